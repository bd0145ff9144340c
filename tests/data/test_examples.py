"""What each stage makes of a pair."""

import math
from collections import Counter

import numpy as np
import pytest

from cocoa_pl.data.examples import (
    BridgeExamples,
    CaptionExamples,
    PairExamples,
)
from cocoa_pl.data.items import IMAGE_SLOT, Item, Pair
from cocoa_pl.data.pairs import Pairs
from cocoa_pl.errors import UserError

PICTURE = Item(f"{IMAGE_SLOT}\nFind the caption", (b"picture",))
OTHER = Item(IMAGE_SLOT, (b"other",))
CAPTION = Item("a red dog")
QUESTION = Item("Which dog is red?")


def pair(query: Item, positive: Item, *negatives: Item, subset: str = "toy") -> Pair:
    return Pair(query, positive, negatives, subset, f"{subset} row 0")


def test_caption_example_puts_the_text_behind_the_image_or_the_query() -> None:
    expected = Item(f"{IMAGE_SLOT}\nFind the caption\na red dog", (b"picture",))
    for query, positive, made in (
        (PICTURE, CAPTION, expected),
        (CAPTION, PICTURE, expected),
        (QUESTION, CAPTION, Item("Which dog is red?\na red dog")),
    ):
        assert CaptionExamples()(pair(query, positive), np.random.default_rng(0)) == ((made, None),)


@pytest.mark.parametrize("both", [pair(PICTURE, CAPTION), pair(CAPTION, PICTURE)])
@pytest.mark.parametrize("share", [0, 0.2, 0.9, 1])
def test_bridge_rebuilds_the_text_from_either_source_in_the_shares_asked_for(
    share: float, both: Pair
) -> None:
    make = BridgeExamples(sources={"query": share, "self": 1 - share})
    rows, rng = 2000, np.random.default_rng(0)
    drawn = Counter(make(both, rng) for _ in range(rows))
    from_image, from_text = ((PICTURE, "a red dog"),), ((CAPTION, "a red dog"),)
    assert drawn.total() == drawn[from_image] + drawn[from_text]
    assert abs(drawn[from_image] / rows - share) <= 4 * math.sqrt(share * (1 - share) / rows)


@pytest.mark.parametrize(
    "sources", [{"query": 0.5}, {"query": 0.5, "self": 0.4}, {"query": 0.5, "target": 0.5}, {}]
)
def test_bridge_shares_that_make_no_whole_are_refused(sources: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="bridge sources must be shares of query and self"):
        BridgeExamples(sources=sources)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_pair_gives_query_positive_and_the_first_negatives(count: int) -> None:
    negatives = (OTHER, QUESTION)
    make, row = PairExamples(max_negatives=count), pair(PICTURE, CAPTION, *negatives)
    expected = tuple((item, None) for item in (PICTURE, CAPTION, *negatives[:count]))
    assert make(row, np.random.default_rng(0)) == expected


def test_only_pairs_with_a_describing_text_and_of_the_subsets_are_kept() -> None:
    good, images = pair(PICTURE, CAPTION, subset="a"), pair(PICTURE, OTHER, subset="a")
    elsewhere = pair(CAPTION, PICTURE, subset="b")
    pairs = Pairs.of([good, images, elsewhere])
    assert list(pairs.describing(None)) == [good, elsewhere]
    assert list(pairs.describing(["a"])) == [good]
    with pytest.raises(UserError, match=r"no pair has an image .* \(subsets: \['b'\]\)"):
        Pairs.of([good]).describing(["b"])


def test_each_subset_gives_its_first_pairs_in_order() -> None:
    pairs = [pair(PICTURE, CAPTION, subset=name) for name in "abaaba"]
    first = Pairs.of(pairs).first_of_each_subset
    assert list(first(2)) == [pairs[i] for i in (0, 1, 2, 4)]
    assert list(first(None)) == pairs
