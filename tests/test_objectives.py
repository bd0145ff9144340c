"""Losses against closed forms and slow twins."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy, normalize
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from cocoa_pl.objectives import (
    ContentKeys,
    info_nce,
    info_nce_by_blocks,
    masked_next_token,
    matryoshka,
    rebuilt_patches,
    same_content,
)

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
    assert torch.equal(right, (logits.argmax(1) == LABELS[1:])[HIDDEN - 1])


def test_no_information_costs_the_logarithm_of_the_vocabulary() -> None:
    losses, _ = masked_next_token(torch.zeros(4, V), LABELS[HIDDEN])
    torch.testing.assert_close(losses, torch.full((4,), math.log(V)))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_token_losses_are_never_narrower_than_float32(
    given: torch.dtype, expected: torch.dtype
) -> None:
    losses, right = masked_next_token(random(4, V).to(given), LABELS[HIDDEN])
    assert losses.dtype == expected
    assert right.dtype == torch.bool


def test_nothing_hidden_gives_empty_losses() -> None:
    losses, right = masked_next_token(random(0, V), LABELS[:0])
    assert losses.shape == right.shape == (0,)
    assert float(losses.sum()) == 0


# --- Rebuilt patches -------------------------------------------------------------------------


def test_rebuilding_error_is_the_mean_square_of_each_visual_token() -> None:
    predicted, pixels = random(5, 8), random(5, 8, seed=1)
    expected = [
        sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) / 8
        for p, q in zip(predicted.tolist(), pixels.tolist(), strict=True)
    ]
    torch.testing.assert_close(rebuilt_patches(predicted, pixels), torch.tensor(expected))


def test_perfect_rebuilding_costs_nothing_and_predicting_zero_of_noise_costs_one() -> None:
    pixels = random(400, 200)
    assert float(rebuilt_patches(pixels, pixels).sum()) == 0
    assert abs(float(rebuilt_patches(torch.zeros_like(pixels), pixels).mean()) - 1) < 0.02
    assert rebuilt_patches(pixels.bfloat16(), pixels).dtype == torch.float32


# --- InfoNCE ---------------------------------------------------------------------------------


def slow_info_nce(
    queries: Tensor, candidates: Tensor, positives: list[int], scale: float, ignored: Tensor
) -> list[float]:
    losses = []
    for n, positive in enumerate(positives):
        scores = [scale * float(queries[n] @ candidate) for candidate in candidates]
        kept = [score for m, score in enumerate(scores) if not ignored[n, m]]
        losses.append(math.log(sum(math.exp(score) for score in kept)) - scores[positive])
    return losses


@pytest.mark.parametrize("seed", range(3))
def test_info_nce_equals_its_slow_twin(seed: int) -> None:
    queries, candidates = unit(4, D, seed=seed), unit(7, D, seed=seed + 10)
    positives = [3, 0, 6, 1]
    ignored = random(4, 7, seed=seed) > 0.8
    ignored[range(4), positives] = False
    losses, similarity = info_nce(
        queries,
        candidates,
        torch.tensor(positives),
        torch.tensor(20.0),
        false_negatives=ignored,
    )
    expected = slow_info_nce(queries, candidates, positives, 20.0, ignored)
    torch.testing.assert_close(losses, torch.tensor(expected))
    torch.testing.assert_close(similarity, queries @ candidates.T)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_zero_embeddings_cost_the_logarithm_of_the_batch(batch_size: int) -> None:
    zeros = torch.zeros(batch_size, D)
    losses, _ = info_nce(
        zeros, zeros, torch.arange(batch_size), torch.tensor(50.0), false_negatives=None
    )
    torch.testing.assert_close(losses, torch.full((batch_size,), math.log(batch_size)))


def test_orthogonal_pairs_have_the_closed_form_loss() -> None:
    eye, scale = torch.eye(D), 3.0
    losses, _ = info_nce(eye, eye, torch.arange(D), torch.tensor(scale), false_negatives=None)
    closed_form = math.log(1 + (D - 1) * math.exp(-scale))
    torch.testing.assert_close(losses, torch.full((D,), closed_form))


def test_without_any_negative_left_nothing_is_lost() -> None:
    queries = unit(3, D)
    losses, _ = info_nce(
        queries,
        unit(3, D, seed=1),
        torch.arange(3),
        torch.tensor(50.0),
        false_negatives=~torch.eye(3, dtype=torch.bool),
    )
    assert torch.equal(losses, torch.zeros(3))


def test_ignored_candidates_get_no_gradient_and_the_temperature_gets_one() -> None:
    candidates = unit(3, D, seed=1).requires_grad_()
    scale = torch.tensor(5.0, requires_grad=True)
    ignored = torch.tensor([[False, True, False]])
    losses, _ = info_nce(unit(1, D), candidates, torch.tensor([0]), scale, false_negatives=ignored)
    losses.sum().backward()
    assert candidates.grad is not None
    assert candidates.grad.any(1).tolist() == [True, False, True]
    assert scale.grad is not None
    assert float(scale.grad) != 0


def test_similarities_are_computed_in_float32() -> None:
    queries = unit(3, D).bfloat16()
    losses, similarity = info_nce(
        queries, queries, torch.arange(3), torch.tensor(50.0), false_negatives=None
    )
    assert losses.dtype == similarity.dtype == torch.float32
    assert torch.equal(similarity, queries.float() @ queries.float().T)


# --- False negatives -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_same_content_equals_its_slow_twin(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n, m = 5, 9
    positive = torch.randperm(m, generator=generator)[:n]
    query_keys = torch.randint(0, 4, (n,), generator=generator)
    candidate_keys = torch.randint(0, 4, (m,), generator=generator)
    candidate_query_keys = torch.full((m,), -1).index_copy(0, positive, query_keys)
    got = same_content(positive, query_keys, candidate_keys, candidate_query_keys)
    for i in range(n):
        own = int(positive[i])
        for j in range(m):
            same_target = candidate_keys[j] == candidate_keys[own]
            same_query = candidate_query_keys[j] == query_keys[i]
            assert bool(got[i, j]) == (j != own and bool(same_target | same_query))


def test_equal_targets_and_targets_of_equal_queries_are_no_negatives() -> None:
    # Queries a, b, a; their positives x, x, y; hard negatives x, z.
    got = same_content(
        torch.tensor([0, 1, 2]),
        torch.tensor([10, 11, 10]),
        torch.tensor([1, 1, 2, 1, 3]),
        torch.tensor([10, 11, 10, -1, -1]),
    )
    assert got.int().tolist() == [[0, 1, 1, 1, 0], [1, 0, 0, 1, 0], [1, 0, 0, 0, 0]]


# --- InfoNCE by tiles ------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    queries: Tensor
    candidates: Tensor
    positive: Tensor
    scale: Tensor
    keys: ContentKeys

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.queries, self.candidates, self.scale


def make_task(n: int, m: int, *, width: int = D, dtype: torch.dtype = torch.float64) -> Task:
    """Few keys, so that every row has false negatives."""
    generator = torch.Generator().manual_seed(n)
    positive = torch.randperm(m, generator=generator)[:n]
    query_keys = torch.randint(0, 5, (n,), generator=generator)
    keys = ContentKeys(
        queries=query_keys,
        candidates=torch.randint(0, 9, (m,), generator=generator),
        partners=torch.full((m,), -1).index_copy(0, positive, query_keys),
    )
    queries = unit(n, width, seed=n)
    near = normalize(queries + 1.5 * unit(n, width, seed=n + 1), dim=-1)  # some are nearest
    candidates = unit(m, width, seed=m).index_copy(0, positive, near)
    queries, candidates = (x.to(dtype).requires_grad_() for x in (queries, candidates))
    scale = torch.tensor(20.0, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
    return Task(queries, candidates, positive, scale, keys)


def whole(task: Task, *, masked: bool) -> tuple[Tensor, Tensor]:
    """The slow twin: one table of N x M."""
    keys, ignored = task.keys, None
    if masked:
        ignored = same_content(task.positive, keys.queries, keys.candidates, keys.partners)
    losses, seen = info_nce(
        task.queries, task.candidates, task.positive, task.scale, false_negatives=ignored
    )
    if ignored is not None:
        seen = seen.masked_fill(ignored, -torch.inf)
    return losses, seen.argmax(1) == task.positive


def by_blocks(task: Task, *, masked: bool, block: int) -> tuple[Tensor, Tensor, Tensor]:
    return info_nce_by_blocks(
        task.queries,
        task.candidates,
        task.positive,
        task.scale,
        keys=task.keys if masked else None,
        block=block,
    )


def gradients(task: Task, losses: Tensor) -> tuple[Tensor, ...]:
    weight = torch.linspace(0.5, 1.5, len(losses), dtype=losses.dtype)
    return torch.autograd.grad((losses * weight).sum(), task.inputs)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block", [1, 4, 5, 13, 30, 31, 100])
@pytest.mark.parametrize(("n", "m"), [(13, 31), (20, 20), (1, 31)])
def test_tiles_equal_the_whole_table_forward_and_backward(
    n: int, m: int, block: int, masked: bool
) -> None:
    task = make_task(n, m)
    losses, hits, compared = by_blocks(task, masked=masked, block=block)
    expected, expected_hits = whole(task, masked=masked)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)
    assert torch.equal(hits, expected_hits)
    assert compared.all()
    torch.testing.assert_close(
        gradients(task, losses), gradients(task, expected), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("block", [1, 2, 4, 50])
def test_a_query_without_a_negative_is_no_hit_and_not_compared(block: int) -> None:
    """Query 0: all others are its own answer or of its own words. Query 1: one is not."""
    queries, candidates = torch.eye(2, 3), torch.eye(4, 3)
    losses, hits, compared = info_nce_by_blocks(
        queries,
        candidates,
        torch.tensor([0, 1]),
        torch.tensor(50.0),
        keys=ContentKeys(
            queries=torch.tensor([7, 8]),
            candidates=torch.tensor([1, 2, 1, 3]),
            partners=torch.tensor([7, 7, -1, 7]),
        ),
        block=block,
    )
    assert losses[0] == 0
    assert compared.tolist() == [False, True]
    assert hits.tolist() == [False, True]
    alone = info_nce_by_blocks(
        queries[:1], candidates[:1], torch.tensor([0]), torch.tensor(1.0), keys=None, block=block
    )
    assert [part.tolist() for part in alone] == [[0], [False], [False]]


def test_masking_changes_losses_and_hits() -> None:
    """The comparison above would not see keys of the wrong rows else."""
    task = make_task(13, 31)
    plain, masked = (by_blocks(task, masked=masked, block=4) for masked in (False, True))
    assert (plain[0] - masked[0]).min() > 0
    assert masked[1].sum() > plain[1].sum() > 0


@pytest.mark.parametrize("block", [2, 3, 7, 50])
def test_of_equally_near_candidates_the_first_one_counts(block: int) -> None:
    """Also where they lie in different tiles."""
    queries = torch.eye(4, dtype=torch.float64)[torch.tensor([0, 0, 1, 1])]
    candidates = torch.eye(4, dtype=torch.float64)[torch.tensor([2, 0, 1, 0, 3, 1, 0])]
    _, hits, _ = info_nce_by_blocks(
        queries,
        candidates,
        torch.tensor([1, 3, 2, 5]),
        torch.tensor(9.0),
        keys=None,
        block=block,
    )
    assert hits.tolist() == [True, False, True, False]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("broken", ["query", "candidate", "both"])
def test_what_is_not_a_number_spreads_as_in_the_whole_table(broken: str, masked: bool) -> None:
    task = make_task(13, 31)
    if broken != "candidate":
        task.queries.data[5, 2] = torch.nan
    if broken != "query":
        task.candidates.data[17, 1] = torch.nan
    losses, hits, _ = by_blocks(task, masked=masked, block=4)
    expected, expected_hits = whole(task, masked=masked)
    assert losses.isnan().any()
    torch.testing.assert_close(losses, expected, equal_nan=True)
    assert torch.equal(hits, expected_hits)
    torch.testing.assert_close(gradients(task, losses), gradients(task, expected), equal_nan=True)


def test_tiles_compute_in_float32_also_under_autocast() -> None:
    task = make_task(6, 8, dtype=torch.bfloat16)
    plain, *_ = by_blocks(task, masked=True, block=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, *_ = by_blocks(task, masked=True, block=2)
        found = gradients(task, losses)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, plain)
    assert [x.dtype for x in found] == [torch.bfloat16, torch.bfloat16, torch.float32]
    torch.testing.assert_close(found, gradients(task, whole(task, masked=True)[0]))


def test_gradients_of_half_precision_are_rounded_once() -> None:
    """Summed over tiles in bfloat16 they would differ from the whole table's."""
    task = make_task(96, 96, dtype=torch.bfloat16)
    found = gradients(task, by_blocks(task, masked=True, block=8)[0])
    wide = make_task(96, 96, dtype=torch.float32)
    for mine, theirs in zip(wide.inputs, task.inputs, strict=True):
        mine.data.copy_(theirs.data)
    expected = gradients(wide, whole(wide, masked=True)[0])
    for got, exact in zip(found[:2], expected[:2], strict=True):
        error = (got.float() - exact).norm() / exact.norm()
        assert float(error) < 2**-9  # on average less than half a step of bfloat16


