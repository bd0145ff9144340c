"""The model card (README.md) of an exported folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from cocoa_pl.evaluation.report import between, percent
from cocoa_pl.evaluation.results import MEANS
from cocoa_pl.export.parity import Compared
from cocoa_pl.models.exported import read_description


def write_card(
    folder: Path,
    *,
    name: str,
    library: str,
    compared: Sequence[Compared],
    num_cases: int,
    data: Mapping[str, Any] | None,
    results: Mapping[str, Any] | None,
) -> None:
    """Write README.md as the Hugging Face hub shows it.

    Args:
        name: of the model, and the path in its examples.
        library: `transformers` or `sentence-transformers`.
        num_cases: inputs that `compared` was measured on.
        data: the run's config of its data; None where it is not known.
        results: content of a results.json; None for a model without scores.
    """
    described = read_description(folder)
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
        cases=num_cases,
        data=None if data is None else _public(data),
        scores=None if results is None else _scores(results),
        **{key: described[key] for key in ("dtype", "max_length", "min_pixels", "max_pixels")},
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _public(data: Mapping[str, Any]) -> str:
    """As YAML, without the folders of a machine."""

    def kept(node: Any) -> Any:
        if not isinstance(node, Mapping):
            return node
        return {key: kept(value) for key, value in node.items() if key not in _FOLDERS}

    return yaml.safe_dump(kept(data), sort_keys=False, allow_unicode=True).rstrip()


_FOLDERS = ("cache_dir", "root", "image_root", "path", "validation_path")


def _scores(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the card's table shows: means where there are any, every subset otherwise; of mteb every
    task, with the metric that is its score.
    """
    intervals = results.get("intervals", {})
    means = {name: results[name] for name in MEANS}
    values = {**means, **results["groups"]}
    interval_of = {**intervals, **intervals.get("groups", {})}
    if results["overall"] is None:
        values = {name: one["precision_at_1"] for name, one in results["subsets"].items()}
        interval_of = intervals.get("subsets", {})
    rows = [
        (
            name.replace("_", " "),
            percent(value),
            between(interval_of[name]) if name in interval_of else "",
        )
        for name, value in values.items()
        if value is not None
    ]
    title, third = "Precision@1 in percent with 95 % bootstrap intervals over queries", "interval"
    if tasks := results.get("tasks"):
        title, third = "Main scores of mteb's tasks in percent", "metric"
        rows = [(name, percent(one["main_score"]), one["metric"]) for name, one in tasks.items()]
    return {"said": f"{title}, on {results['benchmark']}", "third": third, "rows": rows}
