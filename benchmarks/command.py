"""`python -m benchmarks`: run benchmarks, print them, and write their JSON and the page of results.

A peer is re-created from public calls of torch, transformers, peft and numpy, because the released
CoCoA code does not run. Both sides must give equal results before either is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.benchmark import SIZES, Effort, measure
from benchmarks.machine import ROOT, environment, matrix_product_ceiling
from benchmarks.page import one_line, write_page
from benchmarks.registry import ALL, BENCHMARKS, BY_NAME, find, names

EFFORT = Effort(seconds=4.0, min_pairs=3, curve_pairs=2)
RESULTS = ROOT / "benchmarks" / "results.md"


def run(arguments: Sequence[str]) -> None:
    """Run a command line; a mistake in it is one sentence and exit status 2."""
    if arguments[:1] == ["page"]:
        _page(arguments[1:])
    else:
        _measure(arguments)


def _measure(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure the project side by side with its peers. `python -m benchmarks page` "
        "writes the page of results.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="names:\n"
        + "\n".join(f"  {b.name:20} {b.id:4} {b.title}" for b in (*BENCHMARKS, *BY_NAME)),
    )
    parser.add_argument("name", choices=names(), metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=SIZES, help="default: that of the device")
    parser.add_argument("--no-curves", action="store_true", help="only the sizes of the device")
    parser.add_argument("--seconds", type=float, default=EFFORT.seconds, help="of each benchmark")
    parser.add_argument("--pairs", type=int, default=EFFORT.min_pairs, help="at least, of each")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    if chosen.pairs < 1:
        parser.error("--pairs must be at least 1")

    torch.set_num_threads(1)
    device = torch.device(chosen.device)
    effort = Effort(chosen.seconds, chosen.pairs, min(EFFORT.curve_pairs, chosen.pairs))
    found, start = environment(device), time.perf_counter()
    ceiling = matrix_product_ceiling(device)
    print(
        f"{found['device']}: {ceiling['flops_per_second'] / 1e9:,.0f} GFLOP/s in {ceiling['dtype']}"
    )
    records: list[dict[str, Any]] = []
    benchmarks = find(chosen.name)
    for benchmark in benchmarks:
        record = measure(
            replace(benchmark, curves=()) if chosen.no_curves else benchmark,
            size=chosen.size or chosen.device,
            device=device,
            effort=effort,
            ceiling=ceiling,
            environment=found,
        )
        records.append(record)
        print(one_line(record), flush=True)
        if chosen.json is not None:
            alone = len(benchmarks) == 1 and chosen.name != ALL
            seconds = time.perf_counter() - start
            _write(chosen.json, record if alone else {"results": records, "seconds": seconds})
    if failed := [record["name"] for record in records if "error" in record]:
        parser.exit(1, f"{parser.prog}: failed: {', '.join(failed)}\n")


def _write(file: Path, values: Any) -> None:
    """After every benchmark, and whole: what was measured is there whatever happens next."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")
    os.replace(partial, file)


def _page(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks page", description="Write the page of results and its plots."
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="written by --json")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE")
    chosen = parser.parse_args(arguments)
    for file in chosen.files:
        if not file.is_file():
            parser.error(f"{file} does not exist; write it with python -m benchmarks all --json")
    write_page([json.loads(file.read_text()) for file in chosen.files], out=chosen.out)
