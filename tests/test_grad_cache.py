"""Gradients of many chunks in the memory of one."""

import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from cocoa_pl.grad_cache import cached_backward
from cocoa_pl.live_bytes import LiveBytes
from cocoa_pl.objectives import info_nce

ROWS, WIDTH = 7, 6
SEED = 3
SIZES = [1, 2, 5, ROWS]
KEPT = [1, 2, 3, 100]
CPU = torch.device("cpu")


class Encoder(nn.Module):
    """Two layers with dropout between them, and a learnable temperature."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(WIDTH, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, WIDTH)
        )
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, rows: Tensor) -> Tensor:
        return normalize(self.layers(rows), dim=-1)

    def loss(self, embeddings: Tensor) -> Tensor:
        """Each row looks for its neighbour among all rows: no chunk's loss is its own affair."""
        index = torch.arange(len(embeddings)).roll(-1)
        losses, _ = info_nce(
            embeddings, embeddings, index, self.log_scale.exp(), false_negatives=None
        )
        return losses.mean()

    def gradients(self) -> list[Tensor]:
        found = [p.grad for p in self.parameters()]
        self.zero_grad()
        return [g for g in found if g is not None]


class Alive:
    """Counts the graphs that are in memory: each holds a tensor that goes with it."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def __call__(self, embeddings: Tensor) -> Tensor:
        if not embeddings.requires_grad:
            return embeddings
        factor = torch.ones_like(
            embeddings
        )  # saved for the backward pass, and known to no one else
        self.now += 1
        self.most = max(self.most, self.now)
        weakref.finalize(factor, self._gone)
        return embeddings * factor

    def _gone(self) -> None:
        self.now -= 1


@pytest.fixture
def rows() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


def graph_bytes(model: Callable[[Tensor], Tensor], chunk: Tensor) -> int:
    """What a chunk's graph takes."""
    with LiveBytes() as live:
        embeddings = model(chunk)
        assert embeddings.requires_grad
        return live.now


def run(
    embed: Callable[[Tensor], Tensor],
    chunks: Sequence[Tensor],
    loss: Callable[[Tensor], Tensor],
    *,
    keep: int = 1,
    agreed: Callable[[bool], bool] = bool,
) -> Tensor:
    """With room for the graphs of so many chunks like the first."""
    with torch.random.fork_rng():
        size = graph_bytes(Encoder(0.4), chunks[0])
    return cached_backward(
        embed,
        chunks,
        loss,
        keep_bytes=keep * size if keep > 1 else 0,
        agreed=agreed,
        backward=lambda t: t.backward(),
        device=CPU,
    )


def cached(
    model: Encoder, rows: Tensor, size: int, *, keep: int = 1
) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(SEED)
    value = run(model, rows.split(size), model.loss, keep=keep)
    return value, model.gradients()


def one_pass(model: Encoder, rows: Tensor, size: int) -> tuple[Tensor, list[Tensor]]:
    """One graph over the same chunks, which draw their dropout one after the other."""
    torch.manual_seed(SEED)
    value = model.loss(torch.cat([model(chunk) for chunk in rows.split(size)]))
    value.backward()
    return value.detach(), model.gradients()


def close(first: list[Tensor], second: list[Tensor]) -> bool:
    assert len(first) == len(second)
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("size", SIZES)
def test_gradients_equal_one_pass_with_dropout(size: int, keep: int, rows: Tensor) -> None:
    model = Encoder(0.4)
    value, found = cached(model, rows, size, keep=keep)
    expected_value, expected = one_pass(model, rows, size)
    assert torch.allclose(value, expected_value, atol=1e-6)
    assert close(found, expected)


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("size", SIZES)
def test_without_dropout_the_cutting_makes_no_difference(
    size: int, keep: int, rows: Tensor
) -> None:
    model = Encoder(0.0)
    value, found = cached(model, rows, size, keep=keep)
    expected_value, expected = one_pass(model, rows, ROWS)
    assert torch.allclose(value, expected_value, atol=1e-6)
    assert close(found, expected)


@pytest.mark.parametrize("keep", KEPT)
def test_a_learnt_temperature_gets_its_gradient_once(keep: int, rows: Tensor) -> None:
    model = Encoder(0.4)
    _, found = cached(model, rows, 2, keep=keep)
    _, expected = one_pass(model, rows, 2)
    names = [name for name, _ in model.named_parameters()]
    place = names.index("log_scale")
    assert expected[place].abs() > 1e-3
    assert torch.allclose(found[place], expected[place], atol=1e-6)


def test_accumulating_the_losses_of_chunks_would_be_something_else(rows: Tensor) -> None:
    """The comparison above can fail: without the other chunks' rows there are fewer negatives."""
    model = Encoder(0.0)
    for chunk in rows.split(2):
        (model.loss(model(chunk)) * len(chunk) / ROWS).backward()
    assert not close(model.gradients(), one_pass(model, rows, 2)[1])


