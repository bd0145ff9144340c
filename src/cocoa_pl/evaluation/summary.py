"""Mean and deviation over the seeds of finished runs: a table, summary.csv, summary.md and a plot.

Runs that differ in nothing but their seed form one line. A run without results is listed as
missing, never left out in silence.
"""

import csv
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.runs import Run


@dataclass(frozen=True)
class Stat:
    """One score over seeds; `std` is the sample deviation, None for a single value."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        """In percent, e.g. `91.6 ± 0.4`."""
        if self.mean is None:
            return "missing"
        deviation = "" if self.std is None else f" ± {100 * self.std:.1f}"
        return f"{100 * self.mean:.1f}{deviation}"


@dataclass(frozen=True)
class Line:
    """One configuration: its scores over `n` finished runs, and its runs without results."""

    label: str
    n: int
    stats: dict[str, Stat]
    missing: tuple[Run, ...]


def summarise(runs: Sequence[Run], *, metrics: Sequence[str]) -> list[Line]:
    """One line per configuration, in order of first appearance, with every metric over its seeds.

    Raises:
        UserError: if a finished run lacks one of the metrics.
    """
    label = _labels(runs)
    return [
        _line(name, [run for run in runs if label(run) == name], metrics=metrics)
        for name in dict.fromkeys(label(run) for run in runs)
    ]


def write_summary(folder: Path, runs: Sequence[Run], *, subsets: Sequence[str]) -> Table:
    """Write summary.csv, summary.md and summary.png to `folder`; return the table for a terminal.

    All have the overall score, the groups and `subsets`, as far as the benchmark has them; the plot
    leaves the groups out.
    """
    groups = dict.fromkeys(group for run in runs for group in run.groups)
    known = {name for run in runs for name in run.scores}
    metrics = [m for m in ("overall", *groups, *subsets) if m in known or not known]
    lines = summarise(runs, metrics=metrics)
    _write_csv(folder / "summary.csv", lines, metrics=metrics)
    (folder / "summary.md").write_text(_markdown(lines, metrics=metrics), encoding="utf-8")
    if any(line.n for line in lines):
        plotted = [metric for metric in metrics if metric not in groups] or metrics
        plot(folder / "summary.png", lines, metrics=plotted)
    return _table(lines, metrics=metrics)


def plot(path: Path, lines: Sequence[Line], *, metrics: Sequence[str]) -> None:
    """Horizontal bars of the mean, a whisker of one deviation to each side, a dot for every run."""
    # Imported here: only a plot needs it, and it takes a second to load.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    label_width = min(4.5, 0.4 + 0.085 * max(len(line.label) for line in lines))
    size = (label_width + 2.6 * len(metrics), 1.2 + 0.5 * len(lines))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    places = range(len(lines))
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        stats = [line.stats[metric] for line in lines]
        means = [100 * (stat.mean or 0.0) for stat in stats]
        axes.barh(places, means, height=0.62, color="#d9bfa9")
        for place, stat, mean in zip(places, stats, means, strict=True):
            if stat.std is not None:
                whisker = 100 * stat.std
                axes.errorbar(mean, place - 0.12, xerr=whisker, color="#22201d", capsize=3)
            dots = [100 * value for value in stat.values]
            axes.scatter(dots, [place + 0.14] * len(dots), s=12, color="#8a5a3c", zorder=3)
            axes.annotate(
                str(stat), (1.02, place), xycoords=("axes fraction", "data"), va="center", size=8
            )
        axes.set_title(metric, size=10, loc="left")
        axes.set_xlim(0, 100)
        axes.tick_params(labelsize=8, length=0)
        axes.grid(axis="x", color="#e4dfd7")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
    panels[0].set_yticks(places, [_wrap(line.label) for line in lines], size=9)
    panels[0].invert_yaxis()
    runs = [line.n for line in lines]
    count = f"{min(runs)} to {max(runs)}" if min(runs) != max(runs) else f"{runs[0]}"
    figure.supxlabel(
        f"precision@1 in %; mean, one deviation, and each of {count} runs", size=8, color="#6a645c"
    )
    figure.savefig(path)


def _labels(runs: Sequence[Run]) -> Callable[[Run], str]:
    """How to name a run's configuration: by the overrides that are not the same in all runs."""
    keys = dict.fromkeys(key for run in runs for key in run.variant)
    varying = [key for key in keys if len({run.variant.get(key) for run in runs}) > 1]

    def label(run: Run) -> str:
        told = {key: run.variant[key] for key in varying if key in run.variant}
        if len(varying) == 1 and told:
            return next(iter(told.values()))
        return ", ".join(f"{key}={value}" for key, value in told.items()) or "as configured"

    return label


