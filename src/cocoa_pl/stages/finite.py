"""Skips optimizer steps on gradients that are not finite, without waiting for their norms.

To look at a norm is to wait for the device. So the device itself skips such a step, and all that
follow, by the switch that torch's own gradient scaler uses (`found_inf` of fused optimizers); and
the host looks at each norm one step later, when it is long there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class FiniteSteps:
    """Guards the steps of one optimizer."""

    def __init__(self) -> None:
        self._failed: Tensor | None = None  # () bool on the device: some step until now was bad
        self._last: tuple[Tensor, torch.cuda.Event | None, Any] | None = None

    def guard(
        self, optimizer: torch.optim.Optimizer, norm: Tensor, targets: Tensor, facts: Any
    ) -> None:
        """Make the optimizer skip its next step if that, or one before it, is not finite.

        Args:
            optimizer: a fused one; others do not know the switch.
            norm: () of all gradients.
            targets: () float, how much there was to learn from.
            facts: what `look_back` returns of the step.
        """
        assert all(group["fused"] for group in optimizer.param_groups)
        failed = ~norm.isfinite()
        self._failed = failed if self._failed is None else self._failed | failed
        optimizer.found_inf = self._failed.float()  # type: ignore[attr-defined]
        numbers, copied = torch.stack([norm.detach(), targets]), None
        if numbers.is_cuda:
            numbers = numbers.to("cpu", non_blocking=True)  # into pinned memory
            copied = torch.cuda.current_stream().record_event()
        self._last = numbers, copied, facts

    def look_back(self) -> tuple[float, float, Any] | None:
        """Norm, targets and facts of the step that was guarded since the last look; waits for it.

        The step was not taken if its norm is not finite.
        """
        if self._last is None:
            return None
        (numbers, copied, facts), self._last = self._last, None
        if copied is not None:
            copied.synchronize()
        norm, targets = numbers.tolist()
        return norm, targets, facts
