"""An examination in, what a person reads on the terminal and a machine in JSON out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from cocoa_pl.doctor.examination import Examination
from cocoa_pl.doctor.findings import KINDS, Findings, Severity
from cocoa_pl.doctor.histogram import make_bins, percentiles, text_histogram
from cocoa_pl.doctor.lengths import StageLengths

FORMAT_VERSION = 1
SHOWN_ROWS = 3

_LEGEND = "tokens of a sample; samples cut; tokens of a step over all GPUs, in passes"
_COLOURS = {Severity.STOPS: "red", Severity.LOSES: "yellow", Severity.INFORMS: "cyan"}


def show(console: Console, examination: Examination, *, not_checked: Sequence[str]) -> None:
    """Print the whole report: what was read, lengths, findings, verdict."""
    parts: list[RenderableType] = [_inventory(examination)]
    if examination.lengths:
        parts += ["", text_histogram(examination.lengths, width=console.width)]
        parts += ["", _length_table(examination.lengths), f"[dim]{_LEGEND}[/]"]
    parts += ["", _summary(examination.findings)]
    parts += [f"[yellow]not checked[/]: {escape(sentence)}" for sentence in not_checked]
    parts.append(verdict(examination.findings))
    console.print(Group(*parts), highlight=False)


def verdict(findings: Findings) -> str:
    """One sentence at the end."""
    stops, loses, informs = (findings.total(severity) for severity in Severity)
    if stops:
        return f"[bold red]{stops:,} finding(s) would stop training[/] (on_bad_row=fail)"
    lost = f"; {loses:,} row(s) or texts are lost" if loses else ""
    return f"[bold green]nothing would stop training[/]{lost}; {informs:,} for your information"


def write_json(path: Path, examination: Examination, *, not_checked: Sequence[str]) -> None:
    """The machine-readable report: counts of every kind, the first findings of each in full."""
    findings = examination.findings
    content = {
        "format": FORMAT_VERSION,
        "stops_training": findings.stops_training,
        "rows": examination.rows,
        "kinds": {
            kind: {
                "severity": KINDS[kind].severity.name.lower(),
                "title": KINDS[kind].title,
                "advice": KINDS[kind].advice,
                "count": findings.count(kind),
                "listed": len(findings.kept(kind)),
            }
            for kind in findings.kinds()
        },
        "findings": [asdict(f) for kind in findings.kinds() for f in findings.kept(kind)],
        "images": _image_facts(examination),
        "lengths": [_length_facts(one) for one in examination.lengths],
        "not_checked": list(not_checked),
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _inventory(examination: Examination) -> Table:
    grid = Table.grid(padding=(0, 2))
    rows = ", ".join(f"{part} {count:,}" for part, count in examination.rows.items())
    grid.add_row("[bold]rows[/]", escape(rows))
    sizes = examination.sizes
    if not len(sizes):
        count = examination.num_images
        said = f"{count:,}, none of which can be read" if count else "none"
        grid.add_row("[bold]images[/]", said)
        return grid
    areas = sizes.prod(axis=1)
    small, large = sizes[areas.argmin()].tolist(), sizes[areas.argmax()].tolist()
    unreadable = examination.num_images - len(sizes)
    said = f"{examination.num_images:,}, from {small[0]} x {small[1]} to {large[0]} x {large[1]}"
    said += f" pixels; {unreadable:,} cannot be read" if unreadable else " pixels"
    grid.add_row("[bold]images[/]", said)
    if len(examination.visual):
        found = percentiles(examination.visual)
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
        cut = int((one.totals > one.max_length).sum())
        for stage in one.stages:
            table.add_row(
                stage.name,
                *[f"{found[name]:,.0f}" for name in ("p50", "p90", "p99", "max")],
                f"{cut:,}",
                f"{one.tokens_per_step(stage):,.0f}",
                f"{stage.token_budget:,}",
                f"{np.ceil(one.pieces_per_step(stage)):,.0f}",
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
                f"[{colour}]{findings.count(kind):,}[/]",
                f"{about.title} [dim]({escape(about.advice)})[/]\n"
                f"[dim]{escape(_examples(findings, kind))}[/]",
            )
    return table


def _examples(findings: Findings, kind: str) -> str:
    """Names of the first rows; where no row is meant, the first message."""
    kept = findings.kept(kind)
    rows = list(dict.fromkeys(finding.row_id for finding in kept if finding.row_id))
    if not rows:
        return kept[0].message
    more = findings.count(kind) > SHOWN_ROWS and len(rows) >= SHOWN_ROWS
    return ", ".join(rows[:SHOWN_ROWS]) + (", ..." if more else "")


def _image_facts(examination: Examination) -> dict[str, Any]:
    sizes = examination.sizes
    facts: dict[str, Any] = {
        "count": examination.num_images,
        "unreadable": examination.num_images - len(sizes),
    }
    if len(sizes):
        facts["width"] = {"min": int(sizes[:, 0].min()), **percentiles(sizes[:, 0])}
        facts["height"] = {"min": int(sizes[:, 1].min()), **percentiles(sizes[:, 1])}
    if len(examination.visual):
        visual = examination.visual
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
        "cut": int((one.totals > one.max_length).sum()),
        "tokens": percentiles(one.totals) if len(one.totals) else None,
        "histogram": {"edges": bins.edges.tolist(), "counts": bins.counts(one.totals).tolist()},
        "steps": {
            stage.name: {
                "tokens": one.tokens_per_step(stage),
                "token_budget": stage.token_budget,
                "passes": one.pieces_per_step(stage),
            }
            for stage in one.stages
        },
    }
