"""Packed queries, keys, values and a plan in; packed outputs out. One function, several kernels.

Also the adapters that hand this function to stock transformers models: nothing of theirs is forked.
"""

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from cocoa_pl.attention.plan import Plan
from cocoa_pl.attention.variable_length import flash, suits_flash, varlen

log = logging.getLogger(__name__)

Kernel = Callable[[Tensor, Tensor, Tensor, Plan, float], Tensor]

TEXT_ATTENTION = "cocoa"
# transformers hands packed images to an attention function whole, instead of one by one in a Python
# loop, only when the function's name contains "flash" (`is_flash_attention_requested`).
VISION_ATTENTION = "cocoa_flash_layout"


def sdpa(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Tensor:
    """torch's own attention, one padded call for each bucket of similar segments; runs anywhere."""
    heads = q.shape[1]
    outputs = []
    for bucket in plan.buckets:
        output = scaled_dot_product_attention(
            _pad(q, bucket.q_index),
            _pad(k, bucket.k_index),
            _pad(v, bucket.k_index),
            attn_mask=bucket.mask,
            is_causal=bucket.causal,
            scale=scale,
            enable_gqa=k.shape[1] != heads,
        )  # (G, H, Lq, D)
        outputs.append(output.transpose(1, 2).flatten(0, 1))  # (G * Lq, H, D)
    return torch.cat(outputs).index_select(0, plan.restore_index)


def auto(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Tensor:
    """`varlen` in half precision on a GPU that has it, `sdpa` elsewhere; logged once for each."""
    kernel = varlen if suits_flash(v) else sdpa
    _tell(kernel.__name__, v.device.type, v.dtype, v.shape[-1])
    return kernel(q, k, v, plan, scale)


KERNELS: dict[str, Kernel] = {"sdpa": sdpa, "varlen": varlen, "flash": flash, "auto": auto}


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, kernel: str, scale: float) -> Tensor:
    """Attention over the segments of a plan.

    Args:
        q: (T, H, D).
        k, v: (T, H_kv, D); H is a multiple of H_kv.
        kernel: a name in `KERNELS`; never changed behind the caller's back.

    Returns:
        (T, H, D) in the one dtype of q, k and v; where they differ (rotary embeddings under
        autocast), in the type that autocast computes in.

    Raises:
        UserError: where the kernel does not run on this device or in this type, or is not
            installed.
    """
    return KERNELS[kernel](q, k, v, plan, scale)


def transformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    plan: Plan,
    kernel: str,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    """The signature that transformers calls, for (1, H, T, D) packed states.

    `plan` has no default on purpose: a model called without one fails instead of falling back to a
        causal mask.
    """
    assert attention_mask is None, "the plan is the mask"
    if dropout:
        raise ValueError(
            "attention dropout is not supported by variable-length kernels; set it to 0"
        )
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # (T, H, D) each
    return attend(q, k, v, plan, kernel=kernel, scale=scaling)[None], None


AttentionInterface.register(TEXT_ATTENTION, transformers_attention)
AttentionInterface.register(VISION_ATTENTION, transformers_attention)


@cache
def _tell(kernel: str, device: str, dtype: torch.dtype, width: int) -> None:
    log.info("attention kernel auto: %s for heads of %d in %s on %s", kernel, width, dtype, device)


def _pad(states: Tensor, index: Tensor) -> Tensor:
    """(T, H, D) -> (G, H, L, D)."""
    rows = states.index_select(0, index.flatten())
    return rows.view(*index.shape, *states.shape[1:]).transpose(1, 2)
