"""Counts of functions whose operations and memory are known beforehand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from benchmarks.counting import Cost, Count, LiveBytes, cost_of

CPU = torch.device("cpu")
FLOAT = 4  # bytes


def cost(run: object, *parameters: Tensor) -> Cost:
    assert callable(run)
    return cost_of(run, device=CPU, parameters=parameters)


def test_operations_of_a_product_forward_and_backward() -> None:
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(7, 5)
    product = 2 * 3 * 5 * 7
    assert cost(lambda: linear(x, weight)).flops == product
    assert cost(lambda: linear(x, weight).sum().backward()).flops == 2 * product  # no gradient of W


def test_attention_on_the_cpu_is_counted_like_its_products() -> None:
    """torch's own table has no entry for this kernel."""
    q, k = (
        torch.randn(2, 3, 10, 8, requires_grad=True),
        torch.randn(2, 3, 12, 8, requires_grad=True),
    )
    forward = 2 * 2 * (2 * 3 * 10 * 12 * 8)
    assert cost(lambda: scaled_dot_product_attention(q, k, k)).flops == forward
    both = cost(lambda: scaled_dot_product_attention(q, k, k).sum().backward()).flops
    assert both == forward + forward * 5 // 2


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_attention_of_packed_segments_is_counted_by_their_scores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before 2.13 torch counts none of it."""
    for name in ("_varlen_attn", "_varlen_attn_backward"):
        monkeypatch.delitem(flop_registry, getattr(torch.ops.torch_attn, name), raising=False)
    bounds_q, bounds_k = torch.tensor([0, 3, 10]), torch.tensor([0, 5, 9])
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k = (torch.randn(n, 4, 8, dtype=torch.bfloat16, requires_grad=True) for n in (10, 9))
    forward = 2 * 2 * (3 * 5 + 7 * 4) * 4 * 8

    def run() -> Tensor:
        return varlen_attn(q, k, k, bounds_q.int(), bounds_k.int(), 7, 5)

    assert cost(run).flops == forward
    assert cost(lambda: run().sum().backward()).flops == forward + forward * 5 // 2


def test_what_a_graph_keeps_is_counted_once_and_without_parameters() -> None:
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)

    def run() -> None:
        y = linear(x, weight).exp()  # keeps its result
        (y * y.view(-1).view_as(y)).sum().backward()  # keeps the same storage twice

    assert cost(run, x, weight).peak_saved_bytes == 6 * 4 * FLOAT
    assert cost(run, weight).peak_saved_bytes == 2 * 6 * 4 * FLOAT  # and the input


def test_a_graph_that_is_gone_is_no_longer_counted() -> None:
    x = torch.randn(10, requires_grad=True)

    def passes(count: int) -> None:
        for _ in range(count):
            x.exp().sum().backward()

    one = cost(lambda: passes(1), x).peak_saved_bytes
    assert one == 10 * FLOAT
    assert cost(lambda: passes(3), x).peak_saved_bytes == one


def test_an_output_that_no_backward_pass_reaches_is_let_go() -> None:
    """As a norm that is only looked at: it is saved by the graph that makes it."""
    x = torch.randn(1000, requires_grad=True)

    def norms(count: int) -> None:
        for _ in range(count):
            (x * 2).norm(dim=0, keepdim=True).detach()

    assert cost(lambda: norms(8)).peak_saved_bytes == cost(lambda: norms(1)).peak_saved_bytes


def test_two_graphs_that_live_together_are_both_counted() -> None:
    x = torch.randn(10, requires_grad=True)
    assert cost(lambda: (x.exp().sum() + x.exp().sum()).backward(), x).peak_saved_bytes == 80


def test_peak_memory_is_of_what_lives_together() -> None:
    x = torch.randn(1000)

    def run() -> Tensor:
        y = x + 1
        y = y * 2  # both alive here
        del y
        return x + 3

    assert cost(run).peak_bytes == 2 * 1000 * FLOAT
    assert cost(lambda: x.view(10, 100)).peak_bytes == 0


def test_counting_does_not_keep_recomputed_graphs() -> None:
    """On a GPU a contrastive step of 11 GiB took all 139 while it was counted."""
    layers = [nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(8)]
    x = torch.randn(1000, 64, requires_grad=True)

    def run() -> None:
        y = x
        for layer in layers:
            y = checkpoint(layer, y, use_reentrant=False)
        y.sum().backward()

    parameters = [p for layer in layers for p in layer.parameters()]
    run()  # gradients are there
    with LiveBytes() as live:
        run()
    assert cost(run, x, *parameters).peak_bytes == live.peak


def test_writing_into_an_input_makes_nothing() -> None:
    x = torch.randn(1000)
    assert cost(lambda: x.add_(1)).peak_bytes == 0


def test_a_side_without_any_has_no_ratio() -> None:
    assert Count(peer=6, ours=2).ratio == 3
    assert Count(peer=6, ours=0).ratio is None
