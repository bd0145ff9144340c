"""The gradient cache gives the gradients of one large batch in the memory of a chunk."""

import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from cocoa_pl.grad_cache import GradientCache
from cocoa_pl.losses import info_nce

ROWS, WIDTH = 7, 6
SEED = 3
SIZES = [1, 5, ROWS]


class Model(nn.Module):
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
        """Each row looks for its neighbour among all rows: no batch's loss is its own affair."""
        index = torch.arange(len(embeddings)).roll(-1)
        scale = self.log_scale.exp()
        return info_nce(embeddings, embeddings, index, scale, keys=None, block=100)[0].mean()

    def gradients(self) -> list[Tensor]:
        found = [p.grad for p in self.parameters()]
        self.zero_grad()
        return [g for g in found if g is not None]


@pytest.fixture
def rows() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


def step(
    embed: Callable[[Tensor], Tensor], batches: Sequence[Tensor], loss: Callable[[Tensor], Tensor]
) -> Tensor:
    cache = GradientCache(embed, batches)
    value = loss(cache.embeddings)
    value.backward()
    cache.backward(lambda t: t.backward())
    return value.detach()


def cached(model: Model, rows: Tensor, size: int) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(SEED)
    value = step(model, rows.split(size), model.loss)
    return value, model.gradients()


def one_pass(model: Model, rows: Tensor, size: int) -> tuple[Tensor, list[Tensor]]:
    """One graph over the same batches, which draw their dropout one after the other."""
    torch.manual_seed(SEED)
    value = model.loss(torch.cat([model(batch) for batch in rows.split(size)]))
    value.backward()
    return value.detach(), model.gradients()


def close(first: list[Tensor], second: list[Tensor]) -> bool:
    assert len(first) == len(second) == 5  # the temperature's, too
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("size", SIZES)
def test_gradients_equal_one_pass(size: int, dropout: float, rows: Tensor) -> None:
    model = Model(dropout)
    value, found = cached(model, rows, size)
    expected_value, expected = one_pass(model, rows, size if dropout else ROWS)
    assert torch.allclose(value, expected_value, atol=1e-6)
    assert close(found, expected)


def test_one_graph_is_in_memory_at_a_time(rows: Tensor) -> None:
    model, alive, most = Model(0.4), 0, 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def embed(batch: Tensor) -> Tensor:
        nonlocal alive, most
        embeddings: Tensor = model(batch)
        if not embeddings.requires_grad:
            return embeddings
        factor = torch.ones_like(embeddings)  # only the graph knows it
        alive += 1
        most = max(most, alive)
        weakref.finalize(factor, gone)
        return embeddings * factor

    step(embed, rows.split(2), model.loss)
    assert (alive, most) == (0, 1)
