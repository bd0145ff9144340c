"""A run's means beside published ones of the same benchmark.

Only a whole benchmark stands beside them: a mean over a choice of subsets compares with nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.results import Results

MEANS = ("in_distribution", "out_of_distribution", "overall")
OWN = "this run"


@dataclass(frozen=True)
class Line:
    """One model's means in [0, 1], in the order of the columns."""

    model: str
    scores: tuple[float, ...]
    is_own: bool


def columns(results: Results) -> tuple[str, ...]:
    """Groups in the benchmark's order, then the means over splits and over all."""
    return (*results.groups, *MEANS)


def lines(results: Results, published: Sequence[Mapping[str, object]]) -> list[Line]:
    """Published rows as they are listed, and the run's own last; none for a choice of subsets.

    Args:
        published: rows with `model`, and every column in percent, as papers have them.

    Raises:
        UserError: if a row lacks a column or has one more.
    """
    if results.is_partial or not published:
        return []
    wanted = columns(results)
    found = []
    for row in published:
        if different := set(row) ^ {"model", *wanted}:
            raise UserError(
                f"benchmark.published: the row of {row.get('model')} must have model, "
                f"{', '.join(wanted)}; see {', '.join(sorted(different))}"
            )
        scores = tuple(_fraction(row, name) for name in wanted)
        found.append(Line(str(row["model"]), scores, is_own=False))
    content = results.to_json()
    means = {**content["groups"], **{name: content[name] for name in MEANS}}
    return [*found, Line(OWN, tuple(means[name] for name in wanted), is_own=True)]


def published_table(results: Results, rows: Sequence[Line]) -> Table:
    """`lines` for a terminal, in percent."""
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
