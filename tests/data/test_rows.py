"""Rows become pairs as the mappings of conf/data say; a bad row is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cocoa_pl.data.items import IMAGE_SLOT, Item, Pair
from cocoa_pl.data.sources import PairSource
from cocoa_pl.errors import UserError

MakeSource = Callable[..., PairSource]
SLOT = IMAGE_SLOT
NONE = {"bytes": None, "path": None}

# A row each as in TIGER-Lab/MMEB-train; the negative image of VisDial has no placeholder there.
VISDIAL = {
    "qry": "Represent the given dialogue about an image, which is used for image retrieval: "
    "Q:is the photo in color\nA:yes\n\n",
    "qry_image_path": "",
    "pos_text": "<|image_1|>\nRepresent the given image\n",
    "pos_image_path": "images/a.png",
    "neg_text": "",
    "neg_image_path": "images/b.png",
}
MSCOCO = {
    "qry": "<|image_1|>\nFind an image caption describing the given everyday image.\n",
    "qry_image_path": "images/a.png",
    "pos_text": "A man with a red helmet.",
    "pos_image_path": "",
}
OWN = {"query": "Find the caption", "query_image": "images/a.png", "positive": "a dog asleep"}
CAPTION = {"image_path": "images/a.png", "caption": "a dog asleep on a sofa", "id": 17}
QUERY = {"qry": "<|image_1|>\nFind it", "qry_image_path": "images/b.png", "pos_text": "a cat"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rows")
    (root / "images").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (4, 4)).save(root / f"images/{name}.png")
    return root


@pytest.fixture(scope="module")
def pair(root: Path, pair_source: MakeSource) -> Callable[..., Pair]:
    def make(config: str, row: object, **changes: Any) -> Pair:
        form = pair_source(config, image_root=str(root), path=".", **changes).form
        found = form.pair(row, row_id="Set row 1", subset="Set")
        assert form.pair(row, row_id="Set row 1", subset="Set", is_known=True) == found
        return found

    return make


def picture(root: Path, *names: str, text: str = "") -> Item:
    return Item(SLOT * len(names) + text, tuple(root / f"images/{name}.png" for name in names))


def test_published_rows_are_read_to_the_letter(root: Path, pair: Callable[..., Pair]) -> None:
    assert pair("mmeb", VISDIAL) == Pair(
        query=Item(VISDIAL["qry"]),
        positive=picture(root, "a", text="\nRepresent the given image\n"),
        negatives=(picture(root, "b"),),
        subset="Set",
        row_id="Set row 1",
    )
    mscoco = pair("mmeb", MSCOCO)
    assert mscoco.query == picture(root, "a", text=MSCOCO["qry"].removeprefix("<|image_1|>"))
    assert (mscoco.positive, mscoco.negatives) == (Item(MSCOCO["pos_text"]), ())


def test_image_comes_first_unless_the_text_places_it(root: Path, pair: Callable[..., Pair]) -> None:
    placed = {"positive": "The dog in <|image_1|> sleeps", "positive_image": "images/b.png"}
    found = pair("pairs", OWN | placed)
    assert found.query == picture(root, "a", text="\nFind the caption")
    assert found.positive == Item(f"The dog in {SLOT} sleeps", (root / "images/b.png",))
    assert pair("pairs", OWN | {"query": None}).query == picture(root, "a")


def test_captions_and_queries_of_cocoa_become_pairs(root: Path, pair: Callable[..., Pair]) -> None:
    found = pair("cocoa_json", CAPTION)
    assert (found.query, found.positive) == (picture(root, "a"), Item("a dog asleep on a sofa"))
    found = pair("cocoa_json", QUERY)
    assert (found.query, found.positive) == (picture(root, "b", text="\nFind it"), Item("a cat"))
    found = pair("cocoa_json", {"qry": "only", "pos_text": "text"})
    assert (found.query, found.positive) == (Item("only"), Item("text"))
    below = pair("cocoa_json", CAPTION | {"image_path": str(root / "images/b.png")})
    assert below.query == picture(root, "b")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"png", (b"png",)),
        ({"bytes": b"png", "path": "elsewhere.png"}, (b"png",)),
        ({"bytes": b"", "path": "images/a.png"}, ("images/a.png",)),
        ([{"bytes": b"png", "path": None}, "images/b.png"], (b"png", "images/b.png")),
        (NONE, ()),
        (b"", ()),
        ([], ()),
    ],
    ids=str,
)
def test_images_in_the_rows_are_images(
    root: Path, pair: Callable[..., Pair], value: Any, expected: tuple[Any, ...]
) -> None:
    media = tuple(root / one if isinstance(one, str) else one for one in expected)
    found = pair(
        "pairs", OWN | {"query_image": value, "negatives": [{"text": "n", "image": value}]}
    )
    assert found.query.media == found.negatives[0].media == media
    row = MSCOCO | {"qry": "<image>" * len(media) + "a", "qry_image_path": value}
    assert pair("mmeb", row).query.media == media


@pytest.mark.parametrize(
    ("texts", "images", "expected"),
    [
        (None, None, []),
        ("", "", []),
        ("[]", "[]", []),
        ("a cat", "", [("a cat", None)]),
        ("['a cat', \"a dog's\", \"it's [third]\"]", "", ["a cat", "a dog's", "it's [third]"]),
        ("['a cat', 'a dog']", "['', '']", ["a cat", "a dog"]),
        ("['a cat', '']", "", ["a cat"]),
        ("", "['images/a.png', 'images/b.png']", [(SLOT, "a.png"), (SLOT, "b.png")]),
        ("['<|image_1|> red', 'x']", "['images/a.png', '']", [(f"{SLOT} red", "a.png"), "x"]),
        ("['no slot']", "images/b.png", [(f"{SLOT}\nno slot", "b.png")]),
        (["a cat", "a dog"], ["", "images/a.png"], ["a cat", (f"{SLOT}\na dog", "a.png")]),
        (["", "n"], [{"bytes": b"png", "path": None}, NONE], [(SLOT, b"png"), "n"]),
    ],
)
def test_negatives_may_be_strings_lists_or_written_lists(
    pair: Callable[..., Pair], texts: Any, images: Any, expected: list[Any]
) -> None:
    found = pair("mmeb", MSCOCO | {"neg_text": texts, "neg_image_path": images}).negatives
    names = [getattr(one, "name", one) for item in found for one in item.media or [None]]
    wanted = [one if isinstance(one, tuple) else (one, None) for one in expected]
    assert list(zip([item.text for item in found], names, strict=True)) == wanted


def test_negative_lists_are_parsed_never_executed(
    tmp_path: Path, pair: Callable[..., Pair]
) -> None:
    trap = tmp_path / "executed"
    text = f"[__import__('pathlib').Path({str(trap)!r}).touch()]"
    with pytest.raises(UserError, match="Set row 1: neg_text looks like a list"):
        pair("mmeb", MSCOCO | {"neg_text": text})
    assert not trap.exists()


def test_placeholder_without_an_image_is_taken_out_on_request(pair: Callable[..., Pair]) -> None:
    orphan = MSCOCO | {"pos_text": "<|image_1|>\nRepresent the page"}
    orphan |= {"neg_text": "['<|image_1|>\\nof nothing']", "neg_image_path": "['']"}
    found = pair("mmeb", orphan, drop_orphan_slots=True)
    assert found.positive.text == "\nRepresent the page"
    assert [item.text for item in found.negatives] == ["\nof nothing"]
    with pytest.raises(UserError, match="Set row 1, positive: it is empty"):
        pair("mmeb", MSCOCO | {"pos_text": "<|image_1|>\n"}, drop_orphan_slots=True)


BAD_ROWS: list[tuple[str, Any, str]] = [
    ("mmeb", {"qry_image_path": ""}, "query: the text holds .* names no image"),
    ("mmeb", {"pos_text": None}, "positive: it is empty"),
    ("mmeb", {"qry": "Find it"}, "query: it has image .* but no <|image_1|>"),
    ("mmeb", {"qry": "a", "qry_image_path": b"png"}, "query: it has image 'in the row' but no"),
    ("mmeb", {"pos_image_path": "images/b.png"}, "positive: it has image"),
    ("mmeb", {"qry": " \n\t", "qry_image_path": ""}, "query: it is empty"),
    ("mmeb", {"qry_image_path": "images/c.png"}, r"Set row 1, query: image .*c\.png does not"),
    ("mmeb", {"qry_image_path": "../a.png"}, "leaves the image root"),
    ("mmeb", {"qry": b"text"}, r"query: it must be a text .* found bytes"),
    ("mmeb", {"neg_text": "['a', 'b']", "neg_image_path": "['x']"}, "has 2 entries .* 1"),
    ("mmeb", {"neg_text": "[1, 2]"}, "negative: it must be a text .* found int"),
    ("mmeb", {"neg_text": "['a', ']"}, "looks like a list"),
    ("mmeb", {"neg_text": "<|image_1|> b"}, "negative: the text holds"),
    ("pairs", {"query_image": {"url": "a.png"}}, r"query: it must .* found dict"),
    ("pairs", {"query": "a \ud800"}, "not valid Unicode"),
    ("pairs", {"postive": "a"}, "unknown column postive; known are query, query_image"),
    ("pairs", {"negatives": "a cat"}, r"must be a list of {text, image} objects, found 'a cat'"),
    ("pairs", {"negatives": ["a cat"]}, "must be a list of {text, image} objects, found 'a cat'"),
    ("pairs", {"negatives": [{"txt": "a"}]}, r"of {text, image} objects, found {'txt': 'a'}"),
    ("pairs", {"negatives": [{"text": ""}]}, "negative: it is empty"),
]
GOOD = {"mmeb": MSCOCO, "pairs": OWN}


@pytest.mark.parametrize(("config", "changes", "message"), BAD_ROWS)
def test_a_bad_row_is_named(
    pair: Callable[..., Pair], config: str, changes: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        pair(config, GOOD[config] | changes)
    error = caught.value
    assert error.row_id == "Set row 1"
    assert error.kind
    named = f"Set row 1, {error.role}: " if error.role else "Set row 1: "
    assert str(error).startswith(named)


def test_a_row_that_no_mapping_fits_is_named(pair: Callable[..., Pair]) -> None:
    message = (
        "Set row 1: the columns image_path and caption, or qry and pos_text are needed; it has"
    )
    with pytest.raises(UserError, match=f"{message} image, text"):
        pair("cocoa_json", {"image": "a", "text": "b"})
