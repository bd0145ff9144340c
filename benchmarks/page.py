"""The Markdown page of results, with tables and plots, from the JSON of `python -m benchmarks`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_check
from benchmarks.plots import draw_curves, draw_ratios

Record = Mapping[str, Any]

HEAD = """\
# Results of the benchmarks

Written by `python -m benchmarks page`; do not edit.

- Every peer is a **re-creation** from public calls of torch, transformers, peft and numpy, because
  the released CoCoA code does not run.
- Before anything is timed, both sides must give equal results, and equal gradients where there are
  any: on a GPU in float32, on few samples and two layers, and near ones in bfloat16.
- Both run in turns in one process. The ratio is the median over pairs of neighbouring runs, with a
  95 % bootstrap interval; above 1, this project is faster.
- Counts are exact (the JSON has all digits) and the same on any machine of a kind; times are of
  the machine named.
- *Rate* and *of ceiling* are ours. Curves and shares of the ceiling are in time of the GPU, or of
  the processor, which does not pass while others have it.
"""


def write_page(files: Sequence[Mapping[str, Any]], *, out: Path) -> None:
    """Write the page, and its plots into `img/` beside it.

    Args:
        files: each the JSON of one run, of one benchmark or of several, or of the GPU check.
    """
    pictures = out.parent / "img"
    pictures.mkdir(parents=True, exist_ok=True)
    sections = [HEAD]
    for file in files:
        if "rehearsal" in file:  # a summary of the GPU check
            sections.append(gpu_check.section(file))
            file = {"results": [r for r in file.get("bench", {}).values() if "environment" in r]}
        records = file.get("results", [file])
        if not records:
            continue
        slug = records[0]["environment"]["device_type"]
        ratios, curves = pictures / f"{slug}-ratios.png", pictures / f"{slug}-curves.png"
        links = []
        if timed := [record for record in records if record["ratio"] is not None]:
            draw_ratios(timed, ratios)
            links.append(_picture("Ratios with their intervals and targets", ratios, out))
        if any(record["curves"] for record in records):
            draw_curves(records, curves)
            links.append(_picture("How cost grows", curves, out))
        sections.append(section(records, links))
    out.write_text("\n".join(sections))


def section(records: Sequence[Record], pictures: Sequence[str]) -> str:
    """All about one machine."""
    parts = [heading(records[0]), table_of_ratios(records), *pictures, "### Counts"]
    parts += [table_of_counts(records), "### What was measured", *map(account, records)]
    return "\n\n".join(parts) + "\n"


def heading(record: Record) -> str:
    """The machine, the versions and the commit."""
    found, ceiling = record["environment"], record["ceiling"]
    packages = ", ".join(
        f"{name} {found[name]}" for name in ("torch", "transformers", "peft", "numpy", "pillow")
    )
    changed = ", with uncommitted changes" if found["uncommitted_changes"] else ""
    side = f"{ceiling['side']:,}"
    return (
        f"## {found['device']}\n\n"
        f"Commit {found['commit'][:10] or 'unknown'}{changed}; {found['date']}; "
        f"Python {found['python']}, {packages}; {found['threads']} thread.\n\n"
        f"The ceiling: products of {side} x {side} matrices in {ceiling['dtype']}, measured in the "
        f"same process, {rate(ceiling['flops_per_second'])}FLOP/s."
    )


def table_of_ratios(records: Sequence[Record]) -> str:
    """One line a benchmark."""
    rows = []
    for r in records:
        target = "" if r["target"] is None else f">= {number(r['target'])}"
        named = [r["id"], f"{r['title']} (`{r['name']}`)"]
        if r["ratio"] is None:
            rows.append([*named, "", "", "**failed**", target, "", "", ""])
            continue
        share = (
            "" if "share_of_ceiling" not in r else f"{100 * r['share_of_ceiling']['ours']:.0f} %"
        )
        low, high = r["ci"]
        rows.append(
            [
                *named,
                seconds(r["peer"]),
                seconds(r["ours"]),
                f"**{number(r['ratio'])}x** ({number(low)} to {number(high)})",
                target,
                f"{number(r['samples_per_second']['ours'])} {r['noun']}/s",
                share,
                str(r["pairs"]),
            ]
        )
    head = ["", "benchmark", "peer", "ours", "ratio", "target", "rate", "of ceiling", "pairs"]
    return table(head, rows)


def table_of_counts(records: Sequence[Record]) -> str:
    """One line a count."""
    rows = []
    for r in records:
        for name, count in r["counts"].items():
            ratio = "" if count["ratio"] is None else f"{number(count['ratio'])}x"
            sides = [amount(count[side]) for side in ("peer", "ours")]
            rows.append([f"`{r['name']}`", name.replace("_", " "), *sides, ratio])
    return table(["benchmark", "count", "peer", "ours", "ratio"], rows)


def account(record: Record) -> str:
    """What a reader must know to read one benchmark's figures."""
    lines = [
        f"**`{record['name']}`** ({record['id']}). {record['title']}. {record['note']}".strip(),
        f"Peer: {record['peer_label']}.",
        f"Sizes: `{record['size_values']}`.",
    ]
    if "error" in record:
        lines.append(f"**Failed**: `{record['error']}`.")
    if record["ratio"] is None:
        return " ".join(lines)
    lines.append(f"In processor time {number(record['cpu_ratio'])}x.")
    if "floor" in record:
        lines.append(
            f"The part that no exact way gets around takes {seconds(record['floor'])} alone: "
            f"{number(record['ratio_at_floor'])}x would be the most."
        )
    if record["target"] is not None and record["ratio"] < record["target"]:
        lines.append(f"**The target of {number(record['target'])}x is not reached.**")
    return " ".join(lines)


def one_line(record: Record) -> str:
    """For the terminal: the peer's time and ours, then what is known of ours."""
    line = f"{record['name']:20} "
    if record["ratio"] is not None:
        low, high = record["ci"]
        line += (
            f"{seconds(record['peer']):>10} -> {seconds(record['ours']):>10} "
            f"{number(record['ratio']):>6}x ({number(low)} to {number(high)}), {record['pairs']} "
            f"pairs; {number(record['samples_per_second']['ours'])} {record['noun']}/s"
        )
    if "share_of_ceiling" in record:
        line += f", {100 * record['share_of_ceiling']['ours']:.0f} % of ceiling"
    if "peak_bytes" in record["counts"]:
        peak = record["counts"]["peak_bytes"]
        line += f", peak {rate(peak['peer'])}B -> {rate(peak['ours'])}B"
    return line + (f"  FAILED: {record['error']}" if "error" in record else "")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def seconds(value: float) -> str:
    """In the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{number(value / size)} {unit}"
    return f"{number(value / 1e-6)} µs"


def rate(value: float) -> str:
    """With a prefix, ready for a unit: `2.1 G`."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{number(value / size)} {prefix}"
    return f"{number(value)} "


def amount(value: float) -> str:
    """Whole numbers in full up to a million."""
    if abs(value) >= 1e6:
        return rate(value).strip()
    return f"{value:,.0f}" if float(value).is_integer() else number(value)


def _picture(caption: str, file: Path, page: Path) -> str:
    return f"![{caption}]({file.relative_to(page.parent)})"
