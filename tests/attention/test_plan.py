"""Plans against the dense mask: the same pairs of tokens, counted and listed; and what is made of
plans ahead of time.
"""

import dataclasses
import pickle
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cocoa_pl.attention import Plan, Policy, dense_mask, make_plan, self_plan
from cocoa_pl.attention import plan as plan_module
from cocoa_pl.attention.gather import on_device

ALL = ("context", "eos", "target")
POLICIES = {
    "bidirectional": Policy("bidirectional", ALL, ALL, ALL, False),
    "eos_bridge": Policy("eos_bridge", ("context", "eos"), ALL, ("eos", "target"), False),
    "strict": Policy("strict", ("context", "eos"), ("context", "eos"), ("eos", "target"), False),
    "isolated": Policy("isolated", ("context",), ("eos",), ("target",), False),
    # CONTEXT and TARGET see the same two ranges, with a gap between them; EOS another list.
    "gap": Policy("gap", ("context", "target"), ALL, ("context", "target"), False),
    "causal": Policy("causal", ALL, ALL, ALL, True),
}


def random_lengths(seed: int) -> Tensor:
    """(S, 3) with one EOS each; every third CONTEXT or TARGET is empty."""
    generator = torch.Generator().manual_seed(seed)
    samples = int(torch.randint(1, 7, (), generator=generator))
    lengths = torch.randint(0, 20, (samples, 3), generator=generator)
    lengths[torch.rand(samples, 3, generator=generator) < 1 / 3] = 0
    lengths[:, 1] = 1
    return lengths


def seen_pairs(plan: Plan) -> Tensor:
    """(T, T) bool, read off the plan's index arithmetic."""
    tokens = int(plan.cu_seqlens_q[-1])
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    ranges = zip(
        pairwise(plan.cu_seqlens_q.tolist()), pairwise(plan.cu_seqlens_k.tolist()), strict=True
    )
    for (first, last), (start, stop) in ranges:
        for query, key in product(range(first, last), plan.kv_index[start:stop].tolist()):
            assert not seen[query, key], "a key is listed twice"
            seen[query, key] = not plan.causal or key <= query
    return seen


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", range(10))
def test_plan_lists_exactly_the_pairs_of_the_dense_mask(name: str, seed: int) -> None:
    lengths = random_lengths(seed)
    plan = make_plan(POLICIES[name], lengths)
    assert torch.equal(seen_pairs(plan), dense_mask(POLICIES[name], lengths))


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "causal"])
@pytest.mark.parametrize("seed", range(5))
def test_number_of_scores_is_that_of_the_dense_mask(name: str, seed: int) -> None:
    lengths = random_lengths(seed)
    needed = int(dense_mask(POLICIES[name], lengths).sum())
    assert make_plan(POLICIES[name], lengths).num_scores == needed


@pytest.mark.parametrize("seed", range(5))
def test_bridge_saves_the_two_blocks_between_context_and_target(seed: int) -> None:
    lengths = random_lengths(seed)
    context, _, target = lengths.unbind(1)
    closed_form = (lengths.sum(1) ** 2 - 2 * context * target).sum()
    assert make_plan(POLICIES["eos_bridge"], lengths).num_scores == int(closed_form)


def test_bridge_is_three_segments_a_sample_and_bidirectional_one() -> None:
    lengths = torch.tensor([[2, 1, 2], [4, 1, 3]])
    bridge = make_plan(POLICIES["eos_bridge"], lengths)
    assert bridge.cu_seqlens_q.tolist() == [0, 2, 3, 5, 9, 10, 13]
    assert bridge.cu_seqlens_k.tolist() == [0, 3, 8, 11, 16, 24, 28]
    assert bridge.kv_index[:11].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 2, 3, 4]
    both = make_plan(POLICIES["bidirectional"], lengths)
    assert both.cu_seqlens_q.tolist() == both.cu_seqlens_k.tolist() == [0, 5, 13]
    assert both.kv_index.tolist() == list(range(13))


@pytest.mark.parametrize("name", POLICIES)
def test_rectangles_hold_every_segment_with_its_keys(name: str) -> None:
    """Read off the rectangles, real queries see what the dense mask lets them see."""
    lengths = random_lengths(3)
    plan = make_plan(POLICIES[name], lengths)
    tokens = int(lengths.sum())
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    padded = plan.padded
    is_real = torch.zeros(len(padded.q.index), dtype=torch.bool)
    is_real[padded.q.first] = True
    q_sizes = [r.segments * r.queries for r in plan.rectangles]
    keys = padded.k.index.split([r.segments * r.keys for r in plan.rectangles])
    for r, mask, query, key, real in zip(
        plan.rectangles,
        padded.masks,
        padded.q.index.split(q_sizes),
        keys,
        is_real.split(q_sizes),
        strict=True,
    ):
        allowed = torch.ones(r.segments, r.queries, r.keys, dtype=torch.bool)
        allowed &= real.view(r.segments, r.queries, 1)
        if mask is not None:
            allowed &= mask[:, 0]
        if padded.causal:
            allowed = allowed.tril()
        segment, row, column = allowed.nonzero().T
        seen[
            query.view(r.segments, -1)[segment, row], key.view(r.segments, -1)[segment, column]
        ] = True
    assert torch.equal(seen, dense_mask(POLICIES[name], lengths))


def test_self_plan_is_the_bidirectional_plan_of_images() -> None:
    images = self_plan(torch.tensor([3, 1, 5]))
    samples = make_plan(POLICIES["bidirectional"], torch.tensor([[2, 1, 0], [0, 1, 0], [4, 1, 0]]))
    assert torch.equal(seen_pairs(images), seen_pairs(samples))


