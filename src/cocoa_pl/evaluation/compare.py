"""Scored runs side by side: what ends a sweep, and the page of `cocoa report`.

Runs that differ in nothing but their seed form one configuration, with a mean and a deviation. A
run without results is listed as missing, never left out in silence.
"""

from __future__ import annotations

import argparse
import base64
import datetime
import io
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import NormalDist
from typing import IO, Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from cocoa_pl.errors import UserError, typed, visible
from cocoa_pl.evaluation.figures import read_panels
from cocoa_pl.evaluation.report import markdown, percent, plain_table, shown, write_page
from cocoa_pl.evaluation.results import (
    CONFIDENCE,
    Results,
    SubsetScore,
    mean_score,
    read_config,
    read_results,
    read_yaml,
)

MOST_CURVES = 6  # more cannot be distinguished
PANELS = 3  # of a plot, beside each other
MARKS = {"": "", "above": "+", "below": "-"}
Key = tuple[str, str]  # `mean`, `width`, `group`, `subset` or `task`, and its name


class Run(NamedTuple):
    """A run folder, what was overridden for it and, unless `missing` says why not, its results."""

    folder: Path
    overrides: Mapping[str, str]
    results: Results | None
    missing: str = ""


def read_run(folder: Path) -> Run:
    """A run with what Hydra kept of its command line."""
    overrides: dict[str, str] = {}
    try:
        words = read_yaml(folder / ".hydra" / "overrides.yaml") or []
        pairs = (word.lstrip("+").partition("=") for word in words)
        overrides = {k: v for k, _, v in pairs if not k.startswith(("hydra.", "hydra/"))}
        if not (folder / "results.json").is_file():
            return Run(folder, overrides, None, f"no results.json in {folder.name}")
        return Run(folder, overrides, read_results(folder / "results.json"))
    except UserError as error:
        return Run(folder, overrides, None, str(error))


def read_sweep(sweep: Path) -> list[Run]:
    """The runs below a sweep folder, those whose folder is a number in its order."""
    folders = {path.parent.parent for path in sweep.rglob(".hydra/overrides.yaml")}
    ordered = sorted(folders, key=lambda f: (not f.name.isdigit(), f.name.zfill(9), str(f)))
    return [read_run(folder) for folder in ordered]


def by_overrides(runs: Sequence[Run]) -> list[str]:
    """The configuration of each run: the overrides that are not the same in all, the seed aside."""
    keys = dict.fromkeys(key for run in runs for key in run.overrides if key != "seed")
    varying = [key for key in keys if len({run.overrides.get(key) for run in runs}) > 1]
    labels = []
    for run in runs:
        words = {key: run.overrides[key] for key in varying if key in run.overrides}
        named = words.values() if len(varying) == 1 else (f"{k}={v}" for k, v in words.items())
        labels.append(", ".join(named) or "as configured")
    return labels


def by_folders(runs: Sequence[Run]) -> list[str]:
    """The configuration of each run: the folders of all whose config.yaml differs in nothing but
    seeds. Where that leaves nothing to compare, each run stands for itself.
    """
    resolved = [run.folder.resolve() for run in runs]
    by_depth = (["/".join(path.parts[-depth:]) for path in resolved] for depth in count(1))
    names = next(some for some in by_depth if len(set(some)) == len(some))
    table = settings(runs).filter(regex=r"^(?!(.*\.)?seed$)")
    values = [
        tuple(row) if any(row) else name for name, row in zip(names, table.values, strict=True)
    ]
    labels = [
        ", ".join(name for name, other in zip(names, values, strict=True) if other == own)
        for own in values
    ]
    return labels if len(set(labels)) > 1 else names


def settings(runs: Sequence[Run]) -> pd.DataFrame:
    """A row for each run: the values of its config.yaml as text, below dotted keys; empty for none.

    Raises:
        UserError: for a config.yaml that is damaged.
    """
    rows = [pd.json_normalize([read_config(run.folder)]).astype(str) for run in runs]
    return pd.concat(rows, ignore_index=True).fillna("")


