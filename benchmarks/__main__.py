"""Measure the project side by side with its peers, and write the page of results.

python -m benchmarks NAME --json FILE        one benchmark; `all` for all of them
python -m benchmarks page FILE [FILE ...]    benchmarks/results.md
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before torch and numpy are imported: a ratio must not depend on who else is on the machine.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is looked up on the network

import torch  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from benchmarks import ROOT  # noqa: E402
from benchmarks.measure import BENCHMARKS, SIZES, matrix_product_ceiling, measure  # noqa: E402
from benchmarks.page import one_line, page  # noqa: E402

ALL = "all"
SECONDS, PAIRS = 20.0, 5


def main(arguments: Sequence[str]) -> None:
    """Run a command line; a mistake in it is one sentence and exit status 2."""
    if arguments[:1] == ["page"]:
        _page(arguments[1:])
    else:
        _measure(arguments)


def _measure(arguments: Sequence[str]) -> None:
    names = "\n".join(f"  {name:18} {one.title}" for name, one in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure the project side by side with its peers. `python -m benchmarks page` "
        "writes the page of results.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"names:\n{names}",
    )
    parser.add_argument("name", choices=(*BENCHMARKS, ALL), metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=SIZES, help="default: that of the device")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each benchmark's pairs")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="at least, of each")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    if chosen.pairs < 1:
        parser.error("--pairs must be at least 1")

    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    device, start = torch.device(chosen.device), time.perf_counter()
    ceiling = matrix_product_ceiling(device)
    print(f"{ceiling['flops_per_second'] / 1e9:,.0f} GFLOP/s in {ceiling['dtype']}")
    records: list[dict[str, Any]] = []
    for name in BENCHMARKS if chosen.name == ALL else [chosen.name]:
        record = measure(
            name,
            BENCHMARKS[name],
            size=chosen.size or chosen.device,
            device=device,
            seconds=chosen.seconds,
            min_pairs=chosen.pairs,
            ceiling=ceiling,
        )
        records.append(record)
        print(one_line(record), flush=True)
        if chosen.json is not None:
            seconds = time.perf_counter() - start
            several = {"results": records, "seconds": seconds}
            _write(chosen.json, several if chosen.name == ALL else record)
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
        prog="python -m benchmarks page", description="Write the page of results."
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="written by --json")
    default = ROOT / "benchmarks" / "results.md"
    parser.add_argument("--out", type=Path, default=default, metavar="FILE")
    chosen = parser.parse_args(arguments)
    for file in chosen.files:
        if not file.is_file():
            parser.error(f"{file} does not exist; write it with python -m benchmarks all --json")
    contents = [json.loads(file.read_text()) for file in chosen.files]
    try:
        chosen.out.write_text(page(contents))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