# --- Made ahead of time ------------------------------------------------------------------------

KERNELS = ["sdpa", "varlen", "flash"]


def form_of(plan: Plan, kernel: str) -> Any:
    """What the kernel reads, on the plan's device."""
    return plan.padded if kernel == "sdpa" else plan.packed


def tensors_in(form: Any) -> dict[str, Tensor]:
    """All tensors that a kernel may read, by where they are."""
    if isinstance(form, Tensor):
        return {"": form}
    found: dict[str, Tensor] = {}
    if dataclasses.is_dataclass(form):
        parts = {field.name: getattr(form, field.name) for field in dataclasses.fields(form)}
    else:
        parts = dict(enumerate(form)) if isinstance(form, tuple) else {}
    for name, part in parts.items():
        if not getattr(part, "in_place", False):
            found |= {f"{name}.{inner}": x for inner, x in tensors_in(part).items()}
    return found


def assert_equal_forms(found: Any, expected: Any) -> None:
    ours, theirs = tensors_in(found), tensors_in(expected)
    assert ours.keys() == theirs.keys()
    assert len(ours) >= 2
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on, whoever makes a form fails."""

    def fails(*_: Any, **__: Any) -> Any:
        raise AssertionError("made in the step")

    def forbid() -> None:
        monkeypatch.setattr(plan_module, "pad", fails)
        monkeypatch.setattr(plan_module, "make_gather", fails)

    return forbid


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_prepared_travels_and_is_what_would_have_been_made(
    kernel: str, name: str, nothing_is_made: Callable[[], None]
) -> None:
    made = make_plan(POLICIES[name], random_lengths(3))
    expected = form_of(made, kernel)
    plan = make_plan(POLICIES[name], random_lengths(3)).prepared(kernel)
    nothing_is_made()
    there = pickle.loads(pickle.dumps(plan)).to("cpu")
    assert_equal_forms(form_of(there, kernel), expected)
    assert form_of(there, kernel) is form_of(there, kernel)
    assert there.causal == made.causal
    other = "varlen" if kernel == "sdpa" else "sdpa"
    with pytest.raises(AssertionError, match="made in the step"):
        form_of(there, other)


def test_a_plan_can_be_prepared_for_several_kernels(nothing_is_made: Callable[[], None]) -> None:
    plan = make_plan(POLICIES["eos_bridge"], random_lengths(3))
    both = plan.prepared("sdpa").prepared("varlen")
    expected = (plan.padded, plan.packed)
    nothing_is_made()
    assert_equal_forms(both.padded, expected[0])
    assert_equal_forms(both.packed, expected[1])


def test_the_kernel_must_be_named() -> None:
    with pytest.raises(ValueError, match="cannot prepare a plan for attention kernel 'auto'"):
        self_plan(torch.tensor([3])).prepared("auto")


class Moves(TorchDispatchMode):
    """Storages that are copied to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.moved.append(args[0].untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_tensor_moves_once_for_all_layers(kernel: str) -> None:
    plan = make_plan(POLICIES["eos_bridge"], random_lengths(3)).to("meta").prepared(kernel)
    host = form_of(plan.to("cpu"), kernel)
    with Moves() as seen:
        there = plan.to("meta")
        assert seen.moved == []  # not before a kernel asks
        forms = [form_of(there, kernel) for _ in range(3)]
    assert all(form is forms[0] for form in forms)
    assert {tensor.device.type for tensor in tensors_in(forms[0]).values()} == {"meta"}
    wanted = [tensor.untyped_storage().data_ptr() for tensor in tensors_in(host).values()]
    assert sorted(seen.moved) == sorted(wanted)
    assert len(set(wanted)) == len(wanted)


def test_rectangles_are_fewer_where_calls_cost_more() -> None:
    """Which kind of device a plan is for is known before there is one."""
    lengths = torch.randint(1, 400, (60,), generator=torch.Generator().manual_seed(0))
    on_cpu, on_gpu = (self_plan(lengths).to(d).prepared("sdpa") for d in ("cpu", "cuda"))
    assert on_cpu.host_padded is not None
    assert on_gpu.host_padded is not None
    assert len(on_gpu.host_padded.rectangles) < len(on_cpu.host_padded.rectangles)


@pytest.mark.parametrize("kernel", KERNELS)
def test_pinning_reaches_every_tensor_of_a_prepared_plan(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[Tensor] = []

    def pin_memory(tensor: Tensor) -> Tensor:
        pinned.append(tensor)
        return tensor.clone()

    plan = make_plan(POLICIES["eos_bridge"], random_lengths(3))
    assert plan.pin_memory().host_padded is None  # nothing is made to be pinned
    prepared = plan.prepared(kernel)
    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    there = prepared.pin_memory()
    expected = tensors_in(form_of(prepared, kernel))
    assert len(pinned) == len(expected)
    assert_equal_forms(form_of(there, kernel), form_of(prepared, kernel))
    copies = tensors_in(form_of(there, kernel))
    assert all(copies[name] is not expected[name] for name in expected)


def test_copies_to_a_gpu_start_from_pinned_memory_and_nobody_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []
    host = torch.arange(3)
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: tensor is not host)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: calls.append("pin") or tensor.clone())
    monkeypatch.setattr(Tensor, "to", lambda tensor, *to, **how: calls.append((to, how)) or tensor)
    cuda = torch.device("cuda")
    on_device(host, cuda)
    on_device(torch.arange(3), cuda)  # pinned already
    copy = ((cuda,), {"non_blocking": True})
    assert calls == ["pin", copy, copy]
