"""Each text or image becomes a unit vector that does not depend on the rest of its batch."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from cocoa_pl.data.inputs import as_item
from cocoa_pl.data.items import IMAGE_SLOT, Item
from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError

Vectors = NDArray[np.float32]


@pytest.fixture(scope="module")
def picture(make_image: Callable[..., Image.Image]) -> Image.Image:
    return make_image((56, 56), seed=9)


@pytest.fixture(scope="module")
def items(make_item: Callable[..., Item]) -> list[Item]:
    return [make_item(seed, images=seed % 3) for seed in range(7)]


@pytest.fixture(scope="module")
def vectors(embedder: Embedder, items: list[Item]) -> Vectors:
    return embedder.encode(items)


def assert_same(vectors: Vectors) -> None:
    np.testing.assert_allclose(vectors, vectors[:1].repeat(len(vectors), axis=0), atol=1e-5)


def test_vectors_are_float32_of_unit_length_and_do_not_depend_on_the_order(
    vectors: Vectors, items: list[Item], embedder: Embedder
) -> None:
    assert vectors.shape == (7, embedder.dim)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.ptp(vectors, axis=0).max() > 0.1  # not all the same
    np.testing.assert_allclose(embedder.encode(items[::-1])[::-1], vectors, atol=1e-5)
    nothing = embedder.encode([])
    assert (nothing.shape, nothing.dtype) == ((0, embedder.dim), np.float32)


def test_a_picture_may_be_a_path_bytes_an_array_or_opened(
    embedder: Embedder, picture: Image.Image, tmp_path: Path
) -> None:
    path = tmp_path / "picture.png"
    picture.save(path)
    sources: Sequence[Any] = (picture, path, path.read_bytes(), np.asarray(picture))
    with_text = [{"text": "a dog", "image": one} for one in (*sources, str(path), [picture])]
    assert_same(embedder.encode(with_text))
    assert_same(embedder.encode([*sources, {"image": picture}]))
    gray = np.asarray(picture.convert("L"))
    assert np.isfinite(embedder.encode([gray])).all()


def test_strings_dicts_and_items_mean_the_same(embedder: Embedder, picture: Image.Image) -> None:
    texts = embedder.encode(["two boats", {"text": "two boats"}, Item("two boats")])
    assert_same(texts)
    placed = Item(f"{IMAGE_SLOT}\ntwo boats", (picture,))  # as readers of rows have it
    shown = embedder.encode([{"text": "two boats", "image": picture}, placed])
    assert_same(shown)
    assert np.abs(shown[0] - texts[0]).max() > 1e-3


def test_an_instruction_comes_before_the_words(embedder: Embedder, picture: Image.Image) -> None:
    values = ["two boats", {"text": "two boats", "image": picture}, {"image": [picture] * 2}]
    plain, instructed = embedder.encode(values), embedder.encode(values, instruction="Find it:")
    items = [as_item(value, "Find it:") for value in values]
    assert [item.text.replace(IMAGE_SLOT, "I") for item in items] == [
        "Find it: two boats",
        "I\nFind it: two boats",
        "II\nFind it:",
    ]
    np.testing.assert_array_equal(instructed, embedder.encode(items))
    assert np.abs(plain - instructed).max(axis=1).min() > 1e-3


def test_leading_components_are_of_unit_length(
    embedder: Embedder, items: list[Item], vectors: Vectors
) -> None:
    short = embedder.encode(items, truncate_dim=8)
    assert short.shape == (7, 8)
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, atol=1e-6)
    lengths = np.linalg.norm(vectors[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(short, vectors[:, :8] / lengths, atol=1e-6)
    np.testing.assert_array_equal(embedder.encode(items, truncate_dim=embedder.dim), vectors)
    np.testing.assert_array_equal(embedder.encode(items, truncate_dim=np.int64(8)), short)


def test_a_bar_is_shown_if_progress_is_true(
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
        ({"text": "a", "picture": 1}, "keys text and image, not.*picture.*; rename"),
        ({"image": 3}, "a path, bytes, a PIL image or an array, not int; open it"),
        ({"image": ""}, "path is empty; leave the image out"),
        ({"image": {"a.png", "b.png"}}, r"a set has no order; write sorted\(items\)"),
        (np.zeros((4, 4, 3)), r"uint8 of height x width x 3.*not float64 of 4 x 4 x 3; .*astype"),
        (np.zeros((4, 4, 4), np.uint8), "not uint8 of 4 x 4 x 4; .* drop alpha"),
        (np.zeros((0, 0, 3), np.uint8), r"has no pixels \(0 x 0\); replace it"),
        (Image.new("RGB", (0, 5)), r"has no pixels \(0 x 5\); replace it"),
        (Path("x" * 5000), r"image x+\.\.\. cannot be reached: File name too long; name a shorter"),
        ({"image": "https://host/a.png"}, "image https:/host/a.png is an address; download it"),
        ({"image": f"data:image/png;base64,{'A' * 5000}"}, "AAA[.]{3} is a data URL; .*b64decode"),
        (Path("/dev/zero"), "image /dev/zero is no file; check the path"),
        ({"text": 7}, "text is a string"),
        ({"text": b"words"}, r"text is a string, not bytes; write text.decode\(\)"),
        ("a \ud800", "the text is not valid Unicode.*; fix it"),
        (7, r"an item is a string.*not int; write str\(item\)"),
        (None, "an item is a string.*not NoneType; leave it out"),
        (torch.zeros(3), r"an item is a string.*not Tensor; write tensor.numpy\(\)"),
        ([{"text": "a"}], r"an item is a string.*not list; one item with several parts is \{"),
    ],
)
def test_what_cannot_be_embedded_is_refused_with_a_remedy(
    value: Any, message: str, embedder: Embedder
) -> None:
    with pytest.raises(UserError, match=f"^item 0: .*{message}") as caught:
        embedder.encode([value])
    assert len(str(caught.value)) < 300


def test_a_long_text_is_cut_without_talk_of_indexing_errors(
    embedder: Embedder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedder.processor.tokenizer, "model_max_length", 128)  # as exported
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="transformers")  # which exports make silent
    text = "the dog sleeps " * 5000
    assert np.isfinite(embedder.encode([text])).all()
    assert "indexing errors" not in caplog.text
    embedder.processor.tokenizer(text)
    assert "indexing errors" in caplog.text  # it would have been seen


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_gives_the_same_vectors_and_works_alone(
    copied: Callable[[Embedder], Embedder],
    embedder: Embedder,
    items: list[Item],
    vectors: Vectors,
) -> None:
    other = copied(embedder)
    with embedder._one_at_a_time:  # in use meanwhile
        np.testing.assert_array_equal(other.encode(items), vectors)
    assert other.identity() == embedder.identity()


@pytest.mark.parametrize("name", ["truncate_dim", "batch_tokens", "threads"])
def test_what_is_no_whole_number_is_refused(name: str, embedder: Embedder) -> None:
    for value in (-1, "64", 8.0, True, np.True_, [8], float("nan")):
        with pytest.raises(UserError) as caught:
            embedder.encode(["a dog"], **{name: value})
        assert str(caught.value).startswith(f"{name} is a whole number ")
        assert str(caught.value).endswith(f", not {value!r}")


def test_leading_components_are_at_most_all(embedder: Embedder) -> None:
    for dim in (0, embedder.dim + 1):
        message = f"a whole number from 1 to {embedder.dim}, not {dim}"
        with pytest.raises(UserError, match=message):
            embedder.encode([], truncate_dim=dim)


@pytest.mark.parametrize(
    ("path", "device", "message"),
    [
        *((path, "cpu", "opens a folder or a hub id, not ") for path in ("", None, 3)),
        ("x" * 5000, "cpu", "File name too long"),
        *(("x", one, f"^device is auto, cpu, cuda .*, not {one}") for one in (None, True, 0)),
        *(
            ("x", one, f"^device={one} is not here; there are auto, cpu")  # the path is not tried
            for one in ("gpu", "mps", "meta", "", "cuda:99", "cpu:x")
        ),
    ],
)
def test_what_names_no_model_or_device_is_refused(path: Any, device: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Embedder.load(path, device=device)


def test_a_mistake_of_all_items_names_none_and_a_bad_item_its_place(
    embedder: Embedder, tmp_path: Path
) -> None:
    for encode in (embedder.encode, embedder.stream):
        with pytest.raises(UserError, match=r"^items come in a list; write \[item\]"):
            encode("two boats")
        with pytest.raises(UserError, match=r"^an instruction is one string for all items, not "):
            encode(["a dog"], instruction=["Find it:"])  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^item 1: image .*none\.png does not exist"):
        embedder.encode(["two boats", {"image": tmp_path / "none.png"}, ""])
    with pytest.raises(UserError, match="item 2: an item needs a text or an image"):
        embedder.encode(["two boats", "a dog", "", {"text": 3}])
