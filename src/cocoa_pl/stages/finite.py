"""Norms of gradients in; no optimizer step on one that is not finite, and its step named, out.

To look at a norm is to wait for the device. So the device itself skips such a step, and all that
follow, by the switch that torch's own gradient scaler uses (`found_inf` of fused optimizers); and
the host looks at each norm one step later, when it is long there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

Facts = TypeVar("Facts")


@dataclass(frozen=True)
class Done(Generic[Facts]):
    """A step that the device has come to; it was not taken if its norm is not finite."""

    norm: float
    targets: float
    facts: Facts


@dataclass(frozen=True)
class _Seen(Generic[Facts]):
    numbers: Tensor  # (2) norm and targets, on the host once the device has come to them
    copied: torch.cuda.Event | None
    facts: Facts


class FiniteSteps(Generic[Facts]):
    """Watches the steps of one optimizer; `facts` is what the caller wants back of a bad one."""

    def __init__(self) -> None:
        self._failed: Tensor | None = None  # () bool on the device: some step until now was bad
        self._last: _Seen[Facts] | None = None

    def guard(
        self, optimizer: torch.optim.Optimizer, norm: Tensor, targets: Tensor, facts: Facts
    ) -> None:
        """To be called before `optimizer.step()`.

        Args:
            optimizer: a fused one; others do not know the switch.
            norm: () of all gradients.
            targets: () float, how much there was to learn from.
        """
        assert all(group["fused"] for group in optimizer.param_groups)
        failed = ~norm.isfinite()
        self._failed = failed if self._failed is None else self._failed | failed
        optimizer.found_inf = self._failed.float()  # type: ignore[attr-defined]
        self._last = _to_host(torch.stack([norm.detach(), targets]), facts)

    def look_back(self) -> Done[Facts] | None:
        """The step that `guard` was called for since the last look; waits until it is done."""
        seen, self._last = self._last, None
        if seen is None:
            return None
        if seen.copied is not None:
            seen.copied.synchronize()
        norm, targets = seen.numbers.tolist()
        return Done(norm, targets, seen.facts)


def _to_host(numbers: Tensor, facts: Facts) -> _Seen[Facts]:
    if numbers.device.type != "cuda":
        return _Seen(numbers, None, facts)
    copy = torch.empty_like(numbers, device="cpu", pin_memory=True)
    copy.copy_(numbers, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    return _Seen(copy, done, facts)
