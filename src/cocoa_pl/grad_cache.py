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
        # For the second pass: each batch, the generators as they were before its first pass (the
        # CPU's and the device's), and its embeddings, a leaf whose gradient is needed.
        self._replayed: list[tuple[Any, Tensor, Tensor | None, Tensor]] = []
        embedded = [embed(batches[0])]
        for batch in batches[1:]:
            cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
            cpu = torch.get_rng_state()
            with torch.no_grad():
                leaf = embed(batch)
            embedded.append(leaf.requires_grad_())
            self._replayed.append((batch, cpu, cuda, leaf))
        self.embeddings = torch.cat(embedded)

    def backward(self, backward: Callable[[Tensor], None]) -> None:
        """The second pass; to be called when the loss of `embeddings` has been differentiated.

        Args:
            backward: what calls `.backward()` (Lightning's manual_backward).
        """
        for batch, cpu, cuda, leaf in self._replayed:
            assert leaf.grad is not None, "the loss has not been differentiated"
            devices = [] if cuda is None else [torch.cuda.current_device()]
            with torch.random.fork_rng(devices=devices):
                torch.set_rng_state(cpu)
                if cuda is not None:
                    torch.cuda.set_rng_state(cuda)
                again = self._embed(batch)
            backward((again * leaf.grad).sum())
