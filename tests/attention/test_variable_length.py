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

from cocoa_pl.attention import Plan, Policy, attend, dense_mask, kernels, make_plan, self_plan
from cocoa_pl.attention.gather import gather
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


def test_gathering_is_indexing_and_its_gradient_is_exact() -> None:
    plan = bridge_plan()
    wanted = plan.packed.gather
    rows = torch.randn(int(plan.cu_seqlens_q[-1]), 3, dtype=torch.float64).requires_grad_()
    copies = gather(rows, wanted)
    assert torch.equal(copies, rows[plan.kv_index])
    weight = torch.randn(copies.shape, dtype=torch.float64)
    (found,) = torch.autograd.grad((copies * weight).sum(), rows)
    (expected,) = torch.autograd.grad((rows[plan.kv_index] * weight).sum(), rows)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    assert torch.autograd.gradcheck(lambda x: gather(x, wanted), (rows,))


def test_copies_are_added_in_float32_and_rounded_once() -> None:
    plan = bridge_plan()
    rows = torch.zeros(int(plan.cu_seqlens_q[-1]), 64, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(len(plan.kv_index), 64).bfloat16()
    (gather(rows, plan.packed.gather) * weight).sum().backward()
    exact = torch.zeros(rows.shape, dtype=torch.float64)
    exact.index_add_(0, plan.kv_index, weight.double())
    once = exact.float().bfloat16()
    assert rows.grad is not None
    assert torch.equal(rows.grad, once)
    stepwise = torch.zeros_like(rows.detach())
    for place, token in enumerate(plan.kv_index.tolist()):
        stepwise[token] += weight[place]
    assert not torch.equal(stepwise, once)  # three terms: rounding after each is something else


def test_no_list_of_copies_names_a_token_twice() -> None:
    plan = bridge_plan()
    wanted = plan.packed.gather
    assert len(wanted.more) == 2  # EOS is read by all three segments
    for tokens, places in wanted.more:
        assert len(tokens.unique()) == len(tokens)
        assert torch.equal(plan.kv_index[places], tokens)
    assert torch.equal(plan.kv_index[wanted.first], torch.arange(len(wanted.first)))
    listed = torch.cat([wanted.first, *(places for _, places in wanted.more)])
    assert torch.equal(listed.sort().values, torch.arange(len(plan.kv_index)))


@pytest.mark.parametrize("name", ["bidirectional", "causal"])
def test_nothing_is_gathered_where_keys_lie_in_place(name: str) -> None:
    lengths = torch.tensor(LENGTHS["mixed"])
    rows = torch.randn(int(lengths.sum()), 2)
    assert gather(rows, make_plan(POLICIES[name], lengths).packed.gather) is rows
    assert gather(rows[:13], self_plan(torch.tensor([4, 9])).packed.gather).shape == (13, 2)
    assert self_plan(torch.tensor([4, 9])).packed.gather.in_place


def test_bounds_are_made_once_for_all_layers() -> None:
    plan = bridge_plan()
    assert plan.packed is plan.packed
    assert plan.packed.max_q == 30
    assert plan.packed.max_k == 48  # EOS of (17, 1, 30)
    assert plan.to("cpu").packed is not plan.packed


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


# --- On a GPU ---------------------------------------------------------------------------------

GPU_LENGTHS = torch.tensor([[300, 1, 64], [17, 1, 30], [0, 1, 5], [130, 1, 0]])
IMAGES, WINDOWS = torch.tensor([576, 1024, 64, 4]), torch.tensor([64] * 20 + [32, 16, 16, 4])
PLANS: dict[str, Callable[[], Plan]] = {
    **{
        name: (lambda policy=policy: make_plan(policy, GPU_LENGTHS))
        for name, policy in POLICIES.items()
    },
    "images": lambda: self_plan(IMAGES),
    "windows": lambda: self_plan(WINDOWS),
}
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = {"grouped": (12, 2, 128), "vision": (4, 4, 80), "many groups": (28, 4, 128)}


def on_gpu(name: str, shape: str, dtype: torch.dtype) -> tuple[Plan, list[Tensor]]:
    plan, (heads, kv_heads, width) = PLANS[name]().to("cuda"), SHAPES[shape]
    tokens = int(plan.cu_seqlens_q[-1])
    inputs = states(tokens, heads=heads, kv_heads=kv_heads, width=width, dtype=dtype, device="cuda")
    return plan, inputs


def require(kernel: str) -> None:
    if kernel == "flash":
        pytest.importorskip("flash_attn")


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["varlen", "flash"])
@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PLANS)
def test_half_precision_equals_float32_on_a_gpu(
    name: str, shape: str, dtype: torch.dtype, kernel: str
) -> None:
    """Grouped heads first: a kernel that mixes them up, forward or backward, fails here."""
    require(kernel)
    plan, half = on_gpu(name, shape, dtype)
    full = [x.detach().float().requires_grad_() for x in half]
    scale = half[0].shape[-1] ** -0.5
    got = attend(*half, plan, kernel=kernel, scale=scale)
    expected = attend(*full, plan, kernel="sdpa", scale=scale)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, rtol=2e-2, atol=2e-2)
    for found, wanted in zip(gradients(got, half), gradients(expected, full), strict=True):
        error = (found.float() - wanted).norm() / wanted.norm()
        assert error < 1e-2  # bfloat16 has 8 bits; a key that is missed costs far more


@pytest.mark.gpu
@pytest.mark.parametrize("name", PLANS)
def test_auto_is_varlen_in_half_precision_on_a_gpu_and_sdpa_in_float32(name: str) -> None:
    for dtype, kernel in ((torch.bfloat16, "varlen"), (torch.float32, "sdpa")):
        plan, inputs = on_gpu(name, "grouped", dtype)
        found = attend(*inputs, plan, kernel="auto", scale=SCALE)
        assert torch.equal(found, attend(*inputs, plan, kernel=kernel, scale=SCALE))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["varlen", "flash", "sdpa"])
@pytest.mark.parametrize("name", ["eos_bridge", "bidirectional", "causal", "windows"])
def test_kernels_are_deterministic_where_torch_is(name: str, kernel: str) -> None:
    require(kernel)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        plan, inputs = on_gpu(name, "grouped", torch.bfloat16)
        runs = []
        for _ in range(3):
            output = attend(*inputs, plan, kernel=kernel, scale=SCALE)
            runs.append((output, *gradients(output, inputs)))
    finally:
        torch.use_deterministic_algorithms(before)
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["varlen", "flash", "sdpa"])
@pytest.mark.parametrize("name", ["eos_bridge", "windows"])
def test_a_plan_and_its_kernel_never_wait_for_the_device(name: str, kernel: str) -> None:
    require(kernel)
    plan, inputs = on_gpu(name, "grouped", torch.bfloat16)
    attend(*inputs, plan, kernel=kernel, scale=SCALE).sum().backward()  # warm up
    ready = PLANS[name]().to("cuda").prepared(kernel).pin_memory()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(*inputs, ready, kernel=kernel, scale=SCALE).sum().backward()
        attend(*inputs, PLANS[name]().to("cuda"), kernel=kernel, scale=SCALE).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
