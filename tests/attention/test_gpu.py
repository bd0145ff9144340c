"""Kernels for packed rows on a GPU, against one dense mask in float64; grouped heads first.

Nothing else here means much where `test_a_first_look_at_grouped_heads` fails.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from cocoa_pl.attention import attend, dense_mask, kernels, make_plan, self_plan
from tests.attention import oracle
from tests.attention.oracle import OURS as POLICIES
from tests.attention.oracle import gradients

pytestmark = pytest.mark.gpu

LENGTHS = torch.tensor([[300, 1, 64], [17, 1, 30], [0, 1, 5], [130, 1, 0], [1, 1, 128]])
KERNELS = ["sdpa", "varlen", "flash"]
# Of gradients, as a share of their norm: some steps of each type. A key that is missed costs more.
TYPES = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
TEXT: dict[str, int] = {"heads": 12, "kv_heads": 2, "width": 128}  # of Qwen2-VL-2B
TOWERS: dict[str, dict[str, int]] = {
    "Qwen2-VL": {"heads": 16, "kv_heads": 16, "width": 80},
    "Qwen3-VL": {"heads": 16, "kv_heads": 16, "width": 64},
}
# Patches of images; and of windows, 64 each except at the right and lower edges.
VISION = {"full": [1024, 256, 576, 4], "windowed": [*[64] * 12, 32, 32, 16, *[64] * 4, 8]}


@pytest.fixture(autouse=True)
def installed(request: pytest.FixtureRequest) -> None:
    if "kernel" in request.fixturenames and request.getfixturevalue("kernel") == "flash":
        pytest.importorskip("flash_attn")


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def states(tokens: int, dtype: torch.dtype, **shape: int) -> list[Tensor]:
    return oracle.states(tokens, dtype=dtype, device="cuda", **shape)


def assert_equals_dense(output: Tensor, inputs: list[Tensor], mask: Tensor, scale: float) -> None:
    oracle.assert_equals_dense(output, inputs, mask, scale, bound=TYPES[output.dtype])


# --- Grouped heads -----------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_first_look_at_grouped_heads(kernel: str) -> None:
    """Two segments of other numbers of keys than of queries, twelve heads that share two."""
    lengths = torch.tensor([[5, 1, 3]])
    inputs = states(9, torch.bfloat16, **TEXT)
    policy = POLICIES["eos_bridge"]
    plan = make_plan(policy, lengths).prepared("sdpa").to("cuda")
    output = attend(*inputs, plan, kernel=kernel, scale=0.1)
    assert_equals_dense(output, inputs, dense_mask(policy, lengths), 0.1)


@pytest.mark.parametrize("name", POLICIES)
def test_grouped_heads_equal_repeated_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As handed to a version of torch that promises nothing about grouped heads."""
    monkeypatch.setattr(kernels, "VARLEN_TAKES_GROUPS", False)
    plan = make_plan(POLICIES[name], LENGTHS).prepared("sdpa").to("cuda")
    inputs = states(int(LENGTHS.sum()), torch.bfloat16, **TEXT)
    output = attend(*inputs, plan, kernel="varlen", scale=0.1)
    assert_equals_dense(output, inputs, dense_mask(POLICIES[name], LENGTHS), 0.1)


