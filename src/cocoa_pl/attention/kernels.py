"""Attention over the segments of a plan, by one of several kernels; and the function that stock
transformers models call, so that nothing of theirs is forked.
"""

import inspect
import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from cocoa_pl.attention.plan import Plan
from cocoa_pl.errors import UserError, first_line

log = logging.getLogger(__name__)

Kernel = Callable[[Tensor, Tensor, Tensor, Plan, float], Tensor]

TEXT_ATTENTION = "cocoa"
# transformers hands packed images to an attention function whole, instead of one by one in a Python
# loop, only when the function's name contains "flash" (`is_flash_attention_requested`).
VISION_ATTENTION = "cocoa_flash_layout"

HALF = (torch.bfloat16, torch.float16)
# torch 2.11 promises nothing about grouped heads.
VARLEN_TAKES_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters


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
    # torch prefers cuDNN from Hopper on. It builds a plan for every new shape, a second each
    # (https://github.com/modelscope/FunASR/issues/3704), and packed batches bring new shapes in
    # every step. A backward pass is that of the kernel that ran forward. torch's own `sdpa_kernel`
    # sets all backends, at ten times the cost.
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        # A view of a fused projection, kept for the backward pass, would keep all of it.
        return KERNELS[kernel](q, k, v.contiguous(), plan, scale)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(allowed)


def sdpa(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Tensor:
    """torch's own attention, one call for each rectangle of padded segments; runs anywhere."""
    padded = plan.padded
    assert padded is not None, 'sdpa takes `plan.prepared("sdpa")`'
    q_sizes = [r.segments * r.queries for r in padded.rectangles]
    k_sizes = [r.segments * r.keys for r in padded.rectangles]
    outputs = []
    for r, mask, *states in zip(
        padded.rectangles,
        padded.masks,
        _rows(q, padded.q_index).split(q_sizes),
        _rows(k, padded.k_index).split(k_sizes),
        _rows(v, padded.k_index).split(k_sizes),
        strict=True,
    ):
        queries, keys, values = (
            rows.unflatten(0, (r.segments, -1)).transpose(1, 2) for rows in states
        )  # (G, H, Lq, D), (G, H_kv, Lk, D) twice
        groups = queries.shape[1] // keys.shape[1]
        if groups > 1 and not _takes_groups(v.device, v.dtype, masked=mask is not None):
            keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
            groups = 1
        output = scaled_dot_product_attention(
            queries,
            keys,
            values,
            mask,
            is_causal=plan.causal and mask is None,  # aligned at the first query and key
            scale=scale,
            enable_gqa=groups > 1,
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return _rows(torch.cat(outputs), padded.place)


def varlen(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Tensor:
    """torch's `varlen_attn`; deterministic under `torch.use_deterministic_algorithms`."""
    q, k, v, *bounds = _segments("varlen", q, k, v, plan)
    groups = q.shape[1] // k.shape[1]
    grouped: dict[str, Any] = {"enable_gqa": groups > 1} if VARLEN_TAKES_GROUPS else {}
    if groups > 1 and not VARLEN_TAKES_GROUPS:
        k, v = (states.repeat_interleave(groups, dim=1) for states in (k, v))
    # Of unequal numbers of queries and keys the last ones are aligned: row_idx + max_seqlen_k -
    # max_seqlen_q in
    # https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/transformers/cuda/flash_attn/mask.h
    window = (-1, 0) if plan.causal else (-1, -1)
    output = varlen_attn(q, k, v, *bounds, scale=scale, window_size=window, **grouped)
    assert isinstance(output, Tensor)
    return output


def flash(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Tensor:
    """flash-attn's `flash_attn_varlen_func`; deterministic as above, grouped heads as they are.

    From 2.1 on its causal mask is aligned at the last query and key
    (https://github.com/Dao-AILab/flash-attention#21-change-behavior-of-causal-flag).
    """
    try:
        function = import_module("flash_attn").flash_attn_varlen_func
    except ImportError as error:
        raise UserError(
            "model.kernel=flash needs flash-attn, which cannot be imported "
            f"({first_line(error)}): pip install 'cocoa_pl[flash]', or take "
            "model.kernel=varlen, which comes with torch"
        ) from error
    output: Tensor = function(
        *_segments("flash", q, k, v, plan),
        softmax_scale=scale,
        causal=plan.causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return output


def auto(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Tensor:
    """`varlen` in half precision on a GPU that has it, `sdpa` elsewhere; logged once for each."""
    kernel = chosen("auto", device=v.device, dtype=v.dtype, head_width=v.shape[-1])
    _log_choice(kernel, v.device.type, v.dtype, v.shape[-1])
    return KERNELS[kernel](q, k, v, plan, scale)


KERNELS: dict[str, Kernel] = {"sdpa": sdpa, "varlen": varlen, "flash": flash, "auto": auto}


def chosen(kernel: str, *, device: torch.device, dtype: torch.dtype, head_width: int) -> str:
    """The kernel that computes: what `auto` comes to, and any other name itself.

    Args:
        dtype: of the values, which is what projections compute in.
    """
    if kernel != "auto":
        return kernel
    return "sdpa" if flash_refusal(device, dtype, head_width) else "varlen"


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


def flash_refusal(device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    """Why a flash kernel does not compute this; None where it does."""
    if device.type != "cuda":
        return f"runs on CUDA only, not on {device.type}"
    if dtype not in HALF:
        return f"computes in bfloat16 or float16, not in {dtype}: set model.dtype=bfloat16"
    if head_width > 256 or head_width % 8:
        return f"takes heads of a multiple of 8 up to 256 wide, not {head_width}"
    if torch.cuda.get_device_capability(device) < (8, 0):  # Ampere
        return "needs a GPU of compute capability 8.0 or more"
    return None


def _segments(kernel: str, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Any, ...]:
    """What a variable-length kernel reads: states, bounds, and the longest segments.

    Queries and keys are rounded to the type of the values, which is what the projections computed
    in: rotary embeddings leave float32 beside it when weights are float32 under autocast. Keys that
    several segments see are copied for each of them.
    """
    if reason := flash_refusal(v.device, v.dtype, v.shape[-1]):
        raise UserError(f"model.kernel={kernel} {reason}; model.kernel=sdpa runs anywhere")
    k, v = _rows(k.to(v.dtype), plan.kv_index), _rows(v, plan.kv_index)
    return q.to(v.dtype), k, v, *plan[:4]


def _rows(states: Tensor, index: Tensor | None) -> Tensor:
    """Rows by their numbers, or as they lie.

    The backward pass adds the copies of a row in the type of the states; on CUDA in one fixed order
    only under `torch.use_deterministic_algorithms`.
    """
    return states if index is None else states.index_select(0, index)


def _takes_groups(device: torch.device, dtype: torch.dtype, *, masked: bool) -> bool:
    """Whether SDPA computes grouped heads without a table of scores: on CUDA flash attention alone
    does, in half precision and without a mask.
    """
    return device.type != "cuda" or (dtype in HALF and not masked)


@cache
def _log_choice(kernel: str, device: str, dtype: torch.dtype, width: int) -> None:
    log.info("attention kernel auto: %s for heads of %d in %s on %s", kernel, width, dtype, device)
