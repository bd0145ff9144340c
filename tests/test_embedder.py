"""Each text or image becomes a unit vector that does not depend on the rest of its batch, nor on
the threads that work ahead of the model and beside it.
"""

from __future__ import annotations

import copy
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from cocoa_pl import embedder as embedder_module
from cocoa_pl.attention import Policy
from cocoa_pl.data import item_batches as batches_module
from cocoa_pl.data.items import IMAGE_SLOT, Item, as_item
from cocoa_pl.data.processor import Processor
from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError
from cocoa_pl.models.exported import FINGERPRINT_TOLERANCE, take_fingerprint
from cocoa_pl.models.loading import Loaded

Vectors = NDArray[np.float32]


@pytest.fixture(scope="module")
def picture(make_image: Callable[..., Image.Image]) -> Image.Image:
    return make_image((56, 56), seed=9)


@pytest.fixture(scope="module")
def items(make_item: Callable[..., Item]) -> list[Item]:
    return [make_item(seed, images=seed % 3) for seed in range(23)]


@pytest.fixture(scope="module")
def vectors(embedder: Embedder, items: list[Item]) -> Vectors:
    return embedder.encode(items)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [t.name for t in threading.enumerate() if "item_batches" in t.name] == []


@pytest.mark.parametrize(("batch_tokens", "window"), [(1, 4096), (70, 7), (10_000, 4096)])
def test_vectors_are_unit_float32_and_those_of_items_one_by_one_for_any_number_of_threads(
    batch_tokens: int,
    window: int,
    embedder: Embedder,
    items: list[Item],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batches_module, "WINDOW", window)
    alone = np.concatenate([embedder.encode([item], threads=0) for item in items])
    assert (alone.shape, alone.dtype) == ((23, embedder.dim), np.float32)
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-5)
    assert np.ptp(alone, axis=0).max() > 0.1  # not all the same
    found = [embedder.encode(items, batch_tokens=batch_tokens, threads=n) for n in (0, 1, 4)]
    np.testing.assert_allclose(found[0], alone, atol=1e-5)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    nothing = embedder.encode([])
    assert (nothing.shape, nothing.dtype) == ((0, embedder.dim), np.float32)


def test_items_mean_the_same_however_they_are_given(
    embedder: Embedder, picture: Image.Image, tmp_path: Path
) -> None:
    path = tmp_path / "picture.png"
    picture.save(path)
    sources: list[Any] = [picture, path, path.read_bytes(), np.asarray(picture)]
    placed = Item(f"{IMAGE_SLOT}\ntwo boats", (picture,))  # as readers of rows have it
    texts, shown, pictures = (
        embedder.encode(same)
        for same in (
            ["two boats", {"text": "two boats"}, Item("two boats")],
            [
                placed,
                *({"text": "two boats", "image": o} for o in (*sources, str(path), [picture])),
            ],
            [*sources, {"image": picture}],
        )
    )
    for vectors in (texts, shown, pictures):
        np.testing.assert_allclose(vectors, vectors[:1].repeat(len(vectors), axis=0), atol=1e-5)
    assert np.abs(shown[0] - texts[0]).max() > 1e-3
    assert np.isfinite(embedder.encode([np.asarray(picture.convert("L"))])).all()


def test_an_instruction_is_that_of_each_item(embedder: Embedder, picture: Image.Image) -> None:
    values = ["two boats", {"text": "two boats", "image": picture}, {"image": [picture] * 2}]
    plain, instructed = embedder.encode(values), embedder.encode(values, instruction="Find it:")
    items = [as_item(value, "Find it:") for value in values]
    np.testing.assert_array_equal(instructed, embedder.encode(items))
    assert np.abs(plain - instructed).max(axis=1).min() > 1e-3


