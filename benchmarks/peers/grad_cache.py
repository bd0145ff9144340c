"""The gradient-cached loss over chunks of queries and positives, and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

Chunk = TypeVar("Chunk")
RandomState = tuple[Tensor, Tensor | None]


def cached_step(
    embed: Callable[[Chunk], Tensor],
    queries: Sequence[Chunk],
    positives: Sequence[Chunk],
    *,
    temperature: float,
) -> Tensor:
    """GradCache (arXiv 2101.06983) in the manner of VLM2Vec's and CoCoA's copies of its library.

    Both towers (here one model) have chunk lists of their own; every chunk is embedded without a
    graph, then again with one; the generator is put back for the second time.

    Args:
        embed: chunk -> (n, D) unit rows.

    Returns:
        The loss, detached; gradients are added to the parameters.
    """
    towers = [queries, positives]
    states: list[list[RandomState]] = []
    embeddings = []
    for tower in towers:
        states.append([])
        parts = []
        for chunk in tower:
            states[-1].append(random_state())
            with torch.no_grad():
                parts.append(embed(chunk))
        embeddings.append(torch.cat(parts).detach().requires_grad_())

    scores = embeddings[0] @ embeddings[1].T / temperature
    loss = cross_entropy(scores, torch.arange(len(scores), device=scores.device))
    loss.backward()

    for tower, kept, whole in zip(towers, states, embeddings, strict=True):
        assert whole.grad is not None
        start = 0
        for chunk, state in zip(tower, kept, strict=True):
            with replayed(state):
                again = embed(chunk)
            gradient = whole.grad[start : start + len(again)]
            torch.dot(again.flatten(), gradient.flatten()).backward()
            start += len(again)
    return loss.detach()


def random_state() -> RandomState:
    """Of the processor and of the current GPU, where there is one."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


@contextmanager
def replayed(state: RandomState) -> Iterator[None]:
    """Dropout draws again what it drew in that state."""
    cpu, cuda = state
    with torch.random.fork_rng(devices=[] if cuda is None else [torch.cuda.current_device()]):
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
        yield
