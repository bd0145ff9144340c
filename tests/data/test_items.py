"""What users pass in (lists, placeholders, instructions) becomes items of one format."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pytest
from jinja2 import Environment, Template
from PIL import Image

from cocoa_pl.data.items import IMAGE_SLOT, Item, as_item, as_list, template_source
from cocoa_pl.errors import UserError

S = IMAGE_SLOT
PICTURES = tuple(Image.new("RGB", (28, 28), (number, 0, 0)) for number in range(3))
PNG = io.BytesIO()
PICTURES[0].save(PNG, "PNG")

# --- One format ------------------------------------------------------------------------------

TEXTS = (
    *("", " ", "a dog", "  a dog \n", "\n\na dog", "a\ufffcb", "好 👋", "{{ 7 * 7 }} {% if %}"),
    *("<|image_1|>", "<|image_1|>\n", "<|image_1|>\nfind it", "<|image_1|> a", "a <|image_1|>\n"),
    *("<|image_1|>a<|image_2|>b", "<|image_2|><|image_1|>", "<|image_1|><|image_1|>"),
    *("<|image_01|>", "<|image_9|>", "<|image_0|>", "<|image_\u0661|> a", "<|image_ a |> b"),
    *("<image>", "a <image> b", "<image><image>", "<image> <|image_1|>", "<|image_pad|> a"),
    *("<ima<|image_1|>ge>", "<|image_<|image_1|>2|>", f"a {S}", f"{S}", f"<|image_1|>{S}"),
)
INSTRUCTIONS = (
    *(None, "", "Find it:", "Find it: ", "Find\n", "Find\u3000", " ", "好"),
    *("<|image_1|> Find", "<image>\nFind", f"Find {S}"),
)


@pytest.fixture(scope="module")
def template() -> Template:
    """What other tools compile, with the slot for the image token."""

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment = Environment(trim_blocks=True, lstrip_blocks=True)  # as transformers does
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template_source(image=S, special_tokens=()))


def rendered(template: Template, text: str, count: int, instruction: str | None) -> str:
    """What the template makes of messages, as other tools give them to it."""
    user: list[dict[str, str]] = [{"type": "text", "text": text}, *[{"type": "image"}] * count]
    system = [] if instruction is None else [{"role": "system", "content": instruction}]
    return template.render(messages=[*system, {"role": "user", "content": user}])


def built(text: str, count: int, instruction: str | None) -> str:
    return as_item({"text": text, "image": list(PICTURES[:count])}, instruction).text


def result_of(make: Callable[..., str], *arguments: Any) -> str:
    try:
        return make(*arguments)
    except ValueError as error:
        return f"refused: {error}"


@pytest.mark.parametrize("count", [0, 1, 2])
def test_items_are_what_the_exported_template_makes_of_messages(
    count: int, template: Template
) -> None:
    refused = 0
    for text, instruction in product(TEXTS, INSTRUCTIONS):
        if not text and not count:
            continue  # nothing to embed
        expected = result_of(rendered, template, text, count, instruction)
        assert result_of(built, text, count, instruction) == expected
        refused += expected.startswith("refused")
    assert 0 < refused < len(TEXTS) * len(INSTRUCTIONS)


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        (" a dog \n", 0, " a dog \n"),
        (" a dog \n", 1, f"{S}\n a dog \n"),
        ("", 2, f"{S}{S}"),
        ("is <|image_1|> like <|image_2|>?", 2, f"is {S} like {S}?"),
        ("<|image_1|>\nfind it", 1, f"{S}\nfind it"),
        ("a <image> b <image>", 2, f"a {S} b {S}"),
        ("<img>, <image> in HTML", 0, "<img>, <image> in HTML"),
        ("an \ufffc in a text", 1, f"{S}\nan \ufffc in a text"),
        ("<|image_pad|>", 1, f"{S}\n<|image_pad|>"),
        ("a <|image_1|>", 0, "holds <|image_1|> but names no image; give the image or remove"),
        ("<|image_2|>", 1, "holds <|image_2|> for 1 image(s)"),
        ("<|image_1|>", 2, "holds <|image_1|> for 2 image(s)"),
        ("<|image_2|><|image_1|>", 2, "(s); name each of them once, in their order, or none"),
        ("<image>", 2, "holds 1 <image> for 2 image(s)"),
        ("<|image_1|> or <image>", 1, "both <|image_1|> and <image>; write one kind"),
        (f"{S}\na", 1, "holds U+FDD0"),
    ],
)
def test_placeholders_are_placed_or_refused_and_nothing_else_is_touched(
    text: str, count: int, expected: str
) -> None:
    found = result_of(built, text, count, None)
    assert expected in found if found.startswith("refused") else found == expected


@pytest.mark.parametrize(
    ("text", "instruction", "expected"),
    [
        ("a dog", "Find it:", "Find it: a dog"),
        (" a dog ", "Find it:\n", "Find it:\n a dog "),
        ("a dog", "", "a dog"),
        (f"{S}", "Find it:", f"{S}\nFind it:"),
        (f"{S}\na dog", "Find it:", f"{S}\nFind it: a dog"),
        (f"{S}\n\na dog", "Find it:", f"{S}\nFind it: \na dog"),
        (f"left of {S}", "Find it:", f"Find it: left of {S}"),
        (f"{S}{S}is {S} it?", "Find it:", f"{S}{S}\nFind it: is {S} it?"),
        (f"{S} <image> in <|image_7|>", "Find it:", f"{S}\nFind it:  <image> in <|image_7|>"),
    ],
)
def test_an_item_keeps_its_slots_and_words_behind_an_instruction(
    text: str, instruction: str, expected: str
) -> None:
    item = Item(text, PICTURES[: text.count(S)])
    assert as_item(item, instruction) == Item(expected, item.media)


def test_an_instruction_names_no_image() -> None:
    with pytest.raises(UserError, match="an instruction is one string for all items, not list"):
        as_item("a dog", ["Find it"])  # type: ignore[arg-type]
    for instruction in ("<|image_1|>\nFind it", "<image> Find it", f"{S} Find it"):
        with pytest.raises(UserError, match="the instruction holds a placeholder"):
            as_item("a dog", instruction)


# --- What is a list --------------------------------------------------------------------------

WORDS = ["a", "b", "c", "d"]
SHUFFLED = pd.Series(WORDS).iloc[[2, 0, 3, 1]]


def generated() -> Iterator[str]:
    yield from WORDS


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        (SHUFFLED, ["c", "a", "d", "b"]),
        (SHUFFLED[SHUFFLED != "a"], ["c", "d", "b"]),
        (np.array(WORDS), WORDS),
        (pl.Series(WORDS), WORDS),
        (generated(), WORDS),
        (dict.fromkeys(WORDS).keys(), WORDS),
        (tuple(WORDS), WORDS),
        ([], []),
    ],
)
def test_items_are_taken_in_their_own_order(items: Any, expected: list[str]) -> None:
    found = as_list(items)
    assert [as_item(found[place]) for place in range(len(found))] == [Item(w) for w in expected]


def test_a_data_set_is_read_item_by_item() -> None:
    rows = datasets.Dataset.from_dict({"text": WORDS, "image": [None, PNG.getvalue()] * 2})
    assert as_list(rows) is rows
    assert as_item(rows[1]) == Item(f"{S}\nb", (PNG.getvalue(),))
    assert as_list(rows["text"]) == WORDS
    column = pd.Series([{"bytes": b"a", "path": None}, {"bytes": None, "path": "b.png"}])
    expected = [Item(S, (b"a",)), Item(S, (Path("b.png"),))]
    assert [as_item(one) for one in as_list(column)] == expected  # such a column of `to_pandas()`


@pytest.mark.parametrize(
    ("items", "message"),
    [
        *(
            (one, r"items come in a list; write \[item\] for a single ")
            for one in (
                *("a", b"a", bytearray(b"a"), Path("a"), PICTURES[0], Item("a"), {"text": "a"}),
                *(io.StringIO("a\nb"), 7, None),
            )
        ),
        (np.zeros((4, 5, 3), np.uint8), r"shape \(4, 5, 3\) is taken for one picture; .*\[array\]"),
        (np.array("a"), "taken for one picture"),
        ({"a", "b"}, r"a set has no order; write sorted\(items\)"),
        (pd.DataFrame({"text": WORDS}), r"a table is no list; take a column"),
        (pl.DataFrame({"text": WORDS}), "a table is no list"),
    ],
)
def test_what_is_no_list_of_items_is_refused(items: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        as_list(items)


# --- What is in an item ----------------------------------------------------------------------


NONES: Sequence[Any] = (None, float("nan"), np.float64("nan"), pd.NA, [], [None])


@pytest.mark.parametrize("none", [*NONES, {"bytes": None, "path": None}])
def test_what_pandas_writes_for_none_is_none(none: Any) -> None:
    assert as_item({"text": "a", "image": none}) == Item("a")
    missing = "" if isinstance(none, list | dict) else none
    assert as_item({"text": missing, "image": b"a"}) == Item(S, (b"a",))
    with pytest.raises(UserError, match="needs a text or an image"):
        as_item({"text": missing, "image": none})


@pytest.mark.parametrize(
    "several",
    [
        ["a.png", "b.png"],
        ("a.png", Path("b.png")),
        pd.Series(["b.png", "a.png"]).iloc[::-1],
        np.array(["a.png", "b.png"]),
        [{"bytes": None, "path": "a.png"}, {"path": "b.png"}],
        ["a.png", float("nan"), "b.png"],
    ],
)
def test_an_item_has_several_images_in_their_order(several: Any) -> None:
    found = as_item({"text": np.str_("x"), "image": several})
    assert found == Item(f"{S}{S}\nx", (Path("a.png"), Path("b.png")))
    assert type(found.text) is str


def test_images_that_can_be_read_once_only_are_refused() -> None:
    for images in ((name for name in ("a.png", "b.png")), map(str, ["a.png"])):
        with pytest.raises(UserError, match="images come in a list, not in a"):
            as_item({"text": "x", "image": images})


def test_arrays_of_an_item_are_one_picture_or_several() -> None:
    array = np.stack([np.asarray(picture) for picture in PICTURES])
    found = as_list(array)
    assert [np.asarray(as_item(one).media[0])[0, 0, 0] for one in found] == [0, 1, 2]
    assert len(as_item({"image": array}).media) == 3
    assert len(as_item({"image": array[0]}).media) == 1
    assert len(as_item(array[0, ..., 0]).media) == 1


def test_an_item_s_images_are_a_tuple_however_they_are_written() -> None:
    path = Path("a.png")
    assert {Item(S, one) for one in ([path], path, iter([path]))} == {Item(S, (path,))}  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"paths \(Path\), bytes or PIL images, not"):
        Item(S, ["a.png"])  # type: ignore[arg-type]


def test_pictures_of_other_meaning_are_other_items() -> None:
    grey = Image.new("P", (4, 6), 0)
    red = grey.copy()
    red.putpalette([255, 0, 0])
    turned = grey.copy()
    turned.getexif()[0x0112] = 6
    images = [grey, red, Image.new("P", (6, 4), 0), Image.new("L", (4, 6), 0), turned]
    assert len({Item(S, (image,)).key for image in images}) == len(images)
    assert Item(S, (grey,)).key == Item(S, (grey.copy(),)).key


def test_an_item_is_of_valid_unicode_and_its_files_have_any_name() -> None:
    with pytest.raises(UserError, match="the text is not valid Unicode"):
        Item("a \ud800")
    odd, plain = (Item(IMAGE_SLOT, (Path(name),)) for name in ("a\udcff.png", "a.png"))
    assert odd.key == Item(IMAGE_SLOT, (Path("a\udcff.png"),)).key != plain.key
