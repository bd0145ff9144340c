"""The self-contained report.html of a scored run, and its score table for the terminal.

The page loads nothing: its style is inline, its images are data URIs, its curves inline SVG. All
text from datasets is escaped by the template engine, and the page's own policy forbids scripts.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from cocoa_pl.attention import Policy, dense_mask, segment_letters
from cocoa_pl.data.images import ImageSource, open_image
from cocoa_pl.errors import UserError, visible
from cocoa_pl.evaluation.figures import read_panels
from cocoa_pl.evaluation.results import (
    MEANS,
    GalleryRow,
    Interval,
    Results,
    SubsetScore,
    mean_score,
    score_interval,
)

QUERY_BOX, CANDIDATE_BOX, MAP_BOX = 168, 112, 96  # CSS pixels
GRID_LENGTHS = (4, 1, 3)  # CONTEXT, BOTTLENECK, TARGET of the sample that grids show
OWN = "this run"
# Scores by their names in results.json, and what tables call them; those at 1 are precision@1.
COLUMNS = {
    "precision_at_1": "P@1",
    "precision_at_1_strict": "strict",
    "recall_at_5": "R@5",
    "recall_at_10": "R@10",
    "ndcg_at_5": "nDCG@5",
    "ndcg_at_10": "nDCG@10",
    "chance": "chance",
}
ModelScores = tuple[str, tuple[float, ...]]  # a model's means in [0, 1], in the order of `columns`


class Picture(NamedTuple):
    """An image as the page shows it, `width` x `height` CSS pixels."""

    uri: str
    width: int
    height: int
    pixelated: bool


@dataclass(frozen=True)
class Provenance:
    """Where the scored model comes from; what is empty is left out of the report.

    Attributes:
        facts: what a reader should know first, e.g. `{"attention": "causal", "seed": 1}`.
        lineage: what each stage that made the weights left in `cocoa.json`.
        policies: attention by what it is used for, such as a stage's name.
        config: the run's configuration, as YAML.
        metrics_csv: the run's logged numbers, drawn as loss curves.
    """

    facts: Mapping[str, object] = field(default_factory=dict)
    lineage: Sequence[Mapping[str, Any]] = ()
    policies: Mapping[str, Policy] = field(default_factory=dict)
    config: str | None = None
    metrics_csv: Path | None = None

    @property
    def grids(self) -> dict[str, tuple[str, ...]]:
        """Each policy once, named after all that use it: its mask of one short sample, a string for
        each row with the letters of what is seen, or a blank.
        """
        letters = segment_letters(GRID_LENGTHS)
        found = {}
        for policy in self.policies.values():
            users = [user for user, other in self.policies.items() if other.name == policy.name]
            mask = dense_mask(policy, torch.tensor([GRID_LENGTHS]))
            found[f"{policy.name}: {', '.join(users)}"] = tuple(
                "".join(letter if seen else " " for letter, seen in zip(letters, row, strict=True))
                for row in mask.tolist()
            )
        return found


def write_report(
    path: Path,
    results: Results,
    *,
    title: str,
    date: str,
    provenance: Provenance,
    published: Sequence[ModelScores] = (),
) -> None:
    """Write the whole report to `path`.

    Args:
        published: results of others to stand beside, and the run's own; none leaves it out.
    """
    write_page(
        path,
        "report.html.j2",
        title=title,
        date=date,
        provenance=provenance,
        results=results,
        columns=COLUMNS,
        numbers={subset.name: number for number, subset in enumerate(results.subsets)},
        published=published,
        published_columns=columns(results),
        gallery={
            subset.name: [row for row in results.gallery if row.subset == subset.name]
            for subset in results.subsets
        },
        outcome=outcome,
        picture=picture,
        query_box=QUERY_BOX,
        candidate_box=CANDIDATE_BOX,
        map_box=MAP_BOX,
        panels=read_panels({"": provenance.metrics_csv}) if provenance.metrics_csv else [],
    )


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write a page of a template of this package; in all text nothing is markup or acts."""
    environment = Environment(
        loader=PackageLoader("cocoa_pl", "evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "between": between,
        "interval": score_interval,
        "mean": mean_score,
        "number": "{:.3g}".format,
        "heading": _heading,
    }
    page = environment.get_template(template).render(values)
    path.write_text(visible(page, lines=True), encoding="utf-8")


def shown(name: object) -> Text:
    """A name for a terminal as it stands: its brackets are no markup, and nothing in it acts."""
    return Text(visible(name, lines=True))


def markdown(text: str) -> str:
    """A name for a cell or a line of Markdown as it stands: nothing in it is markup."""
    line = " ".join(visible(text, lines=True).split())
    return re.sub(r"[\\`*<\[|~]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", line)


def score_table(results: Results) -> Table:
    """The scores for a terminal, in percent: groups behind their subsets, splits, and the whole."""
    names = [name for name in COLUMNS if not name.endswith("_at_5")]

    def line(label: str, subsets: Sequence[SubsetScore], *more: str) -> list[str]:
        return [label, *(percent(mean_score(subsets, of=name)) for name in names), *more]

    rows = [["subset", *(COLUMNS[name] for name in names), "queries", "of", "split"]]
    for group, subsets in results.groups.items():
        for one in subsets:
            counts = f"{one.num_queries:,}", f"{one.num_candidates:,}"
            rows.append(line(one.name, [one], *counts, "in" if one.in_distribution else "out"))
        if not results.is_partial:
            rows.append(line(group, subsets))
    means = [(name, results.means.get(name)) for name in (*MEANS[1:], MEANS[0])]
    rows += [line(name.replace("_", " "), subsets) for name, subsets in means if subsets]
    notes = [f"{one.name}: {one.caveat}" for one in results.subsets if one.caveat]
    if widths := ", ".join(f"{name}: {percent(x)}" for name, x in results.widths.items()):
        notes.append(f"overall P@1 of leading components alone: {widths}")
    return plain_table(f"{results.benchmark}: scores in %", rows, "\n".join(notes))


def columns(results: Results) -> tuple[str, ...]:
    """Groups in the benchmark's order, then the means over splits and over all, as papers do."""
    return (*results.groups, *MEANS[1:], MEANS[0])


def published_rows(results: Results, published: Sequence[Mapping[str, Any]]) -> list[ModelScores]:
    """Published rows as they are listed, and the run's own last; none for a choice of subsets.

    Args:
        published: rows with `model`, and every column in percent, as papers have them.

    Raises:
        UserError: if a row lacks a column or has one more, or a score is no percentage.
    """
    if results.is_partial or not published:
        return []
    names = columns(results)
    found = []
    for row in published:
        scores = [row.get(name) for name in names]
        in_percent = all(isinstance(x, int | float) and 0 <= x <= 100 for x in scores)
        if set(row) != {"model", *names} or not in_percent:
            raise UserError(
                f"benchmark.published: the row of {row.get('model')} must have model and, in "
                f"percent, {', '.join(names)}"
            )
        found.append((str(row["model"]), tuple(row[name] / 100 for name in names)))
    own = tuple(mean_score(results.averages[name]) for name in names)
    return [*found, (OWN, own)]


def published_table(results: Results, rows: Sequence[ModelScores]) -> Table:
    """`published_rows` for a terminal, in percent."""
    head = ["model", *(name.replace("_", " ") for name in columns(results))]
    texts = ([model, *map(percent, scores)] for model, scores in rows)
    return plain_table("Beside published results, in %", [head, *texts])


def plain_table(title: str, rows: Iterable[Sequence[str]], note: str = "") -> Table:
    """Names and numbers for a terminal; the first row and the first column are titles, and a
    shorter row is bold.
    """
    (first, *others), *body = rows
    table = Table(title=shown(title), title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column(shown(first), overflow="fold")
    for column in others:
        table.add_column(shown(column), justify="right", overflow="fold")
    for row in body:
        table.add_row(*map(shown, row), style="bold" if len(row) <= len(others) else None)
    table.caption, table.caption_justify = shown(note) if note else None, "left"
    return table


def outcome(row: GalleryRow) -> str:
    """How the query went, in words: a hit, a tie at the top, or the rank of the positive."""
    rank = next(candidate.rank for candidate in row.ranked if candidate.is_positive)
    if row.hit:
        return "Hit"
    if rank == 1:
        return "Miss: tied with another candidate"
    return f"Miss: the positive is number {rank:,} of {row.num_candidates:,}"


def picture(source: ImageSource, *, box: int, where: str) -> Picture:
    """A small image is enlarged by a whole factor, pixels kept; a large one becomes a JPEG."""
    try:
        image = open_image(source)
    except UserError as error:
        error.row_id = where
        raise
    longest = max(image.size)
    is_small, kind = longest <= box, "png"
    times, parts = (box // longest, 1) if is_small else (box, longest)
    width, height = (max(1, side * times // parts) for side in image.size)
    if not is_small:
        dense, kind = (width * 2, height * 2), "jpeg"
        image = image.resize(dense, Image.Resampling.LANCZOS, reducing_gap=2.0)
    image.save(buffer := io.BytesIO(), format=kind, optimize=True, quality=82)
    uri = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Picture(uri, width, height, pixelated=is_small)


def percent(score: float) -> str:
    return f"{100 * score:.1f}"


def between(interval: Interval) -> str:
    """E.g. `87.1 to 89.0`."""
    low, high = interval
    return f"{percent(low)} to {percent(high)}"


def _heading(label: str) -> str:
    return label.upper() if len(label) <= 3 else label[:1].upper() + label[1:]
