"""B1. The masked-token loss and its gradient: logits of the masked positions only, against logits
of all positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from benchmarks.benchmark import CUDA_IN_FLOAT32, SECONDS, Benchmark, Task, curve
from benchmarks.comparing import assert_close
from benchmarks.counting import Count, Counts, torch_counts
from cocoa_pl.losses import masked_next_token

IGNORED = -100  # cross_entropy's own mark


@dataclass(frozen=True)
class Size:
    """One packed row of samples.

    Attributes:
        masked: share of tokens that are hidden: 13 of 320, where 20 % of the 64 text tokens beside
            256 visual ones are.
    """

    tokens: int
    width: int
    vocabulary: int
    masked: float
    dtype: torch.dtype


class MaskedHead(Task):
    """Loss and the gradient of the hidden states; the vocabulary's weights are frozen, as under
    adapters.
    """

    def __init__(self, size: Size, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        rows = max(1, round(size.masked * size.tokens))

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, size.dtype)

        chosen = 1 + torch.randperm(size.tokens - 1, generator=generator)[:rows]
        labels = torch.randint(size.vocabulary, (size.tokens,), generator=generator)
        mask = torch.zeros(size.tokens, dtype=torch.bool).index_fill(0, chosen, True)
        self.samples = size.tokens
        self.rows = rows
        self.device = device
        self.hidden = normal(size.tokens, size.width).requires_grad_()
        self.weight = normal(size.vocabulary, size.width) / size.width**0.5
        # Workers know which states predict which tokens.
        hidden = mask.nonzero()[:, 0]
        self.before, self.targets = (hidden - 1).to(device), labels[hidden].to(device)
        self.marked = labels.where(mask, IGNORED).to(device)

    def peer(self) -> tuple[Tensor, Tensor]:
        logits = linear(self.hidden[None], self.weight).float()  # of every position
        shifted, labels = logits[:, :-1].contiguous(), self.marked[None, 1:].contiguous()
        loss = cross_entropy(shifted.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        return loss.detach(), torch.autograd.grad(loss, self.hidden)[0]

    def ours(self) -> tuple[Tensor, Tensor]:
        states = self.hidden.index_select(0, self.before)
        losses, _ = masked_next_token(linear(states, self.weight), self.targets)
        loss = losses.sum() / self.rows
        return loss.detach(), torch.autograd.grad(loss, self.hidden)[0]

    def check(self) -> None:
        assert_close(self.ours(), self.peer())

    def counts(self) -> Counts:
        counted = torch_counts(
            self.peer, self.ours, device=self.device, parameters=[self.weight, self.hidden]
        )
        return {"head_rows": Count(self.samples, self.rows), **counted}


TEST = Size(tokens=320, width=32, vocabulary=1024, masked=13 / 320, dtype=torch.float32)
CPU = Size(tokens=320, width=256, vocabulary=151_936, masked=13 / 320, dtype=torch.float32)
CUDA = Size(tokens=8192, width=1536, vocabulary=151_936, masked=13 / 320, dtype=torch.bfloat16)
IN_FLOAT32 = replace(CUDA, tokens=512, dtype=torch.float32)

SIZES = {"test": TEST, "cpu": CPU, "cuda": CUDA, CUDA_IN_FLOAT32: IN_FLOAT32}

BENCHMARK = Benchmark(
    id="B1",
    name="masked_head",
    title="Vocabulary head and loss on masked positions",
    peer_label="CoCoA's modeling_qwen2_vl.py: logits of all positions, to float32, shifted copies, "
    "cross-entropy",
    noun="tokens",
    target=12,
    note="4 % of tokens are masked: 20 % of the text beside 256 visual tokens. Forward and "
    "backward to the hidden states.",
    sizes=SIZES,
    build=MaskedHead,
    curves=(
        curve(
            "tokens",
            SECONDS,
            "tokens",
            {"test": (50, 100), "cpu": (40, 80, 160, 320), "cuda": (1024, 2048, 4096, 8192)},
            SIZES,
        ),
    ),
)
