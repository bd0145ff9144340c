"""The self-contained report.html of a scored run, and its score table for the terminal.

The page loads nothing: its style is inline, its images are data URIs, its curves inline SVG. All
text from datasets is escaped by the template engine, and the page's own policy forbids scripts.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from rich.markup import escape
from rich.table import Table

from cocoa_pl.attention import Policy, dense_mask, segment_letters
from cocoa_pl.data.images import ImageSource, open_image
from cocoa_pl.data.items import Item
from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.figures import histogram, read_panels
from cocoa_pl.evaluation.results import (
    GalleryRow,
    Interval,
    Results,
    SubsetScore,
    mean_score,
    score_interval,
)

QUERY_BOX, CANDIDATE_BOX, MAP_BOX = 168, 112, 96  # CSS pixels
TEXT_LIMIT = 320  # characters of an item shown in the gallery
GRID_LENGTHS = (4, 1, 3)  # CONTEXT, BOTTLENECK, TARGET of the sample that grids show
COLUMN_MEANS = ("in_distribution", "out_of_distribution", "overall")  # as papers have them
OWN = "this run"


@dataclass(frozen=True)
class Score:
    """One line of a score table; every number in [0, 1]."""

    label: str
    official: float
    interval: Interval  # of `official`
    strict: float
    chance: float
    num_subsets: int


@dataclass(frozen=True)
class Picture:
    """An image as the page shows it, `width` x `height` CSS pixels."""

    uri: str
    width: int
    height: int
    pixelated: bool


@dataclass(frozen=True)
class Grid:
    """Who sees whom: `rows[row][column]` is the letter of what is seen, or a blank."""

    name: str
    rows: tuple[str, ...]


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
    def grids(self) -> list[Grid]:
        """Each policy once, named after all that use it."""
        users: dict[str, tuple[Policy, list[str]]] = {}
        for user, policy in self.policies.items():
            users.setdefault(policy.name, (policy, []))[1].append(user)
        return [
            Grid(f"{name}: {', '.join(names)}", grid_rows(policy))
            for name, (policy, names) in users.items()
        ]


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
    page = (
        templates()
        .get_template("report.html.j2")
        .render(
            title=title,
            date=date,
            provenance=provenance,
            results=results,
            numbers={subset.name: number for number, subset in enumerate(results.subsets)},
            histograms={
                subset.name: histogram(subset.similarities)
                for subset in results.subsets
                if subset.similarities is not None
            },
            splits=split_scores(results),
            published=published,
            published_columns=columns(results),
            groups=group_scores(results),
            gallery={
                subset.name: [row for row in results.gallery if row.subset == subset.name]
                for subset in results.subsets
            },
            outcome=outcome,
            pictures=pictures,
            query_box=QUERY_BOX,
            candidate_box=CANDIDATE_BOX,
            map_box=MAP_BOX,
            panels=read_panels({"": provenance.metrics_csv}) if provenance.metrics_csv else [],
        )
    )
    path.write_text(page, encoding="utf-8")


def templates() -> Environment:
    """What pages are made with; all text is escaped."""
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
        "interval": lambda subset: score_interval([subset]),
        "number": _number,
        "shorten": _shorten,
        "heading": _heading,
    }
    return environment


def score_table(results: Results) -> Table:
    """The scores for a terminal, in percent: groups with their subsets, splits, and the whole."""
    table = Table(title=f"{escape(results.benchmark)}: precision@1 in %", title_justify="left")
    table.add_column("subset")
    table.add_column("split")
    for column in ("P@1", "strict", "chance", "queries", "candidates"):
        table.add_column(column, justify="right")
    for group in group_scores(results):
        for subset in results.groups[group.label]:
            table.add_row(
                escape(subset.name),
                "in" if subset.in_distribution else "out",
                percent(subset.precision_at_1),
                percent(subset.precision_at_1_strict),
                percent(subset.chance),
                f"{subset.num_queries:,}",
                f"{subset.num_candidates:,}",
            )
        if not results.is_partial:
            table.add_row(*_score_cells(group), style="bold", end_section=True)
    means = split_scores(results)
    for split in means[1:]:
        table.add_row(*_score_cells(split))
    for whole in means[:1]:
        table.add_row(*_score_cells(whole), style="bold")
    caveats = [f"{escape(one.name)}: {one.caveat}" for one in results.subsets if one.caveat]
    table.caption, table.caption_justify = "\n".join(caveats) or None, "left"
    return table


def split_scores(results: Results) -> list[Score]:
    """The unweighted means over all subsets and over the splits that have any; none of a choice."""
    if results.is_partial:
        return []
    splits = {
        "overall": results.subsets,
        "in distribution": results.split(in_distribution=True),
        "out of distribution": results.split(in_distribution=False),
    }
    return [_score(label, subsets) for label, subsets in splits.items() if subsets]


def group_scores(results: Results) -> list[Score]:
    """The unweighted mean of every group."""
    return [_score(name, subsets) for name, subsets in results.groups.items()]


@dataclass(frozen=True)
class ModelScores:
    """One model's means in [0, 1], in the order of the columns."""

    model: str
    scores: tuple[float, ...]
    is_own: bool


