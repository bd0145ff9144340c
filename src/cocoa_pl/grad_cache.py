"""Chunks and a loss over all their embeddings in, exact gradients out, in the memory of few chunks.

Gao et al. 2021 (arXiv 2101.06983): (1) embed every chunk without a graph, (2) differentiate the
loss with respect to the embeddings only, (3) embed each chunk again with a graph and push the
cached gradient through it. Chunks whose graph is kept in (1) are done in (2) and need no (3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from cocoa_pl.live_bytes import LiveBytes

Chunk = TypeVar("Chunk")


def cached_backward(
    embed: Callable[[Chunk], Tensor],
    chunks: Sequence[Chunk],
    loss: Callable[[Tensor], Tensor],
    *,
    keep_bytes: int,
    agreed: Callable[[bool], bool],
    backward: Callable[[Tensor], None],
    device: torch.device,
) -> Tensor:
    """Accumulate the gradient of `loss(cat(embed(chunk) for chunk in chunks))`.

    The first chunk's graph is kept: it takes no more than a chunk that is embedded again does. So
    are those of the next ones as long as all kept graphs fit into `keep_bytes`, where a chunk is
    taken to need what the one before it did; put the dearest first. For C chunks of which K are
    kept `embed` is called 2 C - K times. Dropout draws the same masks in both passes over a chunk.

    Args:
        embed: chunk -> (n, D).
        loss: (N, D) -> (); its own parameters (a learnt temperature) get their gradient in step 2.
        keep_bytes: of graphs that are in memory together.
        agreed: whether all processes that gather parameters together say yes; they must keep
            equally many chunks.
        backward: what calls `.backward()` (Lightning's manual_backward).
        device: where the chunks are embedded.

    Returns:
        The loss, detached.
    """
    kept: list[Tensor] = []
    states: list[_RandomState] = []
    parts: list[Tensor] = []
    used, fits = 0, True  # the first one always does
    for chunk in chunks:
        if fits:
            embedded, size = _embedded(embed, chunk, device, counted=keep_bytes > 0)
            kept.append(embedded)
            used += size
            fits = keep_bytes > 0 and agreed(used + size <= keep_bytes)
            continue
        states.append(_RandomState())
        with torch.no_grad():
            parts.append(embed(chunk))

    # A leaf: it takes the gradient that the replayed chunks wait for.
    cached = [torch.cat(parts).requires_grad_()] if parts else []
    value = loss(torch.cat([*kept, *cached]))
    backward(value)
    if not cached:
        return value.detach()

    assert cached[0].grad is not None
    gradients = cached[0].grad.split([len(part) for part in parts])
    replayed = chunks[len(chunks) - len(parts) :]
    for chunk, state, gradient in zip(replayed, states, gradients, strict=True):
        with state.replayed():
            again = embed(chunk)
        backward((again * gradient).sum())
    return value.detach()


def _embedded(
    embed: Callable[[Chunk], Tensor], chunk: Chunk, device: torch.device, *, counted: bool
) -> tuple[Tensor, int]:
    """A chunk's embeddings, and the bytes that their graph holds where they are counted."""
    if not counted:
        return embed(chunk), 0
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        return embed(chunk), torch.cuda.memory_allocated(device) - before
    with LiveBytes() as live:
        embeddings = embed(chunk)
        size = live.now
    return embeddings, size


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