# --- Scores ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Runs and their configurations.

    Attributes:
        members: configuration -> its runs.
        cells: for each score a cell for each configuration, with the attributes
            `score`, mean over its runs in [0, 1], NaN without any;
            `deviation`, sample deviation over its runs, NaN for a single one;
            `runs`, the score of each run;
            `low` and `high`, interval of the difference from the first configuration, or NaN;
            `differs`, `above` or `below` where that does not hold zero, or empty;
            `is_best` of all configurations; `text` in percent, such as `91.6 ± 0.4`.
    """

    members: Mapping[str, Sequence[Run]]
    cells: Mapping[Key, Sequence[Any]]

    @property
    def missing(self) -> list[str]:
        """Runs without results, and why."""
        found = [run for runs in self.members.values() for run in runs if run.missing]
        words = [" ".join(f"{k}={v}" for k, v in run.overrides.items()) for run in found]
        return [f"{w or run.folder}: {run.missing}" for w, run in zip(words, found, strict=True)]

    @property
    def note(self) -> str:
        return "missing: " + "; ".join(self.missing) if self.missing else ""

    def table(self, keys: Sequence[Key], *, marked: bool = False) -> list[list[str]]:
        """Titles, and of each configuration its name, how many runs it has, and its scores; a mark
        tells what differs from the first one.
        """
        rows = [["configuration", "runs", *map(title, keys)]]
        for place, (label, runs) in enumerate(self.members.items()):
            finished = sum(not run.missing for run in runs)
            number = f"{finished}" if finished == len(runs) else f"{finished} of {len(runs)}"
            cells = [self.cells[key][place] for key in keys]
            texts = [cell.text + (MARKS[cell.differs] if marked else "") for cell in cells]
            rows.append([label, number, *texts])
        return rows


def title(key: Key) -> str:
    """What a score's column is called."""
    kind, name = key
    return visible(f"overall at {name}" if kind == "width" else name)


def compared(runs: Sequence[Run], labels: Sequence[str]) -> Comparison:
    """Set configurations side by side.

    Intervals are those of the normal approximation. Configurations answer the same queries, but
    which of them each answered is not kept: they count as independent, and intervals are wider than
    they could be. The variance of a mean over several runs counts too.
    """
    members: dict[str, list[Run]] = {}
    labels = [*map(visible, labels)]  # pandas and files hold UTF-8 alone
    for label, run in zip(labels, runs, strict=True):
        members.setdefault(label, []).append(run)
    tables = [{} if run.results is None else _scores(run.results) for run in runs]
    keys = dict.fromkeys(key for table in tables for key in table) or [("mean", "overall")]
    cells = {}
    for key in keys:
        pairs = [table.get(key, (math.nan, math.nan)) for table in tables]
        lines = pd.DataFrame(pairs, columns=["score", "variance"]).groupby(labels, sort=False)
        some = lines["score"].agg(score="mean", deviation="std")
        some["runs"] = [scores.dropna().tolist() for _, scores in lines["score"]]
        counts = lines["score"].count()
        variance = lines["variance"].mean() + (some["deviation"] ** 2 / counts).fillna(0)
        gap = some["score"] - some["score"].iloc[0]
        reach = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) * (variance + variance.iloc[0]) ** 0.5
        some["low"], some["high"] = gap - reach, gap + reach
        some["differs"] = np.select([some["low"] > 0, some["high"] < 0], ["above", "below"], "")
        some["is_best"] = some["score"] == some["score"].max()
        some["text"] = [
            "missing"
            if count == 0
            else percent(mean) + ("" if count == 1 else f" ± {percent(std)}")
            for mean, std, count in zip(some["score"], some["deviation"], counts, strict=True)
        ]
        cells[key] = [*some.itertuples()]
    return Comparison(members, cells)


