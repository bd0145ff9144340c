"""Filling a store: only what is missing, each item by one process, and nothing lost but a shard."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np
import pytest

from cocoa_pl.data.items import IMAGE_SLOT, Item
from cocoa_pl.errors import UserError
from cocoa_pl.evaluation import filling
from cocoa_pl.evaluation.filling import distinct, fill
from cocoa_pl.evaluation.identities import Identities
from cocoa_pl.evaluation.store import VectorStore

DIM = 4
BATCH = 3
IDENTITY = {"weights": "1f00", "dtype": "float32", "tolerance": 1e-3, "fingerprint": [[1.0]]}

# Fills the store named by its argument and is killed in the middle of the third shard.
KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[2])))
import test_filling as toy
toy.filling.SHARD_VECTORS = 6
model = toy.Model(kill_at=16)
toy.fill_all(toy.open_store(Path(sys.argv[1])), toy.texts(30), model)
"""


class Model:
    """Vectors from the numbers in texts, in batches out of order; counts what it embeds."""

    def __init__(self, *, kill_at: int | None = None) -> None:
        self.embedded: list[str] = []
        self.kill_at = kill_at

    def stream(self, items: Sequence[Item]) -> Generator[tuple[np.ndarray, np.ndarray]]:
        order = np.arange(len(items))[::-1]
        for start in range(0, len(items), BATCH):
            places = order[start : start + BATCH]
            for place in places:
                if items[place].text == "bad":
                    raise UserError("item 7: bad")
                self.embedded.append(items[place].text)
                if len(self.embedded) == self.kill_at:
                    signal.raise_signal(signal.SIGKILL)
            yield places, np.stack([vector_of(items[place]) for place in places])


def vector_of(item: Item) -> np.ndarray:
    angle = float(item.key % 1000)
    return np.array([np.cos(angle), np.sin(angle), 0, 0], np.float32)


def texts(count: int) -> list[Item]:
    return [Item(f"text {number}") for number in range(count)]


def open_store(folder: Path) -> VectorStore:
    return VectorStore(folder, identity=IDENTITY, dim=DIM, dtype="float32")


def fill_all(
    store: VectorStore, items: Sequence[Item], model: Model, *, rank: int = 0, world_size: int = 1
) -> int:
    return fill(store, items, Identities.of(items), model.stream, rank=rank, world_size=world_size)


def assert_holds(store: VectorStore, items: Sequence[Item]) -> None:
    store.reload()
    found = store.vectors(Identities.of(items))
    np.testing.assert_array_equal(found[:], np.stack([vector_of(item) for item in items]))


@pytest.mark.parametrize("shard_vectors", [1, 6, 1000])
def test_a_store_holds_every_item_afterwards(
    shard_vectors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "SHARD_VECTORS", shard_vectors)
    store, model = open_store(tmp_path), Model()
    assert fill_all(store, texts(20), model) == 20
    assert_holds(store, texts(20))
    expected = {1: 7, 6: 4, 1000: 1}[shard_vectors]
    assert len(list(tmp_path.glob("*.safetensors"))) == expected


def test_only_what_is_missing_is_embedded(tmp_path: Path) -> None:
    fill_all(open_store(tmp_path), texts(10), Model())
    model = Model()
    assert fill_all(open_store(tmp_path), texts(14), model) == 4
    assert sorted(model.embedded) == [f"text {number}" for number in range(10, 14)]
    again = Model()
    assert fill_all(open_store(tmp_path), texts(14), again) == 0
    assert again.embedded == []
    assert_holds(open_store(tmp_path), texts(14))


def test_a_killed_run_goes_on_with_what_it_had_finished(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    store, model = open_store(tmp_path), Model()
    assert len(store) == 12  # two shards of six; the rest of sixteen died with it
    assert fill_all(store, texts(30), model) == 18
    assert len(set(model.embedded)) == len(model.embedded) == 18
    assert_holds(store, texts(30))


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt])
def test_what_was_finished_before_an_error_is_kept(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items, model = [*texts(3), Item("bad"), *texts(12)[3:]], Model()
    if error is KeyboardInterrupt:
        original = filling._Writer.add

        def add(self: filling._Writer, *given: np.ndarray) -> None:
            original(self, *given)
            if self._count == 9:
                raise KeyboardInterrupt

        monkeypatch.setattr(filling._Writer, "add", add)
    with pytest.raises(error):
        fill_all(open_store(tmp_path), items, model)
    assert len(open_store(tmp_path)) == 9


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_items_and_none_is_embedded_twice(
    world_size: int, tmp_path: Path
) -> None:
    items = texts(60)
    # All of them opened the store before any wrote into it, as they may.
    stores = [open_store(tmp_path) for _ in range(world_size)]
    models = [Model() for _ in range(world_size)]
    for rank, (store, model) in enumerate(zip(stores, models, strict=True)):
        fill_all(store, items, model, rank=rank, world_size=world_size)
    embedded = [text for model in models for text in model.embedded]
    assert sorted(embedded) == sorted(item.text for item in items)
    assert min(len(model.embedded) for model in models) > 60 / world_size / 3
    assert_holds(stores[0], items)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    fill_all(open_store(tmp_path), texts(60), Model(), rank=1, world_size=3)
    done = len(open_store(tmp_path))
    models = [Model(), Model()]
    for rank, model in enumerate(models):
        fill_all(open_store(tmp_path), texts(60), model, rank=rank, world_size=2)
    assert sum(len(model.embedded) for model in models) == 60 - done
    assert_holds(open_store(tmp_path), texts(60))


def test_items_of_a_damaged_shard_are_embedded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "SHARD_VECTORS", 6)
    fill_all(open_store(tmp_path), texts(18), Model())
    first = min(tmp_path.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-5])
    model = Model()
    assert fill_all(open_store(tmp_path), texts(18), model) == 6
    assert_holds(open_store(tmp_path), texts(18))


def test_a_changed_picture_is_embedded_again_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"1234")
    items = [Item(f"{IMAGE_SLOT}new", (picture,)), *texts(3)]
    fill_all(open_store(tmp_path / "store"), items, Model())
    picture.write_bytes(b"12345")
    model = Model()
    caplog.set_level(logging.INFO)
    assert fill_all(open_store(tmp_path / "store"), items, model) == 1
    assert model.embedded == [f"{IMAGE_SLOT}new"]
    assert "1 of them because an image file has changed" in caplog.text


def test_vectors_reach_the_disk_after_some_time_even_if_they_are_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "SHARD_SECONDS", 0.0)
    fill_all(open_store(tmp_path), texts(9), Model())
    assert len(list(tmp_path.glob("*.safetensors"))) == 3  # one a batch


def test_equal_items_are_one() -> None:
    items = [Item("a"), Item("b"), Item("a"), Item("c"), Item("b")]
    kept, identities = distinct(items, Identities.of(items))
    assert [item.text for item in kept] == ["a", "b", "c"]
    assert identities.keys.tolist() == [item.key for item in kept]
