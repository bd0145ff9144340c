"""The doctor's report: tables for the terminal, and doctor.json."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cocoa_pl.data.rows import KEPT
from cocoa_pl.doctor.check import Checkup
from cocoa_pl.doctor.measure import spread
from cocoa_pl.evaluation.report import plain_table

FORMAT_VERSION = 2
SHOWN_ROWS = 3

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


def facts_of(checkup: Checkup, not_checked: Sequence[str]) -> dict[str, Any]:
    """What doctor.json holds: kind after kind all counts, and the first findings in full."""
    counts, findings = Counter[str](), defaultdict[str, list[dict[str, str]]](list)
    for part, errors in checkup.found.items():
        # A source of one's own may hand over an error of no kind.
        known = {kind: kind if kind in KINDS else "bad_row" for kind in errors.counts}
        for kind, count in errors.counts.items():
            counts[known[kind]] += count
        for e in errors:
            about = {"kind": known[e.kind], "part": part, "row_id": e.row_id, "role": e.role}
            findings[known[e.kind]].append({**about, "file": e.file, "message": str(e)})
    found = [kind for kind in KINDS if counts[kind]]
    sizes = checkup.images.sizes
    visual = checkup.visual_tokens
    images = {"width": sizes[:, 0], "height": sizes[:, 1], "visual_tokens": visual}
    return {
        "format": FORMAT_VERSION,
        "stops_training": any(KINDS[kind][0] == "stops" for kind in found),
        "rows": checkup.num_rows,
        "kinds": {
            kind: {
                **dict(zip(("severity", "title", "advice"), KINDS[kind], strict=True)),
                "count": counts[kind],
                "listed": min(len(findings[kind]), KEPT),
            }
            for kind in found
        },
        "findings": [finding for kind in found for finding in findings[kind][:KEPT]],
        "images": {
            "count": len(checkup.images),
            "unreadable": len(checkup.images) - len(sizes),
            **{name: spread(values) for name, values in images.items() if len(values)},
        },
        "lengths": checkup.lengths,
        "not_checked": list(not_checked),
    }


def print_report(console: Console, facts: dict[str, Any]) -> None:
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
            quantiles = ", ".join(f"{key} {value:,.0f}" for key, value in images[name].items())
            print_line(f"  {name.replace('_', ' ')}: {quantiles}")
    if lengths:
        table = [["stage", "p50", "p90", "p99", "max", "cut", "step", "budget", "passes"]]
        for one in lengths:
            tokens = [one["tokens"][name] for name in table[0][1:5]]
            step = one["tokens_per_step"], one["token_budget"], math.ceil(one["passes"])
            numbers = (f"{number:,.0f}" for number in (*tokens, one["cut"], *step))
            table.append([one["stage"], *numbers])
        print_line("", plain_table("tokens of a sample, and of a step over all GPUs", table))
    print_line("", _summary(facts))
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


def _summary(facts: dict[str, Any]) -> Table:
    """Of each kind how many there are, what to do, and the first rows."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    before = ""
    for kind, about in facts["kinds"].items():
        words, colour = SEVERITIES[about["severity"]]
        if words != before:
            table.add_row("", f"[bold {colour}]{words}[/]")
        before = words
        some = [finding for finding in facts["findings"] if finding["kind"] == kind]
        rows = list(dict.fromkeys(finding["row_id"] for finding in some if finding["row_id"]))
        # Where no row is meant, the first message.
        examples = ", ".join(rows[:SHOWN_ROWS]) or some[0]["message"]
        examples += ", ..." if rows[SHOWN_ROWS:] else ""
        told = f"{about['title']} [dim]({escape(about['advice'])})[/]\n[dim]{escape(examples)}[/]"
        table.add_row(f"[{colour}]{about['count']:,}[/]", told)
    return table
