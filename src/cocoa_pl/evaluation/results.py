"""Scores and example rows of one evaluated benchmark, written to and read from results.json."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from cocoa_pl.data.items import Item
from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.figures import Similarities, Space

CONFIDENCE = 0.95
RESAMPLES = 10_000
Interval = tuple[float, float]
MEANS = ("overall", "in_distribution", "out_of_distribution")  # as results.json names them
# Of what mteb scores: by rules of each task's own, so nothing is precision@1 and nothing is a mean.
OF_MTEB: dict[str, Any] = {**dict.fromkeys(MEANS), "groups": {}, "subsets": {}}
_READ = ("precision_at_1", "group", "in_distribution", "num_queries")


@dataclass(frozen=True)
class SubsetScore:
    """Scores of one subset in [0, 1]; `num_candidates` counts unique candidates over all rows,
    `num_without_choice` rows with a single one, which are hits whatever the model says.
    """

    name: str
    group: str
    in_distribution: bool
    precision_at_1: float
    precision_at_1_strict: float
    num_queries: int
    num_candidates: int
    chance: float
    similarities: Similarities | None = None
    num_without_choice: int = 0

    @property
    def caveat(self) -> str:
        """What a reader of the score must know; empty for nothing."""
        if not self.num_without_choice:
            return ""
        return (
            f"{self.num_without_choice:,} of {self.num_queries:,} queries have a single candidate, "
            "which is right whatever the model says"
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
    def overall(self) -> float | None:
        """The mean over all subsets; None if not all were scored."""
        return None if self.is_partial else mean_score(self.subsets)

    @property
    def in_distribution(self) -> float | None:
        """The mean over subsets of this split; None if there is none."""
        return self._split_score(in_distribution=True)

    @property
    def out_of_distribution(self) -> float | None:
        """The mean over subsets of this split; None if there is none."""
        return self._split_score(in_distribution=False)

    @property
    def groups(self) -> dict[str, tuple[SubsetScore, ...]]:
        """Group -> its subsets, in order of first appearance."""
        names = dict.fromkeys(subset.group for subset in self.subsets)
        return {name: tuple(s for s in self.subsets if s.group == name) for name in names}

    def split(self, *, in_distribution: bool) -> tuple[SubsetScore, ...]:
        return tuple(s for s in self.subsets if s.in_distribution == in_distribution)

    def to_json(self) -> dict[str, Any]:
        """The content of results.json; a split without subsets is null, and so are all means over
        subsets of a partial result.
        """
        return {
            "benchmark": self.benchmark,
            "checkpoint": self.checkpoint,
            "overall": self.overall,
            "in_distribution": self.in_distribution,
            "out_of_distribution": self.out_of_distribution,
            "groups": {
                name: None if self.is_partial else mean_score(subsets)
                for name, subsets in self.groups.items()
            },
            "intervals": self._intervals(),
            "subsets": {
                subset.name: {
                    "group": subset.group,
                    "in_distribution": subset.in_distribution,
                    "precision_at_1": subset.precision_at_1,
                    "precision_at_1_strict": subset.precision_at_1_strict,
                    "num_queries": subset.num_queries,
                    "num_candidates": subset.num_candidates,
                    "chance": subset.chance,
                    "num_queries_without_choice": subset.num_without_choice,
                    **(subset.similarities.to_json() if subset.similarities else {}),
                }
                for subset in self.subsets
            },
        }

    def _intervals(self) -> dict[str, Any]:
        """Of everything that has a score by the official rule, by its name."""
        splits = {
            "overall": self.subsets,
            "in_distribution": self.split(in_distribution=True),
            "out_of_distribution": self.split(in_distribution=False),
        }
        found: dict[str, Any] = {"confidence": CONFIDENCE}
        for name, subsets in splits.items():
            found[name] = None if self.is_partial or not subsets else score_interval(subsets)
        found["groups"] = {
            name: None if self.is_partial else score_interval(subsets)
            for name, subsets in self.groups.items()
        }
        found["subsets"] = {subset.name: score_interval([subset]) for subset in self.subsets}
        return found

    def write_json(self, path: Path) -> None:
        text = json.dumps(self.to_json(), indent=2, allow_nan=False, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")

    def _split_score(self, *, in_distribution: bool) -> float | None:
        subsets = self.split(in_distribution=in_distribution)
        return mean_score(subsets) if subsets and not self.is_partial else None


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


def mean_score(subsets: Sequence[SubsetScore], *, strict: bool = False) -> float:
    """Unweighted mean of precision@1 over at least one subset."""
    scores = [s.precision_at_1_strict if strict else s.precision_at_1 for s in subsets]
    return sum(scores) / len(scores)


def score_interval(subsets: Sequence[SubsetScore]) -> Interval:
    """Interval of the unweighted mean of precision@1 over at least one subset."""
    return interval([resampled(s.precision_at_1, s.num_queries, name=s.name) for s in subsets])


def resampled(score: float, count: int, *, name: str) -> NDArray[np.float64]:
    """[RESAMPLES] scores of as many rows drawn with replacement: a bootstrap over queries (Efron
    1979).

    Rows score 0 or 1, so how many of a resample's rows are hits is binomial, and none is drawn row
    by row. Which subsets a benchmark has is not drawn: an interval covers no other data sets.

    Args:
        name: of the subset; the draws follow from it, so that a subset has the same interval in
            any choice of them.
    """
    seed = int.from_bytes(name.encode(), "little")
    drawn = np.random.default_rng(seed).binomial(count, score, size=RESAMPLES)
    return drawn / count


def interval(parts: Sequence[NDArray[np.float64]]) -> Interval:
    """Interval of the unweighted mean over subsets, from the resamples [RESAMPLES] of each."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.mean(parts, axis=0), [tail, 1 - tail])
    return float(low), float(high)
