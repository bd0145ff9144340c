"""A store keeps complete files of vectors, for one model and unchanged images."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cocoa_pl.data.items import IMAGE_SLOT, Item
from cocoa_pl.errors import UserError
from cocoa_pl.evaluation import store as store_module
from cocoa_pl.evaluation.store import VectorStore, cache_keys, embed_missing, file_state

DIM, BATCH = 6, 3
IDENTITY: dict[str, Any] = {
    "weights": "1f00",
    "policy": {"name": "bidirectional"},
    "max_pixels": 3136,
    "dtype": "float32",
    "tolerance": 1e-3,
    "fingerprint": [[1.0, 0.0], [0.0, 1.0]],
}

# Fills the store named by its argument and is killed in the middle of the third file.
KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[2])))
import test_store as toy
toy.store_module.FILE_VECTORS = 6
toy.fill(toy.open_store(Path(sys.argv[1])), toy.texts(*range(30)), toy.Model(kill_at=16))
"""


class Model:
    """Vectors from the keys of items, in batches out of order; counts what it embeds."""

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
    return vectors_of(1, seed=item.key)[0]


def open_store(
    folder: Path, *, stored_as: str = "float16", dim: int = DIM, **changes: Any
) -> VectorStore:
    return VectorStore(folder, identity=IDENTITY | changes, dim=dim, dtype=stored_as)


def vectors_of(count: int, *, seed: int = 0) -> np.ndarray:
    array = np.random.default_rng(seed).normal(size=(count, DIM))
    return (array / np.linalg.norm(array, axis=1, keepdims=True)).astype(np.float32)


def texts(*numbers: int) -> list[Item]:
    return [Item(f"text {number}") for number in numbers]


def fill(store: VectorStore, items: Sequence[Item], model: Model, **share: int) -> int:
    return embed_missing(store, items, cache_keys(items), model.stream, **share)


def assert_holds(store: VectorStore, items: Sequence[Item]) -> None:
    expected = np.stack([vector_of(item) for item in items])
    np.testing.assert_array_equal(store.vectors(cache_keys(items)), expected.astype(store.dtype))


# --- what is found -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_was_added_is_found_again_in_any_order(dtype: str, tmp_path: Path) -> None:
    vectors, keys = vectors_of(10), cache_keys(texts(*range(10)))
    store = open_store(tmp_path / "store", stored_as=dtype)
    for part in (slice(0, 4), slice(4, 5), slice(5, 10)):
        store.add(keys[part], vectors[part])
    for again in (store, open_store(tmp_path / "store", stored_as=dtype)):
        assert len(again) == 10
        for wanted in ([7, 0, 9, 4, 4, 1], [4], []):
            found = again.vectors(keys[wanted])
            assert (found.shape, found.dtype) == ((len(wanted), DIM), dtype)
            np.testing.assert_array_equal(found, vectors[wanted].astype(dtype))


def test_what_is_not_there_is_missing_and_no_vector_is_made_up(tmp_path: Path) -> None:
    store, keys = open_store(tmp_path), cache_keys(texts(0, 1, 2))
    assert store.missing(keys).tolist() == [0, 1, 2]
    store.add(keys[[0, 2]], vectors_of(2))
    assert store.missing(keys).tolist() == [1]
    with pytest.raises(UserError, match="lacks 1 of 3 vectors; run the same command again"):
        store.vectors(keys)


def test_any_safetensors_reader_opens_a_file(tmp_path: Path) -> None:
    open_store(tmp_path).add(np.arange(5), vectors_of(5))
    (path,) = tmp_path.glob("*.safetensors")
    arrays = {name: (a.dtype.name, a.shape) for name, a in load_file(path).items()}
    assert arrays == {"keys": ("int64", (5,)), "vectors": ("float16", (5, DIM))}


def test_a_changed_image_file_is_another_vector(tmp_path: Path) -> None:
    picture, other = tmp_path / "picture.png", tmp_path / "other.png"
    picture.write_bytes(b"1234")
    other.write_bytes(b"1234")
    item = Item(f"{IMAGE_SLOT}a{IMAGE_SLOT}", (picture, other))
    store = open_store(tmp_path / "store")
    store.add(cache_keys([item]), vectors_of(1))
    before = file_state(item)
    assert not len(store.missing(cache_keys([item])))
    os.utime(other, ns=(1, 10**18))  # the same size, another time
    touched = file_state(item)
    assert len(store.missing(cache_keys([item])))
    other.write_bytes(b"12345")
    os.utime(other, ns=(1, 10**18))  # the same time, another size
    longer = file_state(item)
    other.unlink()
    assert len({before, touched, longer, file_state(item), 0}) == 5


def test_files_swapped_for_each_other_are_other_vectors(tmp_path: Path) -> None:
    """The same sizes and times of modification, as files out of an archive have."""
    first, second = tmp_path / "1.png", tmp_path / "2.png"
    for path in (first, second):
        path.write_bytes(path.stem.encode())
        os.utime(path, ns=(1, 10**18))
    items = [Item(IMAGE_SLOT, (path,)) for path in (first, second)]
    before = cache_keys(items)
    first.rename(tmp_path / "3.png")
    second.rename(first)
    (tmp_path / "3.png").rename(second)
    assert not np.isin(cache_keys(items), before).any()


def test_only_files_have_a_state(tmp_path: Path) -> None:
    assert file_state(Item("text")) == 0
    assert file_state(Item(IMAGE_SLOT, (b"bytes",))) == 0


# --- what is embedded --------------------------------------------------------------------------


