"""`cocoa export`: write a model for Hugging Face or sentence-transformers, if all tools read its
vectors.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from cocoa_pl.config.saved import settings_of
from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.results import Results, read_config, read_results
from cocoa_pl.export.card import write_card
from cocoa_pl.export.folder import export, replacing
from cocoa_pl.export.parity import TOLERANCE, Compared, check, compare, samples
from cocoa_pl.export.sentence_transformers import write_sentence_transformers
from cocoa_pl.models.exported import (
    DESCRIPTION,
    FINGERPRINT_TOLERANCE,
    described_in,
    export_folder,
    write_description,
)
from cocoa_pl.run import open_embedder

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
    out = _output_folder(parsed.run, parsed.out, parsed.to)
    data, results = read_config(Path(parsed.run)).get("data"), _results(parsed.run)
    embedder = open_embedder(parsed.run, device="cpu")
    source: dict[str, Any]
    if parsed.run.endswith(".ckpt"):
        source = {"settings": settings_of(read_config(Path(parsed.run).resolve().parents[1]))}
    else:
        source = described_in(export_folder(parsed.run))
    with replacing(out) as fresh:
        exported = export(
            embedder,
            fresh,
            lineage=source.get("lineage", []),
            settings=source.get("settings"),
            rounding=source.get("rounding"),
        )
        described = described_in(fresh)
        dtype = described["dtype"]
        for_st = parsed.to == "sentence-transformers"
        if for_st:
            write_sentence_transformers(fresh, dim=exported.dim)
        compared = compare(exported, fresh, with_sentence_transformers=for_st)
        note = "when training ended"
        if dtype != "float32":
            note = f"{note}; adapters merged, weights rounded to {dtype}"
        tolerance = TOLERANCE if dtype == "float32" else FINGERPRINT_TOLERANCE[dtype]
        compared = (Compared("training", described["rounding"], note, tolerance), *compared)
        console.print(_table(compared))
        check(compared)
        write_card(
            fresh,
            name=parsed.name or Path(parsed.run).resolve().name,
            library=LIBRARIES[parsed.to],
            compared=compared,
            num_cases=len(samples(exported.processor.max_length)),
            data=data,
            results=results,
        )
        write_description(fresh, described)
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


def _output_folder(run: str, out: str | None, to: str) -> Path:
    if out is None and not Path(run).is_dir():
        raise UserError(f"{run} is no folder to write into; say where to: --out FOLDER")
    folder = Path(run) / to if out is None else Path(out)
    if folder.exists() and not (folder / DESCRIPTION).is_file():
        raise UserError(f"{folder} exists and is no exported model; name another with --out")
    if folder.exists() and Path(run).exists() and folder.resolve() == Path(run).resolve():
        raise UserError(f"{run} would be replaced by itself; name another folder with --out")
    return folder


def _results(run: str) -> Results | None:
    path = Path(run) / "results.json"
    return read_results(path) if path.is_file() else None


def _table(compared: Sequence[Compared]) -> Table:
    table = Table("read by", "difference", "", box=None, header_style="bold")
    for one in compared:
        shown = "not computed" if one.difference is None else f"{one.difference:.1e}"
        table.add_row(one.way, shown, one.note)
    return table