def test_a_temperature_that_does_not_train_needs_no_gradient() -> None:
    task = make_task(13, 31)
    frozen = replace(task, scale=task.scale.detach())
    losses, *_ = by_blocks(frozen, masked=True, block=4)
    found = torch.autograd.grad(losses.sum(), (frozen.queries, frozen.candidates))
    whole_losses = whole(task, masked=True)[0]
    expected = torch.autograd.grad(whole_losses.sum(), (task.queries, task.candidates))
    torch.testing.assert_close(found, expected)


def test_a_second_derivative_is_refused() -> None:
    task = make_task(13, 31)
    losses, *_ = by_blocks(task, masked=False, block=4)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(losses.sum(), task.queries, create_graph=True)


def test_a_rank_without_queries_has_no_losses_and_a_gradient_of_zero() -> None:
    task = make_task(3, 9)
    none = replace(task, queries=task.queries[:0], positive=task.positive[:0])
    losses, hits, _ = by_blocks(replace(none, keys=cut(task.keys)), masked=True, block=4)
    assert losses.shape == hits.shape == (0,)
    (found,) = torch.autograd.grad(losses.sum(), task.candidates)
    assert not found.any()


def cut(keys: ContentKeys) -> ContentKeys:
    return replace(keys, queries=keys.queries[:0])


