"""What each stage makes of a pair."""

import math
from collections import Counter

import pytest

from cocoa_pl.data.examples import (
    BridgeExamples,
    CaptionExamples,
    PairExamples,
    Sample,
    describing,
    first_of_each_subset,
    sides,
)
from cocoa_pl.data.items import IMAGE_SLOT, Item, Pair
from cocoa_pl.errors import UserError
from cocoa_pl.randomness import mix

PICTURE = Item(f"{IMAGE_SLOT}\nFind the caption", (b"picture",))
OTHER = Item(IMAGE_SLOT, (b"other",))
CAPTION = Item("a red dog")
QUESTION = Item("Which dog is red?")


def pair(query: Item, positive: Item, *negatives: Item, subset: str = "toy") -> Pair:
    return Pair(query, positive, negatives, subset, f"{subset} row 0")


@pytest.mark.parametrize(
    ("query", "positive", "expected"),
    [
        (PICTURE, CAPTION, (PICTURE, "a red dog")),
        (CAPTION, PICTURE, (PICTURE, "a red dog")),
        (QUESTION, CAPTION, (QUESTION, "a red dog")),
        (PICTURE, OTHER, None),
    ],
    ids=["image to text", "text to image", "text to text", "image to image"],
)
def test_sides_are_the_image_and_the_text_that_describes_it(
    query: Item, positive: Item, expected: tuple[Item, str] | None
) -> None:
    assert sides(pair(query, positive)) == expected


def test_caption_example_puts_the_text_behind_the_image() -> None:
    expected = (Sample(Item(f"{IMAGE_SLOT}\nFind the caption\na red dog", (b"picture",)), None),)
    for both in (pair(PICTURE, CAPTION), pair(CAPTION, PICTURE)):
        assert CaptionExamples()(both, 0) == expected


@pytest.mark.parametrize("both", [pair(PICTURE, CAPTION), pair(CAPTION, PICTURE)])
def test_bridge_rebuilds_the_same_text_from_either_source(both: Pair) -> None:
    from_image, from_text = Sample(PICTURE, "a red dog"), Sample(CAPTION, "a red dog")
    make = BridgeExamples(sources={"query": 0.5, "self": 0.5})
    assert {make(both, mix(seed)) for seed in range(50)} == {(from_image,), (from_text,)}
    assert {BridgeExamples(sources={"query": 1, "self": 0})(both, mix(s)) for s in range(50)} == {
        (from_image,)
    }
    assert {BridgeExamples(sources={"query": 0, "self": 1})(both, mix(s)) for s in range(50)} == {
        (from_text,)
    }


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_bridge_draws_its_sources_in_the_shares_asked_for(share: float) -> None:
    make, rows = BridgeExamples(sources={"query": share, "self": 1 - share}), 4000
    drawn = Counter(
        bool(make(pair(PICTURE, CAPTION), mix(0, 0, r))[0].context.media) for r in range(rows)
    )
    assert abs(drawn[True] / rows - share) < 4 * math.sqrt(share * (1 - share) / rows)


def test_bridge_draw_follows_from_the_seed() -> None:
    make = BridgeExamples(sources={"query": 0.5, "self": 0.5})
    first, second = ([make(pair(PICTURE, CAPTION), mix(s)) for s in range(30)] for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    "sources", [{"query": 0.5}, {"query": 0.5, "self": 0.4}, {"query": 0.5, "target": 0.5}, {}]
)
def test_bridge_shares_that_make_no_whole_are_refused(sources: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="bridge sources must be shares of query and self"):
        BridgeExamples(sources=sources)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_pair_gives_query_positive_and_the_first_negatives(count: int) -> None:
    negatives = (OTHER, QUESTION)
    samples = PairExamples(max_negatives=count)(pair(PICTURE, CAPTION, *negatives), 0)
    assert samples == tuple(Sample(i, None) for i in (PICTURE, CAPTION, *negatives[:count]))


def test_only_pairs_with_a_describing_text_and_of_the_subsets_are_kept() -> None:
    good, images = pair(PICTURE, CAPTION, subset="a"), pair(PICTURE, OTHER, subset="a")
    elsewhere = pair(CAPTION, PICTURE, subset="b")
    assert describing([good, images, elsewhere], None) == [good, elsewhere]
    assert describing([good, images, elsewhere], ["a"]) == [good]


def test_data_without_such_a_pair_is_refused() -> None:
    with pytest.raises(UserError, match=r"no pair has an image .* \(subsets: \['b'\]\)"):
        describing([pair(PICTURE, CAPTION, subset="a")], ["b"])


def test_each_subset_gives_its_first_pairs_in_order() -> None:
    pairs = [pair(PICTURE, CAPTION, subset=name) for name in "abaaba"]
    assert first_of_each_subset(pairs, 2) == [pairs[i] for i in (0, 1, 2, 4)]
    assert first_of_each_subset(pairs, None) == pairs
