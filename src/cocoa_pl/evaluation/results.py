"""Scores and example rows of one evaluated benchmark, written to and read from results.json."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cocoa_pl.data.items import Item
from cocoa_pl.errors import UserError, system_error
from cocoa_pl.evaluation.figures import Space

CONFIDENCE = 0.95
RESAMPLES = 10_000
Interval = tuple[float, float]
MEANS = ("overall", "in_distribution", "out_of_distribution")  # as results.json names them
NEVER_LACKING = 7  # keys of a subset, from `group` to `chance`, that every version wrote


@dataclass(frozen=True)
class SubsetScore:
    """Scores of one subset in [0, 1], as results.json has them under its name.

    Attributes:
        num_candidates: unique ones over all rows.
        chance: precision@1 of a guess among each row's distinct candidates.
        num_queries_without_choice: rows with a single candidate, which are hits whatever the model
            says.
        more: other metrics of `scoring.metrics`, by name.
        widths: precision@1 of the leading components, by their number.
        positive_similarities, hardest_negative_similarities: rows of each of `scoring.BINS`, by
            the cosine of their query with its positive, and with the nearest of its other
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
    more: Mapping[str, float] = field(default_factory=dict)
    widths: Mapping[str, float] = field(default_factory=dict)
    positive_similarities: Sequence[int] = ()
    hardest_negative_similarities: Sequence[int] = ()

    @property
    def caveat(self) -> str:
        """What a reader of the score must know; empty for nothing."""
        if not self.num_queries_without_choice:
            return ""
        return (
            f"{self.num_queries_without_choice:,} of {self.num_queries:,} queries have a single "
            "candidate, which is right whatever the model says"
        )

    def score(self, name: str) -> float:
        """One of its scores by its name in results.json, or by a number of components."""
        others = {**self.more, **self.widths}
        return others[name] if name in others else float(getattr(self, name))

    def to_json(self) -> dict[str, Any]:
        """All but the name, `more` among the other keys, and nothing that is empty."""
        content = {key: value for key, value in asdict(self).items() if value not in ({}, ())}
        del content["name"]
        more = content.pop("more", {})
        return {**content, **more}

    @classmethod
    def from_json(cls, name: str, content: Mapping[str, Any]) -> SubsetScore:
        """Raises KeyError for one that lacks what every version wrote, ValueError for no scores."""
        own = [one.name for one in fields(cls) if one.name not in ("name", "more")]
        given = {key: content[key] for key in own[:NEVER_LACKING]}
        given |= {key: content[key] for key in own[NEVER_LACKING:] if key in content}
        more = {key: value for key, value in content.items() if "_at_" in key and key not in own}
        found = cls(name, more=more, **given)
        scores = [found.precision_at_1, found.precision_at_1_strict, found.chance, *more.values()]
        scores += found.widths.values()
        if not all(0 <= score <= 1 for score in scores) or not found.num_queries > 0:
            raise ValueError(f"{name} has a score that is none")
        return found


