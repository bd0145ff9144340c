"""`attend` with all kernels against the dense oracle."""

import inspect
import logging
from itertools import pairwise, product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from cocoa_pl.attention import Policy, attend, dense_mask, kernels, make_plan
from cocoa_pl.attention import plan as plan_module
from cocoa_pl.attention.kernels import KERNELS, chosen, transformers_attention
from cocoa_pl.errors import UserError
from tests.attention.oracle import (
    LENGTHS,
    POLICIES,
    assert_equals_dense,
    dense_attention,
    random_lengths,
    states,
)

MIXED = torch.tensor(LENGTHS["mixed"])
TOKENS = int(MIXED.sum())
SCALE = 0.3
BRIDGE = make_plan(POLICIES["eos_bridge"], MIXED).prepared("sdpa")


def check(
    policy: Policy, lengths: Tensor, *, kernel: str = "sdpa", bound: float = 1e-12, **shape: Any
) -> None:
    """Output and gradients of all tokens against the dense mask."""
    inputs = states(int(lengths.sum()), **shape)
    plan = make_plan(policy, lengths).prepared(kernel)
    output = attend(*inputs, plan, kernel=kernel, scale=SCALE)
    assert output.dtype == inputs[0].dtype
    assert_equals_dense(output, inputs, dense_mask(policy, lengths), SCALE, bound=bound)


# --- Padded rectangles -------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("lengths", [*LENGTHS, 0, 1, 2])
def test_sdpa_equals_the_dense_mask(name: str, lengths: str | int) -> None:
    """Packed is one by one, too: the mask has a block for each sample."""
    is_seed = isinstance(lengths, int)
    given = random_lengths(lengths, longest=90) if is_seed else torch.tensor(LENGTHS[lengths])
    check(POLICIES[name], given)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (6, 3)])
