"""A folder of pictures with hostile names, and files that must not be shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from cocoa_pl.embedder import Embedder
from cocoa_pl.search.index import ImageIndex

HOSTILE = ["<img src=x onerror=alert(1)>.png", '"quoted" & [bold].png', "ends with a space .png"]
NO_TEXT = b"\xff\xfe.png"
SECRET = b"nobody may see this"


@pytest.fixture
def folder(tmp_path: Path, make_image: Callable[..., Image.Image]) -> Path:
    """Six pictures and two below, links that lead out, and what is no picture."""
    root = tmp_path / "pictures"
    (root / "below").mkdir(parents=True)
    (root / ".hidden").mkdir()
    names = [*HOSTILE, "1.png", "2.JPG", NO_TEXT.decode("utf-8", "surrogateescape")]
    for seed, name in enumerate([*names, "below/3.png", "below/4.webp", ".hidden/5.png", ".6.png"]):
        make_image((56, 56), seed=seed).save(root / name)
    (root / "broken.png").write_bytes(b"no picture")
    (root / "notes.txt").write_bytes(SECRET)
    outside = tmp_path / "outside.png"
    make_image((56, 56), seed=99).save(outside)
    (root / "link.png").symlink_to(outside)
    (root / "linked").symlink_to(tmp_path, target_is_directory=True)
    (root / "gone.png").symlink_to(tmp_path / "nowhere.png")
    return root


@pytest.fixture
def index(folder: Path, embedder: Embedder) -> ImageIndex:
    index = ImageIndex(folder, embedder, kept_in=None, threads=2)
    index.update()
    return index
