"""Packed queries, keys, values and a plan in; packed outputs out, by a kernel that needs no
rectangles: torch's own `varlen_attn`, or flash-attn where it is installed.

Both read segment i as rows `cu_seqlens[i]:cu_seqlens[i + 1]`, so keys that several segments see are
gathered once for each of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from cocoa_pl.attention.gather import gather
from cocoa_pl.attention.plan import Packed, Plan
from cocoa_pl.errors import UserError

HALF = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM, HEAD_DIM_STEP = 256, 8  # of the flash kernels behind both functions
MIN_CAPABILITY = (8, 0)  # Ampere

# Queries, keys, values, bounds, causal, scale -> outputs.
Call = Callable[[Tensor, Tensor, Tensor, Packed, bool, float], Tensor]


def varlen(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Tensor:
    """torch's `varlen_attn`; deterministic under `torch.use_deterministic_algorithms`."""
    require_flash_inputs(v, "varlen")
    return over_segments(_torch_call(), q, k, v, plan, scale)


def flash(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Tensor:
    """flash-attn's `flash_attn_varlen_func`; deterministic as above."""
    call = _flash_call()
    require_flash_inputs(v, "flash")
    return over_segments(call, q, k, v, plan, scale)


def over_segments(call: Call, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Tensor:
    """Give a variable-length kernel the rows that a plan asks for.

    Queries and keys are rounded to the type of the values, which is what the projections computed
    in: rotary embeddings leave float32 beside it when weights are float32 under autocast.

    Args:
        q: (T, H, D).
        k, v: (T, H_kv, D).

    Returns:
        (T, H, D) in the dtype of v.
    """
    packed = plan.packed
    q, k = q.to(v.dtype), k.to(v.dtype)
    k, v = gather(k, packed.gather), gather(v, packed.gather)
    return call(q, k, v, packed, plan.causal, scale)


def suits_flash(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether a flash kernel computes on this device, in this type, for heads of this width."""
    return _refusal(device, dtype, head_width) is None


def require_flash_inputs(states: Tensor, kernel: str) -> None:
    """Fail with a sentence where a flash kernel would fail with a riddle.

    Raises:
        UserError: off CUDA, before Ampere, in another type than bfloat16 and float16, or for a head
            width that is no multiple of 8 or above 256.
    """
    if reason := _refusal(states.device, states.dtype, states.shape[-1]):
        raise UserError(f"model.kernel={kernel} {reason}; model.kernel=sdpa runs anywhere")


def torch_call(function: Callable[..., Any]) -> Call:
    """Adapt `varlen_attn` as the installed torch has it.

    Its documented keywords changed: 2.10 takes `is_causal` and no `scale`; 2.11 `scale` and
    `window_size`, where (-1, 0) is causal; 2.12 and 2.13 `enable_gqa` too. Where grouped heads are
    not promised, keys and values are repeated. What else there is (`seqused_k`, `block_table`,
    `num_splits`, caches) is for inference. A causal segment has as many queries as keys, so it does
    not matter at which end a version aligns them.
    """
    names: Mapping[str, Any] = inspect.signature(function).parameters
    if not {"window_size", "is_causal"} & set(names):
        raise UserError(
            f"model.kernel=varlen does not know varlen_attn of torch {torch.__version__}; "
            "take model.kernel=sdpa"
        )

    def call(q: Tensor, k: Tensor, v: Tensor, packed: Packed, causal: bool, scale: float) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        keywords: dict[str, Any] = {}
        if "window_size" in names:
            keywords["window_size"] = (-1, 0) if causal else (-1, -1)
        else:
            keywords["is_causal"] = causal
        if "enable_gqa" in names:
            keywords["enable_gqa"] = groups > 1
        elif groups > 1:
            k, v = (states.repeat_interleave(groups, dim=1) for states in (k, v))
        if "scale" in names:
            keywords["scale"] = scale
        elif (factor := scale * q.shape[2] ** 0.5) != 1:  # of what it scales by itself
            q = q * factor
        bounds = (packed.cu_seqlens_q, packed.cu_seqlens_k, packed.max_q, packed.max_k)
        output: Tensor = function(q, k, v, *bounds, **keywords)
        return output

    return call


def flash_call(function: Callable[..., Any]) -> Call:
    """Adapt flash-attn's `flash_attn_varlen_func` (2.x), which takes grouped heads as they are."""

    def call(q: Tensor, k: Tensor, v: Tensor, packed: Packed, causal: bool, scale: float) -> Tensor:
        output: Tensor = function(
            q,
            k,
            v,
            packed.cu_seqlens_q,
            packed.cu_seqlens_k,
            packed.max_q,
            packed.max_k,
            softmax_scale=scale,
            causal=causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return output

    return call


def _refusal(device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    """Why a flash kernel does not compute this; None where it does."""
    if device.type != "cuda":
        return f"runs on CUDA only, not on {device.type}"
    if dtype not in HALF:
        return f"computes in bfloat16 or float16, not in {dtype}: set model.dtype=bfloat16"
    if head_width > MAX_HEAD_DIM or head_width % HEAD_DIM_STEP:
        return f"takes heads of a multiple of 8 up to 256 wide, not {head_width}"
    if _capability(device) < MIN_CAPABILITY:
        return "needs a GPU of compute capability 8.0 or more"
    return None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _torch_call() -> Call:
    from torch.nn.attention.varlen import varlen_attn

    return torch_call(varlen_attn)


@cache
def _flash_call() -> Call:
    try:
        module = import_module("flash_attn")
    except ImportError as error:
        raise UserError(
            "model.kernel=flash needs flash-attn, which cannot be imported "
            f"({str(error).splitlines()[0]}): pip install 'cocoa_pl[flash]', or take "
            "model.kernel=varlen, which comes with torch"
        ) from error
    return flash_call(module.flash_attn_varlen_func)
