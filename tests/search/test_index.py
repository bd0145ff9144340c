"""An image index holds the folder's present files."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cocoa_pl.config.process import guarded
from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError
from cocoa_pl.search import index as module
from cocoa_pl.search.index import ImageIndex, look

from .conftest import NO_TEXT, READABLE


def again(folder: Path, embedder: Embedder, **choices: Any) -> ImageIndex:
    given: dict[str, Any] = {"kept_in": None, "threads": 2}
    return ImageIndex(folder, embedder, **(given | choices))


def names(index: ImageIndex) -> set[bytes]:
    return {os.fsencode(file.as_posix()) for file in index.files.values()}


def test_files_are_those_of_the_folder_and_no_others(index: ImageIndex) -> None:
    found = names(index)
    assert len(found) == READABLE
    assert {b"1.png", b"2.JPG", b"below/3.png", b"below/4.jp2", b"below/nosuffix", NO_TEXT} <= found
    assert index.left_out == {}  # thumbnails and the like are nobody's pictures


def test_what_cannot_be_searched_is_named_with_the_reason_and_stops_nothing(
    folder: Path, embedder: Embedder, tmp_path: Path
) -> None:
    whole = (folder / "1.png").read_bytes()
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "cut.png").write_bytes(whole[:-60])  # its header is whole
    (folder / "photo.HEIC").write_bytes(heic := b"\0\0\0\x18ftypheic" + bytes(100))
    (folder / "phone").write_bytes(heic)
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "linked").symlink_to(tmp_path, target_is_directory=True)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "socket.png"))
    index = again(folder, embedder)
    assert index.update() == READABLE
    kinds = "AVIF, BMP, GIF, JPEG, JPEG2000, PNG, PPM, TIFF, WEBP"
    assert {str(file): why for file, why in index.left_out.items()} == {
        "broken.png": f"cannot be read as an image (its content is none of {kinds})",
        "cut.png": "cannot be read as an image (image file is truncated)",
        "photo.HEIC": "HEIC is not read; convert it to JPEG",
        "phone": "HEIC is not read; convert it to JPEG",
        "link.png": "is a link that leads out of the folder",
        "linked": "is a link to a folder, which is not followed",
        "gone.png": "cannot be opened (No such file or directory)",
        "loop.png": "cannot be opened (Too many levels of symbolic links)",
        "pipe.png": "is no file",
        "socket.png": "is no file",
    }


@pytest.fixture
def nobodys_folder() -> Iterator[Path]:
    """A folder of somebody whom permissions bind, who is at work."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(65534)
    yield folder
    if was_root:
        os.seteuid(0)
    for below in folder.iterdir():
        below.chmod(0o700)
    shutil.rmtree(folder)


def test_folders_that_cannot_be_listed_or_entered_are_named(nobodys_folder: Path) -> None:
    for name in ("closed", "listed", "open"):
        (nobodys_folder / name).mkdir()
        (nobodys_folder / name / "a.png").write_bytes(b"")
    (nobodys_folder / "closed").chmod(0o300)
    (nobodys_folder / "listed").chmod(0o600)
    files, left_out = look(nobodys_folder)
    assert list(files.values()) == [Path("open/a.png")]
    assert left_out == {
        Path("closed"): "cannot be listed (Permission denied)",
        Path("listed/a.png"): "cannot be opened (Permission denied)",
    }


