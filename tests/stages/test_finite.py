"""A step on a gradient that is not finite is not taken, and is named one step later."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from cocoa_pl.stages.base import FiniteSteps

FINE, BAD = 1.0, (math.nan, math.inf)

Seen = tuple[float, float, int] | None  # norm, targets, number of the step before


def steps(gradients: list[float], *, look: bool) -> tuple[list[Tensor], list[Seen]]:
    """Values of a parameter behind each step, and what was said of the step before. Every second
    step has a target.
    """
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1, fused=True)
    watch = FiniteSteps()
    values, seen = [], []
    for number, gradient in enumerate(gradients):
        parameter.grad = torch.full((3,), gradient)
        if look:
            seen.append(watch.look_back())
        watch.guard(optimizer, parameter.grad.norm(), torch.tensor(number % 2.0), number)
        optimizer.step()
        values.append(parameter.detach().clone())
    seen.append(watch.look_back())
    return values, seen


@pytest.mark.parametrize("bad", BAD)
def test_the_weights_stay_as_before_the_bad_step(bad: float) -> None:
    values, _ = steps([FINE, bad, FINE, FINE], look=False)
    assert not torch.equal(values[0], torch.ones(3))
    for value in values[1:]:  # not even decay, and not even a step that would be fine
        assert torch.equal(value, values[0])


def test_finite_steps_are_those_of_the_plain_optimizer() -> None:
    used = [FINE, 0.5, 2.0]
    values, seen = steps(used, look=True)
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1, fused=True)
    for value, gradient in zip(values, used, strict=True):
        parameter.grad = torch.full((3,), gradient)
        optimizer.step()
        assert torch.equal(value, parameter)
    assert seen == [None, *((pytest.approx(3**0.5 * g), n % 2, n) for n, g in enumerate(used))]


@pytest.mark.parametrize("bad", BAD)
def test_the_bad_step_is_named_once_the_next_one_is_queued(bad: float) -> None:
    _, at_the_end = steps([FINE, bad], look=True)
    assert at_the_end[-1] is not None
    assert not math.isfinite(at_the_end[-1][0])
    _, seen = steps([FINE, FINE, bad, FINE], look=True)
    assert seen[3] is not None
    norm, _, number = seen[3]
    assert number == 2
    assert not math.isfinite(norm)
    assert all(other is None or math.isfinite(other[0]) for other in seen[:3])


def test_an_optimizer_that_cannot_skip_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=False)
    with pytest.raises(AssertionError):
        FiniteSteps().guard(optimizer, torch.tensor(1.0), torch.tensor(1.0), 0)
