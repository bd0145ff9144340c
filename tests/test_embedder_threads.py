"""Embedding ahead of the model and in several threads: the same vectors, and no thread is left."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cocoa_pl import embedder as embedder_module
from cocoa_pl.attention import Policy
from cocoa_pl.data import processor as processing
from cocoa_pl.data.items import Item
from cocoa_pl.data.processor import Processor
from cocoa_pl.embedder import Embedder
from cocoa_pl.models.exported import FINGERPRINT_TOLERANCE, take_fingerprint
from cocoa_pl.models.loading import Loaded


@pytest.fixture
def embedder(
    load_tiny: Callable[..., Loaded], processor: Processor, policies: dict[str, Policy]
) -> Embedder:
    return Embedder(load_tiny().backbone, processor, policies["bidirectional"])


@pytest.fixture(scope="module")
def items(make_item: Callable[..., Item]) -> list[Item]:
    return [make_item(seed, images=seed % 3) for seed in range(23)]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [t.name for t in threading.enumerate() if "item_batches" in t.name] == []


@pytest.mark.parametrize("batch_tokens", [1, 70, 10_000])
def test_vectors_are_those_of_items_one_by_one_to_the_bit_for_any_number_of_threads(
    batch_tokens: int, embedder: Embedder, items: list[Item]
) -> None:
    alone = np.concatenate([embedder.encode([item], threads=0) for item in items])
    found = [embedder.encode(items, batch_tokens=batch_tokens, threads=n) for n in (0, 1, 4)]
    np.testing.assert_allclose(found[0], alone, atol=1e-5)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


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
    embedder: Embedder, items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = embedder.encode(items)
    backbone, in_training, busy = embedder.backbone, [], threading.Lock()
    backbone.add_module("extra", nn.Dropout().train())  # below a model in evaluation, as peft's are
    backbone.stock.train()
    backbone.stock.model.visual.eval()  # a part of it is frozen
    modes = {name: module.training for name, module in backbone.named_modules()}
    original = backbone.embed

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        assert busy.acquire(blocking=False)  # one thread at a time
        in_training.append(any(module.training for module in backbone.modules()))
        vectors = original(*args, **kwargs)
        busy.release()
        return vectors

    def encode(seed: int) -> None:
        order = np.random.default_rng(seed).permutation(len(items))
        found = embedder.encode([items[n] for n in order], batch_tokens=50, threads=2)
        np.testing.assert_allclose(found, expected[order], atol=1e-5)

    monkeypatch.setattr(backbone, "embed", watched)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(encode, range(8)))
    assert set(in_training) == {False}
    assert {name: module.training for name, module in backbone.named_modules()} == modes
    assert not modes[""]
    assert modes["extra"]


def test_a_tokenizer_is_used_by_one_thread_at_a_time_and_a_cut_is_logged_once(
    make_processor: Callable[..., Processor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    processor = make_processor(max_length=8)
    inside, most, lock = 0, 0, threading.Lock()
    original = processor.tokenizer

    class Watched:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal inside, most
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.001)
            encoded = original(*args, **kwargs)
            with lock:
                inside -= 1
            return encoded

    monkeypatch.setattr(processor, "tokenizer", Watched())
    monkeypatch.setattr(processing, "MAX_KNOWN_TEXTS", 5)  # what is known is forgotten all the time
    monkeypatch.setattr(processing, "MAX_KNOWN_TOKENS", 20)
    texts = [f"the {'dog ' * (n % 7)}near {n % 11} cats" for n in range(200)]
    expected = [original(text, add_special_tokens=False).input_ids for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(processor._text_ids, texts)) == expected
        list(pool.map(lambda t: processor(Item(t), None, key=0, row_id="toy"), texts))
    assert most == 1
    assert 0 < sum(map(len, processor._known_texts.values())) <= 20
    assert caplog.text.count("said once") == 1


def test_a_long_call_logs_its_progress(
    embedder: Embedder,
    items: list[Item],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)
    embedder.encode(items, batch_tokens=70)
    assert "embedded" not in caplog.text
    durations = [embedder_module._duration(seconds) for seconds in (0.4, 89, 600, 12_240)]
    assert durations == ["0 s", "89 s", "10 min", "3.4 h"]
    monkeypatch.setattr(embedder_module, "EVERY_SECONDS", 0.0)
    embedder.encode(items, batch_tokens=70)
    lines = [record.message for record in caplog.records if "embedded" in record.message]
    assert lines[-1].startswith("embedded 23 of 23 items, ")
    assert lines[-1].endswith("about 0 s to go")
    assert len(lines) > 3


def test_identity_is_the_same_for_the_same_model_and_changes_with_all_that_vectors_depend_on(
    embedder: Embedder,
    load_tiny: Callable[..., Loaded],
    make_processor: Callable[..., Processor],
    policies: dict[str, Policy],
) -> None:
    full = policies["bidirectional"]

    def identity(embedder: Embedder) -> dict[str, Any]:
        found = embedder.identity()
        del found["fingerprint"], found["tolerance"]
        return found

    mine = identity(embedder)
    other = load_tiny().backbone
    assert identity(Embedder(other, make_processor(), full)) == mine
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
        differing = {key for key, value in identity(changed_one).items() if value != mine[key]}
        assert differing == {name}


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
