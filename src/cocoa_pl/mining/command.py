"""`cocoa mine`: write training data with the hard negatives that a model finds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from cocoa_pl.config.build import build, register_resolvers
from cocoa_pl.config.command_line import compose_overrides
from cocoa_pl.data.items import Item
from cocoa_pl.data.stream import PairStream
from cocoa_pl.errors import UserError
from cocoa_pl.mining.folder import image_root, write_subset
from cocoa_pl.mining.mine import Mined, mine
from cocoa_pl.run import open_embedder


def run(arguments: Sequence[str], console: Console) -> int:
    """Write the folder; the exit status is 0.

    Raises:
        UserError: for a mistake in the overrides, a folder that is in the way, or data that cannot
            be mined.
    """
    parsed = _parser().parse_args(arguments)
    register_resolvers()
    cfg = compose_overrides("mine", parsed.overrides)
    if "benchmark" in cfg:
        raise UserError("cocoa mine reads training data alone; leave out benchmark=")
    out = Path(cfg.out)
    taken = UserError(f"out={out} exists and is not empty; name another folder")
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise taken
    pairs = build(cfg.data).train_pairs()
    if isinstance(pairs, PairStream):
        raise UserError("a stream cannot be mined: all rows are candidates of each other")
    embedder = open_embedder(parsed.run, device=cfg.device)

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
    names = ",".join(mined.subset for mined in done)
    console.print(
        f"train on it: data=mmeb data.root={out} data.image_root={root} data.split=train "
        f"'data.subsets=[{names}]' 'data.caption_subsets=[]'",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cocoa mine",
        usage="cocoa mine RUN [KEY=VALUE ...]",
        description="Find hard negatives for each training row among the positives of its subset, "
        "and write the data with them in MMEB's layout. Keys are those of train.py's data, and "
        "those of conf/mine.yaml: out, negatives, max_of_positive, keep.",
    )
    parser.add_argument("run", metavar="RUN", help="a run, a .ckpt, an exported folder or a hub id")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=argparse.SUPPRESS)
    return parser


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
