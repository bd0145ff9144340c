"""What users pass in, and unit vectors that depend on nothing else."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cocoa_pl.attention import Policy
from cocoa_pl.data.items import IMAGE_SLOT, Item, as_item
from cocoa_pl.data.rows import make_item
from cocoa_pl.data.tokenize import Processor
from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError
from cocoa_pl.models.loading import Loaded

EVERYTHING = ("context", "eos", "target")
FULL = Policy("bidirectional", EVERYTHING, EVERYTHING, EVERYTHING, causal=False)


@pytest.fixture(scope="module")
def embedder(loaded: Loaded, processor: Processor) -> Embedder:
    return Embedder(loaded.backbone, processor, FULL)


@pytest.fixture(scope="module")
def picture(make_image: Callable[..., Image.Image]) -> Image.Image:
    return make_image((56, 56), seed=9)


@pytest.fixture(scope="module")
def items(make_item: Callable[..., Item]) -> list[Item]:
    return [make_item(seed, images=seed % 3) for seed in range(7)]


@pytest.fixture(scope="module")
def vectors(embedder: Embedder, items: list[Item]) -> NDArray[np.float32]:
    return embedder.encode(items)


def test_vectors_are_float32_and_of_unit_length(
    vectors: NDArray[np.float32], embedder: Embedder
) -> None:
    assert vectors.shape == (7, embedder.dim)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.ptp(vectors, axis=0).max() > 0.1  # not all the same


@pytest.mark.parametrize("batch_tokens", [1, 30, 60, 100_000])
def test_vectors_do_not_depend_on_how_items_are_batched(
    batch_tokens: int, embedder: Embedder, items: list[Item], vectors: NDArray[np.float32]
) -> None:
    found = embedder.encode(items, batch_tokens=batch_tokens)
    np.testing.assert_allclose(found, vectors, atol=1e-5)


def test_vectors_do_not_depend_on_order_or_neighbours(
    embedder: Embedder, items: list[Item], vectors: NDArray[np.float32]
) -> None:
    np.testing.assert_allclose(embedder.encode(items[::-1])[::-1], vectors, atol=1e-5)
    np.testing.assert_allclose(embedder.encode(items[3:4]), vectors[3:4], atol=1e-5)
    twice = embedder.encode([*items, *items])
    np.testing.assert_allclose(twice[7:], vectors, atol=1e-5)


def test_nothing_in_is_nothing_out(embedder: Embedder) -> None:
    found = embedder.encode([])
    assert found.shape == (0, embedder.dim)
    assert found.dtype == np.float32


def test_a_picture_may_be_a_path_bytes_or_opened(
    embedder: Embedder, picture: Image.Image, tmp_path: Path
) -> None:
    path = tmp_path / "picture.png"
    picture.save(path)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    array = np.asarray(picture)
    sources: Sequence[Any] = (picture, path, str(path), buffer.getvalue(), array, [picture])
    found = embedder.encode([{"text": "a dog", "image": source} for source in sources])
    np.testing.assert_allclose(found, found[:1].repeat(len(sources), axis=0), atol=1e-5)


def test_strings_dicts_and_items_mean_the_same(embedder: Embedder, picture: Image.Image) -> None:
    texts = embedder.encode(["two boats", {"text": "two boats"}, Item("two boats")])
    np.testing.assert_allclose(texts, texts[:1].repeat(3, axis=0), atol=1e-5)
    placed = Item(f"{IMAGE_SLOT}\ntwo boats", (picture,))  # as readers of rows have it
    shown = embedder.encode([{"text": "two boats", "image": picture}, placed])
    np.testing.assert_allclose(shown[0], shown[1], atol=1e-5)
    assert np.abs(shown[0] - texts[0]).max() > 1e-3


def test_a_placeholder_means_to_the_embedder_what_it_means_in_rows(
    embedder: Embedder, picture: Image.Image, tmp_path: Path
) -> None:
    picture.save(tmp_path / "a.png")
    row = make_item(
        "left of <|image_1|>",
        "a.png",
        role="query",
        where="row",
        image_root=tmp_path,
        add_missing_slot=True,
    )
    ways = ["left of <|image_1|>", "left of <image>"]
    found = embedder.encode([row, *({"text": text, "image": picture} for text in ways)])
    np.testing.assert_allclose(found, found[:1].repeat(3, axis=0), atol=1e-5)
    first = embedder.encode([{"text": "left of ", "image": picture}])
    assert np.abs(first - found[:1]).max() > 1e-3


def test_vectors_of_a_shuffled_series_are_in_its_order(embedder: Embedder) -> None:
    pandas = pytest.importorskip("pandas")
    series = pandas.Series(["a red dog", "two boats", "one sofa"]).iloc[[2, 0, 1]]
    expected = embedder.encode(["one sofa", "a red dog", "two boats"])
    np.testing.assert_array_equal(embedder.encode(series), expected)
    np.testing.assert_array_equal(embedder.encode(text for text in series), expected)
    ((places, vectors),) = embedder.stream(series[series != "one sofa"])
    np.testing.assert_allclose(vectors, expected[1:][places], atol=1e-6)


def test_items_may_share_a_picture_that_is_not_read_yet(embedder: Embedder) -> None:
    """Pillow reads it when it is first asked for pixels, which several threads do at once."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    expected = embedder.encode([{"image": buffer.getvalue()}])
    for _ in range(4):
        shared = Image.open(io.BytesIO(buffer.getvalue()))
        found = embedder.encode([{"image": shared}] * 12, batch_tokens=20, threads=6)
        np.testing.assert_allclose(found, expected.repeat(12, axis=0), atol=1e-5)


