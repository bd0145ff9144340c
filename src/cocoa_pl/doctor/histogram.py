"""Token lengths in, their distribution as bars of text and as a PNG out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from cocoa_pl.doctor.lengths import StageLengths

PERCENTILES = (50, 90, 99)
NUM_BINS = 12  # on the terminal; in the picture several times as many
NICE_STEPS = (1, 2, 4, 5, 8)  # times a power of ten
FINER = 4
EIGHTHS = " ▏▎▍▌▋▊▉█"

# Colour-blind safe (Paul Tol).
BLUE, RED, GREY = "#4477aa", "#aa3377", "#777777"


@dataclass(frozen=True)
class Bins:
    """Equal bins from zero; the last one also holds everything longer.

    Attributes:
        edges: int64 [B + 1]; bin b holds lengths from edges[b] to edges[b + 1] - 1.
        is_open: whether anything is longer than the last edge.
    """

    edges: np.ndarray
    is_open: bool

    def counts(self, lengths: np.ndarray) -> np.ndarray:
        """int64 [B], how many lengths are in each bin."""
        places = np.minimum(lengths // self.edges[1], len(self.edges) - 2)
        return np.bincount(places, minlength=len(self.edges) - 1)

    @property
    def labels(self) -> list[str]:
        starts, ends = self.edges[:-1].tolist(), (self.edges[1:] - 1).tolist()
        spans = [f"{a}-{b}" if a < b else f"{a}" for a, b in zip(starts, ends, strict=True)]
        return [*spans[:-1], f"{starts[-1]}+"] if self.is_open else spans


def make_bins(lengths: np.ndarray, *, count: int) -> Bins:
    """At most `count` bins with round edges, of which the last may be open: 0.5 % are longer."""
    longest = int(lengths.max(initial=1))
    reach = int(np.quantile(lengths, 0.995)) if len(lengths) else 1
    reach = longest if longest <= 1.25 * reach else max(1, reach)
    step = next(
        nice
        for power in range(20)
        for nice in (s * 10**power for s in NICE_STEPS)
        if nice * count > reach
    )
    num_bins = min(count, reach // step + 1)
    return Bins(np.arange(num_bins + 1) * step, longest >= num_bins * step)


def percentiles(values: np.ndarray) -> dict[str, float]:
    """`{"p50", "p90", "p99", "max", "mean"}` of a non-empty array."""
    found = {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
    return {**found, "max": float(values.max()), "mean": float(values.mean())}


def bar(share: float, *, width: int) -> str:
    """A bar of eighths of a character; anything above zero is seen."""
    eighths = max(1, round(share * width * 8)) if share > 0 else 0
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (EIGHTHS[rest] if rest else "")


def text_histogram(lengths: Sequence[StageLengths], *, width: int) -> Table:
    """One column of bars for each kind of stage, in `width` characters altogether."""
    bins = make_bins(np.concatenate([one.totals for one in lengths]), count=NUM_BINS)
    label = max(map(len, bins.labels))
    room = max(4, min(30, (width - label - 2) // len(lengths) - 8))
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left", pad_edge=False)
    table.add_column("tokens", justify="right", no_wrap=True, style="dim")
    for one in lengths:
        table.add_column(one.name, no_wrap=True, max_width=room + 6, overflow="ellipsis")
    counts = [bins.counts(one.totals) for one in lengths]
    tops = [max(1, int(count.max())) for count in counts]
    for row, name in enumerate(bins.labels):
        cells = []
        for count, top in zip(counts, tops, strict=True):
            share = 100 * count[row] / max(1, count.sum())
            said = "" if not count[row] else "<1 %" if share < 1 else f"{share:.0f} %"
            cells.append(f"[cyan]{bar(count[row] / top, width=room)}[/] [dim]{said}[/]")
        table.add_row(name, *cells)
    return table


def draw_lengths(path: Path, lengths: Sequence[StageLengths], visual: np.ndarray) -> None:
    """Write the PNG: a panel for each kind of stage, and one of visual tokens of an image.

    Args:
        visual: int64 [N], of each image; may be empty.
    """
    panels = len(lengths) + bool(len(visual))
    figure, axes = plt.subplots(
        1, panels, figsize=(4.2 * panels, 3.4), layout="constrained", squeeze=False
    )
    for one, place in zip(lengths, axes[0], strict=False):
        _panel(place, one.totals, one.name, "tokens of a sample", limit=one.max_length)
        place.set_ylabel("samples")
    if len(visual):
        _panel(axes[0][-1], visual, "images", "visual tokens of an image", limit=None)
        axes[0][-1].set_ylabel("images")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _panel(axes: Axes, values: np.ndarray, title: str, label: str, *, limit: int | None) -> None:
    bins = make_bins(values, count=FINER * NUM_BINS)
    step = int(bins.edges[1])
    middles = bins.edges[:-1] + (step - 1) / 2  # of the whole numbers in a bin
    axes.bar(middles, bins.counts(values), width=step, color=BLUE)
    marks = {percentile: float(np.percentile(values, percentile)) for percentile in (50, 99)}
    for at in marks.values():
        axes.axvline(at, color=GREY, linewidth=1, linestyle="--")
    axes.margins(y=0.12)
    if limit is not None and limit <= 1.5 * bins.edges[-1]:
        axes.axvline(limit, color=RED, linewidth=1.2)
        axes.annotate(
            f"max_length {limit}",
            (limit, 0.75),
            xycoords=("data", "axes fraction"),
            xytext=(3, 0),
            textcoords="offset points",
            fontsize=7,
            color=RED,
        )
    open_end = f"; last bar: {int(bins.edges[-2])} and more" if bins.is_open else ""
    said = ", ".join(f"{percentile} %: {at:.0f}" for percentile, at in marks.items())
    axes.set_title(f"{title} ({len(values):,}); {said}", fontsize=9)
    axes.set_xlabel(label + open_end, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
