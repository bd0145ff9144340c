"""Examples that a stage makes of a pair: one class for each way of using a pair."""

from collections.abc import Callable, Mapping

import numpy as np

from cocoa_pl.config.bounds import Share, Whole
from cocoa_pl.data.items import Item, Pair
from cocoa_pl.data.pairs import Pairs
from cocoa_pl.data.stream import PairStream
from cocoa_pl.errors import UserError

Example = tuple[Item, str | None]  # CONTEXT, and TARGET where a text is to be rebuilt
MakeSamples = Callable[[Pair, np.random.Generator], tuple[Example, ...]]


def sides(pair: Pair) -> tuple[Item, str]:
    """The side with the image and the text that describes it; of two texts the query comes first.

    Pairs with images on both sides are left out before, by `describing`.
    """
    if not pair.positive.media:
        return pair.query, pair.positive.text
    assert not pair.query.media
    return pair.positive, pair.query.text


class CaptionExamples:
    """Image and text as one CONTEXT: warm-up and plain captioning."""

    def __call__(self, pair: Pair, rng: np.random.Generator) -> tuple[Example, ...]:
        image, text = sides(pair)
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
        image, text = sides(pair)
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
    pairs: Pairs | PairStream, make_samples: MakeSamples, *, batch_size: int
) -> None:
    """Refuse pairs without negatives: a stage that embeds pairs needs two rows that differ in query
    and in positive, or hard negatives.

    Raises:
        UserError: for a batch of one row, or rows that all share a positive or a query, without
            hard negatives.
    """
    if not isinstance(make_samples, PairExamples):
        return
    rows = pairs if isinstance(pairs, Pairs) else ()  # those of a stream are not known
    alike = "a batch has one row" if batch_size == 1 else ""
    for role in ("positive", "query"):
        keys = (getattr(pair, role).key for pair in rows)
        first = next(keys, None) if not alike else None
        if first is not None and all(key == first for key in keys):  # up to the first other one
            alike = f"all {len(rows)} rows have the same {role}"
    if not alike:  # without looking for negatives: there may be millions of rows without any
        return
    has_negatives = not rows or any(pair.negatives for pair in rows)
    if not (make_samples.max_negatives and has_negatives):
        raise UserError(
            f"{alike}, and there are no hard negatives: no query has a wrong answer; "
            "raise the stage's batch_size, or give other rows or hard negatives"
        )