@dataclass(frozen=True)
class TaskScore:
    """What mteb gave a task, by a rule of its own: it is no precision@1, and part of no mean.

    Attributes:
        group: the task's type.
        metric: the task's main one.
    """

    name: str
    group: str
    metric: str
    score: float

    def to_json(self) -> dict[str, Any]:
        return {"group": self.group, "metric": self.metric, "score": self.score}

    @classmethod
    def from_json(cls, name: str, content: Mapping[str, Any]) -> TaskScore:
        if not math.isfinite(content["score"]):
            raise ValueError(f"{name} has a score that is none")
        return cls(name, *(content[key] for key in ("group", "metric", "score")))


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

    Attributes:
        is_partial: only a choice of its subsets was scored: there are no means, which would compare
            with nothing.
        tasks: those of mteb, which then are all there is.
        about: more that results.json tells, by its keys there.
        gallery, space: example rows, and a map of some queries and positives; for the report alone.
    """

    benchmark: str
    checkpoint: str
    subsets: tuple[SubsetScore, ...]
    gallery: tuple[GalleryRow, ...] = ()
    is_partial: bool = False
    space: Space | None = None
    tasks: tuple[TaskScore, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

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

    @property
    def averages(self) -> dict[str, tuple[SubsetScore, ...]]:
        """Means and groups -> their subsets; none of partial results."""
        return {} if self.is_partial else {**self.means, **self.groups}

    @property
    def widths(self) -> dict[str, float]:
        """Overall precision@1 of leading components, by their number; none of partial results."""
        some = self.means.get("overall", ())
        names = some[0].widths if some else ()
        return {width: mean_score(some, of=width) for width in names}

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

        return {
            "benchmark": self.benchmark,
            "checkpoint": self.checkpoint,
            **of_all(mean_score),
            **({"widths": self.widths} if self.widths else {}),
            **self.about,
            "intervals": {
                "confidence": CONFIDENCE,
                **of_all(score_interval),
                "subsets": {subset.name: score_interval([subset]) for subset in self.subsets},
            },
            "subsets": {
                **{one.name: one.to_json() for one in self.subsets},
                **{one.name: one.to_json() for one in self.tasks},
            },
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Results:
        """Scores alone: what is a mean follows from the subsets.

        Raises:
            KeyError, ValueError, TypeError, AttributeError: for what `to_json` does not give.
        """
        found: dict[type, list[Any]] = {SubsetScore: [], TaskScore: []}
        for name, one in content["subsets"].items():
            kind = TaskScore if "metric" in one else SubsetScore
            found[kind].append(kind.from_json(name, one))
        subsets, tasks = (tuple(some) for some in found.values())
        if not subsets and not tasks:
            raise ValueError("it holds no scores")
        is_partial = content["overall"] is None
        return cls(
            content["benchmark"], content["checkpoint"], subsets, (), is_partial, None, tasks
        )

    def write_json(self, path: Path) -> None:
        text = json.dumps(self.to_json(), indent=2, allow_nan=False, ensure_ascii=False)
        # Half of a surrogate pair, as in a path that is not UTF-8, is an escape of JSON then.
        path.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def read_results(path: Path) -> Results:
    """The content of a results.json, of this version or an earlier one.

    Raises:
        UserError: if it is damaged.
    """
    try:
        return Results.from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(system_error(error), file=path) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is damaged ({what}); score the model again") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration that a run saved; empty for a folder without one.

    Raises:
        UserError: if it is damaged.
    """
    found = read_yaml(path := folder / "config.yaml") or {}
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no keys")
    return found


def read_yaml(path: Path) -> Any:
    """The content of a file; None for none.

    Raises:
        UserError: if it is damaged.
    """
    if not path.is_file():
        return None
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(system_error(error), file=path) from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def mean_score(subsets: Sequence[SubsetScore], of: str = "precision_at_1") -> float:
    """Unweighted mean of a score over at least one subset."""
    return sum(subset.score(of) for subset in subsets) / len(subsets)


def score_interval(subsets: Sequence[SubsetScore]) -> Interval:
    """Interval of the unweighted mean of precision@1 over at least one subset: a bootstrap over
    queries (Efron 1979).

    Rows score 0 or 1, so how many of a resample's rows are hits is binomial, and none is drawn row
    by row. Which subsets a benchmark has is not drawn: an interval covers no other data sets. The
    draws follow from a subset's name, so that it has the same interval in any choice of them.
    """
    resampled = []  # for each subset [RESAMPLES] scores of as many rows drawn with replacement
    for one in subsets:
        random = np.random.default_rng(
            int.from_bytes(one.name.encode(errors="surrogatepass"), "little")
        )
        drawn = random.binomial(one.num_queries, one.precision_at_1, size=RESAMPLES)
        resampled.append(drawn / one.num_queries)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.mean(resampled, axis=0), [tail, 1 - tail])
    return float(low), float(high)
