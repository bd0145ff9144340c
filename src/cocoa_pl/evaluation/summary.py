"""Mean and deviation over the seeds of finished runs: a table, summary.csv, summary.md and a plot.

Runs that differ in nothing but their seed form one line. A run without results is listed as
missing, never left out in silence.
"""

import csv
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.markup import escape
from rich.table import Table

from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.results import MEANS, read_results

SEED = "seed"


@dataclass(frozen=True)
class Run:
    """A run folder, what was overridden for it and, unless `missing` says why not, its scores."""

    folder: Path
    overrides: dict[str, str]
    scores: dict[str, float]
    groups: tuple[str, ...]
    missing: str

    @property
    def variant(self) -> dict[str, str]:
        """The overrides that tell configurations apart: all but the seed."""
        return {key: value for key, value in self.overrides.items() if key != SEED}


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
class Variant:
    """One configuration: its scores over `n` finished runs, and its runs without results."""

    label: str
    n: int
    stats: dict[str, Stat]
    missing: tuple[Run, ...]


def summarise(runs: Sequence[Run], *, metrics: Sequence[str]) -> list[Variant]:
    """One entry per configuration, in order of first appearance, with every metric over its seeds.

    Raises:
        UserError: if a finished run lacks one of the metrics.
    """
    label = _labels(runs)
    return [
        _variant(name, [run for run in runs if label(run) == name], metrics=metrics)
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
    variants = summarise(runs, metrics=metrics)
    _write_csv(folder / "summary.csv", variants, metrics=metrics)
    (folder / "summary.md").write_text(_markdown(variants, metrics=metrics), encoding="utf-8")
    if any(variant.n for variant in variants):
        plotted = [metric for metric in metrics if metric not in groups] or metrics
        plot(folder / "summary.png", variants, metrics=plotted)
    return _table(variants, metrics=metrics)


def plot(path: Path, variants: Sequence[Variant], *, metrics: Sequence[str]) -> None:
    """Horizontal bars of the mean, a whisker of one deviation to each side, a dot for every run."""
    # Imported here: only a plot needs it, and it takes a second to load.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    label_width = min(4.5, 0.4 + 0.085 * max(len(variant.label) for variant in variants))
    size = (label_width + 2.6 * len(metrics), 1.2 + 0.5 * len(variants))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    places = range(len(variants))
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        stats = [variant.stats[metric] for variant in variants]
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
    panels[0].set_yticks(places, [_wrap(variant.label) for variant in variants], size=9)
    panels[0].invert_yaxis()
    runs = [variant.n for variant in variants]
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
        overrides = {key: run.variant[key] for key in varying if key in run.variant}
        if len(varying) == 1 and overrides:
            return next(iter(overrides.values()))
        return ", ".join(f"{key}={value}" for key, value in overrides.items()) or "as configured"

    return label


def _variant(label: str, runs: Sequence[Run], *, metrics: Sequence[str]) -> Variant:
    finished = [run for run in runs if not run.missing]
    for run in finished:
        if absent := [metric for metric in metrics if metric not in run.scores]:
            raise UserError(
                f"{run.folder / 'results.json'}: no score {', '.join(absent)}; "
                "summarise only runs of the same benchmark, and only subsets it has"
            )
    return Variant(
        label=label,
        n=len(finished),
        stats={metric: Stat(tuple(run.scores[metric] for run in finished)) for metric in metrics},
        missing=tuple(run for run in runs if run.missing),
    )


def _table(variants: Sequence[Variant], *, metrics: Sequence[str]) -> Table:
    table = Table(title="precision@1 in %, mean ± deviation over runs", title_justify="left")
    table.add_column("configuration", overflow="fold")
    table.add_column("runs", justify="right")
    for metric in metrics:
        table.add_column(escape(metric), justify="right")
    for variant in variants:
        cells = (str(variant.stats[metric]).replace(" ", "") for metric in metrics)
        table.add_row(escape(variant.label), _count(variant), *cells)
    if missing := _missing(variants):
        table.caption = escape("missing: " + "; ".join(missing))
        table.caption_justify = "left"
    return table


def _markdown(variants: Sequence[Variant], *, metrics: Sequence[str]) -> str:
    rows = [
        ["configuration", "runs", *metrics],
        ["---", *["---:"] * (1 + len(metrics))],
        *(
            [
                variant.label.replace("|", "\\|"),
                _count(variant),
                *(str(variant.stats[metric]) for metric in metrics),
            ]
            for variant in variants
        ),
    ]
    text = "Precision@1 in %, mean ± sample deviation over runs.\n\n"
    text += "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
    if missing := _missing(variants):
        text += "\nMissing runs:\n\n" + "\n".join(f"- {run}" for run in missing) + "\n"
    return text


def _write_csv(path: Path, variants: Sequence[Variant], *, metrics: Sequence[str]) -> None:
    """Scores in [0, 1]; an empty cell where there is no mean or no deviation."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        columns = [f"{metric}_{part}" for metric in metrics for part in ("mean", "std")]
        writer.writerow(["configuration", "runs", "missing", *columns])
        for variant in variants:
            cells = [
                part for m in metrics for part in (variant.stats[m].mean, variant.stats[m].std)
            ]
            writer.writerow([variant.label, variant.n, len(variant.missing), *cells])


def _count(variant: Variant) -> str:
    return (
        f"{variant.n} of {variant.n + len(variant.missing)}" if variant.missing else str(variant.n)
    )


def _missing(variants: Sequence[Variant]) -> list[str]:
    return [
        f"{' '.join(f'{k}={v}' for k, v in run.overrides.items()) or run.folder}: {run.missing}"
        for variant in variants
        for run in variant.missing
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


def find_runs(sweep: Path) -> list[Path]:
    """The run folders below a sweep folder, those named by a number in its order."""
    folders = {path.parent.parent for path in sweep.rglob(".hydra/overrides.yaml")}
    return sorted(folders, key=lambda f: (not f.name.isdigit(), f.name.zfill(9), str(f)))


def collect(folders: Iterable[Path]) -> list[Run]:
    """Read each run's `.hydra/overrides.yaml` and results.json."""
    return [_read_run(Path(folder)) for folder in folders]


def missing_run(overrides: Iterable[str], *, folder: Path, why: str) -> Run:
    """A run that is known of but left no results; overrides are `key=value`."""
    return Run(folder, parse_overrides(overrides), scores={}, groups=(), missing=why)


def parse_overrides(overrides: Iterable[str]) -> dict[str, str]:
    """`["+a=1", "seed=2"]` as `{"a": "1", "seed": "2"}`; settings of hydra itself are left out."""
    pairs = (override.lstrip("+").partition("=") for override in overrides)
    return {key: value for key, _, value in pairs if not key.startswith(("hydra.", "hydra/"))}


def _read_run(folder: Path) -> Run:
    overrides_file, results_file = folder / ".hydra" / "overrides.yaml", folder / "results.json"
    if not overrides_file.is_file():
        return missing_run((), folder=folder, why=f"no .hydra/overrides.yaml in {folder.name}")
    try:
        overrides = yaml.safe_load(overrides_file.read_text(encoding="utf-8")) or []
        if not results_file.is_file():
            return missing_run(overrides, folder=folder, why=f"no results.json in {folder.name}")
        results = read_results(results_file)
    except yaml.YAMLError:
        return missing_run((), folder=folder, why=f"overrides.yaml in {folder.name} is damaged")
    except UserError as error:
        return missing_run(overrides, folder=folder, why=str(error))
    tasks = {name: task["main_score"] for name, task in results.get("tasks", {}).items()}
    groups = {**results["groups"], **tasks}
    subsets = {name: subset["precision_at_1"] for name, subset in results["subsets"].items()}
    scores = {**{name: results[name] for name in MEANS}, **groups, **subsets}
    present = {name: score for name, score in scores.items() if score is not None}
    return Run(folder, parse_overrides(overrides), present, tuple(groups), missing="")
