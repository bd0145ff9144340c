"""What every stage shares: one optimizer step a batch, exact sums over chunks and ranks, exact
resume.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import lightning as L
import torch
from torch import Tensor
from transformers import get_scheduler

from cocoa_pl.attention import Policy
from cocoa_pl.config.bounds import NotNegative, Positive, ShareBelowOne, Whole
from cocoa_pl.data.tokenize import Processor
from cocoa_pl.distributed.collectives import (
    all_objects,
    clip_gradients,
    global_max,
    global_sums,
    rank,
    sum_gradients,
)
from cocoa_pl.distributed.strategies import FullySharded, Replicated, reshard, shard
from cocoa_pl.errors import UserError
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.randomness import mix
from cocoa_pl.stages.chunks import AnyChunk, Preparation, Step
from cocoa_pl.stages.finite import Done, FiniteSteps
from cocoa_pl.stages.lockstep import Fillers, in_lockstep, make_fillers

log = logging.getLogger(__name__)

SHOWN_ROWS = 8
Facts = tuple[int, tuple[str, ...]]  # a step's number and its rows on this rank


@dataclass(frozen=True)
class Optimization:
    """AdamW with warm-up and decay.

    Args:
        schedule: a name known to `transformers.get_scheduler`.
        clip_norm: bound of the global gradient norm; 0 or None for none.

    Raises:
        UserError: if rate and decay together would turn the sign of weights.
    """

    lr: Positive
    weight_decay: NotNegative
    betas: tuple[ShareBelowOne, ShareBelowOne]
    schedule: str
    warmup_steps: Whole
    clip_norm: NotNegative | None

    def __post_init__(self) -> None:
        if self.lr * self.weight_decay >= 1:
            raise UserError(
                f"lr={self.lr:g} times weight_decay={self.weight_decay:g} is not below 1: a step "
                "would turn the sign of every weight"
            )


class StageModule(L.LightningModule, ABC, Generic[AnyChunk]):
    """A backbone with a stage's objective.

    Optimization is manual: a step holds as many micro-batches as the token budget asks for, and
    losses are divided by counts over the whole global batch, which no automatic accumulation can
    do.

    Args:
        token_budget: tokens of a micro-batch (or gradient-cache chunk).
        steps: optimizer steps of the whole stage.
        seed: of dropout.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        processor: Processor,
        policy: Policy,
        optimization: Optimization,
        token_budget: int,
        steps: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints hold what trains; LastCheckpoint compares names
        self.backbone = backbone
        self.processor = processor
        self.policy = policy
        self.optimization = optimization
        self.token_budget = token_budget
        self.steps = steps
        self.seed = seed
        self._validation_sums: dict[str, Tensor] = {}
        self._finite: FiniteSteps[Facts] = FiniteSteps()
        self._has_learnt = self._said_empty = False
        # With sharded parameters every rank must use the same parts of the model at the same time.
        self._fillers: Fillers | None = None

    @property
    @abstractmethod
    def parts(self) -> list[torch.nn.Module]:
        """Modules that steps call, which hold all parameters between them."""

    def configure_model(self) -> None:
        if self.trainer.precision != "32-true":
            raise UserError(
                f"trainer.precision={self.trainer.precision} would round losses too; leave it at "
                "32-true and choose what the model computes in by model.dtype"
            )
        strategy = self.trainer.strategy
        if self.trainer.world_size > 1 and not isinstance(strategy, Replicated | FullySharded):
            raise UserError("several processes need trainer=ddp or trainer=fsdp")
        if not isinstance(strategy, FullySharded):
            return
        self._fillers = make_fillers(self.processor)
        everything_trains = all(p.requires_grad for p in self.backbone.parameters())
        half = self.backbone.compute_dtype != torch.float32
        shard(
            self.parts,
            blocks=self.backbone.blocks,
            mesh=strategy.device_mesh["data_parallel"],
            # Adapters stay in float32 beside a base that is in bfloat16 already.
            compute_dtype=self.backbone.compute_dtype if half and everything_trains else None,
        )

    @abstractmethod
    def preparation(
        self, *, validating: bool, device: torch.device | None = None
    ) -> Preparation[AnyChunk]:
        """What makes steps of rows, in the data workers.

        Args:
            device: where the module will be when it takes them; None if it is there already.
        """

    @property
    @abstractmethod
    def empty(self) -> str:
        """What is to be said of a step without targets, and what to do about it."""

    @abstractmethod
    def accumulate(self, step: Step[AnyChunk]) -> dict[str, Tensor]:
        """Run the backward passes of one global batch and return what to log, already exact over
        ranks, and `targets`, () float: what there was to learn from.
        """

    @abstractmethod
    def measure(self, step: Step[AnyChunk]) -> dict[str, Tensor]:
        """Sums over a validation batch, by name; `means` divides them at the end."""

    @abstractmethod
    def means(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Validation sums over all batches and ranks to the numbers that are logged."""

    @abstractmethod
    def illustrate(self, step: Step[AnyChunk]) -> dict[str, Any]:
        """Pictures (float arrays H, W, 3 in [0, 1]) or texts of what the stage does on validation
        rows.
        """

    @abstractmethod
    def hand_over(self, metrics: dict[str, float]) -> str:
        """One sentence on whether the stage did its work, from its own validation measure."""

    def training_step(self, step: Step[AnyChunk], batch_idx: int) -> None:
        # Dropout follows from the step alone, so a resumed run needs no generator state.
        torch.manual_seed(mix(self.seed, self.global_step, rank()))
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        optimizer.zero_grad()
        metrics = self.accumulate(step)
        targets = metrics.pop("targets")
        sum_gradients(self.parameters())
        norm = clip_gradients(self.parameters(), self.optimization.clip_norm)
        metrics |= {"gradient_norm": norm, "lr": torch.tensor(scheduler.get_last_lr()[0])}
        before = self._finite.look_back()  # now that this step is queued
        self._finite.guard(optimizer.optimizer, norm, targets, (self.global_step, step.row_ids))
        optimizer.step()
        scheduler.step()
        self._judge(before)
        self.log_dict({f"train/{name}": value for name, value in metrics.items()})

    def validation_step(self, step: Step[AnyChunk], batch_idx: int) -> None:
        for name, value in self.measure(step).items():
            total = self._validation_sums.get(name, torch.zeros((), device=value.device))
            self._validation_sums[name] = total + value

    def on_validation_start(self) -> None:
        self._judge(self._finite.look_back())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._judge(self._finite.look_back())
        checkpoint["has_learnt"] = self._has_learnt

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._has_learnt = checkpoint.get("has_learnt", True)  # older ones do not say

    def on_train_end(self) -> None:
        self._judge(self._finite.look_back())
        if not self._has_learnt and self.global_step >= self.steps:
            raise UserError(f"the stage has learnt nothing: in all of its steps {self.empty}")

    def on_validation_epoch_end(self) -> None:
        reshard(self)  # a forward pass alone leaves parameters gathered
        sums = global_sums(self._validation_sums)
        self._validation_sums = {}
        if sums:
            found = {f"validation/{n}": v for n, v in self.means(sums).items()}
            # The trainer's own count for loggers is one behind after some resumes.
            self.log_dict(found | {"step": torch.tensor(float(self.global_step))})

    def configure_optimizers(self) -> Any:
        values = self.optimization
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained,
            lr=values.lr,
            betas=values.betas,
            weight_decay=values.weight_decay,
            fused=True,
        )
        scheduler = get_scheduler(
            values.schedule,
            optimizer,
            num_warmup_steps=values.warmup_steps,
            num_training_steps=self.steps,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def in_step(self, chunks: Sequence[AnyChunk]) -> list[AnyChunk]:
        """Chunks on the host with what keeps the ranks in step, where parameters are sharded."""
        if self._fillers is None:
            return list(chunks)
        preparation = self.preparation(validating=False)
        return in_lockstep(chunks, self._fillers, preparation, device=self.device)

    def all_agree(self, mine: bool) -> bool:
        """Whether all ranks that must do the same say yes; alone a rank decides by itself."""
        if self._fillers is None:
            return mine
        return not bool(global_max(torch.tensor(not mine, device=self.device).int()))

    def at_work(self, chunks: Sequence[AnyChunk]) -> Iterator[AnyChunk]:
        """Chunks on the device, one at a time."""
        for chunk in self.in_step(chunks):
            yield chunk.to(self.device)

    def _judge(self, done: Done[Facts] | None) -> None:
        if done is None:
            return
        number, mine = done.facts
        if math.isfinite(done.norm):
            self._has_learnt |= done.targets > 0
            if not (done.targets or self._said_empty):
                self._said_empty = True
                log.warning("step %d: %s (said once)", number, self.empty)
            return
        ids = [row_id for part in all_objects(list(mine)) for row_id in part]
        told = ", ".join(ids[:SHOWN_ROWS]) + (", ..." if len(ids) > SHOWN_ROWS else "")
        path = Path(self.trainer.default_root_dir) / "bad_batch.txt"
        if rank() == 0:
            path.write_text("".join(f"{row_id}\n" for row_id in ids))
        raise UserError(
            f"step {number}: the gradient is {done.norm}; the batch had the rows {told} "
            f"(all {len(ids)} in {path}). The weights are as before this step"
        )
