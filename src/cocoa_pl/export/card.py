"""The model card (README.md) of an exported folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from cocoa_pl.evaluation.report import between, markdown, percent
from cocoa_pl.evaluation.results import Results, mean_score, score_interval
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
    results: Results | None,
) -> None:
    """Write README.md as the Hugging Face hub shows it.

    Args:
        name: of the model, and the path in its examples.
        library: `transformers` or `sentence-transformers`.
        num_cases: inputs that `compared` was measured on.
        data: the run's config of its data; None where it is not known.
        results: of its run; None for a model without scores.
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
