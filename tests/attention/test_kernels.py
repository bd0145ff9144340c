"""`attend` against its slow twin: one dense-mask SDPA over the whole row, in float64."""

import pickle
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from cocoa_pl.attention import Policy, attend, dense_mask, kernels, make_plan
from cocoa_pl.attention import gather as gather_module
from cocoa_pl.attention import plan as plan_module
from cocoa_pl.attention import rectangles as rectangles_module
from cocoa_pl.attention.kernels import KERNELS, chosen, transformers_attention
from cocoa_pl.attention.plan import Packed
from cocoa_pl.attention.variable_length import over_segments

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
    "no context": [[0, 1, 4], [0, 1, 2]],
    "equal samples": [[3, 1, 2], [3, 1, 2]],
    "powers of two": [[3, 1, 4], [7, 1, 8], [1, 1, 2]],
    "mixed": [[9, 1, 4], [0, 1, 7], [2, 1, 0], [0, 1, 0], [17, 1, 30], [1, 1, 1]],
}


def random_lengths(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    samples = int(torch.randint(1, 9, (), generator=generator))
    lengths = torch.randint(-6, 24, (samples, 3), generator=generator).clamp(min=0)
    lengths[:, 1] = 1
    return lengths


def states(tokens: int, *, heads: int, kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(tokens, n, 8, generator=generator, dtype=dtype).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # (H, T, D)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(0, 1)


def assert_equals_dense(policy: Policy, lengths: Tensor, *, heads: int, kv_heads: int) -> None:
    """Forward, and the gradients of a random linear function of the output."""
    q, k, v = states(int(lengths.sum()), heads=heads, kv_heads=kv_heads, dtype=torch.float64)
    got = attend(q, k, v, make_plan(policy, lengths), kernel="sdpa", scale=0.3)
    expected = dense_attention(q, k, v, dense_mask(policy, lengths), 0.3)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype)
    gradients = torch.autograd.grad((got * weight).sum(), (q, k, v))
    reference = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    torch.testing.assert_close(gradients, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_attend_equals_dense_mask_attention(name: str, lengths: list[list[int]]) -> None:
    assert_equals_dense(POLICIES[name], torch.tensor(lengths), heads=4, kv_heads=4)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", range(12))
def test_attend_equals_dense_mask_attention_at_random_lengths(name: str, seed: int) -> None:
    assert_equals_dense(POLICIES[name], random_lengths(seed), heads=6, kv_heads=2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (4, 1), (6, 3)])
def test_grouped_heads_share_keys_in_the_stock_order(heads: int, kv_heads: int) -> None:
    lengths = torch.tensor(LENGTHS["mixed"])
    assert_equals_dense(POLICIES["eos_bridge"], lengths, heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_keeps_the_dtype(name: str, dtype: torch.dtype) -> None:
    lengths = torch.tensor(LENGTHS["mixed"])
    q, k, v = states(int(lengths.sum()), heads=4, kv_heads=2, dtype=dtype)
    got = attend(q, k, v, make_plan(POLICIES[name], lengths), kernel="sdpa", scale=0.3)
    assert got.dtype == dtype
    expected = dense_attention(
        q.double(), k.double(), v.double(), dense_mask(POLICIES[name], lengths), 0.3
    )
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", POLICIES)
def test_several_rectangles_equal_dense_mask_attention(name: str) -> None:
    """Lengths for which several rectangles are made, some of them padded."""
    lengths = torch.tensor([[n, 1, n // 3] for n in (3, 150, 7, 160, 2, 90)])
    plan = make_plan(POLICIES[name], lengths)
    assert 1 < len(plan.padded.rectangles) < len(plan.cu_seqlens_q) - 1
    assert_equals_dense(POLICIES[name], lengths, heads=4, kv_heads=2)


def test_auto_comes_to_sdpa_on_the_cpu_and_other_names_to_themselves() -> None:
    where: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.bfloat16}
    names = {name: chosen(name, head_width=64, **where) for name in KERNELS}
    assert names == {"sdpa": "sdpa", "varlen": "varlen", "flash": "flash", "auto": "sdpa"}


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


def test_unknown_kernel_fails_instead_of_falling_back() -> None:
    q, k, v = states(1, heads=1, kv_heads=1, dtype=torch.float32)
    plan = make_plan(POLICIES["causal"], torch.tensor([[0, 1, 0]]))
    assert "no_such_kernel" not in KERNELS
    with pytest.raises(KeyError, match="no_such_kernel"):
        attend(q, k, v, plan, kernel="no_such_kernel", scale=1.0)


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
    q, k, v = states(1, heads=1, kv_heads=1, dtype=torch.float32)
    plan = make_plan(POLICIES["causal"], torch.tensor([[0, 1, 0]]))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    for allowed in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(allowed)
        try:
            with pytest.raises(RuntimeError, match="out of memory"):
                attend(q, k, v, plan, kernel=kernel, scale=1.0)
            assert torch.backends.cuda.cudnn_sdp_enabled() == allowed
        finally:
            torch.backends.cuda.enable_cudnn_sdp(before)
    assert seen == [False, False]


@pytest.mark.parametrize("name", POLICIES)
def test_heads_that_are_repeated_for_sdpa_equal_grouped_ones(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_takes_groups", lambda *given, masked: False)
    assert_equals_dense(POLICIES[name], torch.tensor(LENGTHS["mixed"]), heads=6, kv_heads=2)


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


# --- Nobody waits for the device ---------------------------------------------------------------


@pytest.fixture
def without_data(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """Tensors in this mode have shapes and no values: reading one fails, as it would wait for the
    device in a step. What a plan moves there has no values either.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for module in (gather_module, rectangles_module, plan_module):
        monkeypatch.setattr(module, "on_device", lambda tensor, device: mode.from_tensor(tensor))
    return mode


def any_linear_map(
    q: Tensor, k: Tensor, v: Tensor, packed: Packed, causal: bool, scale: float
) -> Tensor:
    """In place of a kernel for packed rows, to which only a GPU gives values."""
    assert isinstance(packed.max_q, int)
    bounds = packed.cu_seqlens_q.sum() + packed.cu_seqlens_k.sum()
    return q + (k.sum(0) + v.sum(0)).mean(0) * bounds


@pytest.mark.parametrize("form", ["sdpa", "varlen"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_prepared_plan_is_run_forward_and_backward_without_reading_a_value(
    name: str, form: str, without_data: FakeTensorMode
) -> None:
    lengths = torch.tensor(LENGTHS["mixed"])
    tokens = int(lengths.sum())
    plan = pickle.loads(pickle.dumps(make_plan(POLICIES[name], lengths).prepared(form)))
    with without_data:
        q, k, v = (torch.randn(tokens, n, 8, requires_grad=True) for n in (4, 2, 2))
        if form == "sdpa":
            output = attend(q, k, v, plan, kernel="sdpa", scale=0.3)
        else:
            output = over_segments(any_linear_map, q, k, v, plan, 0.3)
        output.sum().backward()
        with pytest.raises(DataDependentOutputException):
            output.sum().item()  # the mode would have told
    assert all(x.grad is not None and x.grad.shape == x.shape for x in (q, k, v))


# --- The adapter for transformers --------------------------------------------------------------


def transformers_call(**changes: Any) -> tuple[Tensor, None]:
    lengths = torch.tensor([[2, 1, 2]])
    q, k, v = (x.transpose(0, 1)[None] for x in states(5, heads=4, kv_heads=2, dtype=torch.float64))
    arguments: dict[str, Any] = {
        "scaling": 0.3,
        "plan": make_plan(POLICIES["eos_bridge"], lengths),
        "kernel": "sdpa",
        **changes,
    }
    return transformers_attention(nn.Module(), q, k, v, None, **arguments)


def test_adapter_returns_what_transformers_expects() -> None:
    output, weights = transformers_call(is_causal=True, unknown_keyword=1)
    q, k, v = states(5, heads=4, kv_heads=2, dtype=torch.float64)
    mask = dense_mask(POLICIES["eos_bridge"], torch.tensor([[2, 1, 2]]))
    torch.testing.assert_close(output, dense_attention(q, k, v, mask, 0.3)[None])  # (1, T, H, D)
    assert weights is None


def test_attention_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match="attention dropout is not supported"):
        transformers_call(dropout=0.1)
