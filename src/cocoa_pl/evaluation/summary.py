"""Mean and deviation over the seeds of finished runs: a table, summary.csv, summary.md and a plot.

Runs that differ in nothing but their seed form one line. A run without results is listed as
missing, never left out in silence.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml
from rich.markup import escape
from rich.table import Table

from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.results import read_results


@dataclass(frozen=True)
class Run:
    """A run folder, what was overridden for it and, unless `missing` says why not, its scores."""

    folder: Path
    overrides: dict[str, str]
    scores: dict[str, float]
    missing: str = ""


def write_summary(folder: Path, runs: Sequence[Run], *, subsets: Sequence[str]) -> Table:
    """Write summary.csv, summary.md and summary.png to `folder`; return the table for a terminal.

    Args:
        subsets: that the plot shows beside the overall score.

    Raises:
        UserError: if a finished run lacks a score that another has.
    """
    scores = scores_of(runs, default=("overall", *subsets))
    metrics = [str(metric) for metric in scores]
    lines = scores.groupby(level=0, sort=False)
    count = lines[metrics[0]].count()
    stats = lines.agg(["mean", "std"])
    stats.columns = pd.Index([f"{m}_{part}" for m in metrics for part in ("mean", "std")])
    stats.insert(0, "runs", count)
    stats.insert(1, "missing", lines.size() - count)
    stats.to_csv(folder / "summary.csv", index_label="configuration")
    if count.any():
        shown = [metric for metric in metrics if metric in ("overall", *subsets)]
        plot(folder / "summary.png", scores[shown or metrics])

    texts = lines.agg(percent)
    of_all = [f"{n}" if n == m else f"{n} of {m}" for n, m in zip(count, lines.size(), strict=True)]
    texts.insert(0, "runs", of_all)
    absent = [
        f"{' '.join(f'{k}={v}' for k, v in run.overrides.items()) or run.folder}: {run.missing}"
        for run in runs
        if run.missing
    ]
    rows = [
        ["configuration", "runs", *metrics],
        ["---", "---:", *("---:" for _ in metrics)],
        *([label.replace("|", "\\|"), *cells] for label, *cells in texts.itertuples()),
    ]
    text = "Precision@1 in %, mean ± sample deviation over runs.\n\n"
    text += "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
    if absent:
        text += "\nMissing runs:\n\n" + "\n".join(f"- {run}" for run in absent) + "\n"
    (folder / "summary.md").write_text(text, encoding="utf-8")

    table = Table(title="precision@1 in %, mean ± deviation over runs", title_justify="left")
    table.add_column("configuration", overflow="fold")
    for column in ("runs", *metrics):
        table.add_column(escape(column), justify="right")
    for label, number, *cells in texts.itertuples():
        table.add_row(escape(label), number, *(cell.replace(" ", "") for cell in cells))
    if absent:
        table.caption = escape("missing: " + "; ".join(absent))
        table.caption_justify = "left"
    return table


def scores_of(runs: Sequence[Run], *, default: Sequence[str]) -> pd.DataFrame:
    """A row for each run: its scores in [0, 1], or NaN where it is missing. Rows are named by the
    overrides that are not the same in all runs, the seed aside.

    Args:
        default: columns, if no run has a score.

    Raises:
        UserError: if a finished run lacks a score that another has.
    """
    metrics = list(dict.fromkeys(metric for run in runs for metric in run.scores) or default)
    for run in runs:
        absent = [metric for metric in metrics if metric not in run.scores]
        if absent and not run.missing:
            raise UserError(
                f"{run.folder / 'results.json'}: no score {', '.join(absent)}; "
                "summarise only runs of the same benchmark, and only subsets it has"
            )
    keys = dict.fromkeys(key for run in runs for key in run.overrides if key != "seed")
    varying = [key for key in keys if len({run.overrides.get(key) for run in runs}) > 1]
    labels = []
    for run in runs:
        words = {key: run.overrides[key] for key in varying if key in run.overrides}
        named = words.values() if len(varying) == 1 else (f"{k}={v}" for k, v in words.items())
        labels.append(", ".join(named) or "as configured")
    return pd.DataFrame([run.scores for run in runs], labels, metrics, dtype=float)


def percent(scores: "pd.Series[float]") -> str:
    """Mean and sample deviation, e.g. `91.6 ± 0.4`."""
    mean, deviation = 100 * scores.mean(), 100 * scores.std()
    if math.isnan(mean):
        return "missing"
    return f"{mean:.1f}" if math.isnan(deviation) else f"{mean:.1f} ± {deviation:.1f}"


def plot(path: Path, scores: pd.DataFrame) -> None:
    """Horizontal bars of the mean, a whisker of one deviation to each side, a dot for every run."""
    # Imported here: only a plot needs it, and it takes a second to load.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    place_of_run, labels = pd.factorize(scores.index)
    places = range(len(labels))
    size = (
        min(4.5, 0.4 + 0.085 * max(map(len, labels))) + 2.6 * scores.shape[1],
        1.2 + 0.5 * len(labels),
    )
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, scores.shape[1], sharey=True, squeeze=False)[0]
    for axes, (metric, values) in zip(panels, scores.items(), strict=True):
        lines = values.groupby(level=0, sort=False)
        means = 100 * lines.mean().fillna(0)
        axes.barh(places, means, height=0.62, color="#d9bfa9")
        whisker = {"xerr": 100 * lines.std(), "ecolor": "#22201d", "capsize": 3}
        axes.errorbar(means, [place - 0.12 for place in places], fmt="none", **whisker)
        axes.scatter(100 * values, place_of_run + 0.14, s=12, color="#8a5a3c", zorder=3)
        for place, text in enumerate(lines.agg(percent)):
            beside = {"xycoords": ("axes fraction", "data"), "va": "center", "size": 8}
            axes.annotate(text, (1.02, place), **beside)
        axes.set_title(metric, size=10, loc="left")
        axes.set_xlim(0, 100)
        axes.tick_params(labelsize=8, length=0)
        axes.grid(axis="x", color="#e4dfd7")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
    panels[0].set_yticks(places, [textwrap.fill(label, 44) for label in labels], size=9)
    panels[0].invert_yaxis()
    counts = lines.count()
    count = " to ".join(str(n) for n in sorted({counts.min(), counts.max()}))
    figure.supxlabel(
        f"precision@1 in %; mean, one deviation, and each of {count} runs", size=8, color="#6a645c"
    )
    figure.savefig(path)


def read_runs(sweep: Path, *, subsets: Sequence[str]) -> list[Run]:
    """The runs below a sweep folder, those whose folder is a number in its order.

    Args:
        subsets: whose scores are read, beside the overall score, groups and tasks.
    """
    folders = {path.parent.parent for path in sweep.rglob(".hydra/overrides.yaml")}
    ordered = sorted(folders, key=lambda f: (not f.name.isdigit(), f.name.zfill(9), str(f)))
    return [_read_run(folder, subsets) for folder in ordered]


def _read_run(folder: Path, subsets: Sequence[str]) -> Run:
    overrides: dict[str, str] = {}
    try:
        words = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text(encoding="utf-8"))
        pairs = (word.lstrip("+").partition("=") for word in words or [])
        overrides = {k: v for k, _, v in pairs if not k.startswith(("hydra.", "hydra/"))}
        if not (folder / "results.json").is_file():
            return Run(folder, overrides, {}, f"no results.json in {folder.name}")
        results = read_results(folder / "results.json")
    except yaml.YAMLError:
        return Run(folder, {}, {}, f"overrides.yaml in {folder.name} is damaged")
    except UserError as error:
        return Run(folder, overrides, {}, str(error))
    scores = {"overall": results["overall"], **results["groups"]}
    scores |= {name: task["main_score"] for name, task in results.get("tasks", {}).items()}
    known = results["subsets"]
    scores |= {name: known[name]["precision_at_1"] for name in subsets if name in known}
    return Run(folder, overrides, {name: one for name, one in scores.items() if one is not None})
