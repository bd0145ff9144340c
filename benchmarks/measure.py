"""One benchmark: equal results of both sides first, then counts, then times in alternating pairs.

A machine that others share is slow for seconds at a time. What runs directly after one another
shares that fate: the ratio is taken within each pair, and the median over pairs.
"""

from __future__ import annotations

import gc
import os
import platform
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import date
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from benchmarks import commit_of
from cocoa_pl.planning.counting import Counting

PACKAGES = ("torch", "transformers", "sentence-transformers", "peft", "mteb", "numpy", "pillow")
SIZES = ("cpu", "cuda", "test")
SIDES = ("ours", "peer")

# Of the norm of the difference, relative to the norm: the two sides add up in different orders. In
# bfloat16 gradients through many layers differ by 4e-2, so that this is a bound for sanity.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-1}
MAX_PAIRS = 41
RESAMPLES = 2000

Results = Mapping[str, Sequence[Tensor]]

TABLE = yaml.safe_load((Path(__file__).parent / "table.yaml").read_text())
BENCHMARKS: dict[str, dict[str, Any]] = TABLE["benchmarks"]


@dataclass(frozen=True)
class Task:
    """One problem at one size, with its inputs made: two ways to the same results.

    Attributes:
        samples: how many of the benchmark's `noun` a run works on.
        ours, peer: return what must be equal, by name; nothing where dropout draws differ.
        models: of ours and the peer's, whose passes are counted; see `count`.
    """

    samples: int
    ours: Callable[[], Results]
    peer: Callable[[], Results]
    models: tuple[nn.Module | None, nn.Module | None] = (None, None)