# --- What it costs ---------------------------------------------------------------------------


class Seen(TorchDispatchMode):
    """What operations of forward and backward passes make, and how often they multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0  # elements of one result
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Each of these asks the device for a value.
        assert func.overloadpacket not in WAITS, func
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else [result]
        self.largest = max([self.largest, *(x.numel() for x in results if isinstance(x, Tensor))])
        return result


WAITS = {
    torch.ops.aten.nonzero,
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.masked_select,
    torch.ops.aten.is_nonzero,
}


def watch(task: Task, losses: Callable[[], Tensor]) -> Seen:
    with Seen() as seen:
        gradients(task, losses())
    return seen


@pytest.mark.parametrize("masked", [False, True])
def test_no_tensor_is_larger_than_a_tile_or_the_embeddings(masked: bool) -> None:
    n, m, block = 64, 128, 32
    task = make_task(n, m)
    assert watch(task, lambda: whole(task, masked=masked)[0]).largest == n * m
    seen = watch(task, lambda: by_blocks(task, masked=masked, block=block)[0])
    assert seen.largest == block * block > m * D


def test_a_single_tile_is_not_computed_twice() -> None:
    task = make_task(16, 32)
    once = watch(task, lambda: by_blocks(task, masked=True, block=32)[0]).products
    twice = watch(task, lambda: by_blocks(task, masked=True, block=31)[0]).products
    assert once == 3  # forward, and the gradients of both sides
    assert twice == 2 * 4


def saved_bytes(losses: Callable[[], Tensor]) -> int:
    """What the graph keeps for the backward pass, each storage counted once."""
    storages: dict[int, int] = {}

    def keep(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return saved

    with saved_tensors_hooks(keep, lambda saved: saved):
        result = losses()
    assert result.requires_grad  # the graph is alive: no address was given out twice
    return sum(storages.values())


@pytest.mark.parametrize(("n", "m"), [(256, 64), (64, 256), (256, 256)])
def test_what_is_kept_grows_linearly_with_queries_and_with_candidates(n: int, m: int) -> None:
    small, large = make_task(64, 64), make_task(n, max(n, m))
    kept = [saved_bytes(lambda t=t: by_blocks(t, masked=True, block=8)[0]) for t in (small, large)]
    assert kept[1] <= 4 * kept[0]


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that was allocated at one time, temporaries inside operations included."""
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        work()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    taken = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(accumulate(taken))


def assert_fixed_memory(n: int, *, width: int, block: int) -> None:
    """Some tiles, and for each row its two gradients and a few numbers."""
    task = make_task(n, n, width=width, dtype=torch.float32)
    peak = peak_bytes(lambda: gradients(task, by_blocks(task, masked=True, block=block)[0]))
    tiles, rows = 5 * 4 * block**2, (2 * 4 * width + 64) * n
    assert 4 * block**2 < peak < tiles + rows
    assert tiles + rows < 4 * n**2  # one table


@pytest.mark.parametrize("n", [256, 768])
def test_working_memory_is_that_of_some_tiles_whatever_the_batch(n: int) -> None:
    assert_fixed_memory(n, width=16, block=64)


@pytest.mark.slow
@pytest.mark.parametrize("n", [16_384, 65_536])
def test_65536_pairs_take_the_working_memory_of_16384(n: int) -> None:
    """Some 40 MB beside the embeddings and their gradients; one table of all would take 16 GiB."""
    assert_fixed_memory(n, width=16, block=1024)


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
