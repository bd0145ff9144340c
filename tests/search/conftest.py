"""A folder of pictures with hostile names, and files that must not be shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from cocoa_pl.embedder import Embedder
from cocoa_pl.search.index import ImageIndex

HOSTILE = ["<img src=x onerror=alert(1)>.png", '"quoted" & [bold].png', "ends with a space .png"]
# A screenshot of macOS, a wide blank, joined emoji, what rich takes for one, a terminal's control.
NAMES = ["at 10.30\u202fPM.png", "a\u3000b.png", "\U0001f468\u200d\U0001f467.png", ":smile:.png"]
NO_TEXT = b"\xff\x1b[31m\n.png"
READABLE = 13  # of the folder's pictures
SECRET = b"nobody may see this"


@pytest.fixture
def folder(tmp_path: Path, make_image: Callable[..., Image.Image]) -> Path:
    """Pictures, links that lead out, and what is no picture."""
    root = tmp_path / "pictures"
    for name in ("below", ".hidden", "@eaDir", "__MACOSX", ".thumbnails", ".Trash-1000"):
        (root / name).mkdir(parents=True)
    names = [*HOSTILE, *NAMES, NO_TEXT.decode("utf-8", "surrogateescape"), "1.png", "2.JPG"]
    names += ["below/3.png", "below/4.jp2", "below/nosuffix.png"]
    hidden = [".hidden/5.png", ".6.png", "@eaDir/7.png", "__MACOSX/8.png", ".Trash-1000/9.png"]
    for seed, name in enumerate([*names, *hidden]):
        make_image((56, 56), seed=seed).save(root / name)
    (root / "below/nosuffix.png").rename(root / "below/nosuffix")
    (root / "README").write_text("no picture, and without a suffix")
    (root / "notes.txt").write_bytes(SECRET)
    make_image((56, 56), seed=99).save(tmp_path / "outside.png")
    return root


@pytest.fixture
def index(folder: Path, embedder: Embedder) -> ImageIndex:
    index = ImageIndex(folder, embedder, kept_in=None, threads=2)
    index.update()
    return index
