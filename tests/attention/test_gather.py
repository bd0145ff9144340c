"""Copies of tokens against plain indexing, in float64; their gradients against `index_add`."""

import pytest
import torch
from torch import Tensor

from cocoa_pl.attention import Plan, Policy, make_plan, self_plan
from cocoa_pl.attention.gather import Gather, gather, make_gather, ungather

ALL = ("context", "eos", "target")
BRIDGE = Policy("eos_bridge", ("context", "eos"), ALL, ("eos", "target"), False)
LENGTHS = torch.tensor([[9, 1, 4], [0, 1, 7], [2, 1, 0], [0, 1, 0], [17, 1, 30], [1, 1, 1]])
TOKENS = int(LENGTHS.sum())


def bridge_plan() -> Plan:
    return make_plan(BRIDGE, LENGTHS)


def gathers() -> dict[str, tuple[Gather, Tensor]]:
    """Of keys end to end, and of padded queries and keys; with what is real in them."""
    plan = bridge_plan()
    padded, packed = plan.padded, plan.packed.gather
    q_real = torch.zeros(len(padded.q.index), dtype=torch.bool)
    q_real[padded.q.first] = True
    return {
        "packed keys": (packed, torch.ones(len(packed.index), dtype=torch.bool)),
        "padded queries": (padded.q, q_real),
        "padded keys": (padded.k, padded.k_real),
    }


GATHERS = gathers()


@pytest.mark.parametrize("name", GATHERS)
def test_gathering_is_indexing_and_its_gradient_is_exact(name: str) -> None:
    wanted, real = GATHERS[name]
    rows = torch.randn(TOKENS, 3, dtype=torch.float64).requires_grad_()
    copies = gather(rows, wanted)
    assert torch.equal(copies, rows[wanted.index])
    weight = torch.randn(copies.shape, dtype=torch.float64) * real[:, None]  # padding gets none
    (found,) = torch.autograd.grad((copies * weight).sum(), rows)
    (expected,) = torch.autograd.grad((rows[wanted.index] * weight).sum(), rows)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_gathering_passes_a_numerical_check_of_its_gradient() -> None:
    wanted, _ = GATHERS["packed keys"]
    rows = torch.randn(TOKENS, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gather(x, wanted), (rows,))


def test_every_token_is_found_again_and_padding_gets_no_gradient() -> None:
    wanted, real = GATHERS["padded queries"]
    assert not real.all()
    padded = torch.randn(len(wanted.index), 3, dtype=torch.float64).requires_grad_()
    tokens = ungather(padded, wanted)
    assert torch.equal(ungather(gather(tokens, wanted), wanted), tokens)
    assert torch.equal(tokens[wanted.index[real]], padded[real])
    assert torch.autograd.gradcheck(lambda x: ungather(x, wanted), (padded,))
    (found,) = torch.autograd.grad(tokens.sum(), padded)
    assert torch.equal(found.any(1), real)


def test_copies_are_added_in_float32_and_rounded_once() -> None:
    wanted, _ = GATHERS["packed keys"]
    rows = torch.zeros(TOKENS, 64, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(len(wanted.index), 64).bfloat16()
    (gather(rows, wanted) * weight).sum().backward()
    exact = torch.zeros(rows.shape, dtype=torch.float64)
    exact.index_add_(0, wanted.index, weight.double())
    once = exact.float().bfloat16()
    assert rows.grad is not None
    assert torch.equal(rows.grad, once)
    stepwise = torch.zeros_like(rows.detach())
    for place, token in enumerate(wanted.index.tolist()):
        stepwise[token] += weight[place]
    assert not torch.equal(stepwise, once)  # three terms: rounding after each is something else


@pytest.mark.parametrize("name", GATHERS)
def test_every_real_place_is_listed_once_and_no_list_names_a_token_twice(name: str) -> None:
    wanted, real = GATHERS[name]
    assert len(wanted.more) == (0 if name == "padded queries" else 2)  # EOS is read three times
    for tokens, places in [(torch.arange(TOKENS), wanted.first), *wanted.more]:
        assert len(tokens.unique()) == len(tokens)
        assert torch.equal(wanted.index[places], tokens)
    listed = torch.cat([wanted.first, *(places for _, places in wanted.more)])
    assert torch.equal(listed.sort().values, real.nonzero()[:, 0])


def test_copies_are_listed_in_the_order_of_their_places() -> None:
    """The order in which gradients are added, whatever the library that sorts."""
    index, real = torch.tensor([1, 0, 1, 1, 0, 1]), torch.tensor([1, 1, 1, 0, 1, 1]).bool()
    wanted = make_gather(index, real)
    assert wanted.first.tolist() == [1, 0]
    assert [(t.tolist(), p.tolist()) for t, p in wanted.more] == [([1, 0], [2, 4]), ([1], [5])]


def test_nothing_is_copied_where_tokens_lie_in_place() -> None:
    same = Policy("bidirectional", ALL, ALL, ALL, False)
    rows = torch.randn(TOKENS, 2)
    assert gather(rows, make_plan(same, LENGTHS).packed.gather) is rows
    images = self_plan(torch.tensor([4, 4, 4])).padded  # one rectangle without padding
    rows = torch.randn(12, 2)
    assert gather(rows, images.q) is rows
    assert gather(rows, images.k) is rows
    assert ungather(rows, images.q) is rows
    shuffled = make_gather(torch.tensor([1, 0]), torch.ones(2, dtype=torch.bool))
    assert not shuffled.in_place
