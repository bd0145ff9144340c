"""B10. The loss and gradients of one micro-batch of a generative stage: warm-up with its image
decoder, or the bridge. What counts as whose time is said in `contrast.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.attention_bridge import policy
from benchmarks.benchmark import Benchmark, Task
from benchmarks.counting import Count, Counts, torch_counts
from benchmarks.peers.steps import reconstruct_step, warmup_step
from benchmarks.samples import draw, process, row_of
from benchmarks.step_sizes import BRIDGE, CAPTIONS, Size
from benchmarks.training import Ours, Peer, assert_same_step, cleared, weights
from cocoa_pl.data.batch import Sample, pack
from cocoa_pl.data.masking import with_noise
from cocoa_pl.stages.reconstruction import ReconstructionModule

PATCH_WEIGHT = 0.5


class Rebuild(Task):
    """A micro-batch of a generative stage: warm-up with its image decoder, or the bridge."""

    warmup: bool

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self.device, self.samples = size, device, size.batch
        shape = size.model.shape
        self.rows = draw(size.query, size.batch, shape=shape, seed=0)
        self.own = Ours(size.model, device)
        attention = "bidirectional" if self.warmup else "eos_bridge"
        self.theirs = Peer(size.model, self.own, attention=attention, vision=size.peer_vision)
        hidden: dict[str, Any] = (
            {"text_ratio": 0.2, "text_segment": "context", "patch_ratio": 0.5}
            if self.warmup
            else {"text_ratio": 0.7, "text_segment": "target", "patch_ratio": 0.0}
        )
        self.module = self.own.stage(
            ReconstructionModule,
            policy=policy(attention),
            token_budget=size.token_budget,
            patch_weight=PATCH_WEIGHT,
            **hidden,
        ).train()
        self.theirs.model.train()
        self.decoder = None
        if self.module.image_decoder is not None:
            self.decoder = self.theirs.decoder(self.module.image_decoder)
        self.masking, self.collate = self.module.masking, self.module.collator(validating=False)
        # What is hidden is the same on both sides; the peer's rows know before.
        samples = self._samples()
        batch = pack(samples, self.module.backbone.planner(self.module.policy)).to(device)
        merge_size = self.module.backbone.merge_size
        clean = self.module.backbone.pixels(batch)
        noisy = with_noise(clean, batch, merge_size=merge_size).cpu()
        parts = noisy.split([len(sample.patches) for sample in samples])
        self.peer_rows = [
            row_of(drawn, sample, pixels if self.warmup else None)
            for drawn, sample, pixels in zip(self.rows, samples, parts, strict=True)
        ]
        tokens = clean.view(-1, merge_size**2 * clean.shape[1])
        self.clean = tokens.index_select(0, batch.patch_places)
        self.hidden_tokens = len(batch.targets)

    def _samples(self) -> list[Sample]:
        return [
            self.masking(process(drawn, self.own.processor, n), np.random.default_rng(n))
            for n, drawn in enumerate(self.rows)
        ]

    def ours(self) -> Tensor:
        cleared(self.module)
        batches = self.collate([[sample] for sample in self._samples()])
        loss: Tensor = self.module.accumulate(batches)["loss"]
        return loss

    def peer(self) -> Tensor:
        cleared(self.theirs.model, self.decoder)
        model, rows = self.theirs.model, self.peer_rows
        if self.decoder is None:
            return reconstruct_step(model, rows, collate=self.theirs.collate)
        return warmup_step(
            model,
            rows,
            collate=self.theirs.collate,
            decoder=self.decoder,
            weight=PATCH_WEIGHT,
            clean=[self.clean],
        )

    def check(self) -> None:
        assert_same_step(self, self.module, self.theirs.model)

    def counts(self) -> Counts:
        real = sum(len(row.input_ids) for row in self.peer_rows)
        slots = len(self.peer_rows) * max(len(row.input_ids) for row in self.peer_rows)
        return {
            "token_slots_per_real_token": Count(slots / real, 1.0),
            "head_rows": Count(slots, self.hidden_tokens),
            **torch_counts(
                self.peer,
                self.ours,
                device=self.device,
                parameters=weights(self.module, self.theirs.model),
            ),
        }


class Warmup(Rebuild):
    warmup = True


class Bridge(Rebuild):
    warmup = False


PEER = (
    "CoCoA's generative stages: rows padded to the longest, a dense 4-D mask and a dense mask over "
    "all images of the batch (on a GPU, whose memory that one exceeds, image by image, which is "
    "kinder than CoCoA's), patches embedded by a matrix product (kinder too), peft 0.11.1's DoRA, "
    "logits and hidden states of everything, images processed in the step"
)

WARMUP = Benchmark(
    id="B10",
    name="warmup_step",
    title="A warm-up step: masked text and patches",
    peer_label=f"{PEER}; MoCa's image decoder on all tokens",
    noun="samples",
    target=2.5,
    note="One micro-batch of 16, as the released script has; on a GPU 8, so that both sides fit 80 "
    "GB without checkpointing. A fifth of the text and half of the patches are hidden, the same on "
    "both sides. DoRA of rank 8 with dropout 0.1 (off where equality is asserted) and "
    "adapter.dropout_on_base=false.",
    sizes=CAPTIONS,
    build=Warmup,
    curves=(),
)

RECONSTRUCT = replace(
    WARMUP,
    name="reconstruct_step",
    title="A step of the EOS bridge: 70 % of the target hidden",
    peer_label=PEER,
    # Missed: 2.38x fewer operations. A fifth of the peer's slots is padding, and its dense vision
    # mask, which grows with the square of a batch's patches, is small for 8 small pictures.
    note="One micro-batch of 8, as the released script has. DoRA of rank 8 with dropout 0.1 (off "
    "where equality is asserted) and adapter.dropout_on_base=false.",
    sizes=BRIDGE,
    build=Bridge,
)