@pytest.mark.parametrize("grouped", [True, False])
def test_grouped_heads_share_keys_in_the_stock_order(
    heads: int, kv_heads: int, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_takes_groups", lambda *given, masked: grouped)
    check(POLICIES["eos_bridge"], MIXED, heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_output_keeps_the_dtype(dtype: torch.dtype, bound: float) -> None:
    check(POLICIES["eos_bridge"], MIXED, dtype=dtype, bound=bound)


def test_on_cuda_grouped_heads_go_to_flash_attention_alone() -> None:
    types = (torch.float32, torch.bfloat16, torch.float16)
    taken = {
        (device, dtype, masked)
        for device, dtype, masked in product(("cpu", "cuda"), types, (False, True))
        if kernels._takes_groups(torch.device(device), dtype, masked=masked)
    }
    assert {key for key in taken if key[0] == "cuda"} == {
        ("cuda", torch.bfloat16, False),
        ("cuda", torch.float16, False),
    }
    assert len(taken) == 2 + 2 * len(types)  # on the CPU as they are


# --- Variable-length kernels: the contract of `varlen_attn`, one segment after the other -------


def segment_by_segment(
    *given: Any, causal: bool, scale: float | None, grouped: bool = True
) -> Tensor:
    query, key, value, cu_seqlens_q, cu_seqlens_k, max_q, max_k = given
    assert query.dtype == key.dtype == value.dtype
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert (len(query), len(key)) == (cu_seqlens_q[-1], cu_seqlens_k[-1])
    assert grouped or query.shape[1] == key.shape[1]
    scale = query.shape[2] ** -0.5 if scale is None else scale
    bounds = (pairwise(b.tolist()) for b in (cu_seqlens_q, cu_seqlens_k))
    outputs = []
    for (q0, q1), (k0, k1) in zip(*bounds, strict=True):
        assert 0 < q1 - q0 <= max_q
        assert 0 < k1 - k0 <= max_k
        mask = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
        mask = mask.tril(k1 - k0 - (q1 - q0)) if causal else mask
        outputs.append(dense_attention(query[q0:q1], key[k0:k1], value[k0:k1], mask, scale))
    return torch.cat(outputs)


def torch_2_12(
    *states: Any, scale: Any = None, window_size: Any = (-1, -1), enable_gqa: Any = False
) -> Tensor:
    assert window_size in {(-1, -1), (-1, 0)}
    assert enable_gqa == (states[0].shape[1] != states[1].shape[1])
    return segment_by_segment(*states, causal=window_size == (-1, 0), scale=scale)


def torch_2_11(*states: Any, scale: Any = None, window_size: Any = (-1, -1)) -> Tensor:
    causal = window_size == (-1, 0)
    return segment_by_segment(*states, causal=causal, scale=scale, grouped=False)


def flash_attn_2(*states: Any, softmax_scale: float, causal: bool, deterministic: bool) -> Tensor:
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    return segment_by_segment(*states, causal=causal, scale=softmax_scale)


@pytest.fixture(params=["torch 2.12", "torch 2.11", "flash-attn"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a kernel in whose place `segment_by_segment` computes."""
    monkeypatch.setattr(kernels, "flash_refusal", lambda *given: None)
    if request.param == "flash-attn":
        module = SimpleNamespace(flash_attn_varlen_func=flash_attn_2)
        monkeypatch.setattr(kernels, "import_module", {"flash_attn": module}.__getitem__)
        return "flash"
    takes_groups = request.param == "torch 2.12"
    monkeypatch.setattr(kernels, "VARLEN_TAKES_GROUPS", takes_groups)
    monkeypatch.setattr(kernels, "varlen_attn", torch_2_12 if takes_groups else torch_2_11)
    return "varlen"


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("lengths", ["mixed", "bottleneck of three"])
def test_segments_equal_the_dense_mask(lengths: str, name: str, kernel: str) -> None:
    check(POLICIES[name], torch.tensor(LENGTHS[lengths]), kernel=kernel)


def test_queries_and_keys_take_the_type_of_the_values(kernel: str) -> None:
    q, k, v = states(TOKENS, dtype=torch.float32)
    output = attend(q, k, v.bfloat16(), BRIDGE, kernel=kernel, scale=SCALE)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


def test_kernels_are_deterministic_where_torch_is(kernel: str) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    for wanted in (False, True):
        torch.use_deterministic_algorithms(wanted)
        try:  # flash_attn_2 asserts it
            attend(*states(TOKENS), BRIDGE, kernel=kernel, scale=SCALE)
        finally:
            torch.use_deterministic_algorithms(before)


def test_the_installed_torch_has_the_keywords_that_are_passed() -> None:
    from torch.nn.attention.varlen import varlen_attn

    keywords = {"scale": 1.0, "window_size": (-1, 0)}
    keywords |= {"enable_gqa": True} if kernels.VARLEN_TAKES_GROUPS else {}
    inspect.signature(varlen_attn).bind(*range(7), **keywords)


# --- Which kernel runs -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("varlen", "model.kernel=varlen runs on CUDA only, not on cpu; model.kernel=sdpa runs"),
        ("flash", r"needs flash-attn.*pip install 'cocoa_pl\[flash\]'"),
    ],
)
def test_a_kernel_that_does_not_run_says_so(
    kernel: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(kernels, "import_module", missing)
    with pytest.raises(UserError, match=message):
        attend(*states(TOKENS, dtype=torch.bfloat16), BRIDGE, kernel=kernel, scale=SCALE)


def test_auto_is_sdpa_on_the_cpu_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    inputs = states(TOKENS, dtype=torch.bfloat16)
    kernels._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger=kernels.__name__):
        outputs = [
            attend(*inputs, BRIDGE, kernel=name, scale=SCALE) for name in ("auto", "auto", "sdpa")
        ]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    said = [record.getMessage() for record in caplog.records]
    assert said == ["attention kernel auto: sdpa for heads of 8 in torch.bfloat16 on cpu"]


def test_auto_comes_to_varlen_where_flash_attention_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda = torch.device("cuda", 7)
    taken = {
        (dtype, width): chosen("auto", device=cuda, dtype=dtype, head_width=width)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for width in (60, 80, 128, 256, 264)
    }
    assert {key for key, kernel in taken.items() if kernel == "varlen"} == {
        (dtype, width) for dtype in (torch.bfloat16, torch.float16) for width in (80, 128, 256)
    }
    named = [chosen(x, device=cuda, dtype=torch.float32, head_width=60) for x in KERNELS]
    assert named == ["sdpa", "varlen", "flash", "sdpa"]


def test_unknown_kernel_fails_instead_of_falling_back() -> None:
    with pytest.raises(KeyError, match="no_such_kernel"):
        attend(*states(TOKENS), BRIDGE, kernel="no_such_kernel", scale=1.0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_cudnn_is_not_allowed_while_a_kernel_runs_and_is_as_before_afterwards(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def fails(*given: Any, **more: Any) -> Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        raise RuntimeError("out of memory")

    monkeypatch.setattr(kernels, "scaled_dot_product_attention", fails)
    for name in ("varlen", "flash"):
        monkeypatch.setitem(KERNELS, name, fails)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    for allowed in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(allowed)
        try:
            with pytest.raises(RuntimeError, match="out of memory"):
                attend(*states(TOKENS), BRIDGE, kernel=kernel, scale=1.0)
            assert torch.backends.cuda.cudnn_sdp_enabled() == allowed
        finally:
            torch.backends.cuda.enable_cudnn_sdp(before)
    assert seen == [False, False]


# --- Without waiting for the device ------------------------------------------------------------


def any_linear_map(*given: Any, **_: Any) -> Tensor:
    """In place of a variable-length kernel, to which only a GPU gives values."""
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, _ = given
    assert isinstance(max_q, int)
    bounds = cu_seqlens_q.sum() + cu_seqlens_k.sum()
    return q + (k.sum(0) + v.sum(0)).mean(0) * bounds


@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_prepared_plan_is_run_forward_and_backward_without_reading_a_value(
    name: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake tensors have no values: reading one fails, as it would wait for the device."""
    without_data = FakeTensorMode(allow_non_fake_inputs=True)
    monkeypatch.setattr(plan_module, "on_device", lambda x, device: without_data.from_tensor(x))
    monkeypatch.setattr(kernels, "varlen_attn", any_linear_map)
    monkeypatch.setattr(kernels, "flash_refusal", lambda *given: None)
    plan = make_plan(POLICIES[name], MIXED).prepared(kernel).to("cpu")
    with without_data:
        q, k, v = (torch.randn(TOKENS, n, 8, requires_grad=True) for n in (4, 2, 2))
        output = attend(q, k, v, plan, kernel=kernel, scale=SCALE)
        output.sum().backward()
        with pytest.raises(DataDependentOutputException):
            output.sum().item()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in (q, k, v))


# --- The function that transformers calls ------------------------------------------------------


def test_transformers_gets_what_it_expects_and_no_dropout() -> None:
    inputs = [x.transpose(0, 1)[None] for x in states(TOKENS)]  # (1, H, T, D)
    given: dict[str, Any] = {"scaling": SCALE, "plan": BRIDGE, "kernel": "sdpa"}
    output, weights = transformers_attention(nn.Module(), *inputs, None, **given, is_causal=True)
    expected = attend(*states(TOKENS), BRIDGE, kernel="sdpa", scale=SCALE)[None]
    assert weights is None
    assert torch.equal(output, expected)  # (1, T, H, D)
    with pytest.raises(ValueError, match="attention dropout is not supported"):
        transformers_attention(nn.Module(), *inputs, None, **given, dropout=0.1)
