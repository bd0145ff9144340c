"""`cocoa mine`: training data with the hard negatives that a model finds within each subset.

Positive-aware, after NV-Retriever (https://arxiv.org/abs/2407.15831, "TopK-PercPos"): a candidate
that is nearly as near as the positive is more likely another right answer than a hard wrong one.

What is written is in MMEB's layout, which `data=mmeb` and `data=mmeb_hardneg` read:

<folder>/<subset>/train-00000-of-00001.parquet    qry, qry_image_path, pos_text, pos_image_path,
                                                  neg_text, neg_image_path: lists as strings
<folder>/images/<digest>.<type>                   images that were embedded in the rows
"""

from __future__ import annotations

import hashlib
import io
import os
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from rich.console import Console
from rich.table import Table

from cocoa_pl.config.build import build
from cocoa_pl.config.command_line import run_app
from cocoa_pl.data.images import FORMATS, ImageSource, real_path
from cocoa_pl.data.items import IMAGE_SLOT, PLACEHOLDER, Item, Pair, numbered
from cocoa_pl.data.stream import PairStream
from cocoa_pl.errors import UserError, quoted, typed
from cocoa_pl.run import open_embedder

FILE = "train-00000-of-00001.parquet"
SIDES = (("qry", "qry_image_path"), ("pos_text", "pos_image_path"))  # columns of text and image
BLOCK_VALUES = 1 << 25  # similarities in memory together

Encode = Callable[[Sequence[Item]], NDArray[np.float32]]


def run(words: Sequence[str], console: Console) -> int:
    """Run the command line's words, of which the first may be the model; the exit status is 0."""
    words = list(words)
    if words and not words[0].startswith("-") and ("=" not in words[0] or Path(words[0]).exists()):
        words[0] = f"ckpt={quoted(words[0])}"
    return run_app("mine", lambda cfg: write(cfg, console), words)


def write(cfg: DictConfig, console: Console) -> None:
    """Write the folder of a config.

    Raises:
        UserError: for a folder that is in the way, or data that cannot be mined.
    """
    if OmegaConf.is_missing(cfg, "ckpt"):
        raise UserError("say which model mines: cocoa mine RUN_OR_EXPORT")
    if "benchmark" in cfg:
        raise UserError("training data alone are mined; leave out benchmark=")
    out = Path(cfg.out)
    taken = UserError(f"out={out} exists and is not empty; name another folder")
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise taken
    pairs = build(cfg.data).train_pairs()
    if isinstance(pairs, PairStream):
        raise UserError("a stream cannot be mined: all rows are candidates of each other")
    embedder = open_embedder(cfg.ckpt, device=cfg.device)

    encode = partial(
        embedder.encode,
        batch_tokens=cfg.batch_tokens,
        threads=cfg.threads,
        progress=console.is_terminal,
    )
    subsets = subsets_of(pairs)
    root = image_root(pairs, folder=out)
    try:
        (out / "images").mkdir(parents=True)  # two runs that start at once cannot share it
    except FileExistsError:
        raise taken from None
    done = []
    for rows in subsets:
        done.append(mine(rows, encode, cfg.negatives, cfg.max_of_positive, keep=cfg.keep))
        write_subset(out, done[-1].pairs, root=root)
    console.print(_table(done))
    if not any(pair.negatives for mined in done for pair in mined.pairs):
        raise UserError(
            f"no row has a negative: max_of_positive={cfg.max_of_positive} takes every candidate "
            f"for a right answer; raise it (the rows in {out} are as they were)"
        )
    names = ",".join(quoted(mined.pairs[0].subset) for mined in done)
    words = (
        *("data=mmeb", typed("data.root", out), typed("data.image_root", root), "data.split=train"),
        *(shlex.quote(f"data.subsets=[{names}]"), "'data.caption_subsets=[]'"),
    )
    console.print(f"train on it: {' '.join(words)}", soft_wrap=True, markup=False, highlight=False)


class Chosen(NamedTuple):
    """What was chosen for a row.

    Attributes:
        candidates: places of its negatives, the hardest first; fewer where no more are left.
        positive: similarity of query and positive.
        hardest: similarity of query and hardest negative; NaN without one.
        spared: candidates that were left out as possibly right.
    """

    candidates: NDArray[np.intp]
    positive: float
    hardest: float
    spared: int


class Mined(NamedTuple):
    """Rows of a subset, with the mined negatives, and what was chosen for each."""

    pairs: list[Pair]
    chosen: list[Chosen]


def _table(done: Sequence[Mined]) -> Table:
    """Means over the rows of each subset."""
    table = Table(box=None, header_style="bold")
    table.add_column("subset")
    for title in ("rows", "negatives a row", "positive", "hardest negative", "spared a row"):
        table.add_column(title, justify="right")
    for pairs, chosen in done:
        hardest = [row.hardest for row in chosen if not np.isnan(row.hardest)]
        table.add_row(
            pairs[0].subset,
            f"{len(pairs):,}",
            f"{np.mean([len(pair.negatives) for pair in pairs]):.2f}",
            f"{np.mean([row.positive for row in chosen]):.3f}",
            f"{np.mean(hardest):.3f}" if hardest else "-",
            f"{np.mean([row.spared for row in chosen]):.1f}",
        )
    return table


