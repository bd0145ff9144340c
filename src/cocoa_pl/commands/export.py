"""`cocoa export`: a run in, a folder for Hugging Face or sentence-transformers out, if all tools
read the same vectors out of it.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from cocoa_pl import fingerprint
from cocoa_pl.assemble import open_embedder
from cocoa_pl.checkpoint import LAST
from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.results import read_results
from cocoa_pl.evaluation.runs import read_config
from cocoa_pl.export.card import write_card, write_vllm
from cocoa_pl.export.folder import export
from cocoa_pl.export.parity import TOLERANCE, Compared, check, compare, samples
from cocoa_pl.export.sentence_transformers import write_sentence_transformers
from cocoa_pl.exported import DESCRIPTION, export_folder, read_description

LIBRARIES = {"hf": "transformers", "sentence-transformers": "sentence-transformers"}


def run(arguments: Sequence[str], console: Console) -> int:
    """Write the folder, or nothing; the exit status is 0.

    Raises:
        UserError: for a run that holds no model, a folder that is in the way, or vectors that
            differ between tools.
    """
    parsed = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.ERROR)  # a sample is cut on purpose
    transformers_logging.set_verbosity_error()
    out = _place(parsed.run, parsed.out, parsed.to)
    source, lineage = _source(parsed.run)
    embedder = open_embedder(source, device="cpu")
    cases = samples(embedder.processor.max_length)
    trained = embedder.encode(cases)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as scratch:
        fresh = Path(scratch) / out.name
        exported = export(embedder, fresh, lineage=lineage)
        moved = float(np.abs(exported.encode(cases) - trained).max())
        dtype = read_description(fresh)["dtype"]
        for_st = parsed.to == "sentence-transformers"
        if for_st:
            write_sentence_transformers(fresh, dim=exported.dim)
        compared = compare(exported, fresh, with_sentence_transformers=for_st)
        rounding = TOLERANCE if dtype == "float32" else fingerprint.TOLERANCE[dtype]
        note = f"adapters merged, weights rounded to {dtype}" if dtype != "float32" else ""
        compared = (Compared("training", moved, note, rounding), *compared)
        console.print(_table(compared))
        check(compared)
        write_card(
            fresh,
            name=parsed.name or Path(parsed.run).resolve().name,
            library=LIBRARIES[parsed.to],
            compared=compared,
            num_cases=len(cases),
            data=read_config(Path(parsed.run)).get("data"),
            results=_results(parsed.run),
        )
        write_vllm(fresh, causal=exported.policy.causal)
        if out.exists():  # an export of before: `_place` refuses anything else
            out.rename(Path(scratch) / "before")
        fresh.rename(out)
    console.print(f"exported {out}", soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cocoa export",
        description="Write a trained model for other tools: merged weights, processor, model card. "
        "It is written only if every tool that is installed reads the trained model's vectors out "
        f"of it, to {TOLERANCE:g}.",
    )
    parser.add_argument("run", metavar="RUN", help="a run, a .ckpt, an exported folder or a hub id")
    parser.add_argument("--to", choices=LIBRARIES, required=True, help="who shall open it")
    parser.add_argument("--out", metavar="FOLDER", help="where to (default: RUN/hf, for example)")
    parser.add_argument("--name", help="of the model in its card, such as a hub id")
    return parser


def _place(run: str, out: str | None, to: str) -> Path:
    if out is None and not Path(run).is_dir():
        raise UserError(f"{run} is no folder to write into; say where to: --out FOLDER")
    place = Path(run) / to if out is None else Path(out)
    if place.exists() and not (place / DESCRIPTION).is_file():
        raise UserError(f"{place} exists and is no exported model; name another with --out")
    if place.exists() and Path(run).exists() and place.resolve() == Path(run).resolve():
        raise UserError(f"{run} would be replaced by itself; name another folder with --out")
    return place


def _source(run: str) -> tuple[str, list[dict[str, Any]]]:
    """What is opened, and the stages behind it: of a run, the weights as the trainer left them."""
    if run.endswith(".ckpt"):
        return run, []
    folder = export_folder(run)
    checkpoint = Path(run) / LAST
    lineage: list[dict[str, Any]] = read_description(folder)["lineage"]
    return str(checkpoint if checkpoint.is_file() else folder), lineage


def _results(run: str) -> dict[str, Any] | None:
    path = Path(run) / "results.json"
    return read_results(path) if path.is_file() else None


def _table(compared: Sequence[Compared]) -> Table:
    table = Table("read by", "difference", "", box=None, header_style="bold")
    for one in compared:
        shown = "not computed" if one.difference is None else f"{one.difference:.1e}"
        table.add_row(one.way, shown, one.note)
    return table
