"""Variable-length kernels against a segment-by-segment twin and the dense mask, in float64."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cocoa_pl.attention import Plan, Policy, attend, dense_mask, kernels, make_plan
from cocoa_pl.attention.kernels import KERNELS
from cocoa_pl.attention.variable_length import (
    Call,
    flash_call,
    over_segments,
    torch_call,
)
from cocoa_pl.errors import UserError

ALL = ("context", "eos", "target")
POLICIES = {
    "bidirectional": Policy("bidirectional", ALL, ALL, ALL, False),
    "eos_bridge": Policy("eos_bridge", ("context", "eos"), ALL, ("eos", "target"), False),
    "strict": Policy("strict", ("context", "eos"), ("context", "eos"), ("eos", "target"), False),
    "gap": Policy("gap", ("context", "target"), ALL, ("context", "target"), False),
    "causal": Policy("causal", ALL, ALL, ALL, True),
}
LENGTHS = {
    "one token": [[0, 1, 0]],
    "no target": [[5, 1, 0], [3, 1, 0]],
    "mixed": [[9, 1, 4], [0, 1, 7], [2, 1, 0], [0, 1, 0], [17, 1, 30], [1, 1, 1]],
}
SCALE = 0.3

# --- The slow twin: the contract of `varlen_attn`, one segment after the other ----------------


def segment_by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    causal: bool,
    scale: float | None,
) -> Tensor:
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert len(query) == cu_seq_q[-1]
    assert len(key) == len(value) == cu_seq_k[-1]
    outputs = []
    for (q0, q1), (k0, k1) in zip(
        pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True
    ):
        assert 0 < q1 - q0 <= max_q
        assert 0 < k1 - k0 <= max_k
        q, k, v = (x.transpose(0, 1) for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
        output = scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=len(q) != len(k)
        )
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


def today(
    *states: Any, scale: Any = None, window_size: Any = (-1, -1), enable_gqa: Any = False
) -> Tensor:
    assert window_size in {(-1, -1), (-1, 0)}
    assert enable_gqa == (states[0].shape[1] != states[1].shape[1])
    return segment_by_segment(*states, causal=window_size == (-1, 0), scale=scale)


def without_groups(*states: Any, scale: Any = None, window_size: Any = (-1, -1)) -> Tensor:
    assert states[0].shape[1] == states[1].shape[1]
    return segment_by_segment(*states, causal=window_size == (-1, 0), scale=scale)


def at_first(*states: Any, is_causal: bool = False, return_aux: Any = None) -> Tensor:
    assert states[0].shape[1] == states[1].shape[1]
    return segment_by_segment(*states, causal=is_causal, scale=None)


def flash_attn_varlen_func(
    *states: Any, softmax_scale: float, causal: bool, deterministic: bool
) -> Tensor:
    return segment_by_segment(*states, causal=causal, scale=softmax_scale)


CALLS: dict[str, Callable[[], Call]] = {
    "today": lambda: torch_call(today),
    "without groups": lambda: torch_call(without_groups),
    "at first": lambda: torch_call(at_first),
    "flash-attn": lambda: flash_call(flash_attn_varlen_func),
}


def states(
    tokens: int,
    *,
    heads: int = 6,
    kv_heads: int = 2,
    width: int = 8,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(tokens, n, width, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]


def gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a random linear function of the output."""
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad((output * weight.to(output)).sum(), inputs)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # (H, T, D)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(0, 1)


# --- Exactness --------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_segments_equal_the_dense_mask_forward_and_backward(
    lengths: list[list[int]], name: str, call: str
) -> None:
    segments, policy = torch.tensor(lengths), POLICIES[name]
    inputs = states(int(segments.sum()))
    q, k, v = inputs
    got = over_segments(CALLS[call](), q, k, v, make_plan(policy, segments), SCALE)
    expected = dense(q, k, v, dense_mask(policy, segments), SCALE)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    found, wanted = gradients(got, inputs), gradients(expected, inputs)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def bridge_plan() -> Plan:
    return make_plan(POLICIES["eos_bridge"], torch.tensor(LENGTHS["mixed"]))


def test_the_longest_segments_are_told() -> None:
    packed = bridge_plan().packed
    assert packed.max_q == 30
    assert packed.max_k == 48  # EOS of (17, 1, 30)


def test_queries_and_keys_take_the_type_of_the_values() -> None:
    plan = bridge_plan()
    q, k, v = states(int(plan.cu_seqlens_q[-1]), dtype=torch.float32)
    seen: list[torch.dtype] = []

    def call(*given: Any) -> Tensor:
        seen.extend(x.dtype for x in given[:3])
        return given[0]

    output = over_segments(call, q, k, v.bfloat16(), plan, SCALE)
    assert {*seen, output.dtype} == {torch.bfloat16}
    output.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


# --- What is handed over ----------------------------------------------------------------------


def test_flash_attention_is_deterministic_where_torch_is() -> None:
    plan, seen = bridge_plan(), []

    def function(*given: Any, deterministic: bool, **_: Any) -> Tensor:
        seen.append(deterministic)
        output: Tensor = given[0]
        return output

    inputs = states(int(plan.cu_seqlens_q[-1]))
    before = torch.are_deterministic_algorithms_enabled()
    for wanted in (False, True):
        torch.use_deterministic_algorithms(wanted)
        try:
            over_segments(flash_call(function), *inputs, plan, SCALE)
        finally:
            torch.use_deterministic_algorithms(before)
    assert seen == [False, True]


def test_the_installed_torch_is_known() -> None:
    from torch.nn.attention.varlen import varlen_attn

    torch_call(varlen_attn)


def test_an_unknown_signature_is_refused() -> None:
    with pytest.raises(UserError, match=r"does not know varlen_attn of torch .*model.kernel=sdpa"):
        torch_call(lambda query, key, value: query)


def test_a_kernel_for_cuda_says_so_on_the_cpu() -> None:
    plan = bridge_plan()
    inputs = states(int(plan.cu_seqlens_q[-1]), dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"model.kernel=varlen runs on CUDA only, not on cpu"):
        attend(*inputs, plan, kernel="varlen", scale=SCALE)


def test_flash_attn_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr("cocoa_pl.attention.variable_length.import_module", missing)
    plan = bridge_plan()
    inputs = states(int(plan.cu_seqlens_q[-1]), dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"needs flash-attn.*pip install 'cocoa_pl\[flash\]'"):
        attend(*inputs, plan, kernel="flash", scale=SCALE)


def test_auto_is_sdpa_on_the_cpu_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    plan = bridge_plan()
    inputs = states(int(plan.cu_seqlens_q[-1]), dtype=torch.bfloat16)
    kernels._tell.cache_clear()
    with caplog.at_level(logging.INFO, logger=kernels.__name__):
        first, second = (attend(*inputs, plan, kernel="auto", scale=SCALE) for _ in range(2))
    assert torch.equal(first, attend(*inputs, plan, kernel="sdpa", scale=SCALE))
    assert torch.equal(first, second)
    told = [record.getMessage() for record in caplog.records]
    assert told == ["attention kernel auto: sdpa for heads of 8 in torch.bfloat16 on cpu"]


def test_every_kernel_of_the_table_is_tested() -> None:
    assert set(KERNELS) == {"sdpa", "varlen", "flash", "auto"}
