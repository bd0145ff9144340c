"""The rows that training would use, read by training's own readers, and findings about the others.

Bad rows are left out. What cannot be read as a whole is read subset by subset, so that one missing
folder does not hide the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from cocoa_pl.data.items import EvalSubset, Pair
from cocoa_pl.data.sources import DataOfStages, source_of
from cocoa_pl.data.stream import PairStream
from cocoa_pl.doctor.findings import Finding, Findings
from cocoa_pl.errors import UserError
from cocoa_pl.stages.recipe import Stage, TrainingData

TRAIN, VALIDATION = "train", "validation"


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
    def pairs(self) -> Iterator[tuple[str, Pair]]:
        """All pairs of all sources, each with the name of its part."""
        return ((part, p) for source in self.sources for part, rows in source.parts for p in rows)


def read(
    data: TrainingData | DataOfStages,
    stages: Sequence[Stage],
    benchmark: Any,
    findings: Findings,
    *,
    data_pieces: Callable[[], Sequence[TrainingData]],
    benchmark_pieces: Callable[[], Sequence[Any]],
) -> Reading:
    """Read all rows; readers that skip bad ones log what is wrong with them.

    Args:
        benchmark: what a benchmark config builds, or None.
        data_pieces, benchmark_pieces: what is read instead where the whole cannot be, such as each
            subset on its own.

    Raises:
        UserError: for data that are streamed.
    """
    by_source: dict[int, tuple[TrainingData, list[int]]] = {}
    for index, stage in enumerate(stages):
        source = source_of(data, stage.name)
        by_source.setdefault(id(source), (source, []))[1].append(index)
    alone = cache(data_pieces if len(by_source) == 1 else list)
    sources = []
    for source, indices in by_source.values():
        names = ", ".join(stages[index].name for index in indices)
        suffix = f" ({names})" if len(by_source) > 1 else ""
        rows = [
            _read(source, alone, method, part + suffix, findings)
            for part, method in ((TRAIN, "train_pairs"), (VALIDATION, "validation_pairs"))
        ]
        sources.append(Source(suffix, tuple(indices), source.caption_subsets, *rows))
    if benchmark is None:
        return Reading(sources, "", [])
    subsets = _read(benchmark, benchmark_pieces, "subsets", benchmark.name, findings)
    return Reading(sources, benchmark.name, subsets)


def _read(
    whole: Any, make_pieces: Callable[[], Sequence[Any]], method: str, part: str, findings: Findings
) -> Any:
    """All rows that a method gives, or those of the pieces that can be read."""
    rows: Any = []
    failure = ""
    known = len(whole.left_out)
    try:
        rows = getattr(whole, method)()
    except UserError as error:
        failure = str(error)
    found = [Finding.of(error, part=part) for error in whole.left_out[known:]]
    if failure:
        if pieces := make_pieces():
            return [row for piece in pieces for row in _read(piece, list, method, part, findings)]
        if any(failure == said.message for said in findings.kept["unreadable_source"]):
            return []  # the same files were read for another part
        found.append(Finding("unreadable_source", part, "", "", "", failure))
    for finding in found:
        findings.add(finding)
    if isinstance(rows, PairStream):
        raise UserError(
            "streamed rows cannot be compared with each other; fetch a part of the corpus and "
            "check that with data=mmeb data.root=FOLDER"
        )
    return rows
