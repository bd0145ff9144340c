"""Examples that a stage makes of a pair: one class for each way of using a pair."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import overload

import numpy as np

from cocoa_pl.config.bounds import Share, Whole
from cocoa_pl.data.items import Item, Pair
from cocoa_pl.data.readers import has_media, select, subset_codes
from cocoa_pl.data.stream import PairStream
from cocoa_pl.errors import UserError

Example = tuple[Item, str | None]  # CONTEXT, and TARGET where a text is to be rebuilt
MakeSamples = Callable[[Pair, np.random.Generator], tuple[Example, ...]]


def sides(pair: Pair) -> tuple[Item, str] | None:
    """The side with the image and the text that describes it; None where both sides hold images.

    A pair of two texts counts its query as the first side.
    """
    if not pair.positive.media:
        return pair.query, pair.positive.text
    if not pair.query.media:
        return pair.positive, pair.query.text
    return None


class CaptionExamples:
    """Image and text as one CONTEXT: warm-up and plain captioning."""

    def __call__(self, pair: Pair, rng: np.random.Generator) -> tuple[Example, ...]:
        image, text = _sides(pair)
        return ((Item(f"{image.text}\n{text}", image.media), None),)


class BridgeExamples:
    """A CONTEXT whose EOS must rebuild the pair's text.

    From the image side (`query`), and from the text itself (`self`): then the EOS of an image and
    the EOS of its caption must decode to the same words. One of them is drawn for each row and
    epoch.

    Args:
        sources: shares of `query` and `self`; the released scripts use the query side only.

    Raises:
        ValueError: for another source or shares that do not add up to one.
    """

    def __init__(self, *, sources: Mapping[str, Share]) -> None:
        if set(sources) != {"query", "self"} or abs(sum(sources.values()) - 1) > 1e-9:
            raise ValueError(
                f"bridge sources must be shares of query and self, got {dict(sources)}"
            )
        self.query_share = sources["query"]

    def __call__(self, pair: Pair, rng: np.random.Generator) -> tuple[Example, ...]:
        image, text = _sides(pair)
        from_query = rng.random() < self.query_share
        return ((image if from_query else Item(text), text),)


class PairExamples:
    """Query, positive and hard negatives, each embedded apart.

    Args:
        max_negatives: hard negatives of a row that are used, from the first on.
    """

    def __init__(self, *, max_negatives: Whole) -> None:
        self.max_negatives = max_negatives

    def __call__(self, pair: Pair, rng: np.random.Generator) -> tuple[Example, ...]:
        items = (pair.query, pair.positive, *pair.negatives[: self.max_negatives])
        return tuple((item, None) for item in items)


def check_contrast(
    pairs: Sequence[Pair] | PairStream, make_samples: MakeSamples, *, batch_size: int
) -> None:
    """Refuse pairs without negatives: a stage that embeds pairs needs two rows that differ in query
    and in positive, or hard negatives.

    Raises:
        UserError: for a batch of one row, or rows that all share a positive or a query, without
            hard negatives.
    """
    if not isinstance(make_samples, PairExamples):
        return
    alike = ""
    if batch_size == 1:
        alike = "a batch has one row"
    elif not isinstance(pairs, PairStream):  # whose rows are not known
        if _all_alike(pair.positive.key for pair in pairs):
            alike = f"all {len(pairs)} rows have the same positive"
        elif _all_alike(pair.query.key for pair in pairs):
            alike = f"all {len(pairs)} rows have the same query"
    if not alike or (make_samples.max_negatives and _have_negatives(pairs)):
        return
    raise UserError(
        f"{alike}, and there are no hard negatives: no query has a wrong answer; "
        "raise the stage's batch_size, or give other rows or hard negatives"
    )


def _have_negatives(pairs: Sequence[Pair] | PairStream) -> bool:
    return isinstance(pairs, PairStream) or any(pair.negatives for pair in pairs)


def _all_alike(keys: Iterator[int]) -> bool:
    """Looks no further than the first that is not."""
    first = next(keys, None)
    return all(key == first for key in keys)


@overload
def describing(pairs: PairStream, subsets: Sequence[str] | None) -> PairStream: ...


@overload
def describing(pairs: Sequence[Pair], subsets: Sequence[str] | None) -> Sequence[Pair]: ...


def describing(
    pairs: Sequence[Pair] | PairStream, subsets: Sequence[str] | None
) -> Sequence[Pair] | PairStream:
    """Pairs of an image and its text, of the given subsets: what generative stages can use.

    Raises:
        UserError: if none is left.
    """
    if isinstance(pairs, PairStream):
        return pairs.describing(subsets)
    names, codes = subset_codes(pairs)
    wanted = [subsets is None or name in subsets for name in names]
    kept = np.array(wanted, dtype=bool)[codes] & ~has_media(pairs).all(axis=1)
    if not kept.any():
        raise UserError(
            f"no pair has an image on one side and text on the other (subsets: {subsets})"
        )
    return select(pairs, np.flatnonzero(kept))


def first_of_each_subset(
    pairs: Sequence[Pair] | PairStream, count: int | None
) -> Sequence[Pair] | PairStream:
    """At most `count` pairs of each subset, in their order; None keeps all."""
    if isinstance(pairs, PairStream):
        return replace(pairs, first=count)
    if count is None:
        return pairs
    names, codes = subset_codes(pairs)
    kept = [np.flatnonzero(codes == code)[:count] for code in range(len(names))]
    return select(pairs, np.sort(np.concatenate([np.empty(0, np.int64), *kept])))


def _sides(pair: Pair) -> tuple[Item, str]:
    found = sides(pair)
    assert found is not None, "pairs are filtered by `describing`"
    return found
