"""Vectors of subsets in memory and in a folder: whose they are, what is embedded again, and what a
killed run leaves.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from cocoa_pl.attention import Policy
from cocoa_pl.data.items import IMAGE_SLOT, EvalSubset, Item
from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.vectors import VectorSettings, embedded, encode_once, fill, kept


class Model:
    """Vectors from the keys of items; keeps what it embeds."""

    def __init__(self, *, kill_at: int | None = None) -> None:
        self.embedded: list[Item] = []
        self.kill_at = kill_at

    def __call__(self, items: Sequence[Item]) -> np.ndarray:
        rows = np.empty((len(items), 6), np.float32)
        for place, item in enumerate(items):
            if item.text == "bad":
                raise UserError("it is bad", item=place)
            self.embedded.append(item)
            if len(self.embedded) == self.kill_at:
                signal.raise_signal(signal.SIGKILL)
            rows[place] = np.random.default_rng(item.key).normal(size=6)
        return rows


def subset(
    name: str, *, queries: Sequence[Item] = (), candidates: Sequence[Item] = ()
) -> EvalSubset:
    """Four queries, one of which is among the six candidates of every row: nine items."""
    queries = [*queries, *(Item(f"{name} query {n}") for n in range(3)), Item("both")]
    candidates = [*(Item(f"{name} candidate {n}") for n in range(5)), Item("both"), *candidates]
    return EvalSubset(
        name,
        "retrieval",
        True,
        queries,
        candidates,
        np.arange(len(queries)),
        [np.arange(len(candidates))] * len(queries),
        [f"row {n}" for n in range(len(queries))],
    )


def assert_keeps(folder: Path, own: EvalSubset) -> None:
    for found, items in zip(kept(folder, own), (own.queries, own.candidates), strict=True):
        np.testing.assert_array_equal(found, Model()(items))


@pytest.mark.parametrize("world_size", [1, 3, 20])
def test_processes_share_a_subset_and_a_job_of_any_size_reads_it(
    world_size: int, tmp_path: Path
) -> None:
    own, models = subset("a"), [Model() for _ in range(world_size)]
    for rank, model in enumerate(models):
        fill(tmp_path, own, model, rank=rank, world_size=world_size)
    shares = [len(model.embedded) for model in models]
    assert sum(shares) == 9 == len({item for model in models for item in model.embedded})
    assert max(shares) - min(shares) <= 1
    assert len(list(tmp_path.iterdir())) == world_size  # a file of each
    assert_keeps(tmp_path, own)
    alone = Model()
    fill(tmp_path, own, alone)
    fill(tmp_path, own, alone, rank=1, world_size=2)
    assert alone.embedded == []


def test_a_subset_that_some_process_has_not_finished_is_not_read(tmp_path: Path) -> None:
    own, again = subset("a"), Model()
    fill(tmp_path, own, Model(), rank=0, world_size=2)
    with pytest.raises(UserError, match=f"{tmp_path} lacks vectors of a: .* run the same command"):
        kept(tmp_path, own)
    fill(tmp_path, own, again, rank=0, world_size=2)
    assert again.embedded == []
    fill(tmp_path, own, again)  # another number of processes begins the subset anew
    assert len(again.embedded) == 9


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")  # others' threads idle
def test_a_killed_run_goes_on_behind_its_last_whole_subset(tmp_path: Path) -> None:
    def fill_both(model: Model) -> None:
        for name in ("first", "second"):
            fill(tmp_path, subset(name), model)

    process = multiprocessing.get_context("fork").Process(
        target=fill_both, args=[Model(kill_at=15)]
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("first")
    model = Model()
    fill_both(model)
    for name in ("first", "second"):
        assert_keeps(tmp_path, subset(name))
    assert {item.text.split()[0] for item in model.embedded} == {"second", "both"}


def test_a_file_has_its_name_only_when_all_of_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def power_failure(file: int) -> None:
        assert list(tmp_path.glob("*.safetensors")) == []
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cocoa_pl.evaluation.vectors.os.fsync", power_failure)
    with pytest.raises(OSError, match="No space left"):
        fill(tmp_path, subset("a"), Model())
    assert list(tmp_path.iterdir()) == []


def test_a_changed_image_file_is_another_item(tmp_path: Path) -> None:
    """Its size, its time of modification, or, of files that are swapped, the time of change."""
    pictures = [tmp_path / f"{n}.png" for n in range(2)]
    store = tmp_path / "store"
    store.mkdir()
    for number, path in enumerate(pictures):
        path.write_bytes(b"%d" % number)
        os.utime(path, ns=(1, 10**18))
    own = subset("a", candidates=[Item(IMAGE_SLOT, (path,)) for path in pictures])

    def embedded_again() -> bool:
        model = Model()
        fill(store, own, model)
        return bool(model.embedded)

    def swap() -> None:
        pictures[0].rename(tmp_path / "2.png")
        pictures[1].rename(pictures[0])
        (tmp_path / "2.png").rename(pictures[1])

    assert embedded_again()
    assert not embedded_again()
    for change in (
        lambda: os.utime(pictures[0], ns=(1, 10**18 + 1)),
        lambda: pictures[0].write_bytes(b"more"),
        swap,
        pictures[1].unlink,
    ):
        change()
        assert embedded_again()
        assert not embedded_again()


def test_other_items_and_names_have_files_of_their_own_and_a_damaged_one_is_named(
    tmp_path: Path,
) -> None:
    hostile = subset("../a b/" + 300 * "é")
    for own in (hostile, subset("a", queries=[Item("more")]), subset("a")):
        fill(tmp_path, own, Model())
        assert_keeps(tmp_path, own)
    files = list(tmp_path.iterdir())
    assert len(files) == 3
    for file in files:
        file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match=rf"{tmp_path}/a-.* is damaged .*; delete it and run the "):
        kept(tmp_path, own)
    for file in files:
        file.write_bytes(b"")
    with pytest.raises(UserError, match="is damaged"):
        kept(tmp_path, own)


def test_a_store_holds_each_models_own_vectors(
    embedder: Embedder, policies: dict[str, Policy], tmp_path: Path
) -> None:
    own = subset("a")
    causal = Embedder(embedder.backbone, embedder.processor, policies["causal"])
    for model, dtype in ((embedder, "float16"), (causal, "float16"), (causal, "float32")):
        settings = VectorSettings(store=tmp_path, store_dtype=dtype)
        for _ in range(2):
            ((queries, candidates),) = embedded(model, [own], settings)
            np.testing.assert_array_equal(queries, model.encode(own.queries).astype(dtype))
            np.testing.assert_array_equal(candidates, model.encode(own.candidates).astype(dtype))
    files = list(tmp_path.glob("*/*"))
    assert len(files) == len({file.parent for file in files}) == 3
    arrays = [load_file(file)["vectors"] for file in files]  # as any reader of safetensors does
    assert sorted((a.dtype.name, a.shape) for a in arrays) == [
        ("float16", (9, 32)),
        ("float16", (9, 32)),
        ("float32", (9, 32)),
    ]


@pytest.mark.parametrize("keep", [False, True], ids=["memory", "store"])
@pytest.mark.parametrize("role", ["query", "candidate"])
def test_an_item_that_cannot_be_embedded_is_named_by_its_row(
    role: str, keep: bool, tmp_path: Path
) -> None:
    bad = [Item("bad")]
    own = subset("a", queries=bad) if role == "query" else subset("a", candidates=bad)
    with pytest.raises(UserError, match=f"^row 0, {role}: it is bad$"):
        fill(tmp_path, own, Model()) if keep else next(encode_once(Model(), [own]))
    assert list(tmp_path.iterdir()) == []


def test_in_memory_an_item_of_several_subsets_is_encoded_once() -> None:
    model, subsets = Model(), [subset("a"), subset("b"), subset("a ")]
    for own, found in zip(subsets, encode_once(model, subsets), strict=True):
        np.testing.assert_array_equal(found[0], Model()(own.queries))
        np.testing.assert_array_equal(found[1], Model()(own.candidates))
    assert len(model.embedded) == len(set(model.embedded)) == 3 * 8 + 1
