"""The doctor's report: tables for the terminal, and doctor.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from cocoa_pl.doctor.check_data import CheckedData
from cocoa_pl.doctor.findings import KINDS, Findings, Severity
from cocoa_pl.doctor.lengths import StageLengths

FORMAT_VERSION = 1
SHOWN_ROWS = 3
PERCENTILES = (50, 90, 99)
NUM_BINS = 12
NICE_STEPS = (1, 2, 4, 5, 8)  # times a power of ten
EIGHTHS = " ▏▎▍▌▋▊▉█"

_LEGEND = "tokens of a sample; samples cut; tokens of a step over all GPUs, in passes"
_COLOURS = {Severity.STOPS: "red", Severity.LOSES: "yellow", Severity.INFORMS: "cyan"}


def print_report(console: Console, checked: CheckedData, *, not_checked: Sequence[str]) -> None:
    """Print the whole report: what was read, lengths, findings, verdict."""
    stops, loses, informs = (checked.findings.total(severity) for severity in Severity)
    if stops:
        verdict = f"[bold red]{stops:,} finding(s) would stop training[/] (on_bad_row=fail)"
    else:
        lost = f"; {loses:,} row(s) or texts are lost" if loses else ""
        verdict = f"[bold green]nothing would stop training[/]{lost}; "
        verdict += f"{informs:,} for your information"
    parts: list[RenderableType] = [_inventory(checked)]
    if checked.lengths:
        parts += ["", text_histogram(checked.lengths, width=console.width)]
        parts += ["", _length_table(checked.lengths), f"[dim]{_LEGEND}[/]"]
    parts += ["", _summary(checked.findings)]
    parts += [f"[yellow]not checked[/]: {escape(sentence)}" for sentence in not_checked]
    console.print(Group(*parts, verdict), highlight=False)


def write_json(path: Path, checked: CheckedData, *, not_checked: Sequence[str]) -> None:
    """The machine-readable report: counts of every kind, the first findings of each in full."""
    findings = checked.findings
    content = {
        "format": FORMAT_VERSION,
        "stops_training": findings.stops_training,
        "rows": checked.rows,
        "kinds": {
            kind: {
                "severity": KINDS[kind].severity.name.lower(),
                "title": KINDS[kind].title,
                "advice": KINDS[kind].advice,
                "count": findings.counts[kind],
                "listed": len(findings.kept[kind]),
            }
            for kind in findings.kinds()
        },
        "findings": [asdict(f) for kind in findings.kinds() for f in findings.kept[kind]],
        "images": _image_facts(checked),
        "lengths": [_length_facts(one) for one in checked.lengths],
        "not_checked": list(not_checked),
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _inventory(checked: CheckedData) -> Table:
    grid = Table.grid(padding=(0, 2))
    rows = ", ".join(f"{part} {count:,}" for part, count in checked.rows.items())
    grid.add_row("[bold]rows[/]", escape(rows))
    sizes = checked.sizes
    if not len(sizes):
        count = checked.num_images
        text = f"{count:,}, none of which can be read" if count else "none"
        grid.add_row("[bold]images[/]", text)
        return grid
    areas = sizes.prod(axis=1)
    small, large = sizes[areas.argmin()].tolist(), sizes[areas.argmax()].tolist()
    unreadable = checked.num_images - len(sizes)
    text = f"{checked.num_images:,}, from {small[0]} x {small[1]} to {large[0]} x {large[1]}"
    text += f" pixels; {unreadable:,} cannot be read" if unreadable else " pixels"
    grid.add_row("[bold]images[/]", text)
    if len(checked.visual):
        found = percentiles(checked.visual)
        each = ", ".join(f"{name} {found[name]:,.0f}" for name in ("p50", "p90", "p99", "max"))
        grid.add_row("", f"visual tokens of an image: {each}")
    return grid


def _length_table(lengths: Sequence[StageLengths]) -> Table:
    """What samples cost, and what the token budget makes of a step."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("stage", no_wrap=True)
    for name in ("p50", "p90", "p99", "max", "cut", "step", "budget", "passes"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in lengths:
        if not len(one.totals):
            continue
        found = percentiles(one.totals)
        cut = one.num_cut
        for stage in one.stages:
            table.add_row(
                stage.name,
                *[f"{found[name]:,.0f}" for name in ("p50", "p90", "p99", "max")],
                f"{cut:,}",
                f"{one.tokens_per_step(stage):,.0f}",
                f"{stage.token_budget:,}",
                f"{np.ceil(one.passes_per_step(stage)):,.0f}",
            )
    return table


def _summary(findings: Findings) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for severity in Severity:
        kinds = [kind for kind in findings.kinds() if KINDS[kind].severity is severity]
        if not kinds:
            continue
        colour = _COLOURS[severity]
        table.add_row("", f"[bold {colour}]{severity.value}[/]")
        for kind in kinds:
            about = KINDS[kind]
            table.add_row(
                f"[{colour}]{findings.counts[kind]:,}[/]",
                f"{about.title} [dim]({escape(about.advice)})[/]\n"
                f"[dim]{escape(_examples(findings, kind))}[/]",
            )
    return table


def _examples(findings: Findings, kind: str) -> str:
    """Names of the first rows; where no row is meant, the first message."""
    kept = findings.kept[kind]
    rows = list(dict.fromkeys(finding.row_id for finding in kept if finding.row_id))
    if not rows:
        return kept[0].message
    more = findings.counts[kind] > SHOWN_ROWS and len(rows) >= SHOWN_ROWS
    return ", ".join(rows[:SHOWN_ROWS]) + (", ..." if more else "")


def _image_facts(checked: CheckedData) -> dict[str, Any]:
    sizes = checked.sizes
    facts: dict[str, Any] = {
        "count": checked.num_images,
        "unreadable": checked.num_images - len(sizes),
    }
    if len(sizes):
        facts["width"] = {"min": int(sizes[:, 0].min()), **percentiles(sizes[:, 0])}
        facts["height"] = {"min": int(sizes[:, 1].min()), **percentiles(sizes[:, 1])}
    if len(checked.visual):
        visual = checked.visual
        facts["visual_tokens"] = {"min": int(visual.min()), **percentiles(visual)}
    return facts


def _length_facts(one: StageLengths) -> dict[str, Any]:
    bins = make_bins(one.totals)
    return {
        "stages": [stage.name for stage in one.stages],
        "rows": one.num_rows,
        "samples": len(one.totals),
        "unknown": one.num_unknown,
        "max_length": one.max_length,
        "cut": one.num_cut,
        "tokens": percentiles(one.totals) if len(one.totals) else None,
        "histogram": {"edges": bins.edges.tolist(), "counts": bins.counts(one.totals).tolist()},
        "steps": {
            stage.name: {
                "tokens": one.tokens_per_step(stage),
                "token_budget": stage.token_budget,
                "passes": one.passes_per_step(stage),
            }
            for stage in one.stages
        },
    }


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
            text = "" if not count[row] else "<1 %" if share < 1 else f"{share:.0f} %"
            cells.append(f"[cyan]{bar(count[row] / top, width=room)}[/] [dim]{text}[/]")
        table.add_row(name, *cells)
    return table
