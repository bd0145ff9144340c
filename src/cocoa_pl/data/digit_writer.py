"""Scenes and examples in, PNG files and MMEB-format parquet out; equal input, equal bytes."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cocoa_pl.data.digit_tasks import Drawn, Example, Task
from cocoa_pl.data.scenes import Layout, Scene, Split, compose, crop, draw

# One random stream for each split, so that the size of one does not change the scenes of another.
_STREAMS: dict[Split, int] = {"train": 0, "validation": 1, "test": 2}


class Studio:
    """Composes and draws the scenes of one split, with its handwriting only.

    Args:
        root: data folder; pictures go to `images/<split>/` below it, and paths are relative to it.
    """

    def __init__(self, root: Path, *, split: Split, seed: int) -> None:
        self.root = root
        self.split = split
        self.rng = np.random.default_rng([seed, _STREAMS[split]])

    def compose(self, layouts: Sequence[Layout]) -> list[Scene]:
        """One scene in new handwriting for each layout."""
        return [compose(layout, split=self.split, rng=self.rng) for layout in layouts]

    def draw(self, scenes: Sequence[Scene], *, name: str, inverted: bool = False) -> list[Drawn]:
        """Write each scene's picture as `<name>_<number>.png`."""
        return [
            Drawn(scene, self._save(draw(scene, inverted=inverted), f"{name}_{number:05d}"))
            for number, scene in enumerate(scenes)
        ]

    def crop(self, drawn: Drawn, *, cell: int) -> str:
        """Write one cell of a scene; the path of the crop."""
        stem = Path(drawn.image).stem
        return self._save(crop(draw(drawn.scene), cell=cell), f"{stem}_crop{cell}")

    def _save(self, picture: np.ndarray, name: str) -> str:
        relative = f"images/{self.split}/{name}.png"
        path = self.root / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path, compress_level=1)
        return relative


def write_train(folder: Path, examples: Sequence[Example], *, split: str) -> None:
    """Rows with MMEB's training columns; the negative columns only where there are negatives."""
    columns = {
        "qry": [example.query.text for example in examples],
        "qry_image_path": [example.query.image for example in examples],
        "pos_text": [example.positive.text for example in examples],
        "pos_image_path": [example.positive.image for example in examples],
    }
    if any(any(example.negative) for example in examples):
        columns["neg_text"] = [example.negative.text for example in examples]
        columns["neg_image_path"] = [example.negative.image for example in examples]
    _write(pa.table(columns), folder, split=split)


def write_eval(folder: Path, task: Task, *, split: str) -> None:
    """Rows with MMEB's evaluation columns; element 0 of each target list is the positive."""
    texts = pa.array([side.text for side in task.pool])
    images = pa.array([side.image for side in task.pool])
    table = pa.table(
        {
            "qry_text": [example.query.text for example in task.examples],
            "qry_img_path": [example.query.image for example in task.examples],
            "tgt_text": pa.chunked_array(list(_lists(texts, task.candidates))),
            "tgt_img_path": pa.chunked_array(list(_lists(images, task.candidates))),
        }
    )
    _write(table, folder, split=split)


def _lists(pool: pa.Array, candidates: Sequence[np.ndarray]) -> Iterator[pa.Array]:
    """Candidate numbers as lists of strings, all rows in one array, without Python strings."""
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in candidates])])
    yield pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pool.take(pa.array(np.concatenate(candidates)))
    )


def _write(table: pa.Table, folder: Path, *, split: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / f"{split}-00000-of-00001.parquet", compression="zstd")