@pytest.mark.parametrize(("file_vectors", "files"), [(1, 7), (6, 4), (1000, 1)])
def test_only_what_is_missing_is_embedded_and_equal_items_once(
    file_vectors: int, files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "FILE_VECTORS", file_vectors)
    store, model = open_store(tmp_path), Model()
    assert fill(store, texts(*range(20), 3, 4), model) == 20
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    for expected in (4, 0):
        model = Model()
        assert fill(store, texts(*range(24)), model) == expected == len(model.embedded)
        assert_holds(store, texts(*range(24)))
        store = open_store(tmp_path)


def test_a_killed_run_goes_on_with_what_it_had_finished(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    store, model = open_store(tmp_path), Model()
    assert len(store) == 12  # two files of six; the rest of sixteen died with it
    assert fill(store, texts(*range(30)), model) == 18 == len(set(model.embedded))
    assert_holds(store, texts(*range(30)))


def test_what_was_finished_before_an_error_is_kept(tmp_path: Path) -> None:
    items = [*texts(0, 1, 2), Item("bad"), *texts(*range(3, 12))]
    with pytest.raises(UserError, match="bad"):
        fill(open_store(tmp_path), items, Model())
    assert len(open_store(tmp_path)) == 9


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_items_and_none_is_embedded_twice(
    world_size: int, tmp_path: Path
) -> None:
    items = texts(*range(60))
    # All of them opened the store before any wrote into it, as they may.
    stores = [open_store(tmp_path) for _ in range(world_size)]
    models = [Model() for _ in range(world_size)]
    for rank, (store, model) in enumerate(zip(stores, models, strict=True)):
        fill(store, items, model, rank=rank, world_size=world_size)
    embedded = [text for model in models for text in model.embedded]
    assert sorted(embedded) == sorted(item.text for item in items)
    assert min(len(model.embedded) for model in models) > 60 / world_size / 3
    stores[0].reload()
    assert_holds(stores[0], items)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    items = texts(*range(60))
    done = fill(open_store(tmp_path), items, Model(), rank=1, world_size=3)
    rest = [fill(open_store(tmp_path), items, Model(), rank=r, world_size=2) for r in range(2)]
    assert 0 < done == 60 - sum(rest)
    assert_holds(open_store(tmp_path), items)


# --- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 7, 60, -5])
def test_a_file_that_was_cut_off_is_named_and_its_items_are_embedded_again(
    kept: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(open_store(tmp_path), texts(0, 1), Model())
    (first,) = tmp_path.glob("*.safetensors")
    fill(open_store(tmp_path), texts(2, 3), Model())
    first.write_bytes(first.read_bytes()[:kept])
    caplog.set_level(logging.WARNING)
    store = open_store(tmp_path)
    assert len(store) == 2
    assert f"{first} is damaged" in caplog.text
    assert first.exists()  # nothing is deleted unasked
    assert fill(store, texts(0, 1, 2, 3), Model()) == 2


def test_a_file_has_its_name_only_when_all_of_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)

    def power_failure(file: int) -> None:
        assert list(tmp_path.glob("*.safetensors")) == []
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module.os, "fsync", power_failure)
    with pytest.raises(UserError, match=f"store {tmp_path} cannot be written: .*No space left"):
        store.add(cache_keys(texts(0)), vectors_of(1))
    assert list(tmp_path.glob("*.safetensors")) == []


# --- whose vectors -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "2e11"}, "its weights is another"),
        ({"policy": {"name": "causal"}}, "its policy is another"),
        ({"max_pixels": 784}, "its max_pixels is 3136, here it is 784"),
        ({"dtype": "bfloat16"}, "its dtype is float32, here it is bfloat16"),
        ({"new_setting": 3}, "its new_setting is another"),
        ({"fingerprint": [[1.0, 0.0], [0.1, 1.0]]}, "other vectors, which differ by up to 0.1"),
        ({"fingerprint": [[1.0, 0.0], [float("nan"), 1.0]]}, "other vectors"),
    ],
)
def test_another_models_vectors_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    store = open_store(tmp_path)
    store.add(cache_keys(texts(0)), vectors_of(1))
    with pytest.raises(UserError, match=f"{tmp_path} holds vectors of another model.*{message}"):
        open_store(tmp_path, **changes)
    assert len(open_store(tmp_path)) == 1


def test_rounding_of_another_device_is_the_same_model(tmp_path: Path) -> None:
    open_store(tmp_path)
    open_store(tmp_path, fingerprint=[[1.0, 0.0], [1e-5, 1.0]])


def test_another_type_or_width_is_refused(tmp_path: Path) -> None:
    open_store(tmp_path)
    with pytest.raises(UserError, match="its stored_as is float16, here it is float32"):
        open_store(tmp_path, stored_as="float32")
    with pytest.raises(UserError, match="its dim is 6, here it is 8"):
        open_store(tmp_path, dim=8)
    with pytest.raises(UserError, match="store_dtype=int8: choose float16 or float32"):
        open_store(tmp_path, stored_as="int8")


def test_what_is_no_store_is_left_alone(tmp_path: Path) -> None:
    save_file({"weights": np.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"holds .safetensors files but no store.json: it is no"):
        open_store(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "store.json").write_text("{")
    with pytest.raises(UserError, match=r"store\.json is not valid JSON"):
        open_store(tmp_path / "store")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        open_store(tmp_path / "file")


def test_the_store_describes_its_model_in_a_file(tmp_path: Path) -> None:
    open_store(tmp_path)
    written = json.loads((tmp_path / "store.json").read_text())
    assert written == {"format": 3, "dim": DIM, "stored_as": "float16", **IDENTITY}
