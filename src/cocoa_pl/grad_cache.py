"""Chunks and a loss over all their embeddings in, exact gradients out, in the memory of few chunks.

Gao et al. 2021 (arXiv 2101.06983): (1) embed every chunk without a graph, (2) differentiate the
loss with respect to the embeddings only, (3) embed each chunk again with a graph and push the
cached gradient through it. Chunks whose graph is kept in (1) are done in (2) and need no (3).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

Chunk = TypeVar("Chunk")


def cached_backward(
    embed: Callable[[Chunk], Tensor],
    chunks: Sequence[Chunk],
    loss: Callable[[Tensor], Tensor],
    *,
    keep: int,
    backward: Callable[[Tensor], None],
) -> Tensor:
    """Accumulate the gradient of `loss(cat(embed(chunk) for chunk in chunks))`.

    Dropout draws the same masks in both passes over a chunk. `embed` is called 2 C - keep times for
    C chunks, and not more than C times where all are kept. The last chunks are the ones that are
    kept: their graphs live for the shortest time.

    Args:
        embed: chunk -> (n, D).
        loss: (N, D) -> (); its own parameters (a learnt temperature) get their gradient in step 2.
        keep: graphs that are in memory together while the loss is differentiated. With 1 the peak
            is that of a replayed chunk, plus what the loss itself needs.
        backward: what calls `.backward()` (Lightning's manual_backward).

    Returns:
        The loss, detached.

    Raises:
        ValueError: for a negative `keep`.
    """
    if keep < 0:
        raise ValueError(f"keep must not be negative, but is {keep}")
    num_replayed = max(len(chunks) - keep, 0) if len(chunks) > 1 else 0
    replayed, kept = chunks[:num_replayed], chunks[num_replayed:]

    states: list[_RandomState] = []
    parts: list[Tensor] = []
    with torch.no_grad():
        for chunk in replayed:
            states.append(_RandomState())
            parts.append(embed(chunk))

    # A leaf: it takes the gradient that the replayed chunks wait for.
    cached = [torch.cat(parts).requires_grad_()] if parts else []
    value = loss(torch.cat([*cached, *(embed(chunk) for chunk in kept)]))
    backward(value)
    if not cached:
        return value.detach()

    assert cached[0].grad is not None
    gradients = cached[0].grad.split([len(part) for part in parts])
    for chunk, state, gradient in zip(replayed, states, gradients, strict=True):
        with state.replayed():
            again = embed(chunk)
        backward((again * gradient).sum())
    return value.detach()


class _RandomState:
    """The generators as they were before a chunk's first pass."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    @contextmanager
    def replayed(self) -> Iterator[None]:
        devices = [torch.cuda.current_device()] if self.cuda is not None else []
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda)
            yield
