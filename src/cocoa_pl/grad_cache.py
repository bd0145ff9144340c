"""Exact gradients of a loss over the embeddings of many batches, in the memory of one batch.

Gao et al. 2021 (arXiv 2101.06983): (1) embed every batch without a graph, (2) differentiate the
loss with respect to the embeddings only, (3) embed each batch again with a graph and push the
cached gradient through it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class GradientCache:
    """One step over a list of batches.

    The first batch keeps its graph: that takes no more memory than a batch that is embedded again
    does, and saves embedding the most expensive one twice when batches are sorted by cost. So for C
    batches `embed` is called 2 C - 1 times. Dropout draws the same masks in both passes.

    Args:
        embed: batch -> (n, D).
    """

    def __init__(self, embed: Callable[[Any], Tensor], batches: Sequence[Any]) -> None:
        self._embed = embed
        self._replayed = batches[1:]
        # The generators as they were before each first pass: the CPU's and the device's.
        self._random: list[tuple[Tensor, Tensor | None]] = []
        self._sizes: list[int] = []
        first, rest = embed(batches[0]), []
        for batch in self._replayed:
            cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
            self._random.append((torch.get_rng_state(), cuda))
            with torch.no_grad():
                rest.append(embed(batch))
            self._sizes.append(len(rest[-1]))
        # A leaf, whose gradient the second pass needs.
        self._leaf = torch.cat(rest).requires_grad_() if rest else first[:0].detach()
        self.embeddings = torch.cat([first, self._leaf])

    def backward(self, backward: Callable[[Tensor], None]) -> None:
        """The second pass; to be called when the loss of `embeddings` has been differentiated.

        Args:
            backward: what calls `.backward()` (Lightning's manual_backward).
        """
        if not self._sizes:
            return
        assert self._leaf.grad is not None, "the loss has not been differentiated"
        gradients = self._leaf.grad.split(self._sizes)
        for batch, states, gradient in zip(self._replayed, self._random, gradients, strict=True):
            cpu, cuda = states
            devices = [] if cuda is None else [torch.cuda.current_device()]
            with torch.random.fork_rng(devices=devices):
                torch.set_rng_state(cpu)
                if cuda is not None:
                    torch.cuda.set_rng_state(cuda)
                again = self._embed(batch)
            backward((again * gradient).sum())
