"""The embedded data set: digit scenes, written once as an MMEB folder and read back as such.

<cache_dir>/digits-train-<hash>/  train/<subset>/{train,validation}-*.parquet   training columns
                                  validation/<subset>/test-*.parquet            evaluation columns
                                  images/...
<cache_dir>/digits-test-<hash>/   test/<subset>/test-*.parquet, images/...
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cocoa_pl.config.bounds import Count, Seed
from cocoa_pl.data.digit_scenes import (
    ANSWERS,
    DIGIT_WORDS,
    Example,
    Layout,
    Scene,
    Side,
    Studio,
    about,
    filled,
    find_caption,
    find_crop,
    find_edited,
    find_image,
    layouts,
    name_digit,
    name_neighbour,
    ring_layouts,
    target,
)
from cocoa_pl.data.items import EvalSubset, Pair
from cocoa_pl.data.mmeb_eval import MmebBenchmark
from cocoa_pl.data.pairs import Pairs, read_files
from cocoa_pl.data.readers import find_files
from cocoa_pl.data.rows import RowErrors, RowFormat
from cocoa_pl.data.sources import distinct_texts
from cocoa_pl.errors import UserError

# Subset -> task group, in the order of reports.
IN_DISTRIBUTION = {
    "scene_i2t": "retrieval",
    "scene_t2i": "retrieval",
    "scene_i2i": "retrieval",
    "scene_it2i": "retrieval",
    "position_cls": "classification",
    "count_vqa": "vqa",
    "right_of_vqa": "vqa",
    "grounding": "grounding",
}
OUT_OF_DISTRIBUTION = {
    "grid3_i2t": "retrieval",
    "grid3_t2i": "retrieval",
    "inverted_i2t": "retrieval",
    "inverted_cls": "classification",
    "heldout_i2t": "retrieval",
    "heldout_t2i": "retrieval",
    "heldout_vqa": "vqa",
}

_GROUNDING_CANDIDATES = 100
_DIGITS = [Side(word) for word in DIGIT_WORDS]
_ANSWERS = [Side(word) for word in ANSWERS]

_log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
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

    cache_dir: str
    seed: Seed
    scenes: Count
    task_rows: Count
    validation_rows: Count
    caption_subsets: Sequence[str] | None

    def __post_init__(self) -> None:
        self.left_out = RowErrors()

    def prepare(self) -> Path:
        """The data folder, written first if it is not there."""
        return _cached(
            self.cache_dir,
            "digits-train",
            write_training,
            seed=self.seed,
            scenes=self.scenes,
            task_rows=self.task_rows,
            validation_rows=self.validation_rows,
        )

    def train_pairs(self) -> Sequence[Pair]:
        """All training rows, subset after subset."""
        return self._pairs["train"]

    def validation_pairs(self) -> Sequence[Pair]:
        """Validation rows in training format, for validation losses."""
        return self._pairs["validation"]

    def validation_subsets(self) -> list[EvalSubset]:
        """Validation rows with candidates, for choices that precision@1 should make."""
        return _read_subsets(self.prepare(), "validation", IN_DISTRIBUTION)

    def training_texts(self) -> list[str]:
        """All distinct training texts without image slots, sorted: a tokenizer learns from them."""
        return distinct_texts(self.train_pairs())

    @cached_property
    def _pairs(self) -> dict[str, Sequence[Pair]]:
        root = self.prepare()
        form = RowFormat(
            columns=[
                {
                    "query": {"text": "qry", "image": "qry_image_path"},
                    "positive": {"text": "pos_text", "image": "pos_image_path"},
                    "negative": {"text": "neg_text", "image": "neg_image_path"},
                    "required": ["qry", "qry_image_path", "pos_text", "pos_image_path"],
                }
            ],
            image_root=root,
            images_placed=True,
            other_columns=False,
            drop_orphan_slots=False,
            on_bad_row="fail",
            repeated="drop",
        )

        def read(name: str, split: str) -> Pairs:
            files = find_files(root / "train", f"{name}/{split}-*.parquet", source=name)
            return read_files(
                {name: files}, form, subset=name, max_rows=None, left_out=self.left_out
            )

        return {
            split: Pairs.joined([read(name, split) for name in IN_DISTRIBUTION])
            for split in ("train", "validation")
        }


@dataclass(kw_only=True)
class DigitsBenchmark:
    """The test handwriting: all four task groups, in and out of distribution.

    Args:
        name: of the benchmark, in results.
        scenes: rows, and candidates of each row, of the two captioning subsets.
        task_rows: rows of each other subset.
    """

    name: str
    cache_dir: str
    seed: Seed
    scenes: Count
    task_rows: Count
    left_out: ClassVar[tuple[()]] = ()
    is_partial: ClassVar = False
    published: ClassVar[tuple[()]] = ()

    def prepare(self) -> Path:
        """The benchmark folder, written first if it is not there."""
        return _cached(
            self.cache_dir,
            "digits-test",
            write_benchmark,
            seed=self.seed,
            scenes=self.scenes,
            task_rows=self.task_rows,
        )

    def subsets(self) -> list[EvalSubset]:
        """All subsets, in distribution first."""
        return _read_subsets(self.prepare(), "test", IN_DISTRIBUTION | OUT_OF_DISTRIBUTION)


def _read_subsets(root: Path, folder: str, groups: Mapping[str, str]) -> list[EvalSubset]:
    benchmark = MmebBenchmark(
        name=folder,
        root=str(root / folder),
        image_root=str(root),
        split="test",
        table={
            name: {"group": group, "in_distribution": name in IN_DISTRIBUTION}
            for name, group in groups.items()
        },
        unlisted=None,
        subsets=None,
        published=(),
        on_bad_row="fail",
    )
    return benchmark.subsets()


def _cached(cache_dir: str, name: str, write: Callable[..., None], **parameters: int) -> Path:
    """The folder for these parameters, which is there as a whole or not at all; safe to call from
    several processes at once.
    """
    # Raise the format whenever the same parameters would be drawn or worded differently.
    recipe = {"format": 1, **parameters}
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    root = Path(cache_dir) / f"{name}-{key}"
    if root.is_dir():
        return root
    _log.info("Drawing digit scenes into %s", root)
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{name}-") as temporary:
        draft = Path(temporary) / "draft"
        write(draft, **parameters)
        (draft / "complete.json").write_text(json.dumps(recipe, indent=1) + "\n")
        try:
            draft.rename(root)
        except OSError:  # another process was first; both hold the same bytes
            if not root.is_dir():
                raise
    return root


# --- Subsets -------------------------------------------------------------------------------------


class Task(NamedTuple):
    """Rows, and for each its candidates: int [C] positions in `pool`, the positive first."""

    name: str
    examples: list[Example]
    pool: list[Side]
    candidates: list[np.ndarray]


def write_training(
    root: Path, *, seed: int, scenes: int, task_rows: int, validation_rows: int
) -> None:
    """Training columns of both splits under `train/`, evaluation columns under `validation/`."""
    studio = Studio(root, split="train", seed=seed)
    known = layouts("train")  # with more scenes than layouts, layouts repeat in new handwriting
    drawn = studio.draw([known[n % len(known)] for n in range(scenes)], name="scene")
    cells = _cells_to_find(studio, drawn, rows=task_rows)
    examples = _examples(studio, drawn, rows=task_rows)
    examples["grounding"] = [
        find_crop(scene, cell, studio.crop(scene, cell=cell), studio.rng) for scene, cell in cells
    ]
    for name, rows in examples.items():
        _write_train(root / "train" / name, rows, split="train")
    studio = Studio(root, split="validation", seed=seed)
    for task in _evaluation_tasks(studio, scenes=validation_rows, task_rows=validation_rows):
        _write_train(root / "train" / task.name, task.examples, split="validation")
        _write_eval(root / "validation" / task.name, task)


def write_benchmark(root: Path, *, seed: int, scenes: int, task_rows: int) -> None:
    """All test subsets under `test/`: those of training, and out of distribution 3 x 3 grids, light
    ink on dark paper, and pairs of neighbours that training never shows.
    """
    studio = Studio(root, split="test", seed=seed)
    tasks = _evaluation_tasks(studio, scenes=scenes, task_rows=task_rows)
    ring = studio.draw(ring_layouts(studio.rng, count=task_rows), name="grid3")
    known = _first(layouts("test"), task_rows, what="task_rows")
    inverted = studio.draw(known, name="inverted", inverted=True)
    known = _first(layouts("held_out"), task_rows, what="task_rows")
    held_out = studio.draw(known, name="heldout")
    neighbours = [name_neighbour(scene, studio.rng, held_out=True) for scene in held_out]
    tasks += [
        _task("grid3_i2t", map(find_caption, ring)),
        _task("grid3_t2i", map(find_image, ring)),
        _task("inverted_i2t", map(find_caption, inverted)),
        _task("inverted_cls", [name_digit(s, studio.rng) for s in inverted], _DIGITS),
        _task("heldout_i2t", map(find_caption, held_out)),
        _task("heldout_t2i", map(find_image, held_out)),
        _task("heldout_vqa", filter(None, neighbours), _ANSWERS),
    ]
    for task in tasks:
        _write_eval(root / "test" / task.name, task)


def _examples(studio: Studio, drawn: list[Scene], *, rows: int) -> dict[str, list[Example]]:
    """Every in-distribution subset but grounding, which needs crops."""
    rng, by_layout = studio.rng, {scene.layout: scene for scene in drawn}
    asked = studio.shuffled(drawn)[:rows]
    others = studio.draw([scene.layout for scene in asked], name="other")
    edited = (find_edited(scene, by_layout, rng) for scene in studio.shuffled(drawn))
    return {
        "scene_i2t": [find_caption(scene) for scene in drawn],
        "scene_t2i": [find_image(scene) for scene in drawn],
        "scene_i2i": [
            Example(about(scene, "Find the same digits in other handwriting"), target(other.image))
            for scene, other in zip(asked, others, strict=True)
        ],
        "scene_it2i": list(filter(None, edited))[:rows],
        "position_cls": [name_digit(scene, rng) for scene in studio.shuffled(drawn)[:rows]],
        "count_vqa": [
            Example(
                about(scene, "How many digits are there?"),
                Side(DIGIT_WORDS[len(filled(scene.layout))]),
            )
            for scene in _counts_in_turn(studio.shuffled(drawn))[:rows]
        ],
        "right_of_vqa": [
            found for scene in studio.shuffled(drawn) if (found := name_neighbour(scene, rng))
        ][:rows],
    }


def _evaluation_tasks(studio: Studio, *, scenes: int, task_rows: int) -> list[Task]:
    """The in-distribution subsets with their candidates; every scene has a layout of its own."""
    drawn = studio.draw(_first(layouts(studio.split), scenes, what="scenes"), name="scene")
    cells = _cells_to_find(studio, drawn, rows=task_rows)
    crops = {
        (scene, cell): studio.crop(scene, cell=cell)
        for scene, _ in cells
        for cell in filled(scene.layout)
    }
    grounding = [find_crop(s, cell, crops[s, cell], studio.rng) for s, cell in cells]
    examples = _examples(studio, drawn, rows=task_rows)
    pools = {"position_cls": _DIGITS, "count_vqa": _ANSWERS, "right_of_vqa": _ANSWERS}
    pools["scene_it2i"] = [target(scene.image) for scene in drawn]
    return [
        *(_task(name, rows, pools.get(name)) for name, rows in examples.items()),
        Task("grounding", grounding, list(map(target, crops.values())), _rivals(cells, crops)),
    ]


def _task(name: str, examples: Iterable[Example], pool: list[Side] | None = None) -> Task:
    """Every row against all of the pool, or else against the positives of all rows."""
    examples = list(examples)
    if not examples:
        raise UserError(f"digits: so few scenes make no row of {name}; ask for more of them")
    pool = pool or [row.positive for row in examples]
    assert len(set(pool)) == len(pool), f"{name}: two candidates are the same"
    number = {side: index for index, side in enumerate(pool)}
    positives = [number[example.positive] for example in examples]
    everything = np.arange(len(pool))
    return Task(name, examples, pool, [np.r_[p, np.delete(everything, p)] for p in positives])


def _rivals(
    cells: Sequence[tuple[Scene, int]], crops: Mapping[tuple[Scene, int], str]
) -> list[np.ndarray]:
    """For each cell to find its crop, those of the same scene, then of the next scenes.

    A crop with the positive's own piece of handwriting is never its rival.
    """
    places = list(crops)
    glyphs = np.array([scene.glyphs[cell] for scene, cell in places])
    candidates = []
    for scene, cell in cells:
        positive = places.index((scene, cell))
        first = places.index((scene, filled(scene.layout)[0]))
        order = np.roll(np.arange(len(places)), -first)
        rivals = order[glyphs[order] != glyphs[positive]]
        candidates.append(np.r_[positive, rivals[: _GROUNDING_CANDIDATES - 1]])
    return candidates


def _first(known: Sequence[Layout], count: int, *, what: str) -> Sequence[Layout]:
    if count > len(known):
        raise UserError(
            f"digits: {what}={count}, but only {len(known)} different layouts exist there; "
            "candidates must differ, so ask for fewer"
        )
    return known[:count]


def _cells_to_find(studio: Studio, drawn: list[Scene], *, rows: int) -> list[tuple[Scene, int]]:
    asked = studio.shuffled(drawn)[:rows]
    return [(scene, int(studio.rng.choice(filled(scene.layout)))) for scene in asked]


def _counts_in_turn(scenes: Sequence[Scene]) -> list[Scene]:
    """Scenes with one, two, three and four digits in turn, as long as there are any of each."""
    counts = pd.Series([len(filled(scene.layout)) for scene in scenes], dtype=np.int64)
    turns = counts.groupby(counts).cumcount()
    return [scenes[index] for index in np.argsort(turns.to_numpy(), kind="stable")]


# --- MMEB's row format; equal rows give equal bytes ----------------------------------------------


def _write_train(folder: Path, examples: Sequence[Example], *, split: str) -> None:
    """MMEB's training columns; the negative ones only where there are negatives."""
    columns = _columns("qry", "qry_image_path", [row.query for row in examples])
    columns |= _columns("pos_text", "pos_image_path", [row.positive for row in examples])
    negatives = [row.negative for row in examples]
    if any(map(any, negatives)):
        columns |= _columns("neg_text", "neg_image_path", negatives)
    _write(columns, folder, split=split)


def _write_eval(folder: Path, task: Task) -> None:
    """MMEB's evaluation columns; element 0 of each target list is the positive."""
    flat = pa.array(np.concatenate(task.candidates))
    offsets = pa.array(np.cumsum([0, *map(len, task.candidates)]), pa.int32())
    # Arrow takes the strings: 1000 rows x 1000 candidates never become Python lists.
    pool = _columns("tgt_text", "tgt_img_path", task.pool).items()
    targets = {n: pa.ListArray.from_arrays(offsets, pa.array(v).take(flat)) for n, v in pool}
    queries = _columns("qry_text", "qry_img_path", [row.query for row in task.examples])
    _write(queries | targets, folder, split="test")


def _columns(text: str, image: str, sides: Sequence[Side]) -> dict[str, Any]:
    return {text: [side.text for side in sides], image: [side.image for side in sides]}


def _write(columns: dict[str, Any], folder: Path, *, split: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}-00000-of-00001.parquet"
    pq.write_table(pa.table(columns), path, compression="zstd")
