"""Losses against closed forms and slow twins."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from cocoa_pl.losses import (
    info_nce,
    masked_next_token,
    matryoshka,
    rebuilt_patches,
    same_content,
)
from cocoa_pl.planning.counting import Counting

T, D, V = 12, 6, 9


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int = 0) -> Tensor:
    return normalize(random(*shape, seed=seed), dim=-1)


# --- Masked next-token prediction ------------------------------------------------------------

HIDDEN = torch.tensor([1, 4, 5, 11])
LABELS = torch.arange(T) % V


def test_losses_of_chosen_states_are_those_of_all_positions_shifted() -> None:
    hidden, weight = random(T, D), random(V, D, seed=1)
    losses, right = masked_next_token(hidden[HIDDEN - 1] @ weight.T, LABELS[HIDDEN])
    logits = hidden[:-1] @ weight.T  # of all positions but the last
    everywhere = cross_entropy(logits, LABELS[1:], reduction="none")
    torch.testing.assert_close(losses, everywhere[HIDDEN - 1])
    assert masked_next_token(logits.bfloat16()[:4], LABELS[HIDDEN])[0].dtype == torch.float32
    assert torch.equal(right, (logits.argmax(1) == LABELS[1:])[HIDDEN - 1])


# --- Rebuilt patches -------------------------------------------------------------------------


def test_rebuilding_error_is_the_mean_square_of_each_visual_token() -> None:
    predicted, pixels = random(5, 8), random(5, 8, seed=1)
    expected = [
        sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) / 8
        for p, q in zip(predicted.tolist(), pixels.tolist(), strict=True)
    ]
    torch.testing.assert_close(rebuilt_patches(predicted, pixels), torch.tensor(expected))


# --- InfoNCE ---------------------------------------------------------------------------------


class Task(NamedTuple):
    queries: Tensor
    candidates: Tensor
    positive: Tensor
    scale: Tensor
    keys: tuple[Tensor, Tensor, Tensor]


def make_task(n: int, m: int, *, dtype: torch.dtype = torch.float64) -> Task:
    """Few keys, so that every row has false negatives."""
    generator = torch.Generator().manual_seed(n)
    positive = torch.randperm(m, generator=generator)[:n]
    query_keys = torch.randint(0, 5, (n,), generator=generator)
    candidate_keys = torch.randint(0, 9, (m,), generator=generator)
    partners = torch.full((m,), -1).index_copy(0, positive, query_keys)
    queries = unit(n, D, seed=n)
    near = normalize(queries + 1.5 * unit(n, D, seed=n + 1), dim=-1)  # some are nearest
    candidates = unit(m, D, seed=m).index_copy(0, positive, near)
    queries, candidates = (x.to(dtype).requires_grad_() for x in (queries, candidates))
    scale = torch.tensor(20.0, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
    return Task(queries, candidates, positive, scale, (query_keys, candidate_keys, partners))


def solve(task: Task, *, masked: bool, block: int = 1000) -> tuple[Tensor, Tensor, Tensor]:
    queries, candidates, positive, scale, keys = task
    return info_nce(
        queries, candidates, positive, scale, keys=keys if masked else None, block=block
    )


def gradients(task: Task, losses: Tensor) -> tuple[Tensor, ...]:
    weight = torch.linspace(0.5, 1.5, len(losses), dtype=losses.dtype)
    inputs = (task.queries, task.candidates, task.scale)
    return torch.autograd.grad((losses * weight).sum(), inputs)


@pytest.mark.parametrize("masked", [False, True])
def test_info_nce_equals_its_slow_twin(masked: bool) -> None:
    task = make_task(4, 9)
    ignored = torch.zeros(4, 9, dtype=torch.bool)
    if masked:
        ignored = same_content(task.positive, *task.keys)
        assert ignored.any()
    expected, nearest = [], []
    for n, positive in enumerate(task.positive.tolist()):
        scores = (task.queries[n] @ task.candidates.T).tolist()
        kept = {m: score for m, score in enumerate(scores) if not ignored[n, m]}
        total = sum(math.exp(20 * score) for score in kept.values())
        expected.append(math.log(total) - 20 * scores[positive])
        nearest.append(max(kept, key=kept.__getitem__) == positive)
    losses, hits, compared = solve(task, masked=masked)
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64))
    assert hits.tolist() == nearest
    assert compared.all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block", [1, 5])
def test_row_blocks_change_no_value_and_no_gradient(block: int, masked: bool) -> None:
    task = make_task(13, 31)
    found, expected = solve(task, masked=masked, block=block), solve(task, masked=masked)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        gradients(task, found[0]), gradients(task, expected[0]), rtol=0, atol=1e-12
    )


def test_row_blocks_keep_one_block_in_memory() -> None:
    n, m, block = 256, 512, 16
    task = make_task(n, m, dtype=torch.float32)
    peaks = []
    for size in (n, block):
        with Counting() as live:
            gradients(task, solve(task, masked=True, block=size)[0])
        peaks.append(live.peak)
    assert peaks[0] > 4 * n * m  # the table
    assert peaks[1] < 12 * 4 * block * m + 4 * 4 * (n + m) * D + 64 * n


@pytest.mark.parametrize("block", [1, 50])
def test_a_query_without_a_negative_is_no_hit_and_not_compared(block: int) -> None:
    """Query 0: all others are its own answer or of its own words. Query 1: one is not."""
    queries, candidates = torch.eye(2, 3), torch.eye(4, 3)
    losses, hits, compared = info_nce(
        queries,
        candidates,
        torch.tensor([0, 1]),
        torch.tensor(50.0),
        keys=(torch.tensor([7, 8]), torch.tensor([1, 2, 1, 3]), torch.tensor([7, 7, -1, 7])),
        block=block,
    )
    assert losses[0] == 0
    assert compared.tolist() == [False, True]
    assert hits.tolist() == [False, True]
    one = torch.tensor(1.0)
    alone = info_nce(queries[:1], candidates[:1], torch.tensor([0]), one, keys=None, block=block)
    assert [part.tolist() for part in alone] == [[0], [False], [False]]


def test_a_rank_without_queries_has_no_losses_and_a_gradient_of_zero() -> None:
    task = make_task(3, 9)
    keys = (task.keys[0][:0], *task.keys[1:])
    none = task._replace(queries=task.queries[:0], positive=task.positive[:0], keys=keys)
    losses, hits, _ = solve(none, masked=True)
    assert losses.shape == hits.shape == (0,)
    (found,) = torch.autograd.grad(losses.sum(), task.candidates)
    assert not found.any()


def test_losses_of_half_precision_embeddings_are_float32_even_under_autocast() -> None:
    task = make_task(5, 7, dtype=torch.bfloat16)
    exact = Task(task.queries.float(), task.candidates.float(), *task[2:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, *_ = solve(task, masked=True)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, solve(exact, masked=True)[0], rtol=0, atol=0)


# --- False negatives -------------------------------------------------------------------------


def test_equal_targets_and_targets_of_equal_queries_are_no_negatives() -> None:
    # Queries a, b, a; their positives x, x, y; hard negatives x, z.
    got = same_content(
        torch.tensor([0, 1, 2]),
        torch.tensor([10, 11, 10]),
        torch.tensor([1, 1, 2, 1, 3]),
        torch.tensor([10, 11, 10, -1, -1]),
    )
    assert got.int().tolist() == [[0, 1, 1, 1, 0], [1, 0, 0, 1, 0], [1, 0, 0, 0, 0]]


# --- Matryoshka ------------------------------------------------------------------------------


def test_leading_dimensions_are_unit_again() -> None:
    embeddings = unit(5, D)
    pieces = matryoshka(embeddings, [D, 3, 1])
    assert [piece.shape[1] for piece in pieces] == [D, 3, 1]
    torch.testing.assert_close(pieces[0], embeddings)
    for piece in pieces:
        torch.testing.assert_close(piece.norm(dim=1), torch.ones(5))
        lengths = embeddings[:, : piece.shape[1]].norm(dim=1, keepdim=True)
        torch.testing.assert_close(piece * lengths, embeddings[:, : piece.shape[1]])
