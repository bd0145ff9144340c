"""Sums and gathers over ranks; on one process each is the identity.

Gradients are summed (never averaged), because every loss is already divided by a global count.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


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


def exchange_counts(mine: Sequence[int], device: torch.device) -> list[list[int]]:
    """How many rows of each kind every rank holds: a list for each kind, in rank order.

    Args:
        mine: rows of this rank, by kind; as many kinds on all ranks.
        device: what the process group exchanges on.
    """
    if world_size() == 1:
        return [[count] for count in mine]
    table = torch.zeros(len(mine), world_size(), dtype=torch.int64, device=device)
    table[:, rank()] = torch.tensor(mine, device=device)
    found: list[list[int]] = global_sum(table).tolist()
    return found


def gather_rows(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Rows of all ranks in rank order: (n_r, ...) -> (sum n_r, ...).

    Differentiable and exact: the gradient of a row is the sum of what all ranks did with it, and
    every rank receives that of its own rows only.

    Args:
        counts: rows of every rank, from `exchange_counts`; they may differ.
    """
    if world_size() == 1:
        return rows
    assert counts[rank()] == len(rows)
    return _GatherRows.apply(rows, counts)


def all_objects(mine: Any) -> list[Any]:
    """One object of every rank, in rank order; for bookkeeping, not for large tensors."""
    if world_size() == 1:
        return [mine]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, mine)
    return found


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all ranks, in place and in one call; all are of one type.

    A parameter that a rank did not use counts as zero there; one that no rank used keeps no
    gradient, as it would on one process. Sharded parameters (FSDP2) have their sums already.
    """
    trained = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    if world_size() == 1 or not trained:
        return
    here = torch.tensor([p.grad is not None for p in trained], device=trained[0].device)
    used = zip(trained, global_sum(here.int()).tolist(), strict=True)
    # NCCL begins them together, gloo exchanges them as one tensor: one by one takes thrice as long.
    with dist._coalescing_manager():  # type: ignore[attr-defined]
        for parameter in (parameter for parameter, anywhere in used if anywhere):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Bound the norm of the gradient of all parameters together; also of sharded ones.

    Args:
        max_norm: 0 or None leaves gradients as they are.

    Returns:
        () the norm before clipping, the same on all ranks.
    """
    norm = nn.utils.clip_grad_norm_(parameters, max_norm or torch.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether an exchange failed because another process is gone, rather than by a mistake here."""
    if world_size() == 1:
        return False
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


class _GatherRows(torch.autograd.Function):
    """Blocks of equal size, as backends want them: as many rows as the longest rank has."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Sequence[int]) -> Tensor:
        ctx.counts = counts
        padded = _padded(rows, max(counts))
        blocks = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(blocks, padded)
        return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        blocks = [_padded(part, max(ctx.counts)) for part in gradient.split(ctx.counts)]
        own = torch.empty_like(blocks[0])
        dist.reduce_scatter(own, blocks)
        return own[: ctx.counts[rank()]], None


def _padded(rows: Tensor, length: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(length - len(rows), *rows.shape[1:])])
