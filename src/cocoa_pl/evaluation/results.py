"""Scores and example rows of one evaluated benchmark, written to and read from results.json."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cocoa_pl.data.items import Item
from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.figures import Space

CONFIDENCE = 0.95
RESAMPLES = 10_000
Interval = tuple[float, float]
MEANS = ("overall", "in_distribution", "out_of_distribution")  # as results.json names them
# Of what mteb scores: by rules of each task's own, so nothing is precision@1 and nothing is a mean.
OF_MTEB: dict[str, Any] = {**dict.fromkeys(MEANS), "groups": {}, "subsets": {}}
_READ = ("precision_at_1", "group", "in_distribution", "num_queries")


@dataclass(frozen=True)
class SubsetScore:
    """Scores of one subset in [0, 1], as results.json has them under its name.

    Attributes:
        num_candidates: unique ones over all rows.
        num_queries_without_choice: rows with a single candidate, which are hits whatever the model
            says.
        positive_similarities, hardest_negative_similarities: rows of each bin of `figures.EDGES`,
            by the cosine of their query with its positive, and with the nearest of its other
            candidates; empty where they were not counted.
    """

    name: str
    group: str
    in_distribution: bool
    precision_at_1: float
    precision_at_1_strict: float
    num_queries: int
    num_candidates: int
    chance: float
    num_queries_without_choice: int = 0
    positive_similarities: tuple[int, ...] = ()
    hardest_negative_similarities: tuple[int, ...] = ()

    @property
    def caveat(self) -> str:
        """What a reader of the score must know; empty for nothing."""
        if not self.num_queries_without_choice:
            return ""
        return (
            f"{self.num_queries_without_choice:,} of {self.num_queries:,} queries have a single "
            "candidate, which is right whatever the model says"
        )


@dataclass(frozen=True)
class RankedCandidate:
    """A candidate as a query ranked it; rank 1 is the best of `GalleryRow.num_candidates`."""

    item: Item
    rank: int
    score: float
    is_positive: bool


@dataclass(frozen=True)
class GalleryRow:
    """A query with its best candidates, and after them the positive if it is not among these."""

    subset: str
    row_id: str
    query: Item
    ranked: tuple[RankedCandidate, ...]
    num_candidates: int
    hit: bool  # by the strict rule


@dataclass(frozen=True)
class Results:
    """Scores of a benchmark; every mean is over subsets, unweighted, as MMEB reports it.

    `is_partial` says that only a choice of its subsets was scored: then there are no means, which
    would compare with nothing. `space` is a map of some queries and positives.
    """

    benchmark: str
    checkpoint: str
    subsets: tuple[SubsetScore, ...]
    gallery: tuple[GalleryRow, ...]
    is_partial: bool = False
    space: Space | None = None

    @property
    def groups(self) -> dict[str, tuple[SubsetScore, ...]]:
        """Group -> its subsets, in order of first appearance."""
        names = dict.fromkeys(subset.group for subset in self.subsets)
        return {name: tuple(s for s in self.subsets if s.group == name) for name in names}

    @property
    def means(self) -> dict[str, tuple[SubsetScore, ...]]:
        """What results.json calls a mean -> its subsets; of those means that there are."""
        parts = (
            self.subsets,
            tuple(s for s in self.subsets if s.in_distribution),
            tuple(s for s in self.subsets if not s.in_distribution),
        )
        named = zip(MEANS, parts, strict=True)
        return {name: some for name, some in named if some and not self.is_partial}

    def to_json(self) -> dict[str, Any]:
        """The content of results.json; a split without subsets is null, and so are all means over
        subsets of a partial result.
        """

        def of_all(score: Callable[[Sequence[SubsetScore]], Any]) -> dict[str, Any]:
            groups = self.groups.items()
            return {
                **dict.fromkeys(MEANS),
                **{name: score(some) for name, some in self.means.items()},
                "groups": {n: None if self.is_partial else score(some) for n, some in groups},
            }

        subsets = {subset.name: asdict(subset) for subset in self.subsets}
        return {
            "benchmark": self.benchmark,
            "checkpoint": self.checkpoint,
            **of_all(mean_score),
            "intervals": {
                "confidence": CONFIDENCE,
                **of_all(score_interval),
                "subsets": {subset.name: score_interval([subset]) for subset in self.subsets},
            },
            "subsets": {
                name: {key: value for key, value in one.items() if key != "name" and value != ()}
                for name, one in subsets.items()
            },
        }

    def write_json(self, path: Path) -> None:
        text = json.dumps(self.to_json(), indent=2, allow_nan=False, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def read_results(path: Path) -> dict[str, Any]:
    """The content of a results.json; one that mteb scored holds `tasks`.

    Raises:
        UserError: if it is damaged.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if "tasks" in content:  # older ones of mteb hold nothing else
            content = {**OF_MTEB, **content}
        benchmark, groups = content["benchmark"], content["groups"]
        scores = [*(content[name] for name in MEANS), *groups.values()]
        rows = [[one[key] for key in _READ] for one in content["subsets"].values()]
        scores += [score for score, *_ in rows]
        tasks = [(one["metric"], one["main_score"]) for one in content.get("tasks", {}).values()]
        possible = all(score is None or 0 <= score <= 1 for score in scores)
        if not possible or not all(math.isfinite(score) for _, score in tasks):
            raise ValueError(f"{benchmark} has a score that is none")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is damaged ({what}); score the model again") from error
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration that a run saved; empty for a folder without one.

    Raises:
        UserError: if it is damaged.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except (yaml.YAMLError, ValueError, TypeError, OSError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def mean_score(subsets: Sequence[SubsetScore], of: str = "precision_at_1") -> float:
    """Unweighted mean of a score over at least one subset."""
    return sum(getattr(subset, of) for subset in subsets) / len(subsets)


def score_interval(subsets: Sequence[SubsetScore]) -> Interval:
    """Interval of the unweighted mean of precision@1 over at least one subset: a bootstrap over
    queries (Efron 1979).

    Rows score 0 or 1, so how many of a resample's rows are hits is binomial, and none is drawn row
    by row. Which subsets a benchmark has is not drawn: an interval covers no other data sets. The
    draws follow from a subset's name, so that it has the same interval in any choice of them.
    """
    resampled = []  # for each subset [RESAMPLES] scores of as many rows drawn with replacement
    for one in subsets:
        random = np.random.default_rng(int.from_bytes(one.name.encode(), "little"))
        drawn = random.binomial(one.num_queries, one.precision_at_1, size=RESAMPLES)
        resampled.append(drawn / one.num_queries)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.mean(resampled, axis=0), [tail, 1 - tail])
    return float(low), float(high)
