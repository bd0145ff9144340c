"""The Markdown page of results, from the JSON of `python -m benchmarks` and of the GPU check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from matplotlib.ticker import EngFormatter

from benchmarks.measure import BENCHMARKS, PACKAGES

Record = Mapping[str, Any]


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


def one_line(record: Record) -> str:
    """For the terminal: the peer's time and ours, then what is known of ours."""
    line = f"{record['name']:18} "
    if record["ratio"] is not None:
        low, high = map(digits, record["ci"])
        rate = f"{short(record['samples_per_second']['ours'])} {record['noun']}/s"
        line += (
            f"{short(record['peer'], 's'):>8} -> {short(record['ours'], 's'):>8}"
            f"{digits(record['ratio']):>6}x ({low} to {high}), {record['pairs']} pairs; {rate}"
        )
    if "share_of_ceiling" in record:
        line += f", {share(record['share_of_ceiling']['ours'])} of ceiling"
    line += f"skipped: {record['skipped']}" if "skipped" in record else ""
    return line + (f"  FAILED: {record['error']}" if "error" in record else "")


def digits(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}"


def share(value: float) -> str:
    return f"{100 * value:.0f} %"


def short(value: float, unit: str = "") -> str:
    """Three digits and a prefix: `12.7 ms`, `772 TFLOP/s`, `1.23 M`."""
    return str(EngFormatter(unit)(float(digits(value)))).strip()
