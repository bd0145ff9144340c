"""Chunks and a loss over all their embeddings in, exact gradients out, in the memory of one chunk.

Gao et al. 2021 (arXiv 2101.06983): (1) embed every chunk without a graph, (2) differentiate the
loss with respect to the embeddings only, (3) embed each chunk again with a graph and push the
cached gradient through it.
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
    backward: Callable[[Tensor], None],
) -> Tensor:
    """Accumulate the gradient of `loss(cat(embed(chunk) for chunk in chunks))`.

    Dropout draws the same masks in both passes over a chunk. With a single chunk there is nothing
    to cache and one pass does it.

    Args:
        embed: chunk -> (n, D).
        loss: (N, D) -> (); its own parameters (a learnt temperature) get their gradient in step 2.
        backward: what calls `.backward()` (Lightning's manual_backward).

    Returns:
        The loss, detached.
    """
    if len(chunks) == 1:
        value = loss(embed(chunks[0]))
        backward(value)
        return value.detach()

    states: list[_RandomState] = []
    parts: list[Tensor] = []
    with torch.no_grad():
        for chunk in chunks:
            states.append(_RandomState())
            parts.append(embed(chunk))

    embeddings = torch.cat(parts).requires_grad_()
    value = loss(embeddings)
    backward(value)
    assert embeddings.grad is not None

    gradients = embeddings.grad.split([len(part) for part in parts])
    for chunk, state, gradient in zip(chunks, states, gradients, strict=True):
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