def measure(
    name: str,
    benchmark: Mapping[str, Any],
    *,
    size: str,
    device: torch.device,
    seconds: float,
    min_pairs: int,
    ceiling: Mapping[str, Any],
) -> dict[str, Any]:
    """The record that goes into the JSON; with `skipped` where the peer is not installed.

    Whatever goes wrong (sides that do not agree, a full device) ends this benchmark alone: the
    record has an `error` then, beside what was measured before.

    Args:
        benchmark: an entry of table.yaml.
        size: a name in `SIZES`.
        seconds: for the pairs; `min_pairs` are run in any case.
        ceiling: of matrix products, measured in this process.
    """
    record: dict[str, Any] = {
        "name": name,
        **{key: benchmark[key] for key in ("title", "note", "noun")},
        "peer_label": benchmark["peer"],
        "size": size,
        "size_values": benchmark["sizes"][size],
        "ceiling": dict(ceiling),
        "environment": environment(device),
        **dict.fromkeys(("ours", "peer", "ratio")),
        "unit": "seconds",
        "counts": {},
    }
    if find_spec(benchmark["package"]) is None:
        return record | {"skipped": f"{benchmark['package']} is not installed"}
    try:
        task = agreed(benchmark, size, device)
        if benchmark["counted"]:
            ours, peer = count(task.ours, task.models[0]), count(task.peer, task.models[1])
            record["counts"] = {
                name: {"ours": ours[name], "peer": peer[name], "ratio": peer[name] / ours[name]}
                for name in ours
            }
        times = alternate(task, device=device, seconds=seconds, min_pairs=min_pairs)
        record |= figures(task, times)
        if benchmark["counted"]:
            flops, most = record["counts"]["flops"], ceiling["flops_per_second"]
            record["share_of_ceiling"] = {s: flops[s] / record[s] / most for s in SIDES}
    except Exception as error:
        traceback.print_exc()
        record["error"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return record


def agreed(benchmark: Mapping[str, Any], size: str, device: torch.device) -> Task:
    """The task at a size, once both sides have given equal results.

    Raises:
        AssertionError: if they differ.
    """
    make: Callable[..., Task] = resolve_name(benchmark["make"])
    sizes = [benchmark["sizes"][size]]
    if size in benchmark["exact"]:
        sizes.insert(0, {**sizes[0], **benchmark["exact"][size]})
    for number, values in enumerate(sizes):
        task: Any = None
        gc.collect()  # a model refers to itself
        if device.type == "cuda":
            torch.cuda.empty_cache()
        dtype = getattr(torch, values.get("dtype", "float32"))
        typed = {"dtype": dtype} if "dtype" in values else {}
        task = make(**{**values, **typed}, device=device)
        ours, peer = task.ours(), task.peer()
        assert ours or number, "there is nothing to compare"
        assert_equal(ours, peer, dtype=dtype)
    return task


def assert_equal(ours: Results, peer: Results, *, dtype: torch.dtype) -> None:
    """Tensors of one name are equal in shape, and together in value up to rounding of `dtype`."""
    assert ours.keys() == peer.keys(), (list(ours), list(peer))
    for name, expected in peer.items():
        found = ours[name]
        assert [t.shape for t in found] == [t.shape for t in expected], f"shapes of {name} differ"
        error, scale = (
            torch.stack([t.double().square().sum() for t in some]).sum().sqrt().item()
            for some in ([f.double() - e for f, e in zip(found, expected, strict=True)], expected)
        )
        assert np.isfinite(error), f"{name} is not finite"
        assert error <= TOLERANCE[dtype] * scale, (
            f"{name} differs by {error / scale:.2g} of its norm, more than {TOLERANCE[dtype]:.0e}"
        )


def count(run: Callable[[], object], model: nn.Module | None = None) -> dict[str, float]:
    """Counts of one call, the same on any machine of a kind.

    Args:
        model: whose passes are counted; it takes `inputs_embeds`, (B, N, D).

    Returns:
        `flops` of matrix products and attention, forward and backward; `kernels`; `moved_bytes`
        that these read and write; `peak_bytes`, the most memory that tensors made in the call take
        at any time; and of a model `passes` and `token_slots`, tokens with their padding.
    """
    slots: list[int] = []

    def watch(_: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        slots.append(inputs["inputs_embeds"].shape[:2].numel())

    hook = model.register_forward_pre_hook(watch, with_kwargs=True) if model else nullcontext()
    with hook, Counting() as counting:
        run()
    total = counting.result.total
    found = {"flops": total.flops, "kernels": total.kernels, "moved_bytes": total.bytes}
    passes = {"passes": len(slots), "token_slots": sum(slots)} if model else {}
    return {**found, "peak_bytes": counting.peak, **passes}


# --- Time --------------------------------------------------------------------------------------


def alternate(
    task: Task, *, device: torch.device, seconds: float, min_pairs: int, max_pairs: int = MAX_PAIRS
) -> list[tuple[float, float]]:
    """Seconds of ours and of the peer, run in the order A B B A A B B A ...

    Both must have run before, as a comparison of their results makes them: a first run is slower.

    Args:
        seconds: stop after this time, but not before `min_pairs`.
    """
    found: list[tuple[float, float]] = []
    start = time.perf_counter()
    gc.collect()
    gc.disable()  # garbage is collected before, not in the middle of a run
    try:
        while len(found) < max_pairs:
            if len(found) >= min_pairs and time.perf_counter() - start > seconds:
                break
            order = [task.ours, task.peer][:: 1 if len(found) % 2 else -1]
            took = {run: timed(run, device) for run in order}
            found.append((took[task.ours], took[task.peer]))
    finally:
        gc.enable()
    return found


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run; of a GPU, until it has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def figures(task: Task, times: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Medians, and a bootstrap interval of 95 % for the ratio within pairs."""
    ours, peer = np.array(times).T
    ratios = peer / ours
    draws = np.random.default_rng(0).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    interval = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    seconds = {"ours": float(np.median(ours)), "peer": float(np.median(peer))}
    return {
        **seconds,
        "ratio": float(np.median(ratios)),
        "ci": interval.tolist(),
        "pairs": len(ratios),
        "samples": task.samples,
        "samples_per_second": {side: task.samples / seconds[side] for side in SIDES},
    }


# --- The machine -------------------------------------------------------------------------------


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure must be read with, as plain data."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = f"{models[0] if models else platform.machine()} (1 of {os.cpu_count()} cores)"
    versions = {found.name: found.version for found in distributions()}
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else processor,
        "processor": processor,
        "device_type": device.type,
        "date": date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: versions.get(name) for name in PACKAGES},
        "cuda": torch.version.cuda if cuda else None,
        "commit": commit_of(),
    }


def matrix_product_ceiling(device: torch.device, *, side: int | None = None) -> dict[str, Any]:
    """Operations per second of a large square product, the best of 15: what nothing here exceeds.

    bfloat16 on a GPU, float32 on the CPU.

    Args:
        side: rows and columns; None for a size that fills the device.
    """
    cuda = device.type == "cuda"
    side = side or (8192 if cuda else 1024)
    dtype = torch.bfloat16 if cuda else torch.float32
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = min(timed(lambda: left @ right, device) for _ in range(15))
    kind = str(dtype).removeprefix("torch.")
    return {"flops_per_second": 2 * side**3 / best, "side": side, "dtype": kind}