def test_a_picture_alone_needs_no_dict(
    embedder: Embedder, picture: Image.Image, tmp_path: Path
) -> None:
    path = tmp_path / "picture.png"
    picture.save(path)
    found = embedder.encode(
        [{"image": picture}, picture, path, path.read_bytes(), np.asarray(picture)]
    )
    np.testing.assert_allclose(found, found[:1].repeat(5, axis=0), atol=1e-5)
    gray = np.asarray(picture.convert("L"))
    assert np.isfinite(embedder.encode([gray])).all()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("two boats", "Find it: two boats"),
        ({"text": "two boats", "image": 1}, f"{IMAGE_SLOT}\nFind it: two boats"),
        ({"image": 2}, f"{IMAGE_SLOT}{IMAGE_SLOT}\nFind it:"),
        ({"text": "left of<|image_1|>", "image": 1}, f"Find it: left of{IMAGE_SLOT}"),
    ],
    ids=["text", "both", "pictures", "placed"],
)
def test_an_instruction_comes_before_the_words_and_behind_the_pictures(
    value: Any, text: str, embedder: Embedder, picture: Image.Image
) -> None:
    if isinstance(value, dict):
        value = {**value, "image": [picture] * value["image"]}
    item = as_item(value, "Find it:")
    assert item.text == text
    plain, instructed, same = (
        embedder.encode([value]),
        embedder.encode([value], instruction="Find it:"),
        embedder.encode([item]),
    )
    np.testing.assert_array_equal(instructed, same)
    assert np.abs(plain - instructed).max() > 1e-3


def test_leading_components_are_of_unit_length(
    embedder: Embedder, items: list[Item], vectors: NDArray[np.float32]
) -> None:
    short = embedder.encode(items, truncate_dim=8)
    assert short.shape == (7, 8)
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, atol=1e-6)
    lengths = np.linalg.norm(vectors[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(short, vectors[:, :8] / lengths, atol=1e-6)
    np.testing.assert_array_equal(embedder.encode(items, truncate_dim=embedder.dim), vectors)
    for dim in (0, embedder.dim + 1):
        with pytest.raises(UserError, match=rf"truncate_dim is 1 to {embedder.dim}, not {dim}"):
            embedder.encode(items, truncate_dim=dim)


def test_a_bar_is_shown_where_it_is_asked_for(
    embedder: Embedder, items: list[Item], capsys: pytest.CaptureFixture[str]
) -> None:
    embedder.encode(items, progress=True)
    shown = capsys.readouterr()
    assert "7/7" in shown.err
    assert shown.out == ""
    embedder.encode(items)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "needs a text or an image"),
        ("", "needs a text or an image"),
        ({"text": None, "image": []}, "needs a text or an image"),
        ({"text": "a", "picture": 1}, "keys text and image, not.*picture"),
        ({"image": 3}, "a path, bytes, a PIL image or an array, not int"),
        (np.zeros((4, 4, 3)), "uint8 of height x width x 3.*not float64 of 4 x 4 x 3"),
        (np.zeros((4, 4, 4), np.uint8), "not uint8 of 4 x 4 x 4"),
        (np.zeros(4, np.uint8), "not uint8 of 4"),
        ({"text": f"a{IMAGE_SLOT}"}, r"holds U\+FDD0"),
        ({"text": "a <|image_1|>"}, "but names no image"),
        ({"text": 7}, "text is a string"),
        ("a \ud800", "item 0: the text is not valid Unicode"),
        (None, "an item is a string"),
        (7, "an item is a string"),
        ([{"text": "a"}], "an item is a string"),
    ],
)
def test_what_cannot_be_embedded_is_said(value: Any, message: str, embedder: Embedder) -> None:
    with pytest.raises(ValueError, match=message):
        embedder.encode([value])


def test_one_string_is_not_a_list_of_letters(embedder: Embedder) -> None:
    for single in ("two boats", {"text": "two boats"}, np.zeros((4, 4, 3), np.uint8)):
        with pytest.raises(UserError, match=r"write \[(item|array)\]"):
            embedder.encode(single)
        with pytest.raises(UserError, match=r"write \[(item|array)\]"):
            embedder.stream(single)


def test_a_bad_item_is_named_by_its_place(embedder: Embedder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"item 1: .*none\.png"):
        embedder.encode(["two boats", {"image": tmp_path / "none.png"}])
    with pytest.raises(ValueError, match="item 2: "):
        embedder.encode(["two boats", "a dog", ""])
    with pytest.raises(UserError, match="item 0: "):
        embedder.encode([{"image": b"not a picture"}])


def test_a_model_in_training_stays_in_training(embedder: Embedder) -> None:
    embedder.backbone.train()
    try:
        embedder.encode(["two boats"])
        assert embedder.backbone.training
    finally:
        embedder.backbone.eval()
