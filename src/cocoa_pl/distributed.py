"""Rows of this rank in, rows or sums of all ranks out. On one process everything here is the
identity.

Gradients are summed over ranks (never averaged), because every loss is already divided by a global
count.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

BUCKET_BYTES = 256 * 2**20  # of one reduction: full tuning of 7B would double its gradients else


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def global_sum(value: Tensor) -> Tensor:
    """Sum over ranks, without gradient."""
    total = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def global_sums(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over ranks, by name; a rank may lack names that others have, as when it had no rows."""
    if world_size() == 1:
        return values
    gathered = all_objects({name: value.cpu() for name, value in values.items()})
    names = sorted({name for part in gathered for name in part})
    return {name: sum(part[name] for part in gathered if name in part) for name in names}


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all ranks in rank order: (n_r, ...) -> (sum n_r, ...); ranks may hold different
    counts.

    Differentiable and exact: the gradient of a row is the sum of what all ranks did with it.
    """
    if world_size() == 1:
        return rows
    return _GatherRows.apply(rows)


def gather_offset(num_rows: int, device: torch.device) -> int:
    """Where this rank's rows begin in `gather_rows`."""
    if world_size() == 1:
        return 0
    return int(_row_counts(num_rows, device)[: rank()].sum())


def global_max(value: Tensor) -> Tensor:
    """Elementwise maximum over ranks, without gradient."""
    highest = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return highest


def all_objects(mine: Any) -> list[Any]:
    """What every rank says, in rank order; for bookkeeping, not for large tensors."""
    if world_size() == 1:
        return [mine]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, mine)
    return found


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all ranks, in flat calls of at most `BUCKET_BYTES`.

    A parameter that a rank did not use counts as zero there; one that no rank used keeps no
    gradient, as it would on one process. Sharded parameters (FSDP2) have their sums already.
    """
    trained = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    if world_size() == 1 or not trained:
        return
    here = torch.tensor([p.grad is not None for p in trained], device=trained[0].device)
    used = global_max(here.int()).tolist()
    for bucket in _buckets([p for p, anywhere in zip(trained, used, strict=True) if anywhere]):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = part.view_as(parameter)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Bound the norm of the gradient of all parameters together; also of sharded ones.

    Returns:
        () the norm before clipping, the same on all ranks.
    """
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one dtype in pieces of at most `BUCKET_BYTES` (a larger one is alone)."""
    for _, group in groupby(sorted(parameters, key=_dtype), key=_dtype):
        bucket: list[nn.Parameter] = []
        size = 0
        for parameter in group:
            if bucket and size + parameter.nbytes > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(parameter)
            size += parameter.nbytes
        yield bucket


def _dtype(parameter: nn.Parameter) -> str:
    return str(parameter.dtype)


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether an exchange failed because another process is gone, rather than by a mistake here."""
    if world_size() == 1:
        return False
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def _row_counts(num_rows: int, device: torch.device) -> Tensor:
    counts = torch.zeros(world_size(), dtype=torch.int64, device=device)
    counts[rank()] = num_rows
    dist.all_reduce(counts)
    return counts


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        counts = _row_counts(len(rows), rows.device).tolist()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        ctx.start, ctx.stop = sum(counts[: rank()]), sum(counts[: rank() + 1])
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.start : ctx.stop]
