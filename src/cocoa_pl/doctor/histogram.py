"""Distributions of token lengths as bars of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from cocoa_pl.doctor.lengths import StageLengths

PERCENTILES = (50, 90, 99)
NUM_BINS = 12
NICE_STEPS = (1, 2, 4, 5, 8)  # times a power of ten
EIGHTHS = " ▏▎▍▌▋▊▉█"


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


def make_bins(lengths: np.ndarray) -> Bins:
    """At most `NUM_BINS` bins with round edges, of which the last may be open: 0.5 % are longer."""
    longest = int(lengths.max(initial=1))
    reach = int(np.quantile(lengths, 0.995)) if len(lengths) else 1
    reach = longest if longest <= 1.25 * reach else max(1, reach)
    step = next(
        nice
        for power in range(20)
        for nice in (s * 10**power for s in NICE_STEPS)
        if nice * NUM_BINS > reach
    )
    num_bins = min(NUM_BINS, reach // step + 1)
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
    bins = make_bins(np.concatenate([one.totals for one in lengths]))
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
