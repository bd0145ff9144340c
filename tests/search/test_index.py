"""An image index holds the folder's present files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError
from cocoa_pl.search.index import ImageIndex, image_files, nearest

READABLE = 8  # of the folder's pictures


def again(folder: Path, embedder: Embedder, **choices: Any) -> ImageIndex:
    given: dict[str, Any] = {"kept_in": None, "threads": 2}
    return ImageIndex(folder, embedder, **(given | choices))


def test_files_are_those_of_the_folder_and_no_others(folder: Path) -> None:
    names = {os.fsencode(file.as_posix()) for file in image_files(folder)}
    assert len(names) == READABLE + 1  # the broken one is found when it is opened
    assert {b"1.png", b"2.JPG", b"below/3.png", b"below/4.webp", b"\xff\xfe.png"} <= names
    assert not {n for n in names if n.startswith((b".", b"link", b"gone")) or b"hidden" in n}


def test_pictures_are_found_by_themselves_and_equal_the_embedders_vectors(
    index: ImageIndex, embedder: Embedder
) -> None:
    vectors = embedder.encode([index.folder / file for file in index.files])
    for number, vector in enumerate(vectors):
        found = index.search(vector, 3)
        assert found[0].number == number
        assert found[0].file == index.files[number]
        scores = np.sort(vectors @ vector)[::-1]
        np.testing.assert_allclose([one.score for one in found], scores[:3], atol=2e-3)


def test_what_cannot_be_read_is_named_and_left_out(folder: Path, embedder: Embedder) -> None:
    embedded, left_out = again(folder, embedder).update()
    assert embedded == READABLE
    assert list(left_out) == [Path("broken.png")]
    assert "cannot be read as an image" in left_out[Path("broken.png")]


def test_only_what_is_new_or_has_changed_is_embedded(
    index: ImageIndex, embedder: Embedder, make_image: Callable[..., Image.Image]
) -> None:
    folder = index.folder
    assert again(folder, embedder).update()[0] == 0
    make_image((56, 56), seed=50).save(folder / "1.png")  # another picture of that name
    make_image((56, 56), seed=51).save(folder / "new.png")
    (folder / "2.JPG").unlink()
    later = again(folder, embedder)
    assert later.update()[0] == 2
    assert Path("2.JPG") not in later.files
    vector = embedder.encode([folder / "1.png"])[0]
    best = later.search(vector, 1)[0]
    assert best.file == Path("1.png")
    assert best.score == pytest.approx(1, abs=2e-3)


def test_a_folder_may_move_with_what_is_known_of_it(index: ImageIndex, embedder: Embedder) -> None:
    moved = index.folder.with_name("moved")
    shutil.move(index.folder, moved)
    assert again(moved, embedder).update()[0] == 0


def test_a_killed_update_goes_on(
    folder: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = embedder.stream

    def dies(items: Any, **choices: Any) -> Any:
        yield next(stream(items, batch_tokens=1, **choices))
        raise KeyboardInterrupt

    killed = again(folder, embedder)
    with monkeypatch.context() as patch:
        patch.setattr(embedder, "stream", dies)
        with pytest.raises(KeyboardInterrupt):
            killed.update()
    assert again(folder, embedder).update()[0] == READABLE - 1


def test_another_model_has_vectors_of_its_own(
    index: ImageIndex, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedder.processor, "max_length", embedder.processor.max_length - 1)
    assert again(index.folder, embedder).update()[0] == READABLE
    monkeypatch.undo()
    assert again(index.folder, embedder).update()[0] == 0


def test_vectors_may_be_kept_elsewhere(folder: Path, embedder: Embedder, tmp_path: Path) -> None:
    again(folder, embedder, kept_in=tmp_path / "kept").update()
    assert not (folder / ".cocoa").exists()
    assert any((tmp_path / "kept").iterdir())


def test_a_folder_without_pictures_is_refused(tmp_path: Path, embedder: Embedder) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no image that can be read"):
        again(tmp_path / "empty", embedder).update()
    with pytest.raises(UserError, match="is no folder"):
        again(tmp_path / "nowhere", embedder)


# --- Neighbours --------------------------------------------------------------------------------


def unit(count: int, width: int, seed: int) -> np.ndarray:
    """Around a few centres, as pictures are."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(20, width))
    rows = centres[rng.integers(20, size=count)] + 0.5 * rng.normal(size=(count, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_nearest_is_a_sort_and_the_first_of_equals_wins() -> None:
    vectors = np.repeat(unit(50, 8, 1), 2, axis=0)  # every vector twice
    query = unit(1, 8, 2)[0]
    numbers, scores = nearest(query, vectors.astype(np.float16), 11)
    expected = np.argsort(-(vectors.astype(np.float16).astype(np.float32) @ query), kind="stable")
    assert numbers.tolist() == expected[:11].tolist()
    assert (np.diff(scores) <= 0).all()
    assert len(nearest(query, vectors, 1000)[0]) == 100
