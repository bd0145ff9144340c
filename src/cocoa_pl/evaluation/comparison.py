"""`cocoa report`: a page that compares scored runs.

Two scores differ if the interval of their difference does not hold zero. Runs answer the same
queries, but which of them each answered is not kept: the interval takes them as independent and is
wider than it could be.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from statistics import NormalDist
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cocoa_pl.errors import UserError, typed
from cocoa_pl.evaluation.figures import read_panels
from cocoa_pl.evaluation.report import templates
from cocoa_pl.evaluation.results import CONFIDENCE, MEANS, Interval, read_config, read_results

MAX_RUNS = 6  # more curves cannot be distinguished
SIGN = {"": " ", "above": "+", "below": "-"}
Part = tuple[float, int]  # score and number of queries of a subset


def run(arguments: Sequence[str], console: Console) -> int:
    """Write the page and show its means; the exit status is 0.

    Raises:
        UserError: for runs that do not compare.
    """
    parsed = _parser().parse_args(arguments)
    runs = read_runs([Path(folder) for folder in parsed.runs])
    out = Path(parsed.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = compared(runs)
    write_comparison(out, runs, rows, date=datetime.date.today().isoformat())
    console.print(_table(runs, rows))
    console.print(f"report: {out}", soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cocoa report",
        description="Compare runs that were scored on one benchmark: scores with intervals of "
        "their differences from the first run, loss curves, and what their configurations do not "
        "share. A single run's own page is its report.html.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a folder with results.json")
    parser.add_argument("--out", default="comparison.html", help="default: comparison.html")
    return parser


def _table(runs: Sequence[Scored], rows: Sequence[Row]) -> Table:
    table = Table(box=None, header_style="bold")
    table.add_column("precision@1 in %")
    for one in runs:
        table.add_column(escape(one.name), justify="right")
    for row in rows:
        if row.kind != "subset":
            cells = [
                "-" if cell.score is None else f"{100 * cell.score:.1f}{SIGN[cell.differs]}"
                for cell in row.cells
            ]
            table.add_row(escape(row.name.replace("_", " ")), *cells)
    return table


@dataclass(frozen=True)
class Scored:
    """A run with its results.json, and its config.yaml where there is one."""

    name: str
    folder: Path
    results: Mapping[str, Any]
    config: Mapping[str, str]


@dataclass(frozen=True)
class Cell:
    """A run's score, and how far it is from the first run's.

    Attributes:
        is_best: of all runs.
        difference: interval of the difference; None for the first run.
    """

    score: float | None
    is_best: bool
    difference: Interval | None

    @property
    def differs(self) -> str:
        """`above`, `below`, or empty where the interval holds zero."""
        low, high = self.difference or (0.0, 0.0)
        return "above" if low > 0 else "below" if high < 0 else ""


@dataclass(frozen=True)
class Row:
    """A mean, a group or a subset (`kind`) over all runs."""

    name: str
    kind: str
    cells: tuple[Cell, ...]


def read_runs(folders: Sequence[Path]) -> list[Scored]:
    """Open runs of one benchmark.

    Raises:
        UserError: for fewer than two, more than `MAX_RUNS`, the same twice, one that was not
            scored, or runs of different benchmarks.
    """
    if not 2 <= len(folders) <= MAX_RUNS:
        raise UserError(f"2 to {MAX_RUNS} runs are compared, not {len(folders)}")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is named twice")
    runs = []
    for folder, name in zip(folders, _names(folders), strict=True):
        path = folder / "results.json"
        if not path.is_file():
            raise UserError(
                f"{folder} holds no results.json: score it first, python evaluate.py "
                + typed("ckpt", folder)
            )
        results = read_results(path)
        if not results["subsets"]:
            raise UserError(
                f"{path} holds no subsets to compare; mteb compares its tasks by itself"
            )
        runs.append(Scored(name, folder, results, dict(_flat(read_config(folder)))))
    benchmarks = {run.results["benchmark"] for run in runs}
    if len(benchmarks) > 1:
        raise UserError(f"runs of different benchmarks do not compare: {', '.join(benchmarks)}")
    return runs


def compared(runs: Sequence[Scored]) -> list[Row]:
    """Means, groups with their subsets; what no run has is left out."""
    groups: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, subset in run.results["subsets"].items():
            groups.setdefault(subset["group"], {})[name] = None
    named = [(name, "mean") for name in MEANS]
    for group, subsets in groups.items():
        named += [(group, "group"), *((name, "subset") for name in subsets)]
    scores = [_scores(run.results) for run in runs]
    rows = []
    for key in named:
        found = [one.get(key, (None, [])) for one in scores]
        known = [score for score, _ in found if score is not None]
        if not known:
            continue
        first, parts_of_first = found[0]
        cells = []
        for number, (score, parts) in enumerate(found):
            both = number and score is not None and first is not None
            interval = difference(parts_of_first, parts) if both else None
            cells.append(Cell(score, is_best=score == max(known), difference=interval))
        rows.append(Row(*key, tuple(cells)))
    return rows


def _scores(results: Mapping[str, Any]) -> dict[tuple[str, str], tuple[float | None, list[Part]]]:
    """Of every mean, group and subset, by name and kind: its score, and the subsets that it is the
    mean of.
    """
    found: dict[tuple[str, str], tuple[float | None, list[Part]]] = {
        **{(name, "mean"): (results[name], []) for name in MEANS},
        **{(name, "group"): (score, []) for name, score in results["groups"].items()},
    }
    for name, one in results["subsets"].items():
        part = one["precision_at_1"], one["num_queries"]
        split = "in_distribution" if one["in_distribution"] else "out_of_distribution"
        found[name, "subset"] = part[0], [part]
        for key in ((one["group"], "group"), ("overall", "mean"), (split, "mean")):
            found[key][1].append(part)
    return found


def changed(runs: Sequence[Scored]) -> dict[str, list[str]]:
    """Configuration keys whose values are not the same in all runs; of a block of keys that a run
    lacks altogether, the block's name, with `given` for the runs that have it.
    """
    blocks = [
        {".".join(parts[:depth]) for parts in _parts(run) for depth in range(1, len(parts) + 1)}
        for run in runs
    ]
    found: dict[str, list[str]] = {}
    for parts in dict.fromkeys(parts for run in runs for parts in _parts(run)):
        prefixes = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
        key = prefixes[-1]
        shown = next((p for p in prefixes if any(p not in known for known in blocks)), key)
        values = [run.config.get(key, "") for run in runs]
        if shown != key:
            found[shown] = ["given" if shown in known else "" for known in blocks]
        elif len(set(values)) > 1:
            found[key] = values
    return found


def _parts(run: Scored) -> list[tuple[str, ...]]:
    return [tuple(key.split(".")) for key in run.config]


def write_comparison(path: Path, runs: Sequence[Scored], rows: Sequence[Row], *, date: str) -> None:
    """Write the page; `rows` are those of `compared`."""
    metrics = {
        run.name: run.folder / "metrics.csv"
        for run in runs
        if (run.folder / "metrics.csv").is_file()
    }
    reports = {
        run.name: os.path.relpath(run.folder / "report.html", path.parent)
        for run in runs
        if (run.folder / "report.html").is_file()
    }
    page = (
        templates()
        .get_template("comparison.html.j2")
        .render(
            runs=runs,
            benchmark=runs[0].results["benchmark"],
            date=date,
            rows=rows,
            changed=changed(runs),
            reports=reports,
            panels=[  # with validation there would be twice the curves
                replace(panel, curves=curves)
                for panel in read_panels(metrics)
                if (curves := tuple(c for c in panel.curves if c.label.endswith(" train")))
            ],
            confidence=CONFIDENCE,
        )
    )
    path.write_text(page, encoding="utf-8")


def difference(first: Sequence[Part], other: Sequence[Part]) -> Interval:
    """Interval of the mean of `other` minus that of `first`, by the normal approximation."""
    mean = sum(score for score, _ in other) / len(other)
    mean -= sum(score for score, _ in first) / len(first)
    variance = sum(
        sum(score * (1 - score) / count for score, count in part) / len(part) ** 2
        for part in (first, other)
    )
    reach = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) * math.sqrt(variance)
    return mean - reach, mean + reach


def _flat(node: Any, prefix: str = "") -> list[tuple[str, str]]:
    if not isinstance(node, dict):
        return [(prefix, json.dumps(node) if isinstance(node, list) else str(node))]
    joined = f"{prefix}." if prefix else ""
    return [pair for key, value in node.items() for pair in _flat(value, f"{joined}{key}")]


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    resolved = [folder.resolve() for folder in folders]
    names = (["/".join(folder.parts[-depth:]) for folder in resolved] for depth in count(1))
    return next(some for some in names if len(set(some)) == len(some))