def _scores(results: Results) -> dict[Key, tuple[float, float]]:
    """Scores in [0, 1], and their variances over queries: a query scores 0 or 1, so of p over n
    queries it is p (1 - p) / n. What mteb scores has none that is known.
    """

    def of(subsets: Sequence[SubsetScore], name: str = "precision_at_1") -> tuple[float, float]:
        each = [(one.score(name), one.num_queries) for one in subsets]
        variance = sum(p * (1 - p) / n for p, n in each) / len(each) ** 2
        return mean_score(subsets, of=name), variance

    found = {("mean", name): of(some) for name, some in results.means.items()}
    found |= {("width", width): of(results.subsets, width) for width in results.widths}
    for name, some in results.groups.items():
        found |= {("group", name): of(some)} if name in results.averages else {}
        found |= {("subset", one.name): of([one]) for one in some}
    return found | {("task", task.name): (task.score, math.nan) for task in results.tasks}


# --- What is shown -----------------------------------------------------------------------------


def write_summary(folder: Path, runs: Sequence[Run], *, subsets: Sequence[str]) -> Table:
    """Write summary.csv, summary.md and summary.png to `folder`; return the table for a terminal.

    Args:
        subsets: that stand beside the overall score, groups and tasks; the plot shows them alone,
            beside the overall score.

    Raises:
        UserError: if a finished run lacks a score that another has.
    """
    comparison = compared(runs, by_overrides(runs))
    plotted = [("mean", "overall"), *(("subset", name) for name in subsets)]
    keys = [key for key in comparison.cells if key in plotted or key[0] in ("group", "task")]
    for one in runs:
        known = {} if one.results is None else _scores(one.results)
        absent = [key for key in keys if key not in known]
        if absent and not one.missing:
            raise UserError(
                f"{one.folder / 'results.json'}: no score {', '.join(map(title, absent))}; "
                "summarise only runs of the same benchmark, and only subsets it has"
            )
    members = comparison.members.values()
    stats = pd.DataFrame(index=list(comparison.members))
    stats["runs"] = [sum(not run.missing for run in some) for some in members]
    stats["missing"] = [sum(bool(run.missing) for run in some) for some in members]
    for key in keys:
        stats[f"{title(key)}_mean"] = [cell.score for cell in comparison.cells[key]]
        stats[f"{title(key)}_std"] = [cell.deviation for cell in comparison.cells[key]]
    stats.to_csv(folder / "summary.csv", index_label="configuration")
    rows = comparison.table(keys)
    lines = [f"| {' | '.join(map(markdown, row))} |" for row in rows]
    lines.insert(1, f"| --- | {' | '.join('---:' for _ in rows[0][1:])} |")
    if comparison.missing:
        lines += ["", "Missing runs:", "", *(f"- {markdown(one)}" for one in comparison.missing)]
    said = "precision@1 in %, mean ± sample deviation over runs"
    (folder / "summary.md").write_text("\n".join([f"{said}:", "", *lines, ""]), encoding="utf-8")
    if stats["runs"].any():
        with (folder / "summary.png").open("wb") as file:
            plot(file, comparison, [key for key in keys if key in plotted] or keys)
    return plain_table(said, rows, comparison.note)


def plot(file: IO[bytes], comparison: Comparison, keys: Sequence[Key]) -> None:
    """Horizontal bars of the mean, a whisker of one deviation to each side, a dot for every run."""
    # Imported here: only a plot needs it, and it takes a second to load.
    from matplotlib.figure import Figure

    labels = [textwrap.fill(label, 32) for label in comparison.members]
    across = min(len(keys), PANELS)
    down = math.ceil(len(keys) / across)
    size = (2.6 + 2.4 * across, (0.8 + 0.5 * len(labels)) * down)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat
    for axes, key in zip(panels, keys, strict=False):
        for place, cell in enumerate(comparison.cells[key]):
            error = {"xerr": 100 * cell.deviation, "ecolor": "#22201d", "capsize": 3}
            axes.barh(place, 100 * cell.score, height=0.62, color="#d9bfa9", **error)
            dots = [100 * score for score in cell.runs]
            axes.scatter(dots, [place + 0.16] * len(dots), s=12, color="#8a5a3c", zorder=3)
        axes.set_title(title(key), size=10, loc="left", parse_math=False)
        axes.grid(axis="x", color="#e4dfd7")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
    for axes in panels[len(keys) :]:
        axes.set_visible(False)
    panels[0].set_xlim(0, 100)
    panels[0].set_yticks(range(len(labels)), labels, size=8, parse_math=False)
    panels[0].invert_yaxis()
    figure.supxlabel("scores in %: mean, one deviation, and every run", size=8)
    figure.savefig(file, format="png")


