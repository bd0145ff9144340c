"""What a folder keeps of vectors: whole or not at all, found by content, and only this model's."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from cocoa_pl.data.items import IMAGE_SLOT, Item
from cocoa_pl.errors import UserError
from cocoa_pl.evaluation import shards
from cocoa_pl.evaluation.identities import Identities, file_stamp
from cocoa_pl.evaluation.shards import DamagedShard, read_shard, write_shard
from cocoa_pl.evaluation.store import VectorStore

DIM = 6
IDENTITY: dict[str, Any] = {
    "weights": "1f00",
    "policy": {"name": "bidirectional"},
    "max_pixels": 3136,
    "dtype": "float32",
    "tolerance": 1e-3,
    "fingerprint": [[1.0, 0.0], [0.0, 1.0]],
}


def open_store(
    folder: Path, *, stored_as: str = "float16", dim: int = DIM, **changes: Any
) -> VectorStore:
    return VectorStore(folder, identity=IDENTITY | changes, dim=dim, dtype=stored_as)


def vectors_of(count: int, *, seed: int = 0) -> np.ndarray:
    array = np.random.default_rng(seed).normal(size=(count, DIM))
    return (array / np.linalg.norm(array, axis=1, keepdims=True)).astype(np.float32)


def texts(*numbers: int) -> list[Item]:
    return [Item(f"text {number}") for number in numbers]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    keys = np.arange(5)
    return write_shard(tmp_path, keys, keys * 10, vectors_of(5).astype(np.float16))


# --- shards ------------------------------------------------------------------------------------


def test_a_shard_gives_back_what_was_written_as_a_map(shard: Path) -> None:
    read = read_shard(shard, dim=DIM, dtype="float16")
    assert read.keys.tolist() == [0, 1, 2, 3, 4]
    assert read.stamps.tolist() == [0, 10, 20, 30, 40]
    np.testing.assert_array_equal(read.vectors, vectors_of(5).astype(np.float16))
    assert isinstance(read.vectors, np.memmap)


def test_any_safetensors_reader_opens_a_shard(shard: Path) -> None:
    arrays = load_file(shard)
    assert {name: (a.dtype.name, a.shape) for name, a in arrays.items()} == {
        "keys": ("int64", (5,)),
        "stamps": ("int64", (5,)),
        "vectors": ("float16", (5, DIM)),
    }


@pytest.mark.parametrize("kept", [0, 7, 60, -1])
def test_a_shard_that_was_cut_off_is_damaged(kept: int, shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(DamagedShard):
        read_shard(shard, dim=DIM, dtype="float16")


def test_a_single_flipped_bit_anywhere_is_noticed(shard: Path) -> None:
    whole = shard.read_bytes()
    for place in range(8, len(whole), 3):
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(DamagedShard):
            read_shard(shard, dim=DIM, dtype="float16")


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"weights": np.zeros(3)}, "it holds weights"),
        ({"keys": np.arange(2), "stamps": np.arange(2), "vectors": np.zeros((2, 3))}, "F64"),
        (
            {"keys": np.arange(2), "stamps": np.arange(2), "vectors": np.zeros((2, 3), "f2")},
            r"float16 \(2, 3\)",
        ),
        (
            {"keys": np.arange(1), "stamps": np.arange(2), "vectors": np.zeros((2, DIM), "f2")},
            r"float16 \(2, 6\)",
        ),
        (
            {"keys": np.arange(2), "stamps": np.arange(2), "vectors": np.zeros((2, DIM), "f2")},
            "checksum",
        ),
    ],
)
def test_another_file_is_no_shard(arrays: dict[str, Any], told: str, tmp_path: Path) -> None:
    save_file(arrays, tmp_path / "x.safetensors")
    with pytest.raises(DamagedShard, match=told):
        read_shard(tmp_path / "x.safetensors", dim=DIM, dtype="float16")


def test_a_shard_has_its_name_only_when_all_of_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def power_failure(file: int) -> None:
        assert list(tmp_path.glob("*.safetensors")) == []
        raise OSError("no space left on device")

    monkeypatch.setattr(shards.os, "fsync", power_failure)
    with pytest.raises(OSError, match="no space"):
        write_shard(tmp_path, np.arange(5), np.arange(5), vectors_of(5))
    assert list(tmp_path.glob("*.safetensors")) == []


# --- what is found -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_was_written_is_found_again_in_any_order(dtype: str, tmp_path: Path) -> None:
    vectors = vectors_of(10)
    store = open_store(tmp_path / "store", stored_as=dtype)
    for part in (slice(0, 4), slice(4, 5), slice(5, 10)):
        store.write(Identities.of(texts(*range(10)))[part], vectors[part])
    for again in (store, open_store(tmp_path / "store", stored_as=dtype)):
        again.reload()
        assert len(again) == 10
        wanted = [7, 0, 9, 4, 4, 1]
        found = again.vectors(Identities.of(texts(*wanted)))
        assert found.shape == (6, DIM)
        expected = vectors[wanted].astype(dtype)
        np.testing.assert_array_equal(found[0:6], expected)
        np.testing.assert_array_equal(found[np.array([5, 1, 1])], expected[[5, 1, 1]])
        np.testing.assert_array_equal(found[np.array([3, 4])], expected[[3, 4]])  # of one shard
        assert found[np.array([], int)].shape == found[2:2].shape == (0, DIM)
        assert found[0:1].dtype == dtype


def test_what_is_not_there_is_missing_and_no_vector_is_made_up(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert store.find(Identities.of(texts(0, 1))).tolist() == [-1, -1]
    store.write(Identities.of(texts(0, 2)), vectors_of(2))
    store.reload()
    assert (store.find(Identities.of(texts(0, 1, 2))) < 0).tolist() == [False, True, False]
    with pytest.raises(UserError, match="lacks 1 of 3 vectors; run the same command again"):
        store.vectors(Identities.of(texts(0, 1, 2)))


def test_a_changed_image_file_is_another_vector(tmp_path: Path) -> None:
    picture, other = tmp_path / "picture.png", tmp_path / "other.png"
    picture.write_bytes(b"1234")
    other.write_bytes(b"1234")
    item = Item(f"{IMAGE_SLOT}a{IMAGE_SLOT}", (picture, other))
    store = open_store(tmp_path / "store")
    store.write(Identities.of([item, *texts(1)]), vectors_of(2))
    store.reload()
    before = file_stamp(item)
    assert store.find(Identities.of([item])).tolist() == [0]
    os.utime(other, ns=(1, 10**18))  # the same size, another time
    touched = file_stamp(item)
    assert store.find(Identities.of([item])).tolist() == [-1]
    assert store.count_changed(Identities.of([item])) == 1
    assert store.count_changed(Identities.of(texts(1, 2))) == 1  # known, for all it knows
    other.write_bytes(b"12345")
    os.utime(other, ns=(1, 10**18))  # the same time, another size
    longer = file_stamp(item)
    other.unlink()
    assert len({before, touched, longer, file_stamp(item), 0}) == 5


def test_files_swapped_for_each_other_are_other_vectors(tmp_path: Path) -> None:
    """The same sizes and times of modification, as files out of an archive have."""
    first, second = tmp_path / "1.png", tmp_path / "2.png"
    for path in (first, second):
        path.write_bytes(path.stem.encode())
        os.utime(path, ns=(1, 10**18))
    items = [Item(IMAGE_SLOT, (path,)) for path in (first, second)]
    before = Identities.of(items).both
    first.rename(tmp_path / "3.png")
    second.rename(first)
    (tmp_path / "3.png").rename(second)
    assert not np.isin(Identities.of(items).both, before).any()


def test_pictures_of_the_same_bytes_are_told_apart() -> None:
    """In another shape, or with other colours of their palette."""
    flat, tall = (Image.new("RGB", size, "white") for size in ((4, 2), (2, 4)))
    red, blue = Image.new("P", (2, 2)), Image.new("P", (2, 2))
    red.putpalette([255, 0, 0])
    blue.putpalette([0, 0, 255])
    keys = {Item(IMAGE_SLOT, (image,)).key for image in (flat, tall, red, blue)}
    assert len(keys) == 4
    assert Item(IMAGE_SLOT, (flat.copy(),)).key in keys


def test_only_files_have_a_state(tmp_path: Path) -> None:
    assert file_stamp(Item("text")) == 0
    assert file_stamp(Item(IMAGE_SLOT, (b"bytes",))) == 0


# --- damage ------------------------------------------------------------------------------------


def test_a_damaged_shard_is_named_and_its_items_are_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path)
    store.write(Identities.of(texts(0, 1)), vectors_of(2))
    store.write(Identities.of(texts(2, 3)), vectors_of(2, seed=1))
    first, second = sorted(tmp_path.glob("*.safetensors"))
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    caplog.set_level(logging.WARNING)
    store = open_store(tmp_path)
    assert len(store) == 2
    assert f"{first} is damaged (its content does not have its checksum)" in caplog.text
    assert str(second) not in caplog.text
    assert (store.find(Identities.of(texts(0, 1, 2, 3))) < 0).sum() == 2
    assert first.exists()  # nothing is deleted unasked


def test_half_written_files_are_neither_read_nor_kept_for_ever(tmp_path: Path) -> None:
    open_store(tmp_path)
    living, dead = tmp_path / f"{'a' * 32}.draft", tmp_path / f"{'b' * 32}.draft"
    somebodys = tmp_path / "chapter.draft"
    for draft in (living, dead, somebodys):
        draft.write_bytes(b"half")
        os.utime(draft, (0, time.time() - 7200 * (draft != living)))
    assert len(open_store(tmp_path)) == 0
    assert living.exists()
    assert somebodys.exists()
    assert not dead.exists()


# --- whose vectors -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
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
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    store = open_store(tmp_path)
    store.write(Identities.of(texts(0)), vectors_of(1))
    with pytest.raises(UserError, match=f"{tmp_path} holds vectors of another model.*{told}"):
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


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(UserError, match=f"store {tmp_path} cannot be written: .*No space left"):
        store.write(Identities.of(texts(0)), vectors_of(1))


def test_the_store_says_in_a_file_whose_vectors_it_holds(tmp_path: Path) -> None:
    open_store(tmp_path)
    written = json.loads((tmp_path / "store.json").read_text())
    assert written == {"format": 2, "dim": DIM, "stored_as": "float16", **IDENTITY}
