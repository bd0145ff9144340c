"""Measure the project side by side with its peers, and write the page of results.

python -m benchmarks NAME --json FILE        one benchmark; `all` for all of them
python -m benchmarks page FILE [FILE ...]    benchmarks/results.md
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader
from matplotlib.ticker import EngFormatter
from threadpoolctl import threadpool_limits
from transformers.utils import logging as transformers_logging

from benchmarks import ROOT, write_json
from benchmarks.measure import BENCHMARKS, PACKAGES, SIZES, matrix_product_ceiling, measure

ALL = "all"
SECONDS, PAIRS = 20.0, 5


def main(arguments: Sequence[str]) -> None:
    """Run a command line; a mistake in it is one sentence and exit status 2."""
    if arguments[:1] == ["page"]:
        _page(arguments[1:])
    else:
        _measure(arguments)


def _measure(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=(*BENCHMARKS, ALL))
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
    threadpool_limits(1)  # numpy's: a ratio must not depend on who else is on the machine
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
            write_json(chosen.json, several if chosen.name == ALL else record)
    if failed := [record["name"] for record in records if "error" in record]:
        parser.exit(1, f"{parser.prog}: failed: {', '.join(failed)}\n")


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


# --- The page of results ----------------------------------------------------------------------


def page(files: Sequence[Mapping[str, Any]]) -> str:
    """The page; it says what is not measured yet.

    Args:
        files: each the JSON of one run, of one benchmark or of several, or of the GPU check.

    Raises:
        ValueError: for a GPU check that measured nothing on a GPU.
    """
    checks, machines = [], []
    for file in files:
        found = file.get("results", [file])
        if "rehearsal" in file:
            if file["rehearsal"] or "versions" not in file.get("look", {}):
                raise ValueError("a GPU check that is a rehearsal, or without look, shows nothing")
            checks.append(file)
            found = [one for one in file.get("bench", {}).values() if "environment" in one]
        machines.append([record for record in found if "skipped" not in record])
    on_cpu = {r["name"] for some in machines for r in some if r["size"] == "cpu"}
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent))
    environment.globals |= {"digits": digits, "share": share, "short": short}
    return environment.get_template("results.md.j2").render(
        checks=checks,
        machines=[records for records in machines if records],
        missing=[name for name in BENCHMARKS if name not in on_cpu],
        packages=PACKAGES,
    )


def one_line(record: Mapping[str, Any]) -> str:
    """For the terminal: the peer's time and ours, the ratio, and our rate."""
    name = f"{record['name']:18} "
    if record["ratio"] is None:
        return name + record.get("error", record.get("skipped"))
    took = f"{short(record['peer'], 's'):>8} -> {short(record['ours'], 's'):>8}"
    low, high = map(digits, record["ci"])
    rate = f"{short(record['samples_per_second']['ours'])} {record['noun']}/s"
    pairs = f"({low} to {high}), {record['pairs']} pairs"
    return f"{name}{took} {digits(record['ratio']):>6}x {pairs}; {rate}"


def digits(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}"


def share(value: float) -> str:
    return f"{100 * value:.0f} %"


def short(value: float, unit: str = "") -> str:
    """Three digits and a prefix: `12.7 ms`, `772 TFLOP/s`, `1.23 M`."""
    return str(EngFormatter(unit)(float(digits(value)))).strip()


if __name__ == "__main__":
    main(sys.argv[1:])