# --- The page ----------------------------------------------------------------------------------


def run(arguments: Sequence[str], console: Console) -> int:
    """Write the page and show its means; the exit status is 0.

    Raises:
        UserError: for runs that do not compare.
    """
    parser = argparse.ArgumentParser(
        prog="cocoa report",
        description="Compare runs that were scored on one benchmark: scores with intervals of "
        "their differences from the first run, loss curves, and what their configurations do not "
        "share. Runs that differ in nothing but their seed form one column; a sweep's folder "
        "stands for its runs. A single run's own page is its report.html.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a folder with results.json")
    parser.add_argument("--out", default="comparison.html", help="default: comparison.html")
    parsed = parser.parse_args(arguments)
    comparison, out = open_runs([Path(folder) for folder in parsed.runs]), Path(parsed.out)
    keys = [key for key in comparison.cells if key[0] != "subset"] or list(comparison.cells)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_comparison(out, comparison, keys, date=datetime.date.today().isoformat())
    said = "scores in %; those with + or - differ from the first"
    rows = zip(*comparison.table(keys, marked=True), strict=True)  # there are few runs
    console.print(plain_table(said, rows, comparison.note))
    console.print(shown(f"report: {out}"), soft_wrap=True)
    return 0


def open_runs(folders: Sequence[Path]) -> Comparison:
    """Open runs of one benchmark, or those of a sweep.

    Raises:
        UserError: for fewer than two, the same twice, one that was not scored, or runs of different
            benchmarks.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is named twice")
    runs = [read_run(folder) for folder in folders]
    of_sweep = read_sweep(folders[0]) if len(folders) == 1 and runs[0].missing else []
    for run in () if of_sweep else runs:
        if run.missing:
            how = f"score it with python evaluate.py {typed('ckpt', run.folder)}"
            raise UserError(f"{run.folder}: {run.missing}; {how}")
    if len(runs) < 2 and len(of_sweep) < 2:
        raise UserError("2 runs or more are compared, not 1")
    labels = by_overrides(of_sweep) if of_sweep else by_folders(runs)
    runs = of_sweep or runs
    benchmarks = {run.results.benchmark for run in runs if run.results}
    if len(benchmarks) != 1:
        named = ", ".join(sorted(benchmarks)) or "none of them was scored"
        raise UserError(f"runs of different benchmarks do not compare: {named}")
    return compared(runs, labels)


def write_comparison(path: Path, comparison: Comparison, keys: Sequence[Key], *, date: str) -> None:
    """Write the page; its plot shows those of `keys` that are means over groups or over all."""
    first = {label: runs[0] for label, runs in comparison.members.items()}
    runs = [run for some in comparison.members.values() for run in some]
    losses = {label: run.folder / "metrics.csv" for label, run in first.items()}
    losses = {label: file for label, file in losses.items() if file.is_file()}
    plotted = [key for key in keys if key[0] in ("group", "task") or key[1] == "overall"] or keys
    plot(drawn := io.BytesIO(), comparison, plotted)
    config = settings([*first.values()])
    write_page(
        path,
        "comparison.html.j2",
        comparison=comparison,
        num_runs=len(runs),
        benchmark=next(run.results.benchmark for run in runs if run.results),
        date=date,
        reports={
            # Whatever characters its name has.
            run.folder: quote(os.fsencode(os.path.relpath(report, path.parent)))
            for run in runs
            if (report := run.folder / "report.html").is_file()
        },
        changed={key: [*column] for key, column in config.items() if column.nunique() > 1},
        plot=f"data:image/png;base64,{base64.b64encode(drawn.getvalue()).decode()}",
        # With validation there would be twice the curves.
        panels=read_panels(losses, only="train") if 0 < len(losses) <= MOST_CURVES else [],
        confidence=CONFIDENCE,
    )
