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
from cocoa_pl.data.inputs import as_item
from cocoa_pl.data.tokenize import Processor
from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError
from cocoa_pl.items import IMAGE_SLOT, Item
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
    sources: Sequence[Any] = (picture, path, str(path), buffer.getvalue(), [picture])
    found = embedder.encode([{"text": "a dog", "image": source} for source in sources])
    np.testing.assert_allclose(found, found[:1].repeat(len(sources), axis=0), atol=1e-5)


def test_strings_dicts_and_items_mean_the_same(embedder: Embedder, picture: Image.Image) -> None:
    texts = embedder.encode(["two boats", {"text": "two boats"}, Item("two boats")])
    np.testing.assert_allclose(texts, texts[:1].repeat(3, axis=0), atol=1e-5)
    placed = Item(f"{IMAGE_SLOT}two boats", (picture,))
    shown = embedder.encode([{"text": "two boats", "image": picture}, placed])
    np.testing.assert_allclose(shown[0], shown[1], atol=1e-5)
    assert np.abs(shown[0] - texts[0]).max() > 1e-3


def test_pictures_go_first_unless_the_text_places_them(picture: Image.Image) -> None:
    assert as_item({"text": "a", "image": picture}).text == f"{IMAGE_SLOT}a"
    assert as_item({"text": f"a{IMAGE_SLOT}", "image": picture}).text == f"a{IMAGE_SLOT}"
    two = as_item({"text": f"a{IMAGE_SLOT}", "image": [picture, picture]})
    assert two.text == f"{IMAGE_SLOT}a{IMAGE_SLOT}"
    assert as_item({"image": picture}).text == IMAGE_SLOT
    assert as_item({"text": "a", "image": None}) == Item("a")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "needs a text or an image"),
        ("", "needs a text or an image"),
        ({"text": None, "image": []}, "needs a text or an image"),
        ({"text": "a", "picture": 1}, "keys text and image, not.*picture"),
        ({"image": 3}, "a path, bytes or a PIL image"),
        ({"text": f"a{IMAGE_SLOT}"}, "1 image placeholder"),
        ({"text": 7}, "text is a string"),
        (None, "an item is a string"),
        (7, "an item is a string"),
        ([{"text": "a"}], "an item is a string"),
    ],
)
def test_what_cannot_be_embedded_is_said(value: Any, message: str, embedder: Embedder) -> None:
    with pytest.raises(ValueError, match=message):
        embedder.encode([value])


def test_one_string_is_not_a_list_of_letters(embedder: Embedder) -> None:
    with pytest.raises(ValueError, match="list of items"):
        embedder.encode("two boats")
    with pytest.raises(ValueError, match="list of items"):
        embedder.encode({"text": "two boats"})  # type: ignore[arg-type]


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
