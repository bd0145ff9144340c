"""Rows of this rank in, rows or sums of all ranks out. On one process everything here is the
identity.

Gradients are summed over ranks (never averaged), because every loss is already divided by a global
count.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


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
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, {name: value.cpu() for name, value in values.items()})
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


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all ranks in one flat call; a parameter that a rank did not use
    counts as zero there.
    """
    if world_size() == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in trained]
    for dtype in sorted({g.dtype for g in gradients}, key=str):
        group = [(p, g) for p, g in zip(trained, gradients, strict=True) if g.dtype == dtype]
        flat = torch.cat([g.flatten() for _, g in group])
        dist.all_reduce(flat)
        for (parameter, gradient), part in zip(
            group, flat.split([g.numel() for _, g in group]), strict=True
        ):
            parameter.grad = part.view_as(gradient)


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
