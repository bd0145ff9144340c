"""What every stage shares: one optimizer step over a list of batches, exact sums over batches and
ranks, exact resume.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from PIL import Image
from torch import Tensor
from transformers import get_scheduler

from cocoa_pl.attention import Policy
from cocoa_pl.config.bounds import NotNegative, Positive, ShareBelowOne, Whole
from cocoa_pl.data.batch import Batch, Collator, pack
from cocoa_pl.data.items import IMAGE_SLOT, Item
from cocoa_pl.data.masking import Masking
from cocoa_pl.data.processor import Processor
from cocoa_pl.data.sampler import mix
from cocoa_pl.distributed.collectives import (
    all_objects,
    clip_gradients,
    global_sum,
    rank,
    sum_gradients,
)
from cocoa_pl.distributed.strategies import FullySharded, reshard, shard
from cocoa_pl.errors import UserError
from cocoa_pl.models.backbone import Backbone

log = logging.getLogger(__name__)

SHOWN_ROWS = 8


# Those of `transformers.get_scheduler` that ask for no numbers of their own; `polynomial` without
# them is linear.
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
]


@dataclass(frozen=True)
class Optimization:
    """AdamW with warm-up and decay.

    Args:
        clip_norm: bound of the global gradient norm; 0 or None for none.

    Raises:
        UserError: if rate and decay together would turn the sign of weights.
    """

    lr: Positive
    weight_decay: NotNegative
    betas: tuple[ShareBelowOne, ShareBelowOne]
    schedule: Schedule
    warmup_steps: Whole
    clip_norm: NotNegative | None

    def __post_init__(self) -> None:
        if self.lr * self.weight_decay >= 1:
            raise UserError(
                f"lr={self.lr:g} times weight_decay={self.weight_decay:g} is not below 1: a step "
                "would turn the sign of every weight"
            )


class StageModule(L.LightningModule, ABC):
    """A backbone with a stage's objective.

    Optimization is manual: a step is a list of batches, as many as the token budget asks for, and
    losses are divided by counts over the whole global batch, which no automatic accumulation can
    do.

    Args:
        token_budget: tokens of a batch.
        steps: optimizer steps of the whole stage.
        seed: of dropout.
    """

    empty: str  # what a step without targets lacks, and what to do about it
    label: str  # "2/4 warmup": the recipe's, for callbacks
    measures: tuple[str, ...]  # what it logs under `validation/`, as far as rows allow
    masking: Masking | None = None  # what hides parts of samples, in the data workers
    dims: Sequence[int] = ()  # widths of the embedding that it trains, the full one last
    exchanges = False  # TARGETs are validated behind other samples' CONTEXTs too

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
        self._totals: dict[str, Tensor] = {}  # of validation, on this rank
        self._has_learnt = self._said_empty = False
        self._dummies: tuple[Batch, Batch] | None = None  # see `aligned`

    def configure_model(self) -> None:
        strategy = self.trainer.strategy
        if not isinstance(strategy, FullySharded):
            return
        self._dummies = self._make_dummies()
        shard(
            [part for part in self.children() if any(p.requires_grad for p in part.parameters())],
            blocks=self.backbone.blocks,
            mesh=strategy.device_mesh["data_parallel"],
            compute_dtype=self.gathered_dtype,
        )

    @property
    def gathered_dtype(self) -> torch.dtype | None:
        """What sharded parameters are gathered in; None for their own: adapters stay in float32
        beside a base that is in bfloat16 already.
        """
        everything_trains = all(p.requires_grad for p in self.backbone.parameters())
        half = self.backbone.compute_dtype != torch.float32
        return self.backbone.compute_dtype if half and everything_trains else None

    def collator(self, *, validating: bool, device: torch.device | None = None) -> Collator:
        """What makes batches of samples, in the data workers.

        Args:
            device: where the module will be when it takes them; None if it is there already.
        """
        return Collator(
            self.backbone.planner(self.policy, device),
            token_budget=self.token_budget,
            exchange=validating and self.exchanges,
        )

    @abstractmethod
    def accumulate(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Run the backward passes of one step.

        Args:
            batches: of this rank, on the host.

        Returns:
            Metrics to log under `train/`, () float each, exact over ranks; among them `targets`,
            the number of predictions that the step learns from.
        """

    @abstractmethod
    def measure(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Sums over one validation step of this rank, () float each; `means` divides them."""

    @abstractmethod
    def means(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Validation sums over all steps and ranks to the numbers logged under `validation/`."""

    @abstractmethod
    def pictures(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """Pictures (float arrays H, W, 3 in [0, 1]) or texts of what the stage does on validation
        rows, by name.
        """

    @abstractmethod
    def summary_line(self, metrics: dict[str, float]) -> str:
        """One sentence on whether the stage did its work, from its validation metrics."""

    def training_step(self, batches: Sequence[Batch], batch_idx: int) -> None:
        step = self.global_step
        # Dropout follows from the step alone, so a resumed run needs no generator state.
        torch.manual_seed(mix(self.seed, step, rank()))
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        optimizer.zero_grad()
        metrics = self.gradients(batches)
        metrics["lr"] = torch.tensor(scheduler.get_last_lr()[0])
        # The one wait for the device, when all but the optimizer's work is queued.
        targets, norm = torch.stack([metrics.pop("targets"), metrics["gradient_norm"]]).tolist()
        if not math.isfinite(norm):
            raise self._bad_gradient(norm, batches)
        self._has_learnt |= targets > 0
        if not (targets or self._said_empty):
            self._said_empty = True
            log.warning("step %d: %s (said once)", step, self.empty)
        optimizer.step()
        scheduler.step()
        # The trainer's own count for loggers is one behind after some resumes.
        values = {f"train/{name}": value for name, value in metrics.items()}
        self.log_dict(values | {"step": torch.tensor(float(step))})

    def _bad_gradient(self, norm: float, batches: Sequence[Batch]) -> UserError:
        """What to say of a step that is not taken; all its rows are written to `bad_batch.txt`."""
        row_ids = [row_id for batch in batches for row_id in batch.row_ids]
        ids = list(dict.fromkeys(row_id for part in all_objects(row_ids) for row_id in part))
        shown = ", ".join(ids[:SHOWN_ROWS]) + (", ..." if len(ids) > SHOWN_ROWS else "")
        path = Path(self.trainer.default_root_dir) / "bad_batch.txt"
        if rank() == 0:
            path.write_text("".join(f"{row_id}\n" for row_id in ids))
        return UserError(
            f"step {self.global_step}: the gradient is {norm}; the batch had the rows {shown} "
            f"(all {len(ids)} in {path}). The weights are as before this step"
        )

    def gradients(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Run a step up to its optimizer, and return its metrics."""
        # Losses are float32 whatever `trainer.precision` is, which only the backbone follows.
        with torch.autocast(self.device.type, enabled=False):
            metrics = self.accumulate(batches)
        sum_gradients(self.parameters())
        norm = clip_gradients(self.parameters(), self.optimization.clip_norm)
        return metrics | {"gradient_norm": norm}

    def validation_step(self, batches: Sequence[Batch], batch_idx: int) -> None:
        with torch.autocast(self.device.type, enabled=False):
            sums = self.measure(batches)
        for name, value in sums.items():
            self._totals[name] = self._totals.get(name, 0) + value

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["has_learnt"] = self._has_learnt

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._has_learnt = checkpoint["has_learnt"]

    def on_train_end(self) -> None:
        if not self._has_learnt and self.global_step >= self.steps:
            raise UserError(f"the stage has learnt nothing: in all of its steps {self.empty}")

    def on_validation_epoch_end(self) -> None:
        reshard(self)  # a forward pass alone leaves parameters gathered
        if self._totals:
            sums = {name: global_sum(value) for name, value in self._totals.items()}
            found = {f"validation/{n}": v for n, v in self.means(sums).items()}
            self.log_dict(found | {"step": torch.tensor(float(self.global_step))})
            self._totals.clear()

    def configure_optimizers(self) -> Any:
        values = self.optimization
        optimizer = torch.optim.AdamW(
            [p for p in self.parameters() if p.requires_grad],
            lr=values.lr,
            betas=values.betas,
            weight_decay=values.weight_decay,
            fused=True,
        )
        scheduler = get_scheduler(
            values.schedule, optimizer, values.warmup_steps, num_training_steps=self.steps
        )
        return [optimizer], [scheduler]

    def aligned(self, batches: Sequence[Batch]) -> list[Batch]:
        """Batches on the host, and dummies where parameters are sharded and other ranks need them.

        Sharded parameters are gathered by all ranks together, each time a part of the model is
        used. So every rank runs as many batches, and the vision tower for the same ones: one
        without images beside other ranks' images gets an image that no token reads, and ranks with
        fewer batches add some of which nothing is read.
        """
        if self._dummies is None:
            return list(batches)
        text, image = self._dummies
        # Here alone a step waits on the host: ranks exchange how many passes each runs.
        ranks = all_objects([len(batch.grids) > 0 for batch in batches])
        anywhere = [any(has_images) for has_images in zip_longest(*ranks, fillvalue=False)]
        padded = [*batches, *[text] * (len(anywhere) - len(batches))]
        return [
            replace(batch, patches=image.patches, grids=image.grids, vision=image.vision)
            if seen and not len(batch.grids)
            else batch
            for batch, seen in zip(padded, anywhere, strict=True)
        ]

    def _make_dummies(self) -> tuple[Batch, Batch]:
        """The shortest text, without samples that are read, and the smallest image."""
        plan = self.backbone.planner(self.policy)
        side = self.processor.patch_size * self.processor.merge_size
        items = (Item("."), Item(IMAGE_SLOT, (Image.new("RGB", (side, side)),)))
        text, image = (
            pack([self.processor(item, None, key=0, row_id="dummy")], plan) for item in items
        )
        rows = ("bottleneck_rows", "keys", "roles", "pools", "places")
        unread = {name: getattr(text, name)[:0] for name in rows}
        return replace(text, **unread, row_ids=()), image