def columns(results: Results) -> tuple[str, ...]:
    """Groups in the benchmark's order, then the means over splits and over all."""
    return (*results.groups, *COLUMN_MEANS)


def published_rows(
    results: Results, published: Sequence[Mapping[str, object]]
) -> list[ModelScores]:
    """Published rows as they are listed, and the run's own last; none for a choice of subsets.

    Args:
        published: rows with `model`, and every column in percent, as papers have them.

    Raises:
        UserError: if a row lacks a column or has one more.
    """
    if results.is_partial or not published:
        return []
    names = columns(results)
    found = []
    for row in published:
        if different := set(row) ^ {"model", *names}:
            raise UserError(
                f"benchmark.published: the row of {row.get('model')} must have model, "
                f"{', '.join(names)}; see {', '.join(sorted(different))}"
            )
        scores = tuple(_fraction(row, name) for name in names)
        found.append(ModelScores(str(row["model"]), scores, is_own=False))
    content = results.to_json()
    means = {**content["groups"], **{name: content[name] for name in COLUMN_MEANS}}
    return [*found, ModelScores(OWN, tuple(means[name] for name in names), is_own=True)]


def published_table(results: Results, rows: Sequence[ModelScores]) -> Table:
    """`published_rows` for a terminal, in percent."""
    table = Table(title="Beside published results, in %", title_justify="left")
    table.add_column("model")
    for name in columns(results):
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        cells = [f"{100 * score:.1f}" for score in row.scores]
        table.add_row(escape(row.model), *cells, style="bold" if row.is_own else "")
    return table


def _fraction(row: Mapping[str, object], name: str) -> float:
    value = row[name]
    if not isinstance(value, int | float) or not 0 <= value <= 100:
        raise UserError(
            f"benchmark.published: {name} of {row['model']} is {value!r}, not a percentage"
        )
    return value / 100


def outcome(row: GalleryRow) -> str:
    """How the query went, in words: a hit, a tie at the top, or the rank of the positive."""
    rank = next(candidate.rank for candidate in row.ranked if candidate.is_positive)
    if row.hit:
        return "Hit"
    if rank == 1:
        return "Miss: tied with another candidate"
    return f"Miss: the positive is number {rank:,} of {row.num_candidates:,}"


def pictures(item: Item, *, box: int, where: str) -> list[Picture]:
    """The item's images, each fitted into `box` x `box` CSS pixels."""
    return [picture(image, box=box, where=where) for image in item.media]


def picture(source: ImageSource, *, box: int, where: str) -> Picture:
    """A small image is enlarged by a whole factor, pixels kept; a large one becomes a JPEG."""
    image = open_image(source, where=where)
    longest = max(image.size)
    if longest <= box:
        factor = box // longest
        size = (image.width * factor, image.height * factor)
        return Picture(_data_uri(image, "png"), *size, pixelated=True)
    size = (max(1, image.width * box // longest), max(1, image.height * box // longest))
    dense = image.resize((size[0] * 2, size[1] * 2), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return Picture(_data_uri(dense, "jpeg"), *size, pixelated=False)


def percent(score: float) -> str:
    return f"{100 * score:.1f}"


def between(interval: Interval) -> str:
    """E.g. `87.1 to 89.0`."""
    low, high = interval
    return f"{percent(low)} to {percent(high)}"


def _score(label: str, subsets: Sequence[SubsetScore]) -> Score:
    return Score(
        label=label,
        official=mean_score(subsets),
        interval=score_interval(subsets),
        strict=mean_score(subsets, strict=True),
        chance=sum(subset.chance for subset in subsets) / len(subsets),
        num_subsets=len(subsets),
    )


def _score_cells(score: Score) -> tuple[str, ...]:
    return (
        escape(score.label),
        "",
        percent(score.official),
        percent(score.strict),
        percent(score.chance),
    )


def _data_uri(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, optimize=True, quality=82)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _heading(label: str) -> str:
    return label.upper() if len(label) <= 3 else label[:1].upper() + label[1:]


def _shorten(text: str) -> str:
    return text if len(text) <= TEXT_LIMIT else text[: TEXT_LIMIT - 1].rstrip() + "…"


def grid_rows(policy: Policy) -> tuple[str, ...]:
    """The policy's mask of one short sample, a string for each row."""
    mask = dense_mask(policy, torch.tensor([GRID_LENGTHS]))
    columns = segment_letters(GRID_LENGTHS)
    return tuple(
        "".join(letter if seen else " " for letter, seen in zip(columns, row, strict=True))
        for row in mask.tolist()
    )
