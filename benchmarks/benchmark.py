"""One benchmark: equality first, then counts, times and curves."""

from __future__ import annotations

import gc
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from benchmarks.counting import Count, Counts
from benchmarks.timing import Pairs, Run, alternate, measured, median_and_interval

RE_CREATION = "re-creation, because the released CoCoA code does not run"
SIZES = ("cpu", "cuda", "test")
# Not timed: stands for "cuda" where equality is asserted, in float32 and with few samples. In
# bfloat16 the gradients of a deep model are equal to some percent only.
CUDA_IN_FLOAT32 = "cuda_in_float32"
SIDES = ("ours", "peer")
Sides = dict[str, float]
SECONDS = "seconds"  # a curve's quantity that is not a count
FLOOR_RUNS = 7
GIB = 2**30
# Of a GPU's memory: nearer to its end the allocator begins to free and to ask again, and that is
# what would be timed.
FULL = 0.9


class Task(ABC):
    """One problem at one size, with its inputs made: two ways to the same result.

    Attributes:
        samples: how many of the benchmark's `noun` one run works on.
        device: where the work is done, whose time is taken.
    """

    samples: int
    device: torch.device

    @abstractmethod
    def peer(self) -> object:
        """The peer's way, from public calls of torch, transformers, peft and numpy alone."""

    @abstractmethod
    def ours(self) -> object:
        """The project's way, from its public functions."""

    @abstractmethod
    def check(self) -> None:
        """Raise AssertionError unless both give the same results (and gradients)."""

    @abstractmethod
    def counts(self) -> Counts:
        """What both compute, move and keep; exact."""

    def floor(self) -> Run | None:
        """The part of the work that no exact way gets around, alone; None where none is known.

        Where a target lies below it, this is the profile that says so.
        """
        return None


@dataclass(frozen=True)
class Curve:
    """How cost grows with one property of the problem.

    Attributes:
        x: what grows.
        quantity: `SECONDS` (of the GPU, or of the processor), or the name of a count.
        points: by size name, values of x with the sizes to build.
    """

    x: str
    quantity: str
    points: Mapping[str, Sequence[tuple[float, Any]]]


def curve(
    x: str, quantity: str, field: str, values: Mapping[str, Sequence[int]], sizes: Mapping[str, Any]
) -> Curve:
    """A curve along one field of the sizes, which are otherwise as they are named.

    Args:
        field: of a size.
        values: by size name, of the field.
    """
    points = {
        name: [(n, replace(sizes[name], **{field: n})) for n in numbers]
        for name, numbers in values.items()
    }
    return Curve(x, quantity, points)


@dataclass(frozen=True)
class Benchmark:
    """One claim.

    Attributes:
        id: its place in the list of claims (B1 to B10); some have several benchmarks.
        name: on the command line.
        title: what is computed, for the results page.
        peer_label: whose way `peer` re-creates.
        noun: what is counted per second.
        target: the ratio that is aimed at; None where none is claimed.
        note: what a reader must know to read the figures; may be empty.
        sizes: by name, what `build` makes a task of: all `SIZES`, and `CUDA_IN_FLOAT32` where the
            size of a GPU is in half precision.
        build: size, device -> task.
    """

    id: str
    name: str
    title: str
    peer_label: str
    noun: str
    target: float | None
    note: str
    sizes: Mapping[str, Any]
    build: Callable[[Any, torch.device], Task]
    curves: Sequence[Curve]


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: for the pairs of one benchmark; `min_pairs` are run in any case.
        curve_pairs: for each point of a curve.
    """

    seconds: float
    min_pairs: int
    curve_pairs: int


def measure(
    benchmark: Benchmark,
    *,
    size: str,
    device: torch.device,
    effort: Effort,
    ceiling: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """The record that goes into the JSON.

    Whatever goes wrong (sides that do not agree, a full device) ends this benchmark alone: the
    record has an `error` then, beside what was measured before.

    Args:
        size: a name in `SIZES`.
        ceiling: of matrix products, measured in this process.
    """
    record: dict[str, Any] = {
        "id": benchmark.id,
        "name": benchmark.name,
        "title": benchmark.title,
        "peer_label": f"{benchmark.peer_label} ({RE_CREATION})",
        "note": benchmark.note,
        "target": benchmark.target,
        "noun": benchmark.noun,
        "size": size,
        "size_values": str(benchmark.sizes[size]),
        "ceiling": dict(ceiling),
        "environment": dict(environment),
        **{side: None for side in SIDES},
        "ratio": None,
        "unit": "seconds",
        "counts": {},
        "curves": [],
    }
    try:
        _fill(record, benchmark, size, device, effort)
    except Exception as error:
        traceback.print_exc()
        at = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        sides = "".join(f"{side}: " for side in SIDES if side in at)
        record["error"] = f"{sides}{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return record


def _fill(
    record: dict[str, Any], benchmark: Benchmark, size: str, device: torch.device, effort: Effort
) -> None:
    size_values = benchmark.sizes[size]
    if size == "cuda" and CUDA_IN_FLOAT32 in benchmark.sizes:
        _built(benchmark, benchmark.sizes[CUDA_IN_FLOAT32], device).check()
    ceiling = record["ceiling"]["flops_per_second"]
    record |= _headline(_built(benchmark, size_values, device), effort, ceiling)

    def point(curve: Curve, values: Any) -> Sides:
        if values == size_values:  # measured already, and better
            timed = curve.quantity == SECONDS
            return _sides(record["own_seconds"] if timed else record["counts"][curve.quantity])
        return _point(_built(benchmark, values, device), curve.quantity, effort.curve_pairs)

    for curve in benchmark.curves:
        points = [{"x": x} | point(curve, values) for x, values in curve.points[size]]
        record["curves"].append({"x": curve.x, "quantity": curve.quantity, "points": points})


def _built(benchmark: Benchmark, values: Any, device: torch.device) -> Task:
    """A task, made when those before it have left the device: a model refers to itself."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return benchmark.build(values, device)


