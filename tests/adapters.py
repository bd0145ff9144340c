"""Adapters for the tiny models."""

from typing import Any

from cocoa_pl.models.adapters import LowRank

# All linear layers of the language model, and of both towers in every family.
TEXT = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
TARGETS = (
    r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
    r".*visual\.blocks\.\d+\.(attn\.qkv|mlp\.(linear_)?fc\d|mlp\.(gate|up|down)_proj)",
)


def low_rank(**changes: Any) -> LowRank:
    """DoRA of rank 2; any argument can be replaced."""
    values: dict[str, Any] = {
        "rank": 2,
        "alpha": 8,
        "dropout": 0.0,
        "init": "gaussian",
        "use_dora": True,
        "target_modules": TARGETS,
        "lean_dora": True,
        "dropout_on_base": True,
    }
    return LowRank(**(values | changes))
