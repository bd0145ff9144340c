"""Live bytes are those of tensors that operations made and that somebody still holds."""

import torch
from torch import nn

from cocoa_pl.live_bytes import LiveBytes


def test_what_is_held_counts_and_what_is_dropped_does_not() -> None:
    before = torch.ones(100)
    with LiveBytes() as live:
        held = before + 1
        assert live.now == held.nbytes
        dropped = before * 2
        assert live.now == 2 * held.nbytes
        del dropped
        assert live.now == held.nbytes
        assert live.peak == 2 * held.nbytes
    del held
    assert live.now == 0


def test_views_and_what_was_there_before_cost_nothing() -> None:
    before = torch.ones(10, 10)
    with LiveBytes() as live:
        views = [before.T, before[2:], before.view(-1)]
        before.add_(1)
        assert live.now == live.peak == 0
    assert len(views) == 3


def test_a_graph_holds_what_its_backward_pass_needs() -> None:
    layer, x = nn.Linear(8, 16), torch.ones(4, 8)
    with LiveBytes() as live:
        y = layer(x).tanh()
        z = y.sum()
        held = live.now
        del y
        assert live.now == held == 4 * 16 * 4 + 4  # tanh's output and the sum; not the product
        z.backward()
        del z
        gradients = 8 * 16 * 4 + 16 * 4
        assert live.now == gradients
