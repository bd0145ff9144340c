"""What is known of an exported model in, its model card (README.md) and settings for vLLM out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from cocoa_pl.export.parity import Compared
from cocoa_pl.exported import read_description


def write_card(
    folder: Path,
    *,
    name: str,
    library: str,
    compared: Sequence[Compared],
    num_cases: int,
    results: Mapping[str, Any] | None,
) -> None:
    """Write README.md as the Hugging Face hub shows it.

    Args:
        name: of the model, and the path in its examples.
        library: `transformers` or `sentence-transformers`.
        num_cases: inputs that `compared` was measured on.
        results: content of a results.json; None for a model without scores.
    """
    described = read_description(folder)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    # A card is Markdown: nothing is escaped for HTML.
    pages = Environment(loader=PackageLoader("cocoa_pl", "export"), undefined=StrictUndefined)
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
        scores=None if results is None else _scores(results),
        **{key: described[key] for key in ("dtype", "max_length", "min_pixels", "max_pixels")},
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_vllm(folder: Path, *, causal: bool) -> None:
    """Arguments of `vllm serve` for its pooling runner, by their names in its Python interface."""
    settings: dict[str, Any] = {
        "runner": "pooling",
        "convert": "embed",
        "pooler_config": {"pooling_type": "LAST", "normalize": True},
        "hf_overrides": {"is_causal": causal},
    }
    (folder / "vllm.json").write_text(json.dumps(settings, indent=1))


def _scores(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the card's table shows: means where there are any, every subset otherwise."""
    intervals = results["intervals"]
    means = {name: results[name] for name in ("overall", "in_distribution", "out_of_distribution")}
    values = {**means, **results["groups"]}
    between = {**{name: intervals[name] for name in means}, **intervals["groups"]}
    if results["overall"] is None:
        values = {name: one["precision_at_1"] for name, one in results["subsets"].items()}
        between = intervals["subsets"]
    rows = [
        {
            "name": name.replace("_", " "),
            "score": f"{100 * value:.1f}",
            "interval": " to ".join(f"{100 * bound:.1f}" for bound in between[name]),
        }
        for name, value in values.items()
        if value is not None
    ]
    return {"benchmark": results["benchmark"], "rows": rows}