def test_a_file_that_goes_or_changes_while_it_is_indexed_stops_nothing(
    folder: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = module._refusal

    def then_changes(path: Path) -> str | None:
        why = refusal(path)
        if path.name == "1.png":
            path.unlink()
        if path.name == "3.png":
            path.write_bytes(path.read_bytes()[:-60])
        return why

    monkeypatch.setattr(module, "_refusal", then_changes)
    index = again(folder, embedder)
    assert index.update() == READABLE - 2
    reasons = {str(file): why for file, why in index.left_out.items()}
    assert reasons["1.png"] == "does not exist"
    assert "truncated" in reasons["below/3.png"]
    assert index.update() == 0
    assert Path("1.png") not in index.left_out  # it is just gone


def test_results_are_a_sort_of_cosines_in_pages_and_the_first_of_equals_comes_first(
    folder: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b.png"):
        shutil.copy(folder / "1.png", folder / name)
    monkeypatch.setattr(module, "BLOCK", 4)
    index = again(folder, embedder)
    index.update()
    vector = embedder.encode([folder / "1.png"])[0]
    found = index.search(vector, 1000)
    assert len(found) == READABLE + 2
    assert [str(one.file) for one in found[:3]] == ["1.png", "a.png", "b.png"]
    vectors = embedder.encode([folder / one.file for one in found])
    np.testing.assert_allclose([one.score for one in found], vectors @ vector, atol=2e-3)
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert all(index.files[one.key] == one.file for one in found)
    assert index.search(vector, 4, skip=3) == found[3:7]
    assert index.search(vector, 4, skip=1000) == []


def test_only_what_is_new_or_has_changed_or_is_another_models_is_embedded(
    index: ImageIndex,
    embedder: Embedder,
    make_image: Callable[..., Image.Image],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = index.folder.with_name("moved")  # with what is known of it
    shutil.move(index.folder, folder)
    index = again(folder, embedder)
    assert index.update() == 0
    make_image((56, 56), seed=50).save(folder / "1.png")  # another picture of that name
    make_image((56, 56), seed=51).save(folder / "new.png")
    (folder / "2.JPG").unlink()
    for later in (index, again(folder, embedder)):
        later.update()
        assert len(later.files) == READABLE
        assert b"new.png" in names(later)
        assert b"2.JPG" not in names(later)
        best = later.search(embedder.encode([folder / "1.png"])[0], 1)[0]
        assert best.file == Path("1.png")
        assert best.score == pytest.approx(1, abs=2e-3)
    with monkeypatch.context() as patch:
        patch.setattr(embedder.processor, "max_length", embedder.processor.max_length - 1)
        assert again(folder, embedder).update() == READABLE
    assert again(folder, embedder).update() == 0


def test_a_signal_loses_at_most_the_batch_that_is_in_the_model(
    folder: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_TOKENS", 1)
    embed = embedder.backbone.embed
    calls = []

    def then_stops(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return embed(*arguments)

    stopped = again(folder, embedder)
    with monkeypatch.context() as patch:
        patch.setattr(embedder.backbone, "embed", then_stops)
        assert guarded(stopped.update) == 130
    assert again(folder, embedder).update() == READABLE - 5


def test_a_power_cut_costs_seconds_and_a_damaged_file_is_embedded_again(
    folder: Path,
    embedder: Embedder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "BATCH_TOKENS", 1)
    monkeypatch.setattr(module, "SAVED_EVERY", 0.0)
    index = again(folder, embedder)
    index.update()
    first, *others = index.kept.folder.glob("*.safetensors")
    assert len(others) == READABLE - 1
    first.write_bytes(first.read_bytes()[:50])
    (first.parent / "half.draft").write_bytes(b"of a run that was killed")
    with caplog.at_level(logging.WARNING):
        assert again(folder, embedder).update() == 1
    assert f"{first} is damaged" in caplog.text


def test_vectors_may_be_kept_elsewhere_and_what_is_no_folder_is_refused(
    folder: Path, embedder: Embedder, tmp_path: Path
) -> None:
    again(folder, embedder, kept_in=tmp_path / "kept").update()
    assert not (folder / ".cocoa").exists()
    assert any((tmp_path / "kept").iterdir())
    (tmp_path / "loop").symlink_to("loop")
    for name, why in (
        ("nowhere", "does not exist; check the path"),
        ("loop", "cannot be reached: Too many .*; it is a link to itself"),
        ("outside.png", "is no folder; check the path"),
        ("x" * 300, "cannot be reached: File name too long; name a shorter one"),
    ):
        with pytest.raises(UserError, match=why):
            again(tmp_path / name, embedder)
    with pytest.raises(UserError, match=r"cannot be kept in .*outside.png.*Not a dir.* --index"):
        again(folder, embedder, kept_in=tmp_path / "outside.png")
