"""The doctor's report: tables for the terminal, and doctor.json."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cocoa_pl.data.rows import KEPT
from cocoa_pl.doctor.check import Checkup
from cocoa_pl.doctor.measure import spread

FORMAT_VERSION = 1
SHOWN_ROWS = 3

_LEGEND = "tokens of a sample; samples cut; tokens of a step over all GPUs, in passes"
_BARS = " ▁▂▃▄▅▆▇█"

# What a finding does to a run with `on_bad_row=fail`, and its colour.
SEVERITIES = {
    "stops": ("stops training", "red"),
    "loses": ("loses rows or text", "yellow"),
    "informs": ("information", "cyan"),
}
# Kind -> severity, title and advice, in the report's order.
KINDS = {
    "unreadable_source": ("stops", "files or folders that cannot be read", "see the message"),
    "too_few_rows": ("stops", "stage without enough rows", "more rows, or another batch_size"),
    "missing_image": ("stops", "image missing", "unpack all image archives; check image_root"),
    "unreadable_file": ("stops", "file that cannot be reached", "its owner, its mode, or a link"),
    "path_outside_root": ("stops", "image path leaves the root", "write it relative to image_root"),
    "corrupt_image": ("stops", "image corrupt or cut off", "fetch the file again"),
    "elongated_image": ("stops", "image too elongated", "crop it or drop the row"),
    "placeholder_mismatch": ("stops", "placeholder and image do not match", "one for each image"),
    "empty_text": ("stops", "neither text nor image", "fill the side or drop the row"),
    "duplicate_pair": ("stops", "same pair twice", "remove one"),
    "bad_row": ("stops", "row of the wrong form", "see the message"),
    "images_exceed_length": ("stops", "images alone exceed max_length", "lower max_pixels"),
    "repeated_row": ("loses", "row repeats another, left out", "nothing, or remove it"),
    "truncated_text": ("loses", "text cut to max_length", "raise max_length or shorten texts"),
    "negative_is_positive": ("loses", "negative equal to the positive", "mine negatives again"),
    "overlap_pair": ("informs", "pair is in the evaluation, too", "drop it: it raises scores"),
    "overlap_query": ("informs", "query is in the evaluation, too", "drop it: it raises scores"),
    "overlap_image": ("informs", "image is in the evaluation, too", "drop it to have it unseen"),
    "several_positives": ("informs", "query with several positives", "no negatives of each other"),
    "image_tag": ("informs", "text holds the placeholder of an image", "is the image missing?"),
}


def findings_of(checkup: Checkup) -> pd.DataFrame:
    """A row for each finding that was kept, kind after kind: kind, part, row_id, role, file and
    message.
    """
    rows = [
        (_known(e.kind), part, e.row_id, e.role, e.file, str(e))
        for part, errors in checkup.found.items()
        for e in errors
    ]
    columns = ["kind", "part", "row_id", "role", "file", "message"]
    table = pd.DataFrame(rows, columns=columns, dtype=object)  # Arrow's texts are Unicode alone
    table["kind"] = table["kind"].astype(pd.CategoricalDtype([*KINDS]))
    return table.sort_values("kind", kind="stable").groupby("kind", observed=True).head(KEPT)


def _known(kind: str) -> str:
    """A source of one's own may hand over an error of no kind."""
    return kind if kind in KINDS else "bad_row"


def facts_of(
    checkup: Checkup, findings: pd.DataFrame, not_checked: Sequence[str]
) -> dict[str, Any]:
    """What doctor.json holds: counts of every kind, the first findings of each in full."""
    every = Counter[str]()
    for errors in checkup.found.values():
        for kind, count in errors.counts.items():
            every[_known(kind)] += count
    counts = {kind: every[kind] for kind in KINDS if every[kind]}
    sizes = checkup.images.sizes
    visual = checkup.visual_tokens
    images = {"width": sizes[:, 0], "height": sizes[:, 1], "visual_tokens": visual}
    return {
        "format": FORMAT_VERSION,
        "stops_training": any(KINDS[kind][0] == "stops" for kind in counts),
        "rows": checkup.num_rows,
        "kinds": {
            kind: {
                **dict(zip(("severity", "title", "advice"), KINDS[kind], strict=True)),
                "count": count,
                "listed": min(count, KEPT),
            }
            for kind, count in counts.items()
        },
        "findings": findings.to_dict("records"),
        "images": {
            "count": len(checkup.images),
            "unreadable": len(checkup.images) - len(sizes),
            **{name: spread(values) for name, values in images.items() if len(values)},
        },
        "lengths": checkup.lengths,
        "not_checked": list(not_checked),
    }


