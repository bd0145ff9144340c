"""`cocoa mine`: write training data with the hard negatives that a model finds."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from cocoa_pl.config.build import build
from cocoa_pl.config.command_line import run_app
from cocoa_pl.data.items import Item
from cocoa_pl.data.stream import PairStream
from cocoa_pl.errors import UserError, quoted, typed
from cocoa_pl.mining.folder import image_root, write_subset
from cocoa_pl.mining.mine import Mined, mine
from cocoa_pl.run import open_embedder


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

    def encode(items: Sequence[Item]) -> NDArray[np.float32]:
        return embedder.encode(
            items,
            batch_tokens=cfg.batch_tokens,
            threads=cfg.threads,
            progress=console.is_terminal,
        )

    root = image_root(pairs, folder=out)
    subsets = mine(
        pairs,
        encode,
        number=cfg.negatives,
        max_of_positive=cfg.max_of_positive,
        keep=cfg.keep,
    )
    try:
        (out / "images").mkdir(parents=True)  # two runs that start at once cannot share it
    except FileExistsError:
        raise taken from None
    done = []
    for mined in subsets:
        write_subset(out, mined.subset, mined.pairs, root=root)
        done.append(mined)
    console.print(_table(done))
    if not any(mined.negatives for mined in done):
        raise UserError(
            f"no row has a negative: max_of_positive={cfg.max_of_positive} takes every candidate "
            f"for a right answer; raise it (the rows in {out} are as they were)"
        )
    names = ",".join(quoted(mined.subset) for mined in done)
    words = (
        *("data=mmeb", typed("data.root", out), typed("data.image_root", root), "data.split=train"),
        *(shlex.quote(f"data.subsets=[{names}]"), "'data.caption_subsets=[]'"),
    )
    console.print(f"train on it: {' '.join(words)}", soft_wrap=True, markup=False, highlight=False)


def _table(done: Sequence[Mined]) -> Table:
    table = Table(box=None, header_style="bold")
    table.add_column("subset")
    for title in ("rows", "negatives a row", "positive", "hardest negative", "spared a row"):
        table.add_column(title, justify="right")
    for mined in done:
        table.add_row(
            mined.subset,
            f"{len(mined.pairs):,}",
            f"{mined.negatives:.2f}",
            f"{mined.positive:.3f}",
            "-" if np.isnan(mined.hardest) else f"{mined.hardest:.3f}",
            f"{mined.spared:.1f}",
        )
    return table
