"""The embedded data set: digit scenes, written once as an MMEB folder and read back as such.

<cache_dir>/digits-train-<hash>/  train/<subset>/{train,validation}-*.parquet   training columns
                                  validation/<subset>/test-*.parquet            evaluation columns
                                  images/...
<cache_dir>/digits-test-<hash>/   test/<subset>/test-*.parquet, images/...
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from cocoa_pl.config.bounds import Count, Seed
from cocoa_pl.data.digit_subsets import (
    GROUP_OF,
    IN_DISTRIBUTION,
    evaluation_tasks,
    out_of_distribution_tasks,
    training_examples,
)
from cocoa_pl.data.digit_writer import Studio, write_eval, write_train
from cocoa_pl.data.items import EvalSubset, Pair
from cocoa_pl.data.mmeb import read_train
from cocoa_pl.data.mmeb_eval import read_eval_subset
from cocoa_pl.data.rows import OnBadRow, distinct_texts

# Part of the cache key: raise it whenever the same parameters would be drawn or worded differently.
FORMAT_VERSION = 1

_MARKER = "complete.json"  # written last: a folder without it was interrupted
_EVAL_SPLIT = "test"

_log = logging.getLogger(__name__)


class DigitsData:
    """Training and validation rows on the training and validation handwriting.

    Args:
        cache_dir: where the folder is written, once for each set of values.
        seed: of the scenes; the division of handwriting does not depend on it.
        scenes: training scenes with captions.
        task_rows: training rows of each other subset.
        validation_rows: validation rows of each subset.
        caption_subsets: those whose pairs are a picture and its whole caption.
    """

    def __init__(
        self,
        *,
        cache_dir: str,
        seed: Seed,
        scenes: Count,
        task_rows: Count,
        validation_rows: Count,
        caption_subsets: Sequence[str] | None,
        on_bad_row: OnBadRow,
    ) -> None:
        self.cache_dir = Path(cache_dir)
        self.parameters = {
            "seed": seed,
            "scenes": scenes,
            "task_rows": task_rows,
            "validation_rows": validation_rows,
        }
        self.caption_subsets = tuple(caption_subsets) if caption_subsets is not None else None
        self.on_bad_row = on_bad_row

    def prepare(self) -> Path:
        """The data folder, written first if it is not there."""
        return _cached(self.cache_dir, name="digits-train", write=write_training, **self.parameters)

    def train_pairs(self) -> Sequence[Pair]:
        """All training rows, subset after subset."""
        return self._train

    def validation_pairs(self) -> Sequence[Pair]:
        """Validation rows in training format, for validation losses."""
        return self._validation

    def validation_subsets(self) -> list[EvalSubset]:
        """Validation rows with candidates, for choices that precision@1 should make."""
        root = self.prepare()
        return [
            _read_eval(root, folder="validation", subset=subset, on_bad_row=self.on_bad_row)
            for subset in IN_DISTRIBUTION
        ]

    def training_texts(self) -> list[str]:
        """All distinct training texts without image slots, sorted: a tokenizer learns from them."""
        return distinct_texts(self.train_pairs())

    @cached_property
    def _train(self) -> Sequence[Pair]:
        return self._pairs("train")

    @cached_property
    def _validation(self) -> Sequence[Pair]:
        return self._pairs("validation")

    def _pairs(self, split: str) -> Sequence[Pair]:
        root = self.prepare()
        return read_train(
            root / "train",
            subsets=tuple(IN_DISTRIBUTION),
            split=split,
            image_root=root,
            on_bad_row=self.on_bad_row,
            max_rows=None,
        )


class DigitsBenchmark:
    """The test handwriting: all four task groups, in and out of distribution.

    Args:
        name: of the benchmark, in results.
        scenes: rows, and candidates of each row, of the two captioning subsets.
        task_rows: rows of each other subset.
    """

    is_partial = False
    published: tuple[()] = ()

    def __init__(
        self,
        *,
        name: str,
        cache_dir: str,
        seed: Seed,
        scenes: Count,
        task_rows: Count,
        on_bad_row: OnBadRow,
    ) -> None:
        self.name = name
        self.cache_dir = Path(cache_dir)
        self.parameters = {"seed": seed, "scenes": scenes, "task_rows": task_rows}
        self.on_bad_row = on_bad_row

    def prepare(self) -> Path:
        """The benchmark folder, written first if it is not there."""
        return _cached(self.cache_dir, name="digits-test", write=write_benchmark, **self.parameters)

    def subsets(self) -> list[EvalSubset]:
        """All subsets, in distribution first."""
        root = self.prepare()
        return [
            _read_eval(root, folder="test", subset=subset, on_bad_row=self.on_bad_row)
            for subset in GROUP_OF
        ]


def write_training(
    root: Path, *, seed: int, scenes: int, task_rows: int, validation_rows: int
) -> None:
    """Training columns of both splits under `train/`, evaluation columns under `validation/`."""
    studio = Studio(root, split="train", seed=seed)
    for name, examples in training_examples(studio, scenes=scenes, task_rows=task_rows).items():
        write_train(root / "train" / name, examples, split="train")
    studio = Studio(root, split="validation", seed=seed)
    for task in evaluation_tasks(studio, scenes=validation_rows, task_rows=validation_rows):
        write_train(root / "train" / task.name, task.examples, split="validation")
        write_eval(root / "validation" / task.name, task, split=_EVAL_SPLIT)


def write_benchmark(root: Path, *, seed: int, scenes: int, task_rows: int) -> None:
    """All test subsets under `test/`."""
    studio = Studio(root, split="test", seed=seed)
    for task in (
        *evaluation_tasks(studio, scenes=scenes, task_rows=task_rows),
        *out_of_distribution_tasks(studio, rows=task_rows),
    ):
        write_eval(root / "test" / task.name, task, split=_EVAL_SPLIT)


def _read_eval(root: Path, *, folder: str, subset: str, on_bad_row: OnBadRow) -> EvalSubset:
    return read_eval_subset(
        root / folder,
        subset=subset,
        split=_EVAL_SPLIT,
        image_root=root,
        group=GROUP_OF[subset],
        in_distribution=subset in IN_DISTRIBUTION,
        on_bad_row=on_bad_row,
    )


def _cached(cache_dir: Path, *, name: str, write: Callable[..., None], **parameters: int) -> Path:
    """The complete folder for these parameters; safe to call from several processes at once."""
    recipe: dict[str, Any] = {"format": FORMAT_VERSION, **parameters}
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    root = cache_dir / f"{name}-{key}"
    if (root / _MARKER).is_file():
        return root
    _log.info("Drawing digit scenes into %s", root)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=f".{name}-") as temporary:
        draft = Path(temporary) / "draft"
        draft.mkdir()
        write(draft, **parameters)
        (draft / _MARKER).write_text(json.dumps(recipe, indent=1) + "\n")
        if root.exists() and not (root / _MARKER).is_file():
            shutil.rmtree(root)
        try:
            os.rename(draft, root)
        except OSError:
            # Another process finished the same folder first; both hold the same bytes.
            if not (root / _MARKER).is_file():
                raise
    return root