def print_report(console: Console, facts: dict[str, Any], findings: pd.DataFrame) -> None:
    """Print what was read, lengths, findings and a verdict."""
    images, lengths = facts["images"], [one for one in facts["lengths"] if one["samples"]]
    rows = ", ".join(f"{part} {count:,}" for part, count in facts["rows"].items())
    print_line = partial(console.print, highlight=False)
    print_line(f"[bold]rows[/]: {escape(rows)}")
    unreadable = images["unreadable"]
    more = f", of which {unreadable:,} cannot be read" if unreadable else ""
    print_line(f"[bold]images[/]: {images['count']:,}{more}")
    for name in ("width", "height", "visual_tokens"):
        if name in images:
            print_line(f"  {name.replace('_', ' ')}: {_spread_words(images[name])}")
    if lengths:
        print_line("", _length_table(lengths))
        print_line(f"[dim]{_LEGEND}[/]")
    print_line("", _summary(facts["kinds"], findings))
    for sentence in facts["not_checked"]:
        print_line(f"[yellow]not checked[/]: {escape(sentence)}")
    totals = dict.fromkeys(SEVERITIES, 0)
    for about in facts["kinds"].values():
        totals[about["severity"]] += about["count"]
    if facts["stops_training"]:
        words = f"[bold red]{totals['stops']:,} finding(s) would stop training[/] (on_bad_row=fail)"
    else:
        lost = f"; {totals['loses']:,} row(s) or texts are lost" if totals["loses"] else ""
        words = f"[bold green]nothing would stop training[/]{lost}; "
        words += f"{totals['informs']:,} for your information"
    print_line(words)


def _spread_words(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {found[name]:,.0f}" for name in ("min", "p50", "p90", "p99", "max"))


def _length_table(lengths: Sequence[dict[str, Any]]) -> Table:
    """What samples cost, and what the token budget makes of a step."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("stage", no_wrap=True)
    table.add_column("lengths", no_wrap=True)
    for name in ("p50", "p90", "p99", "max", "cut", "step", "budget", "passes"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in lengths:
        of_samples = [one["tokens"][name] for name in ("p50", "p90", "p99", "max")] + [one["cut"]]
        counts = one["histogram"]["counts"]  # any that is not zero is seen
        bars = "".join(_BARS[math.ceil(8 * count / max(counts))] for count in counts)
        for stage, step in one["steps"].items():
            numbers = [*of_samples, step["tokens"], step["token_budget"], math.ceil(step["passes"])]
            table.add_row(stage, bars, *[f"{number:,.0f}" for number in numbers])
    return table


def _summary(kinds: dict[str, dict[str, Any]], findings: pd.DataFrame) -> Table:
    """Of each kind how many there are, what to do, and the first rows."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    before = ""
    for kind, some in findings.groupby("kind", observed=True):
        about = kinds[str(kind)]
        severity = about["severity"]
        words, colour = SEVERITIES[severity]
        if severity != before:
            table.add_row("", f"[bold {colour}]{words}[/]")
        before = severity
        rows = [row_id for row_id in some["row_id"].unique() if row_id]
        # Where no row is meant, the first message.
        examples = ", ".join(rows[:SHOWN_ROWS]) or some["message"].iloc[0]
        examples += ", ..." if rows[SHOWN_ROWS:] else ""
        told = f"{about['title']} [dim]({escape(about['advice'])})[/]\n[dim]{escape(examples)}[/]"
        table.add_row(f"[{colour}]{about['count']:,}[/]", told)
    return table