def test_leading_components_are_of_unit_length(
    embedder: Embedder, items: list[Item], vectors: Vectors
) -> None:
    short = embedder.encode(items, truncate_dim=8)
    assert short.shape == (23, 8)
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
    assert "100%" in shown.err
    assert shown.out == ""
    embedder.encode(items)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"text": "a", "picture": 1}, "keys text and image, not.*picture.*; rename"),
        ({"image": 3}, "a path, bytes, a PIL image or an array, not int; open it"),
        ({"image": ""}, "path is empty; leave the image out"),
        (np.zeros((4, 4, 3)), r"uint8 of height x width x 3.*not float64 of 4 x 4 x 3; .*astype"),
        (np.zeros((4, 4, 4), np.uint8), "not uint8 of 4 x 4 x 4; .* drop alpha"),
        (np.zeros((0, 0, 3), np.uint8), r"has no pixels \(0 x 0\); replace it"),
        (Image.new("RGB", (0, 5)), r"has no pixels \(0 x 5\); replace it"),
        (Path("x" * 5000), r"image x+\.\.\. cannot be reached: File name too long; name a shorter"),
        ({"image": "https://host/a.png"}, "image https:/host/a.png is an address; download it"),
        ({"image": f"data:image/png;base64,{'A' * 5000}"}, "AAA[.]{3} is a data URL; .*b64decode"),
        (Path("/dev/zero"), "image /dev/zero is no file; check the path"),
        ({"text": b"words"}, "text is a string, not bytes; convert it"),
        ("a \ud800", "the text is not valid Unicode.*; fix it"),
        *((one, "an item is a string.*; convert it") for one in (7, None, torch.zeros(3), ["a"])),
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
def test_a_copy_gives_the_same_vectors(
    copied: Callable[[Embedder], Embedder], embedder: Embedder, items: list[Item], vectors: Vectors
) -> None:
    other = copied(embedder)
    np.testing.assert_array_equal(other.encode(items), vectors)
    assert other.identity() == embedder.identity()


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("truncate_dim", "from 1 to 32"),
        ("batch_tokens", "of at least 1"),
        ("threads", "of at least 0"),
    ],
)
def test_what_is_no_whole_number_within_bounds_is_refused(
    name: str, bounds: str, embedder: Embedder
) -> None:
    beyond = (0, embedder.dim + 1) if name == "truncate_dim" else ()
    for value in (-1, "64", 8.0, True, np.True_, [8], float("nan"), *beyond):
        with pytest.raises(UserError) as caught:
            embedder.encode(["a dog"], **{name: value})
        assert str(caught.value) == f"{name} is a whole number {bounds}, not {value!r}"


def test_a_device_that_is_not_here_is_refused_before_the_path_is_tried() -> None:
    given: Any
    for given in ("gpu", "mps", "meta", "", "cuda:99", "cpu:x", None, 0):
        with pytest.raises(UserError, match=f"^device={given} is not here; there are auto, cpu"):
            Embedder.load("x", device=given)


def test_a_mistake_of_all_items_names_none_and_a_bad_item_its_place(
    embedder: Embedder, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"^items come in a list; write \[item\]"):
        embedder.encode("two boats")
    with pytest.raises(UserError, match=r"^an instruction is one string for all items, not "):
        embedder.encode(["a dog"], instruction=["Find it:"])  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^item 1: image .*none\.png does not exist"):
        embedder.encode(["two boats", {"image": tmp_path / "none.png"}, ""])
    with pytest.raises(UserError, match="item 2: an item needs a text or an image"):
        embedder.encode(["two boats", "a dog", "", {"text": 3}])


# --- Streams and threads ----------------------------------------------------------------------


def test_a_stream_hands_over_each_item_once_by_cost(embedder: Embedder, items: list[Item]) -> None:
    expected = embedder.encode(items, batch_tokens=70)
    places: list[int] = []
    for numbers, vectors in embedder.stream(items, batch_tokens=70):
        np.testing.assert_array_equal(vectors, expected[numbers])
        places += numbers.tolist()
    assert sorted(places) == list(range(len(items)))
    assert places != sorted(places)


