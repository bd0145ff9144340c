"""Times of two functions in alternating pairs, and the ratio between them.

A machine that others share is slow for seconds at a time. What runs directly after one another
shares that fate: the ratio is taken within each pair, and the median over pairs.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

Run = Callable[[], object]

MAX_PAIRS = 41
RESAMPLES, CONFIDENCE = 2000, 0.95


@dataclass(frozen=True)
class Sample:
    """One run: seconds on the clock (on a GPU between two events) and of the processor."""

    wall: float
    cpu: float

    def own(self, device: torch.device) -> float:
        """Seconds of the device that computes; not those in which others had it."""
        return self.wall if device.type == "cuda" else self.cpu


@dataclass(frozen=True)
class Pairs:
    """Runs side by side: `peer[i]` and `ours[i]` came directly after one another."""

    peer: tuple[Sample, ...]
    ours: tuple[Sample, ...]

    @property
    def ratios(self) -> list[float]:
        """How many times as long the peer took, in each pair."""
        return [p.wall / o.wall for p, o in zip(self.peer, self.ours, strict=True)]

    @property
    def cpu_ratios(self) -> list[float]:
        """The same in processor time, which does not grow while others have the processor."""
        return [p.cpu / max(o.cpu, 1e-9) for p, o in zip(self.peer, self.ours, strict=True)]


def alternate(
    peer: Run,
    ours: Run,
    *,
    device: torch.device,
    seconds: float,
    min_pairs: int,
    max_pairs: int = MAX_PAIRS,
) -> Pairs:
    """Run both in the order A B B A A B B A ...

    Both must have run before, as a comparison of their results makes them: a first run is slower.

    Args:
        seconds: stop after this time, but not before `min_pairs`.
    """
    runs: tuple[Run, Run] = (peer, ours)
    found: tuple[list[Sample], list[Sample]] = ([], [])
    start = time.perf_counter()
    with no_collection():
        for pair in range(max_pairs):
            if pair >= min_pairs and time.perf_counter() - start > seconds:
                break
            for side in (0, 1) if pair % 2 == 0 else (1, 0):
                found[side].append(measured(runs[side], device))
    return Pairs(tuple(found[0]), tuple(found[1]))


def measured(run: Run, device: torch.device) -> Sample:
    """One run. On a GPU the time between two events, so that nothing waits for the host's clock."""
    cpu = time.process_time()
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        wall = time.perf_counter() - start
        return Sample(wall, time.process_time() - cpu)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    before.record()
    run()
    after.record()
    torch.cuda.synchronize(device)
    return Sample(before.elapsed_time(after) / 1e3, time.process_time() - cpu)


def median_and_interval(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The median, and a bootstrap interval for it that holds with `CONFIDENCE`."""
    numbers = np.asarray(values)
    draws = np.random.default_rng(0).integers(len(numbers), size=(RESAMPLES, len(numbers)))
    medians = np.median(numbers[draws], axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(medians, [tail, 1 - tail])
    return float(np.median(numbers)), (float(low), float(high))


@contextmanager
def no_collection() -> Iterator[None]:
    """Garbage is collected before, not in the middle of a run."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
