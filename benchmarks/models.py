"""Stock Qwen2-VL models with random weights: the true size of 2B, and one of its proportions that
two cores can train.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

# Ids at the end of the vocabulary: text of the benchmarks is drawn from those before.
SPECIAL_IDS = 8
PATCH, MERGE = 14, 2


@dataclass(frozen=True)
class Shape:
    """What the cost of a model follows from.

    Attributes:
        text: fields of the stock text configuration.
        vision: fields of the stock vision configuration.
    """

    text: tuple[tuple[str, Any], ...]
    vision: tuple[tuple[str, Any], ...]

    @property
    def vocabulary(self) -> int:
        return int(dict(self.text)["vocab_size"])


def shape(*, text: dict[str, Any], vision: dict[str, Any]) -> Shape:
    """From plain fields."""
    return Shape(tuple(text.items()), tuple(vision.items()))


# The published config.json of Qwen/Qwen2-VL-2B-Instruct.
QWEN2_VL_2B = shape(
    text={
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "max_position_embeddings": 32_768,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
    },
    vision={"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": 1536},
)

# Widths of a quarter of the above, heads as many, and two layers. What must hold are the
# shares of work:
#
#   per token, linear layers     2B                                      here
#   language model               2 x 28 x 46.8 M = 2.62 GF               2 x 2 x 2.92 M = 11.7 MF
#   vision tower, visual token   8 x (32 x 19.7 M + 1.5 M) + 2 x 34 M    8 x (2 x 1.0 M + 0.34 M)
#                                = 5.11 GF, 1.95 x the language model    + 2 x 1.77 M = 22 MF, 1.9x
#   vocabulary head              2 x 1536 x 151,936 = 0.467 GF, 17.8 %   2 x 384 x 2,712 = 17.8 %
#
# The vocabulary is chosen for the last line, the tower's depth and width for the one above. A
# narrower model spends its time between matrix products, which no true one does.
PROPORTIONS = shape(
    text={
        "hidden_size": 384,
        "intermediate_size": 2240,
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 2712,
        "max_position_embeddings": 32_768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
    },
    vision={"depth": 2, "embed_dim": 288, "num_heads": 8, "mlp_ratio": 4, "hidden_size": 384},
)

# For the tests.
SMALL = shape(
    text={
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,  # at the usual 0.02 attention hardly moves anything
        "rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [2, 1, 1]},
    },
    vision={
        "depth": 2,
        "embed_dim": 32,
        "num_heads": 2,
        "mlp_ratio": 2,
        "hidden_size": 32,
        "initializer_range": 0.2,
    },
)


def with_depth(shape: Shape, *, text: int, vision: int) -> Shape:
    """The same widths with other numbers of layers."""
    return Shape(
        tuple((dict(shape.text) | {"num_hidden_layers": text}).items()),
        tuple((dict(shape.vision) | {"depth": vision}).items()),
    )


def special_ids(shape: Shape) -> dict[str, int]:
    """By the names of Qwen2-VL's configuration; the last row of all is the mask token."""
    first = shape.vocabulary - SPECIAL_IDS
    names = (
        "bos_token_id",
        "eos_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
        "image_token_id",
        "video_token_id",
    )
    return {name: first + place for place, name in enumerate(names)}


def config_of(shape: Shape) -> Any:
    """The stock configuration."""
    ids = special_ids(shape)
    of_text = ("bos_token_id", "eos_token_id")
    top: dict[str, Any] = {name: ids[name] for name in ids if name not in of_text}
    return Qwen2VLConfig(
        text_config={
            **dict(shape.text),
            **{name: ids[name] for name in of_text},
        },
        vision_config=dict(shape.vision),
        tie_word_embeddings=True,
        **top,
    )


def stock_model(shape: Shape, *, attention: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A stock model with random weights, the same ones for the same shape and type."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        config = config_of(shape)
        config._attn_implementation = attention
        model = Qwen2VLForConditionalGeneration._from_config(config, dtype=dtype)
    return model.to(device)


def image_processor(max_pixels: int) -> Any:
    """The stock one, on Pillow."""
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        size={"shortest_edge": (2 * PATCH * MERGE) ** 2, "longest_edge": max_pixels},
    )