def test_a_second_pass_with_fresh_dropout_would_be_something_else(
    rows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above can fail: the generators must be put back before the second pass."""
    model = Encoder(0.4)
    expected = one_pass(model, rows, 2)[1]
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    assert not close(cached(model, rows, 2)[1], expected)


@pytest.mark.parametrize("keep", KEPT)
def test_the_generator_ends_where_the_first_pass_left_it(keep: int, rows: Tensor) -> None:
    model = Encoder(0.4)
    cached(model, rows, 2, keep=keep)
    after_cache = torch.get_rng_state()
    one_pass(model, rows, 2)
    assert torch.equal(after_cache, torch.get_rng_state())


@pytest.mark.parametrize("keep", KEPT)
def test_kept_chunks_are_embedded_once_and_the_others_without_and_then_with_a_graph(
    keep: int, rows: Tensor
) -> None:
    model = Encoder(0.4)
    chunks = [rows[:2], rows[2:4], rows[4:6], rows[6:]]
    seen: list[tuple[int, bool]] = []

    def embed(chunk: Tensor) -> Tensor:
        seen.append((len(chunk), torch.is_grad_enabled()))
        return model(chunk)

    run(embed, chunks, model.loss, keep=keep)
    sizes = [len(chunk) for chunk in chunks]
    first, others = sizes[:keep], sizes[keep:]
    once = [(n, True) for n in first]
    assert seen == [*once, *((n, False) for n in others), *((n, True) for n in others)]
    assert len(seen) == 2 * len(chunks) - min(keep, len(chunks))


def test_what_does_not_fit_is_not_kept(rows: Tensor) -> None:
    """A chunk is taken to need what the one before it did: the budget is never exceeded where the
    dearest come first.
    """
    model, held = Encoder(0.4), []

    def embed(chunk: Tensor) -> Tensor:
        embeddings: Tensor = model(chunk)
        held.append(embeddings.requires_grad)
        return embeddings

    size = graph_bytes(model, rows[:2])
    for room, kept in ((0.5, 1), (1.9, 1), (2.0, 2), (2.9, 2), (3.0, 3)):
        held.clear()
        cached_backward(
            embed,
            rows.split(2),
            model.loss,
            keep_bytes=int(room * size),
            agreed=bool,
            backward=lambda t: t.backward(),
            device=CPU,
        )
        assert held[:4] == [True] * kept + [False] * (4 - kept), room


def test_all_processes_keep_as_many(rows: Tensor) -> None:
    """Another one has no room for a third chunk."""
    model, asked = Encoder(0.4), []

    def agreed(mine: bool) -> bool:
        asked.append(mine)
        return len(asked) < 2

    calls: list[int] = []

    def embed(chunk: Tensor) -> Tensor:
        calls.append(len(chunk))
        return model(chunk)

    run(embed, rows.split(2), model.loss, keep=100, agreed=agreed)
    assert asked == [True, True]
    assert len(calls) == 2 * 4 - 2


@pytest.mark.parametrize("keep", KEPT)
def test_a_single_chunk_is_embedded_once(keep: int, rows: Tensor) -> None:
    model = Encoder(0.0)
    calls: list[int] = []

    def embed(chunk: Tensor) -> Tensor:
        calls.append(len(chunk))
        return model(chunk)

    run(embed, [rows], model.loss, keep=keep)
    assert calls == [ROWS]


@pytest.mark.parametrize("keep", KEPT)
def test_no_more_graphs_than_fit_are_in_memory_together(keep: int, rows: Tensor) -> None:
    model = Encoder(0.4)
    counter = Alive()
    size = graph_bytes(lambda chunk: counter(model(chunk)), rows[:2])
    counter.most = 0
    cached_backward(
        lambda chunk: counter(model(chunk)),
        rows.split(2),
        model.loss,
        keep_bytes=keep * size if keep > 1 else 0,
        agreed=bool,
        backward=lambda t: t.backward(),
        device=CPU,
    )
    assert counter.now == 0
    assert counter.most == min(keep, 4)


@pytest.mark.parametrize("keep", KEPT)
def test_a_chunk_without_rows_still_takes_part_in_every_backward_pass(
    keep: int, rows: Tensor
) -> None:
    """Fillers keep ranks in step: they embed to no rows, and every rank must go through them."""
    model = Encoder(0.0)
    calls: list[int] = []

    def embed(chunk: Tensor) -> Tensor:
        embeddings: Tensor = model(chunk)[: len(chunk) - int(len(chunk) == 1)]
        if embeddings.requires_grad:
            embeddings.register_hook(lambda gradient: calls.append(len(gradient)))
        return embeddings

    run(embed, rows.split(3), model.loss, keep=keep)
    assert sorted(calls) == [0, 3, 3]


def test_gradients_add_to_those_that_are_there(rows: Tensor) -> None:
    model = Encoder(0.0)
    _, once = cached(model, rows, 2)
    for _ in range(2):
        run(model, rows.split(2), model.loss)
    assert close(model.gradients(), [2 * gradient for gradient in once])


def test_the_loss_comes_back_without_a_graph(rows: Tensor) -> None:
    model = Encoder(0.0)
    for size in (2, ROWS):
        value, _ = cached(model, rows, size)
        assert not value.requires_grad
    embeddings = model(rows)
    expected = cross_entropy(
        embeddings @ embeddings.T * model.log_scale.exp(), torch.arange(ROWS).roll(-1)
    )
    assert torch.allclose(value, expected, atol=1e-6)
