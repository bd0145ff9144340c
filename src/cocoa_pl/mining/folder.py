"""Write pairs in MMEB's layout, which `data=mmeb` and `data=mmeb_hardneg` read.

<folder>/<subset>/train-00000-of-00001.parquet    qry, qry_image_path, pos_text, pos_image_path,
                                                  neg_text, neg_image_path: lists as strings
<folder>/images/<digest>.<type>                   images that were embedded in the rows
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cocoa_pl.data.images import ImageSource, real_path
from cocoa_pl.data.items import IMAGE_SLOT, PLACEHOLDER, Item, Pair
from cocoa_pl.errors import UserError

FILE = "train-00000-of-00001.parquet"


def image_root(pairs: Sequence[Pair], *, folder: Path) -> Path:
    """The deepest folder that holds all image files of the pairs; the mined folder, without any."""
    here = real_path(str(folder))
    folders = {
        os.path.dirname(real_path(str(source))) if isinstance(source, Path) else here
        for pair in pairs
        for item in (pair.query, pair.positive, *pair.negatives)
        for source in item.media
    }
    return Path(os.path.commonpath(folders or {here}))


def write_subset(folder: Path, subset: str, pairs: Sequence[Pair], *, root: Path) -> None:
    """Write the rows of a subset.

    Args:
        root: what image paths are relative to.

    Raises:
        UserError: for a row with several images on one side, which the layout cannot hold.
    """
    columns: dict[str, list[str]] = defaultdict(list)
    for pair in pairs:
        for item, text, image in (
            (pair.query, "qry", "qry_image_path"),
            (pair.positive, "pos_text", "pos_image_path"),
        ):
            columns[text].append(_text(item, pair))
            columns[image].append(_path(item, folder, root))
        columns["neg_text"].append(str([_text(item, pair) for item in pair.negatives]))
        columns["neg_image_path"].append(
            str([_path(item, folder, root) for item in pair.negatives])
        )
    path = folder / subset / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    pq.write_table(pa.table(columns), part)
    part.replace(path)


def _text(item: Item, pair: Pair) -> str:
    if len(item.media) > 1:
        raise UserError(f"{pair.row_id}: MMEB's layout holds one image on a side, not several")
    return item.text.replace(IMAGE_SLOT, PLACEHOLDER)


def _path(item: Item, folder: Path, root: Path) -> str:
    """Relative to the root; an embedded image becomes a file first."""
    if not item.media:
        return ""
    source = item.media[0]
    file = source if isinstance(source, Path) else _as_file(source, folder / "images")
    return str(Path(real_path(str(file))).relative_to(root))


def _as_file(source: ImageSource, images: Path) -> Path:
    if isinstance(source, Image.Image):
        buffer = io.BytesIO()
        source.save(buffer, "png")
        source = buffer.getvalue()
    assert isinstance(source, bytes)
    with Image.open(io.BytesIO(source)) as opened:
        kind = (opened.format or "image").lower()
    file = images / f"{hashlib.blake2b(source, digest_size=12).hexdigest()}.{kind}"
    if not file.exists():
        images.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_bytes(source)
        part.replace(file)
    return file