def subsets_of(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Rows by their subset, in the order of first appearance.

    Raises:
        UserError: if no subset has two answers.
    """
    rows: dict[str, list[Pair]] = {}
    for pair in pairs:
        rows.setdefault(pair.subset, []).append(pair)
    if not any(p.positive.key != some[0].positive.key for some in rows.values() for p in some):
        raise UserError(
            "there is nothing to mine: in each subset all rows have the same positive, and only "
            "positives of other rows become negatives"
        )
    return list(rows.values())


def mine(
    pairs: list[Pair], encode: Encode, number: int, max_of_positive: float, *, keep: bool
) -> Mined:
    """Give the rows of a subset negatives among the positives of the others.

    Args:
        encode: gives unit vectors.
        number, max_of_positive: as in `choose`.
        keep: a row's own negatives stay, before the mined ones.

    Raises:
        UserError: naming the row of an item that cannot be embedded.
    """
    queries, query = numbered([pair.query for pair in pairs])
    positives, positive = numbered([pair.positive for pair in pairs])

    def encoded(items: list[Item], numbers: list[int]) -> NDArray[np.float32]:
        try:
            return encode(items)
        except UserError as error:
            if error.item is not None:
                error.row_id = pairs[numbers.index(error.item)].row_id
            raise

    vectors = encoded(queries, query), encoded(positives, positive)
    chosen = list(choose(*vectors, np.array(query), np.array(positive), number, max_of_positive))
    found = []
    for pair, row in zip(pairs, chosen, strict=True):
        own = pair.negatives if keep else ()
        known = {item.key for item in own}
        new = [positives[place] for place in row.candidates if positives[place].key not in known]
        found.append(replace(pair, negatives=(*own, *new)))
    return Mined(found, chosen)


def choose(
    queries: NDArray[np.float32],
    candidates: NDArray[np.float32],
    query: NDArray[np.intp],
    positive: NDArray[np.intp],
    number: int,
    max_of_positive: float,
) -> Iterator[Chosen]:
    """The `number` nearest candidates of each row that are wrong answers.

    Left out are the answers of every row with the same query, and candidates whose similarity is
    above `max_of_positive` times that of the positive (or above it, where that is negative).

    Args:
        queries, candidates: (Q, D) and (C, D), distinct and of unit length.
        query, positive: (rows) places of a row's query and positive in them.
    """
    ends = np.cumsum(np.bincount(query, minlength=len(queries)))
    answers = np.split(positive[np.argsort(query, kind="stable")], ends[:-1])  # of each query
    rows_at_once = max(1, BLOCK_VALUES // max(1, len(candidates)))
    for start in range(0, len(query), rows_at_once):
        rows = slice(start, start + rows_at_once)
        block = queries[query[rows]] @ candidates.T  # (rows, C)
        for asked, right, similarities in zip(query[rows], positive[rows], block, strict=True):
            own = similarities[right]
            similarities[answers[asked]] = -np.inf
            may_be_right = similarities > min(own * max_of_positive, own)
            similarities[may_be_right] = -np.inf
            nearest = _nearest(similarities, number)
            hardest = similarities[nearest[0]] if len(nearest) else np.nan
            yield Chosen(nearest, own, hardest, may_be_right.sum())


def _nearest(similarities: NDArray[np.float32], number: int) -> NDArray[np.intp]:
    """Places of the largest values that are left, the largest first; ties by place."""
    number = min(number, int(np.isfinite(similarities).sum()))
    if number == 0:
        return np.empty(0, np.intp)
    candidates = np.flatnonzero(similarities >= np.partition(similarities, -number)[-number])
    order = np.argsort(-similarities[candidates], kind="stable")
    return candidates[order[:number]]


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


def write_subset(folder: Path, pairs: Sequence[Pair], *, root: Path) -> None:
    """Write the rows of a subset.

    Args:
        root: what image paths are relative to.

    Raises:
        UserError: for a row with several images on one side, which the layout cannot hold.
    """
    columns: dict[str, list[str]] = defaultdict(list)
    for pair in pairs:
        sides = (pair.query, pair.positive, *pair.negatives)
        if any(len(item.media) > 1 for item in sides):
            raise UserError(f"{pair.row_id}: MMEB's layout holds one image on a side, not several")
        texts = [item.text.replace(IMAGE_SLOT, PLACEHOLDER) for item in sides]
        paths = [_path(item, folder, root) for item in sides]
        for side, (text, path) in enumerate(SIDES):
            columns[text].append(texts[side])
            columns[path].append(paths[side])
        columns["neg_text"].append(str(texts[2:]))
        columns["neg_image_path"].append(str(paths[2:]))
    file = folder / pairs[0].subset / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)


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
    with Image.open(io.BytesIO(source), formats=FORMATS) as opened:
        kind = (opened.format or "image").lower()
    file = images / f"{hashlib.blake2b(source, digest_size=12).hexdigest()}.{kind}"
    images.mkdir(parents=True, exist_ok=True)
    file.write_bytes(source)
    return file