# --- Language model and vision tower -----------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kernel", [*KERNELS, "auto"])
@pytest.mark.parametrize("name", POLICIES)
def test_the_language_model_sees_what_its_policy_says(
    name: str, kernel: str, dtype: torch.dtype
) -> None:
    plan = make_plan(POLICIES[name], LENGTHS).prepared("sdpa").to("cuda")
    inputs = states(int(LENGTHS.sum()), dtype, **TEXT)
    output = attend(*inputs, plan, kernel=kernel, scale=128**-0.5)
    assert output.dtype == dtype
    assert_equals_dense(output, inputs, dense_mask(POLICIES[name], LENGTHS), 128**-0.5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", [f"causal {stem}" for stem in oracle.TABLES])
def test_causal_tables_end_with_the_last_key(name: str, kernel: str) -> None:
    """Segments with more keys than queries, and a BOTTLENECK of three."""
    lengths = LENGTHS * torch.tensor([1, 3, 1])
    plan = make_plan(oracle.POLICIES[name], lengths).prepared("sdpa").to("cuda")
    inputs = states(int(lengths.sum()), torch.bfloat16, **TEXT)
    output = attend(*inputs, plan, kernel=kernel, scale=0.1)
    assert_equals_dense(output, inputs, dense_mask(oracle.POLICIES[name], lengths), 0.1)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kernel", [*KERNELS, "auto"])
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("kind", VISION)
def test_the_vision_tower_sees_each_image_or_window_by_itself(
    kind: str, tower: str, kernel: str, dtype: torch.dtype
) -> None:
    lengths = torch.tensor(VISION[kind])
    inputs = states(int(lengths.sum()), dtype, **TOWERS[tower])
    scale = TOWERS[tower]["width"] ** -0.5
    output = attend(
        *inputs, self_plan(lengths).prepared("sdpa").to("cuda"), kernel=kernel, scale=scale
    )
    mask = torch.block_diag(*(torch.ones(n, n) for n in VISION[kind])).bool()
    assert_equals_dense(output, inputs, mask, scale)


@pytest.mark.parametrize("width", [8, 72, 192, 256])
def test_every_head_width_that_is_promised_is_computed(width: int) -> None:
    plan = make_plan(POLICIES["eos_bridge"], LENGTHS).prepared("sdpa").to("cuda")
    inputs = states(int(LENGTHS.sum()), torch.bfloat16, heads=4, kv_heads=2, width=width)
    output = attend(*inputs, plan, kernel="varlen", scale=0.1)
    assert_equals_dense(output, inputs, dense_mask(POLICIES["eos_bridge"], LENGTHS), 0.1)


@pytest.mark.parametrize("name", POLICIES)
def test_float32_is_computed_by_sdpa(name: str) -> None:
    plan = make_plan(POLICIES[name], LENGTHS).prepared("sdpa").to("cuda")
    inputs = states(int(LENGTHS.sum()), torch.float32, **TEXT)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found, expected = (attend(*x, plan, kernel="auto", scale=0.1) for x in (inputs, exact))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-2)  # TF32 may be on
    for ours, theirs in zip(gradients(found, inputs), gradients(expected, exact), strict=True):
        assert float((ours.double() - theirs).norm() / theirs.norm()) < 1e-2


# --- Twice the same, without waiting -----------------------------------------------------------


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", POLICIES)
def test_deterministic_algorithms_give_the_same_bits_twice(
    name: str, kernel: str, dtype: torch.dtype
) -> None:
    lengths = LENGTHS.repeat(8, 1)  # enough for blocks to race
    plan = make_plan(POLICIES[name], lengths).prepared("sdpa").to("cuda")
    inputs = states(int(lengths.sum()), dtype, **TEXT)
    first, *others = (attend(*inputs, plan, kernel=kernel, scale=0.1) for _ in range(3))
    expected = gradients(first, inputs)
    for output in others:
        assert torch.equal(output, first)
        assert all(map(torch.equal, gradients(output, inputs), expected))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", POLICIES)
def test_a_plan_and_its_kernel_never_wait_for_the_device(name: str, kernel: str) -> None:
    inputs = states(int(LENGTHS.sum()), torch.bfloat16, **TEXT)
    made = make_plan(POLICIES[name], LENGTHS).prepared(kernel)
    attend(*inputs, made.to("cuda"), kernel=kernel, scale=0.1).sum().backward()  # sets up
    pinned = apply_to_collection(made, Tensor, Tensor.pin_memory)
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for plan in (made, pinned):
            attend(*inputs, plan.to("cuda"), kernel=kernel, scale=0.1).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
