"""Scores of folders in the published layouts, against each harness's own loop over its vectors.

The loops are re-creations, after VLM2Vec's eval.py (V1) and src/eval_utils (V2):
https://github.com/TIGER-AI-Lab/VLM2Vec.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from cocoa_pl.data.items import IMAGE_SLOT, Item
from cocoa_pl.data.mmeb_eval import MmebBenchmark
from cocoa_pl.evaluation.benchmark import score_subsets
from cocoa_pl.evaluation.vectors import encode_once

PLACEHOLDER = "<|image_1|>"
DISTINCT = 9  # vectors: far fewer than items, so that many tie
Key = tuple[str, str]  # text, path
Saved = dict[Key, NDArray[np.float32]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(12):
        Image.new("RGB", (28, 28), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


class Encoder:
    """Gives each item one of few vectors, and saves which."""

    def __init__(self) -> None:
        vectors = np.random.default_rng(0).normal(size=(DISTINCT, 16)).astype(np.float32)
        self.vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        self.saved: Saved = {}

    def __call__(self, items: Sequence[Item]) -> NDArray[np.float32]:
        rows = []
        for item in items:
            path = str(item.media[0]) if item.media else ""
            key = (item.text.replace(IMAGE_SLOT, PLACEHOLDER), Path(path).name)
            rows.append(random.Random(repr(key)).randrange(DISTINCT))
            self.saved[key] = self.vectors[rows[-1]]
        return self.vectors[rows]


def scored(root: Path, rows: list[dict[str, Any]], encoder: Encoder, **listed: Any) -> float:
    """Precision@1 of a benchmark whose only subset has these rows."""
    (root / "A").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), root / "A" / "test-00000-of-00001.parquet")
    benchmark = MmebBenchmark(
        name="mmeb",
        root=str(root),
        image_root=str(root),
        split="test",
        table={"A": {"in_distribution": True, **listed}},
        unlisted=None,
        subsets=None,
        published=[],
        on_bad_row="fail",
    )
    subsets = benchmark.subsets()
    vectors = encode_once(encoder, subsets)
    (only,) = score_subsets(vectors, subsets, benchmark="mmeb", checkpoint="x").subsets
    return only.precision_at_1


# --- V1: argmax over a row's own candidates, the positive first ---


def v1_rows(seed: int) -> list[dict[str, Any]]:
    """Ragged lists out of one pool, some shared by many rows, with duplicates in a list."""
    draw = random.Random(seed)
    pool: list[Key] = [(f"word {n}", "") for n in range(12)]
    pool += [(f"{PLACEHOLDER}\nRepresent the image", f"{n}.png") for n in range(12)]
    shared = draw.sample(pool, 8)
    rows = []
    for number in range(80):
        targets = list(shared) if number % 3 == 0 else draw.choices(pool, k=draw.randint(1, 9))
        draw.shuffle(targets)
        with_image = number % 2
        rows.append(
            {
                "qry_text": f"{PLACEHOLDER}\nfind {number}" if with_image else f"find {number}",
                "qry_img_path": f"images/{number % 12}.png" if with_image else "",
                "tgt_text": [text for text, _ in targets],
                "tgt_img_path": [f"images/{path}" if path else "" for _, path in targets],
            }
        )
    return rows


def v1_loop(rows: list[dict[str, Any]], saved: Saved) -> float:
    hits = []
    for row in rows:
        query = saved[row["qry_text"], Path(row["qry_img_path"]).name]
        targets = zip(row["tgt_text"], row["tgt_img_path"], strict=True)
        candidates = np.stack([saved[text, Path(path).name] for text, path in targets])
        candidates = candidates / np.linalg.norm(candidates, axis=1, keepdims=True)
        scores = candidates @ (query / np.linalg.norm(query))
        hits.append(int(np.argmax(scores)) == 0)
    return sum(hits) / len(hits)


@pytest.mark.parametrize("seed", range(2))
def test_v1_scores_are_those_of_its_own_loop(seed: int, root: Path) -> None:
    rows, encoder = v1_rows(seed), Encoder()
    found, saved = scored(root, rows, encoder, group="retrieval"), encoder.saved
    assert found == v1_loop(rows, saved)
    assert 0.05 < found < 0.95
    ties = 0
    for row in rows:
        names = zip(row["tgt_text"], row["tgt_img_path"], strict=True)
        vectors = [saved[t, Path(p).name].tobytes() for t, p in names]
        ties += vectors.count(vectors[0]) > 1
    assert ties > 5  # a rule that judged ties otherwise would be seen


# --- V2: candidates are known by name, ranked by argsort ---

READERS = ("classification", "t2i", "i2i")


def v2_rows(reader: str, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    rows = []
    for number in range(80):
        count = draw.randint(2, 7)
        texts = [f"caption {draw.randrange(5)}" for _ in range(count)]
        paths = [f"images/{draw.randrange(6)}.png" for _ in range(count)]
        rows.append(
            {
                "qry_inst": f"{PLACEHOLDER} Find it:" if reader != "t2i" else "Find it:",
                "qry_text": f"question {number}",
                "qry_img_path": f"images/{number % 12}.png" if reader != "t2i" else "",
                "tgt_inst": f"{PLACEHOLDER} Represent it:",
                "tgt_text": texts,
                "tgt_img_path": paths if reader != "classification" else [""] * count,
            }
        )
    return rows


def names_of(row: dict[str, Any], reader: str) -> list[str]:
    """A text, a path, or both."""
    texts, paths = row["tgt_text"], row["tgt_img_path"]
    both = [f"{path}:{text}" for text, path in zip(texts, paths, strict=True)]
    return {"classification": texts, "t2i": paths, "i2i": both}[reader]


@pytest.mark.parametrize("reader", READERS)
def test_v2_scores_are_those_of_its_own_loop(reader: str, root: Path) -> None:
    rows, encoder = v2_rows(reader, seed=0), Encoder()
    group = "classification" if reader == "classification" else "retrieval"
    found, saved = scored(root, rows, encoder, group=group, reader=reader), encoder.saved
    by_caption = {key[0].split(":")[-1].strip(): key for key in saved}
    of_name: dict[str, NDArray[np.float32]] = {}  # the first candidate of a name stands for all
    hits = tied = 0
    for number, row in enumerate(rows):
        names = names_of(row, reader)
        for name, text, path in zip(names, row["tgt_text"], row["tgt_img_path"], strict=True):
            if name not in of_name:
                of_name[name] = saved[_item(saved, reader, text, path)]
        query = saved[by_caption[f"question {number}"]]
        scores = np.stack([of_name[name] for name in names]) @ query
        level = {names[place] for place in np.flatnonzero(scores > scores.max() - 1e-6)}
        tied += len(level) > 1
        if len(level) > 1:  # argsort is not stable there; the official rule is for the positive
            hits += names[0] in level
        else:
            hits += names[np.argsort(-scores)[0]] == names[0]
    assert found == hits / len(rows)
    assert 0.05 < found < 0.95
    assert tied


def _item(saved: Saved, reader: str, text: str, path: str) -> Key:
    """The saved candidate of this text and path."""
    if reader == "classification":
        return text, ""
    (key,) = [k for k in saved if k[1] == Path(path).name and text in k[0] and "qu" not in k[0]]
    return key
