"""Sizes of a model from its transformers configuration, one entry for each family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from cocoa_pl.errors import UserError
from cocoa_pl.planning.shapes import BlockShape, Linear, MergerShape, ModelShape, VisionShape


def model_shape(config: PretrainedConfig) -> ModelShape:
    """The sizes of a model.

    Raises:
        UserError: for a family whose architecture is not known here.
    """
    family = str(config.model_type)
    if family not in VISION:
        raise UserError(f"no plan for a {family} model; known are {', '.join(sorted(VISION))}")
    text: Any = config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelShape(
        text=_text_block(text, head_dim, TEXT[family]),
        vision=VISION[family](config.vision_config),
        vocabulary=text.vocab_size,
        tied=bool(config.tie_word_embeddings),
    )


@dataclass(frozen=True)
class _TextKind:
    """What the numbers of a text configuration do not say."""

    input_bias: Callable[[Any], bool]
    output_bias: Callable[[Any], bool]
    query_norm: bool


def _text_block(text: Any, head_dim: int, kind: _TextKind) -> BlockShape:
    width, inner = text.hidden_size, text.intermediate_size
    queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    name = "model.language_model.layers.{}."
    return BlockShape(
        count=text.num_hidden_layers,
        width=width,
        heads=text.num_attention_heads,
        key_heads=text.num_key_value_heads,
        head_dim=head_dim,
        intermediate=inner,
        activation=text.hidden_act,
        inputs=tuple(
            Linear(f"{name}self_attn.{part}_proj", width, size, kind.input_bias(text))
            for part, size in (("q", queries), ("k", keys), ("v", keys))
        ),
        output=Linear(f"{name}self_attn.o_proj", queries, width, kind.output_bias(text)),
        up=tuple(Linear(f"{name}mlp.{part}_proj", width, inner, False) for part in ("gate", "up")),
        down=Linear(f"{name}mlp.down_proj", inner, width, False),
        layer_norm=False,
        query_norm=kind.query_norm,
    )


def _vision_block(
    vision: Any, width: int, inner: int, up: Sequence[str], down: str, *, layer_norm: bool
) -> BlockShape:
    name = "model.visual.blocks.{}."
    return BlockShape(
        count=vision.depth,
        width=width,
        heads=vision.num_heads,
        key_heads=vision.num_heads,
        head_dim=width // vision.num_heads,
        intermediate=inner,
        activation=vision.hidden_act,
        inputs=(Linear(f"{name}attn.qkv", width, 3 * width, True),),
        output=Linear(f"{name}attn.proj", width, width, True),
        up=tuple(Linear(f"{name}mlp.{part}", width, inner, True) for part in up),
        down=Linear(f"{name}mlp.{down}", inner, width, True),
        layer_norm=layer_norm,
        query_norm=False,
    )


def _merger(
    vision: Any,
    width: int,
    out: int,
    names: tuple[str, str, str],
    *,
    layer_norm: bool,
    merged_norm: bool = False,
) -> MergerShape:
    whole, first, second = names
    merged = width * vision.spatial_merge_size**2
    return MergerShape(
        norm_width=merged if merged_norm else width,
        layer_norm=layer_norm,
        first=Linear(f"model.visual.{whole}.{first}", merged, merged, True),
        second=Linear(f"model.visual.{whole}.{second}", merged, out, True),
    )


def _qwen2_vision(vision: Any) -> VisionShape:
    width = vision.embed_dim
    inner = int(width * vision.mlp_ratio)
    merger = _merger(
        vision, width, vision.hidden_size, ("merger", "mlp.0", "mlp.2"), layer_norm=True
    )
    block = _vision_block(vision, width, inner, ["fc1"], "fc2", layer_norm=True)
    return _tower(vision, block, (merger,))


def _qwen25_vision(vision: Any) -> VisionShape:
    width = vision.hidden_size
    names = ("merger", "mlp.0", "mlp.2")
    merger = _merger(vision, width, vision.out_hidden_size, names, layer_norm=False)
    gated = ["gate_proj", "up_proj"]
    block = _vision_block(
        vision, width, vision.intermediate_size, gated, "down_proj", layer_norm=False
    )
    return _tower(
        vision,
        block,
        (merger,),
        window=vision.window_size // vision.patch_size,
        full_blocks=len(vision.fullatt_block_indexes),
    )


def _qwen3_vision(vision: Any) -> VisionShape:
    width, out = vision.hidden_size, vision.out_hidden_size
    parts = ("linear_fc1", "linear_fc2")
    mergers = [_merger(vision, width, out, ("merger", *parts), layer_norm=True)]
    for number in range(len(vision.deepstack_visual_indexes)):
        names = (f"deepstack_merger_list.{number}", *parts)
        mergers.append(_merger(vision, width, out, names, layer_norm=True, merged_norm=True))
    block = _vision_block(
        vision, width, vision.intermediate_size, parts[:1], parts[1], layer_norm=True
    )
    return _tower(
        vision,
        block,
        tuple(mergers),
        patch_bias=True,
        position_rows=vision.num_position_embeddings,
        input_hook=False,
    )


def _tower(
    vision: Any,
    block: BlockShape,
    mergers: tuple[MergerShape, ...],
    *,
    patch_bias: bool = False,
    position_rows: int = 0,
    window: int = 0,
    full_blocks: int | None = None,
    input_hook: bool = True,
) -> VisionShape:
    return VisionShape(
        block=block,
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        patch_values=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        patch_bias=patch_bias,
        position_rows=position_rows,
        window=window,
        full_blocks=block.count if full_blocks is None else full_blocks,
        input_hook=input_hook,
        mergers=mergers,
    )


_QWEN2 = _TextKind(lambda text: True, lambda text: False, query_norm=False)
_QWEN3 = _TextKind(lambda text: text.attention_bias, lambda text: text.attention_bias, True)

# By `model_type`, as in `models/loading.py`.
TEXT: dict[str, _TextKind] = {"qwen2_vl": _QWEN2, "qwen2_5_vl": _QWEN2, "qwen3_vl": _QWEN3}
VISION: dict[str, Callable[[Any], VisionShape]] = {
    "qwen2_vl": _qwen2_vision,
    "qwen2_5_vl": _qwen25_vision,
    "qwen3_vl": _qwen3_vision,
}
