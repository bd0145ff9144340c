"""The language-modelling forward pass of a stock Qwen2-VL on padded inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize
from transformers import AttentionInterface

from benchmarks.peers.attention import additive_mask, vision_attention
from benchmarks.peers.inputs import Inputs

# transformers hands packed images to an attention function whole, instead of one by one, only when
# the function's name contains "flash".
DENSE_VISION = "benchmark_peer_flash_layout"
# transformers' own "sdpa", image by image: what an up-to-date peer without flash-attn would run.
VISION_BY_IMAGE = "sdpa"


@dataclass(frozen=True)
class Seen:
    """What a forward pass gives, and what a decoder behind it needs."""

    logits: Tensor  # (B, N, V)
    hidden_states: Sequence[Tensor]  # of all layers, (B, N, D) each
    positions: Tensor  # (3, B, N)
    mask: Tensor  # (B, 1, N, N)


class PixelDecoder(nn.Module):
    """One stock decoder layer and a projection to the pixels of a visual token (MoCa)."""

    def __init__(self, layer: nn.Module, projection: nn.Linear) -> None:
        super().__init__()
        self.layer, self.projection = layer, projection


class PatchProduct(nn.Module):
    """The stock tower's patch embedding as a matrix product, kinder than its convolution: that one
    is slow with some versions of cuDNN, and rounds float32 to TF32.
    """

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.proj = stock.proj

    def forward(self, patches: Tensor) -> Tensor:
        weight = self.proj.weight.flatten(1)
        return linear(patches.to(weight.dtype), weight)


class PeerModel(nn.Module):
    """A stock model whose text attends by dense 4-D masks.

    Args:
        stock: `Qwen2VLForConditionalGeneration` with transformers' "sdpa", which repeats key-value
            heads where it is given a mask.
        table: (3, 3) bool, rows attend to columns; all True for a bidirectional model.
        vision: `DENSE_VISION`, as CoCoA's second stage runs the tower, or `VISION_BY_IMAGE`.
    """

    def __init__(self, stock: Any, *, table: Tensor, vision: str) -> None:
        super().__init__()
        self.stock = stock
        self.table = table
        visual = self.stock.model.visual
        visual.config._attn_implementation = vision
        visual.patch_embed = PatchProduct(visual.patch_embed)

    def forward(self, inputs: Inputs) -> Seen:
        """Logits of all positions and the hidden states of all layers, asked for or not, as the
        forward passes of CoCoA and VLM2Vec do in every stage.
        """
        arguments = self._arguments(inputs)
        output = self.stock(**arguments, output_hidden_states=True, use_cache=False)
        positions, mask = arguments["position_ids"], arguments["attention_mask"]
        return Seen(output.logits, output.hidden_states, positions, mask)

    def _arguments(self, inputs: Inputs) -> dict[str, Any]:
        model = self.stock.model
        pixels = [one for one in inputs.pixel_values if one is not None]
        grids = [one for one in inputs.grids if one is not None]
        pictures = {"image_grid_thw": torch.cat(grids)} if grids else {}
        positions, _ = model.get_rope_index(
            inputs.input_ids,
            mm_token_type_ids=inputs.token_types,
            attention_mask=inputs.attention_mask,
            **pictures,
        )
        if pixels:
            pictures["pixel_values"] = torch.cat(pixels)
        mask = additive_mask(
            self.table,
            inputs.segment_lengths,
            slots=inputs.input_ids.shape[1],
            device=inputs.input_ids.device,
            dtype=self.stock.dtype,
        )
        return {
            "input_ids": inputs.input_ids,
            "attention_mask": mask,
            "position_ids": positions,
            "mm_token_type_ids": inputs.token_types,
            **pictures,
        }

    def decode(self, decoder: PixelDecoder, seen: Seen) -> Tensor:
        """Pixels of every token, hidden or not, visual or not, as MoCa's decoder does it."""
        states = seen.hidden_states[-1]
        rotary = self.stock.model.language_model.rotary_emb(states, seen.positions)
        states = decoder.layer(states, attention_mask=seen.mask, position_embeddings=rotary)
        pixels: Tensor = decoder.projection(states)
        return pixels

    def embed(self, inputs: Inputs) -> Tensor:
        """The unit last hidden state at each row's EOS: (B, D) float32."""
        return self._pooled(self(inputs).hidden_states[-1], inputs)  # after all logits

    def embed_without_head(self, inputs: Inputs) -> Tensor:
        """The same, as it would be if the peer ran its model without the vocabulary head."""
        output = self.stock.model(**self._arguments(inputs), use_cache=False)
        return self._pooled(output.last_hidden_state, inputs)

    def _pooled(self, states: Tensor, inputs: Inputs) -> Tensor:
        eos = inputs.segment_lengths[:, 0].to(states.device)
        rows = torch.arange(len(states), device=states.device)
        return normalize(states[rows, eos].float(), dim=-1)


def _dense_vision(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    **_: object,
) -> tuple[Tensor, None]:
    states = [one[0].transpose(0, 1) for one in (query, key, value)]  # (P, H, D)
    return vision_attention(*states, cumulative=cu_seq_lens_q, fold_batch=True)[None], None


AttentionInterface.register(DENSE_VISION, _dense_vision)
