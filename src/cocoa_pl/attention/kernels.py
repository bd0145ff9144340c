"""Attention over the segments of a plan, by one of several kernels; and the function that stock
transformers models call, so that nothing of theirs is forked.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from cocoa_pl.attention.plan import Plan, Varlen
from cocoa_pl.errors import UserError, first_line

log = logging.getLogger(__name__)

Kernel = Callable[[Tensor, Tensor, Tensor, Plan, float], Tensor]
# Queries, keys, values, bounds, causal, scale -> outputs.
VarlenCall = Callable[[Tensor, Tensor, Tensor, Varlen, bool, float], Tensor]

TEXT_ATTENTION = "cocoa"
# transformers hands packed images to an attention function whole, instead of one by one in a Python
# loop, only when the function's name contains "flash" (`is_flash_attention_requested`).
VISION_ATTENTION = "cocoa_flash_layout"

HALF = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM, HEAD_DIM_STEP = 256, 8  # of the flash kernels behind `varlen` and `flash`
MIN_CAPABILITY = (8, 0)  # Ampere


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


def sdpa(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Tensor:
    """torch's own attention, one call for each rectangle of padded segments; runs anywhere."""
    padded = plan.padded
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
    _require_flash_inputs(v, "varlen")
    return over_segments(torch_call(varlen_attn), q, k, v, plan, scale)


def flash(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Tensor:
    """flash-attn's `flash_attn_varlen_func`; deterministic as above."""
    try:
        function = import_module("flash_attn").flash_attn_varlen_func
    except ImportError as error:
        raise UserError(
            "model.kernel=flash needs flash-attn, which cannot be imported "
            f"({first_line(error)}): pip install 'cocoa_pl[flash]', or take "
            "model.kernel=varlen, which comes with torch"
        ) from error
    _require_flash_inputs(v, "flash")
    return over_segments(flash_call(function), q, k, v, plan, scale)


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


def over_segments(
    call: VarlenCall, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float
) -> Tensor:
    """Give a variable-length kernel the rows that a plan asks for.

    Queries and keys are rounded to the type of the values, which is what the projections computed
    in: rotary embeddings leave float32 beside it when weights are float32 under autocast. Keys that
    several segments see are copied for each of them.

    Args:
        q: (T, H, D).
        k, v: (T, H_kv, D).

    Returns:
        (T, H, D) in the dtype of v.
    """
    inputs = plan.varlen
    q, k = q.to(v.dtype), k.to(v.dtype)
    k, v = _rows(k, inputs.k_index), _rows(v, inputs.k_index)
    return call(q, k, v, inputs, plan.causal, scale)


@cache
def torch_call(function: Callable[..., Any]) -> VarlenCall:
    """Adapt `varlen_attn` as the installed torch has it.

    2.11 takes `scale` and `window_size`, where (-1, 0) is causal; from 2.12 on `enable_gqa` too.
    Where grouped heads are not promised, keys and values are repeated.

    Raises:
        UserError: for another signature.
    """
    names: Mapping[str, Any] = inspect.signature(function).parameters
    if not {"window_size", "scale"} <= set(names):
        raise UserError(
            f"model.kernel=varlen does not know varlen_attn of torch {torch.__version__}; "
            "take model.kernel=sdpa"
        )

    def call(q: Tensor, k: Tensor, v: Tensor, inputs: Varlen, causal: bool, scale: float) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        # Of unequal numbers of queries and keys the last ones are aligned: row_idx + max_seqlen_k -
        # max_seqlen_q in
        # https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/transformers/cuda/flash_attn/mask.h
        keywords: dict[str, Any] = {"scale": scale, "window_size": (-1, 0 if causal else -1)}
        if "enable_gqa" in names:
            keywords["enable_gqa"] = groups > 1
        elif groups > 1:
            k, v = (states.repeat_interleave(groups, dim=1) for states in (k, v))
        return function(q, k, v, *inputs[:4], **keywords)

    return call


def flash_call(function: Callable[..., Any]) -> VarlenCall:
    """Adapt flash-attn's `flash_attn_varlen_func`, which takes grouped heads as they are.

    From 2.1 on its causal mask is aligned at the last query and key
    (https://github.com/Dao-AILab/flash-attention#21-change-behavior-of-causal-flag).
    """

    def call(q: Tensor, k: Tensor, v: Tensor, inputs: Varlen, causal: bool, scale: float) -> Tensor:
        deterministic = torch.are_deterministic_algorithms_enabled()
        keywords = {"softmax_scale": scale, "causal": causal, "deterministic": deterministic}
        output: Tensor = function(q, k, v, *inputs[:4], **keywords)
        return output

    return call


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
    if head_width > MAX_HEAD_DIM or head_width % HEAD_DIM_STEP:
        return f"takes heads of a multiple of 8 up to 256 wide, not {head_width}"
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return "needs a GPU of compute capability 8.0 or more"
    return None


def _require_flash_inputs(states: Tensor, kernel: str) -> None:
    if reason := flash_refusal(states.device, states.dtype, states.shape[-1]):
        raise UserError(f"model.kernel={kernel} {reason}; model.kernel=sdpa runs anywhere")


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
def _log_choice(kernel: str, device: str, dtype: torch.dtype, width: int) -> None:
    log.info("attention kernel auto: %s for heads of %d in %s on %s", kernel, width, dtype, device)
