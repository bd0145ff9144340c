"""Packed queries, keys, values and a plan in; packed outputs out. One function, several kernels.

Also the adapters that hand this function to stock transformers models: nothing of theirs is forked.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from cocoa_pl.attention.gather import gather, ungather
from cocoa_pl.attention.plan import Plan
from cocoa_pl.attention.variable_length import HALF, flash, suits_flash, varlen

log = logging.getLogger(__name__)

Kernel = Callable[[Tensor, Tensor, Tensor, Plan, float], Tensor]

TEXT_ATTENTION = "cocoa"
# transformers hands packed images to an attention function whole, instead of one by one in a Python
# loop, only when the function's name contains "flash" (`is_flash_attention_requested`).
VISION_ATTENTION = "cocoa_flash_layout"


def sdpa(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Tensor:
    """torch's own attention, one call for each rectangle of padded segments; runs anywhere."""
    padded = plan.padded
    q_shapes = [(shape.segments, shape.queries) for shape in padded.rectangles]
    k_shapes = [(shape.segments, shape.keys) for shape in padded.rectangles]
    outputs = [
        _rectangle(*states, causal=padded.causal, scale=scale)
        for states in zip(
            _cut(gather(q, padded.q), q_shapes),
            _cut(gather(k, padded.k), k_shapes),
            _cut(gather(v, padded.k), k_shapes),
            padded.masks,
            strict=True,
        )
    ]  # (G, H, Lq, D) each
    rows = torch.cat([output.transpose(1, 2).flatten(0, 1) for output in outputs])
    return ungather(rows, padded.q)


def auto(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Tensor:
    """`varlen` in half precision on a GPU that has it, `sdpa` elsewhere; logged once for each."""
    kernel = chosen("auto", device=v.device, dtype=v.dtype, head_width=v.shape[-1])
    _tell(kernel, v.device.type, v.dtype, v.shape[-1])
    return KERNELS[kernel](q, k, v, plan, scale)


def chosen(kernel: str, *, device: torch.device, dtype: torch.dtype, head_width: int) -> str:
    """The kernel that computes: what `auto` comes to, and any other name itself.

    Args:
        dtype: of the values, which is what projections compute in.
    """
    if kernel != "auto":
        return kernel
    return "varlen" if suits_flash(device, dtype, head_width) else "sdpa"


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
    with _without_cudnn():
        # A view of a fused projection, kept for the backward pass, would keep all of it.
        return KERNELS[kernel](q, k, v.contiguous(), plan, scale)


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


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """torch prefers cuDNN from Hopper on. It builds a plan for every new shape, a second each
    (https://github.com/modelscope/FunASR/issues/3704), and packed batches bring new shapes in every
    step. A backward pass is that of the kernel that ran forward.
    """
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(allowed)


@cache
def _tell(kernel: str, device: str, dtype: torch.dtype, width: int) -> None:
    log.info("attention kernel auto: %s for heads of %d in %s on %s", kernel, width, dtype, device)


def _takes_groups(device: torch.device, dtype: torch.dtype, *, masked: bool) -> bool:
    """Whether SDPA computes grouped heads without a table of scores: on CUDA flash attention alone
    does, in half precision and without a mask.
    """
    return device.type != "cuda" or (dtype in HALF and not masked)


def _rectangle(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool, scale: float
) -> Tensor:
    """(G, H, Lq, D) queries, (G, H_kv, Lk, D) keys and values -> (G, H, Lq, D)."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and not _takes_groups(v.device, v.dtype, masked=mask is not None):
        k, v = (states.repeat_interleave(groups, dim=1) for states in (k, v))
    return scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
    )


def _cut(rows: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """(sum of G L, H, D) -> (G, H, L, D) of each rectangle."""
    parts = rows.split([segments * length for segments, length in shapes])
    return [part.unflatten(0, s).transpose(1, 2) for part, s in zip(parts, shapes, strict=True)]
