"""`cocoa export`: write a model for Hugging Face or sentence-transformers, if all tools read its
vectors.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from cocoa_pl.config.saved import settings_of
from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.report import between, markdown, percent
from cocoa_pl.evaluation.results import (
    Results,
    mean_score,
    read_config,
    read_results,
    score_interval,
)
from cocoa_pl.export.folder import export, replacing, write_sentence_transformers
from cocoa_pl.export.parity import TOLERANCE, Compared, check, compare, samples
from cocoa_pl.models.exported import (
    DESCRIPTION,
    FINGERPRINT_TOLERANCE,
    described_in,
    export_folder,
    write_description,
)
from cocoa_pl.run import open_embedder

FOLDERS = ("cache_dir", "root", "image_root", "path", "validation_path")  # keys of data
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
    data, scores = read_config(Path(parsed.run)).get("data"), Path(parsed.run) / "results.json"
    results = read_results(scores) if scores.is_file() else None
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
        compared = [Compared("training", described["rounding"], note, tolerance), *compared]
        console.print(_table(compared))
        check(compared)
        write_card(
            fresh,
            described,
            name=parsed.name or Path(parsed.run).resolve().name,
            library=LIBRARIES[parsed.to],
            compared=compared,
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


def _table(compared: Sequence[Compared]) -> Table:
    table = Table("read by", "difference", "", box=None, header_style="bold")
    for one in compared:
        shown = "not computed" if one.difference is None else f"{one.difference:.1e}"
        table.add_row(one.way, shown, one.note)
    return table


def write_card(
    folder: Path,
    described: Mapping[str, Any],
    *,
    name: str,
    library: str,
    compared: Sequence[Compared],
    data: Mapping[str, Any] | None,
    results: Results | None,
) -> None:
    """Write the model card, README.md, as the Hugging Face hub shows it.

    Args:
        name: of the model, and the path in its examples.
        data: the run's config of its data; None where it is not known.
        results: of its run; None for a model without scores.
    """
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    # A card is Markdown: nothing is escaped for HTML.
    pages = Environment(
        loader=PackageLoader("cocoa_pl", "export"), undefined=StrictUndefined, trim_blocks=True
    )
    card = pages.get_template("card.md.j2").render(
        name=name,
        path=name,
        library=library,
        family=config["model_type"],
        dim=config["text_config"]["hidden_size"],
        stages=" → ".join(entry["stage"] for entry in described["lineage"]),
        recipe=described["lineage"],
        causal=described["policy"]["causal"],
        eos=tokenizer["eos_token"],
        compared=compared,
        cases=len(samples(described["max_length"])),
        data=""
        if data is None
        else yaml.safe_dump(_public(data), sort_keys=False, allow_unicode=True),
        scores=None if results is None else _scores(results),
        **{key: described[key] for key in ("dtype", "max_length", "min_pixels", "max_pixels")},
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _public(data: Any) -> Any:
    """Without the folders of a machine."""
    if not isinstance(data, Mapping):
        return data
    return {key: _public(value) for key, value in data.items() if key not in FOLDERS}


def _scores(results: Results) -> dict[str, Any]:
    """What the card's table shows: means and groups where there are any, every subset otherwise; of
    mteb every task, with the metric that is its score.
    """
    said, third = "Precision@1 in percent with 95 % bootstrap intervals over queries", "interval"
    parts = results.averages or {subset.name: (subset,) for subset in results.subsets}
    rows = [
        (name.replace("_", " "), percent(mean_score(some)), between(score_interval(some)))
        for name, some in parts.items()
    ]
    if results.tasks:
        said, third = "Main scores of mteb's tasks in percent", "metric"
        rows = [(task.name, percent(task.score), task.metric) for task in results.tasks]
    return {
        "said": f"{said}, on {markdown(results.benchmark)}",
        "third": third,
        "rows": [tuple(map(markdown, row)) for row in rows],
    }
