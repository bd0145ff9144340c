"""A stock decoder layer in; the same layer, which computes only the rows that somebody reads, out.

Behind the last layer nobody reads every token: an embedding is the state at EOS, a masked token is
predicted from one state, an image decoder says hidden visual tokens. Keys and values are needed of
all tokens; the perceptron, which is most of a layer (88 % of Qwen2-VL-2B's), of those rows alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn


def read_rows_only(layer: nn.Module) -> None:
    """From now on the layer takes a keyword `reads`: (R) int64 rows to compute, None for all.

    The layer becomes a subclass of its own class, as FSDP2 does it; parameters and their names
    stay, and so does activation checkpointing, which transformers attaches to subclasses too.
    """
    if not isinstance(layer, ReadsRows):
        kind: Any = type(layer)
        layer.__class__ = _subclass(kind)


class ReadsRows:
    """The stock pre-norm layer, with rows chosen behind its attention."""

    def forward(
        self,
        hidden_states: Tensor,
        *,
        reads: Tensor | None,
        attention_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """(1, T, D) -> (1, R, D)."""
        layer: Any = self
        inputs |= {"attention_mask": attention_mask}
        if reads is None:
            output: Tensor = super().forward(hidden_states, **inputs)  # type: ignore[misc]
            return output
        attended, _ = layer.self_attn(layer.input_layernorm(hidden_states), **inputs)
        states = (hidden_states + attended).index_select(1, reads)
        output = states + layer.mlp(layer.post_attention_layernorm(states))
        return output


@cache
def _subclass(stock: Any) -> Any:
    return type(f"{stock.__name__}ReadingRows", (ReadsRows, stock), {})