def _headline(task: Task, effort: Effort, ceiling: float) -> dict[str, Any]:
    """All that is measured at one size."""
    task.check()
    counts = task.counts()
    if task.device.type == "cuda":
        assert_fits(counts["peak_bytes"], task.device)
    pairs = alternate(
        task.peer,
        task.ours,
        device=task.device,
        seconds=effort.seconds,
        min_pairs=effort.min_pairs,
    )
    found = _figures(pairs, task.device)
    own = found["own_seconds"]
    found["samples"] = task.samples
    found["samples_per_second"] = {side: task.samples / found[side] for side in SIDES}
    found["counts"] = {
        name: {"ours": count.ours, "peer": count.peer, "ratio": count.ratio}
        for name, count in counts.items()
    }
    if "flops" in counts:
        found["share_of_ceiling"] = {
            side: getattr(counts["flops"], side) / own[side] / ceiling for side in SIDES
        }
    if floor := task.floor():
        runs = [measured(floor, task.device).own(task.device) for _ in range(FLOOR_RUNS)]
        found["floor"] = min(runs)
        found["ratio_at_floor"] = own["peer"] / found["floor"]
    return found


def assert_fits(peak_bytes: Count, device: torch.device) -> None:
    """Nothing is timed on a GPU that is as good as full.

    Args:
        peak_bytes: what a run of each side takes beside what is there already.
    """
    total = torch.cuda.mem_get_info(device)[1]
    peak = torch.cuda.memory_allocated(device) + max(peak_bytes.ours, peak_bytes.peer)
    assert peak <= FULL * total, (
        f"takes {peak / GIB:.1f} of {total / GIB:.1f} GiB, more than {FULL:.0%}: times would be "
        "those of its allocator"
    )


def _figures(pairs: Pairs, device: torch.device) -> dict[str, Any]:
    ratio, interval = median_and_interval(pairs.ratios)
    sides = {"ours": pairs.ours, "peer": pairs.peer}
    return {
        **{side: median(sample.wall for sample in found) for side, found in sides.items()},
        "ratio": ratio,
        "ci": list(interval),
        "pairs": len(pairs.ours),
        "cpu_ratio": median(pairs.cpu_ratios),
        "own_seconds": {
            side: median(sample.own(device) for sample in found) for side, found in sides.items()
        },
    }


def _point(task: Task, quantity: str, pairs: int) -> Sides:
    task.check()
    if quantity != SECONDS:
        count = task.counts()[quantity]
        return {"ours": count.ours, "peer": count.peer}
    found = alternate(
        task.peer,
        task.ours,
        device=task.device,
        seconds=0,
        min_pairs=pairs,
        max_pairs=pairs,
    )
    return _sides(_figures(found, task.device)["own_seconds"])


def _sides(found: Mapping[str, float]) -> Sides:
    return {side: found[side] for side in SIDES}