def _line(label: str, runs: Sequence[Run], *, metrics: Sequence[str]) -> Line:
    finished = [run for run in runs if not run.missing]
    for run in finished:
        if absent := [metric for metric in metrics if metric not in run.scores]:
            raise UserError(
                f"{run.folder / 'results.json'}: no score {', '.join(absent)}; "
                "summarise only runs of the same benchmark, and only subsets it has"
            )
    return Line(
        label=label,
        n=len(finished),
        stats={metric: Stat(tuple(run.scores[metric] for run in finished)) for metric in metrics},
        missing=tuple(run for run in runs if run.missing),
    )


def _table(lines: Sequence[Line], *, metrics: Sequence[str]) -> Table:
    table = Table(title="precision@1 in %, mean ± deviation over runs", title_justify="left")
    table.add_column("configuration", overflow="fold")
    table.add_column("runs", justify="right")
    for metric in metrics:
        table.add_column(escape(metric), justify="right")
    for line in lines:
        cells = (str(line.stats[metric]).replace(" ", "") for metric in metrics)
        table.add_row(escape(line.label), _count(line), *cells)
    if missing := _missing(lines):
        table.caption = escape("missing: " + "; ".join(missing))
        table.caption_justify = "left"
    return table


def _markdown(lines: Sequence[Line], *, metrics: Sequence[str]) -> str:
    rows = [
        ["configuration", "runs", *metrics],
        ["---", *["---:"] * (1 + len(metrics))],
        *(
            [
                line.label.replace("|", "\\|"),
                _count(line),
                *(str(line.stats[metric]) for metric in metrics),
            ]
            for line in lines
        ),
    ]
    text = "Precision@1 in %, mean ± sample deviation over runs.\n\n"
    text += "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
    if missing := _missing(lines):
        text += "\nMissing runs:\n\n" + "\n".join(f"- {run}" for run in missing) + "\n"
    return text


def _write_csv(path: Path, lines: Sequence[Line], *, metrics: Sequence[str]) -> None:
    """Scores in [0, 1]; an empty cell where there is no mean or no deviation."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        columns = [f"{metric}_{part}" for metric in metrics for part in ("mean", "std")]
        writer.writerow(["configuration", "runs", "missing", *columns])
        for line in lines:
            cells = [part for m in metrics for part in (line.stats[m].mean, line.stats[m].std)]
            writer.writerow([line.label, line.n, len(line.missing), *cells])


def _count(line: Line) -> str:
    return f"{line.n} of {line.n + len(line.missing)}" if line.missing else str(line.n)


def _missing(lines: Sequence[Line]) -> list[str]:
    return [
        f"{' '.join(f'{k}={v}' for k, v in run.overrides.items()) or run.folder}: {run.missing}"
        for line in lines
        for run in line.missing
    ]


def _wrap(label: str, width: int = 44) -> str:
    """Break a long label after its commas."""
    wrapped, length = "", 0
    for part in label.split(", "):
        if wrapped:
            fits = length + len(part) + 2 <= width
            wrapped, length = wrapped + (", " if fits else ",\n"), length if fits else 0
        wrapped, length = wrapped + part, length + len(part)
    return wrapped