@pytest.mark.parametrize("threads", [0, 4])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_stops_the_model_stops_the_threads(
    error: type[BaseException],
    threads: int,
    embedder: Embedder,
    items: list[Item],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    original = embedder.backbone.embed

    def embed(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise error("stopped")
        return original(*args, **kwargs)

    monkeypatch.setattr(embedder.backbone, "embed", embed)
    with pytest.raises(error, match="stopped"):
        embedder.encode(items * 5, batch_tokens=70, threads=threads)
    assert len(calls) == 3
    monkeypatch.undo()
    assert embedder.encode(items[:2]).shape == (2, embedder.dim)  # it can be used again


def test_several_threads_may_use_one_embedder_and_never_in_training_mode(
    load_tiny: Callable[..., Loaded],
    embedder: Embedder,
    items: list[Item],
    vectors: Vectors,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone, in_training, busy = load_tiny().backbone, [], threading.Lock()
    embedder = Embedder(backbone, embedder.processor, embedder.policy)
    backbone.add_module("extra", nn.Dropout().train())  # below a model in evaluation, as peft's are
    backbone.stock.train()
    backbone.stock.model.visual.eval()  # a part of it is frozen
    modes = {name: module.training for name, module in backbone.named_modules()}
    original = backbone.embed

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        assert busy.acquire(blocking=False)  # one thread at a time
        in_training.append(any(module.training for module in backbone.modules()))
        found = original(*args, **kwargs)
        busy.release()
        return found

    def encode(seed: int) -> None:
        order = np.random.default_rng(seed).permutation(len(items))
        found = embedder.encode([items[n] for n in order], batch_tokens=50, threads=2)
        np.testing.assert_allclose(found, vectors[order], atol=1e-5)

    monkeypatch.setattr(backbone, "embed", watched)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(encode, range(8)))
    assert set(in_training) == {False}
    assert {name: module.training for name, module in backbone.named_modules()} == modes
    assert not modes[""]
    assert modes["extra"]


def test_a_long_call_logs_its_progress(
    embedder: Embedder,
    items: list[Item],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)
    embedder.encode(items, batch_tokens=70)
    assert "embedded" not in caplog.text
    monkeypatch.setattr(embedder_module, "EVERY_SECONDS", 0.0)
    embedder.encode(items, batch_tokens=70)
    lines = [record.message for record in caplog.records if "embedded" in record.message]
    assert lines[-1] == "embedded 23 of 23 items, 0:00:00 to go"
    assert len(lines) > 3


def test_identity_is_the_same_for_the_same_model_and_changes_with_all_that_vectors_depend_on(
    embedder: Embedder,
    load_tiny: Callable[..., Loaded],
    make_processor: Callable[..., Processor],
    policies: dict[str, Policy],
) -> None:
    full = policies["bidirectional"]
    mine = embedder.identity()
    other = load_tiny().backbone
    assert Embedder(other, make_processor(), full).identity() == mine
    changed = {
        "max_length": Embedder(embedder.backbone, make_processor(max_length=64), full),
        "max_pixels": Embedder(embedder.backbone, make_processor(max_pixels=3136), full),
        "policy": Embedder(embedder.backbone, make_processor(), policies["causal"]),
        "weights": Embedder(other, make_processor(), full),
    }
    with torch.no_grad():
        weight = next(other.parameters())
        weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(9.0))  # one bit
    for name, changed_one in changed.items():
        found = changed_one.identity()
        assert {key for key, value in found.items() if value != mine[key]} == {name}


@pytest.mark.gpu
def test_on_a_gpu_batches_go_over_from_pinned_memory_and_vectors_are_those_of_the_cpu(
    load_tiny: Callable[..., Loaded], embedder: Embedder, items: list[Item]
) -> None:
    """To a tenth of what an exported folder is opened with; TF32, which cuDNN's convolutions have
    by default, moves these vectors by 4e-4.
    """
    assert torch.get_float32_matmul_precision() == "highest"
    processor, on_cpu = embedder.processor, embedder
    embedder = Embedder(load_tiny().backbone.cuda(), processor, on_cpu.policy)
    atol = FINGERPRINT_TOLERANCE["float32"] / 10
    batch = embedder._pack([processor(item, None, key=0, row_id="toy") for item in items[:3]])
    assert batch.input_ids.is_pinned()
    assert batch.patches.is_pinned()
    expected = on_cpu.encode(items, batch_tokens=70)
    for threads in (0, 4):
        found = embedder.encode(items, batch_tokens=70, threads=threads)
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
    prints = [take_fingerprint(one.encode) for one in (embedder, on_cpu)]
    np.testing.assert_allclose(*prints, rtol=0, atol=atol)
