"""The rows that training would use, read by training's own readers, and findings about the others.

Bad rows are left out. What cannot be read as a whole is read subset by subset, so that one missing
folder does not hide the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any, Protocol

from cocoa_pl.data.items import EvalSubset, Pair
from cocoa_pl.data.sources import DataOfStages, source_of
from cocoa_pl.data.stream import PairStream
from cocoa_pl.doctor.findings import Finding, Findings
from cocoa_pl.doctor.row_errors import collect_row_errors
from cocoa_pl.errors import UserError
from cocoa_pl.stages.recipe import Stage, TrainingData

TRAIN, VALIDATION = "train", "validation"


class Benchmark(Protocol):
    """What a benchmark config must offer."""

    name: str

    def subsets(self) -> list[EvalSubset]: ...


@dataclass(frozen=True)
class Pieces:
    """Makes the same data and benchmark subset by subset, to find out which cannot be read."""

    data: Callable[[], Sequence[TrainingData]]
    benchmark: Callable[[], Sequence[Benchmark]]


@dataclass(frozen=True)
class Source:
    """Rows of one data source without the bad ones, which are findings.

    Attributes:
        suffix: of the names of its parts, where stages have sources of their own.
        stages: positions of the stages that read it.
    """

    suffix: str
    stages: tuple[int, ...]
    caption_subsets: Sequence[str] | None
    train: Sequence[Pair]
    validation: Sequence[Pair]

    @property
    def parts(self) -> tuple[tuple[str, Sequence[Pair]], ...]:
        """Names and rows of its two parts."""
        return (TRAIN + self.suffix, self.train), (VALIDATION + self.suffix, self.validation)


@dataclass(frozen=True)
class Reading:
    """What the readers made of the files."""

    sources: Sequence[Source]
    benchmark_name: str
    subsets: Sequence[EvalSubset]

    @property
    def pairs(self) -> Iterator[Pair]:
        """All pairs of all sources."""
        return chain.from_iterable(rows for source in self.sources for _, rows in source.parts)


def read(
    data: TrainingData | DataOfStages,
    stages: Sequence[Stage],
    benchmark: Benchmark | None,
    findings: Findings,
    *,
    pieces: Pieces,
) -> Reading:
    """Read all rows; readers that skip bad ones log what is wrong with them.

    Args:
        pieces: what is read instead where the whole cannot be, such as each subset on its own.

    Raises:
        UserError: for data that are streamed.
    """
    by_source: dict[int, tuple[TrainingData, list[int]]] = {}
    for index, stage in enumerate(stages):
        source = source_of(data, stage.name)
        by_source.setdefault(id(source), (source, []))[1].append(index)
    sources = []
    for source, indices in by_source.values():
        names = ", ".join(stages[index].name for index in indices)
        suffix = f" ({names})" if len(by_source) > 1 else ""
        alone = cache(pieces.data if len(by_source) == 1 else list)
        rows = [
            _read(getattr(source, method), _each(alone, method), part + suffix, findings)
            for part, method in ((TRAIN, "train_pairs"), (VALIDATION, "validation_pairs"))
        ]
        sources.append(Source(suffix, tuple(indices), source.caption_subsets, *rows))
    if benchmark is None:
        return Reading(sources, "", [])
    pieces_of_it = _each(pieces.benchmark, "subsets")
    subsets = _read(benchmark.subsets, pieces_of_it, benchmark.name, findings)
    return Reading(sources, benchmark.name, subsets)


def _each(make: Callable[[], Sequence[Any]], method: str) -> Callable[[], list[Callable[[], Any]]]:
    """A function that makes the pieces and gives this method of each."""
    return lambda: [getattr(piece, method) for piece in make()]


def _read(
    whole: Callable[[], Any],
    make_pieces: Callable[[], Sequence[Callable[[], Any]]],
    part: str,
    findings: Findings,
) -> Any:
    """All rows, or those of the pieces that can be read."""
    found = Findings()
    with collect_row_errors(found, part=part):
        try:
            rows = whole()
        except UserError as error:
            if pieces := make_pieces():
                read_rows = (_read(p, list, part, findings) for p in pieces)
                return [row for rows in read_rows for row in rows]
            if any(str(error) == said.message for said in findings.kept("unreadable_source")):
                return []  # the same files were read for another part
            found.add(Finding("unreadable_source", part, "", "", "", str(error)))
            rows = []
    findings.join(found)
    if isinstance(rows, PairStream):
        raise UserError(
            "streamed rows cannot be compared with each other; fetch a part of the corpus and "
            "check that with data=mmeb data.root=FOLDER"
        )
    return rows
