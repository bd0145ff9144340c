"""What every stage shares: one optimizer step a batch, exact sums over chunks and ranks, exact
resume.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import get_scheduler

from cocoa_pl.attention import Policy
from cocoa_pl.batch import Batch, Rows
from cocoa_pl.data.tokenize import Processor
from cocoa_pl.distributed import global_sums, rank, sum_gradients
from cocoa_pl.errors import UserError
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.randomness import mix


@dataclass(frozen=True)
class Optimization:
    """AdamW with warm-up and decay.

    Args:
        schedule: a name known to `transformers.get_scheduler`.
        clip_norm: bound of the global gradient norm.
    """

    lr: float
    weight_decay: float
    betas: tuple[float, float]
    schedule: str
    warmup_steps: int
    clip_norm: float


class StageModule(L.LightningModule, ABC):
    """A backbone with a stage's objective.

    Optimization is manual: a step holds as many micro-batches as the token budget asks for, and
        losses are divided by
    counts over the whole global batch, which no automatic accumulation can do.

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

    @abstractmethod
    def accumulate(self, rows: Rows) -> dict[str, Tensor]:
        """Run the backward passes of one global batch and return what to log, already exact over
        ranks.
        """

    @abstractmethod
    def measure(self, rows: Rows) -> dict[str, Tensor]:
        """Sums over a validation batch, by name; `means` divides them at the end."""

    @abstractmethod
    def means(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Validation sums over all batches and ranks to the numbers that are logged."""

    @abstractmethod
    def illustrate(self, rows: Rows) -> dict[str, Any]:
        """Pictures (float arrays H, W, 3 in [0, 1]) or texts of what the stage does on validation
        rows.
        """

    @abstractmethod
    def hand_over(self, metrics: dict[str, float]) -> str:
        """One sentence on whether the stage did its work, from its own validation measure."""

    def training_step(self, rows: Rows, batch_idx: int) -> None:
        # Dropout follows from the step alone, so a resumed run needs no generator state.
        torch.manual_seed(mix(self.seed, self.global_step, rank()))
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        optimizer.zero_grad()
        with self._local_gradients():
            metrics = self.accumulate(rows)
        sum_gradients(self.parameters())
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self.optimization.clip_norm)
        if not torch.isfinite(norm):
            raise UserError(
                f"step {self.global_step}: the gradient is {norm.item()}; rows of this batch: "
                + ", ".join(rows.batch.row_ids[: rows.num_rows])
            )
        metrics |= {"gradient_norm": norm, "lr": torch.tensor(scheduler.get_last_lr()[0])}
        optimizer.step()
        scheduler.step()
        self.log_dict({f"train/{name}": value for name, value in metrics.items()})

    def validation_step(self, rows: Rows, batch_idx: int) -> None:
        for name, value in self.measure(rows).items():
            total = self._validation_sums.get(name, torch.zeros((), device=value.device))
            self._validation_sums[name] = total + value

    def on_validation_epoch_end(self) -> None:
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

    def chunks(self, batch: Batch) -> list[Batch]:
        return batch.chunk(self.token_budget)

    @contextmanager
    def _local_gradients(self) -> Iterator[None]:
        """Keep DDP's reducer out: it would reduce once for each chunk, average, and wait for unused
        parameters.
        """
        wrapped = self.trainer.strategy.model if self._trainer else None
        if isinstance(wrapped, DistributedDataParallel):
            with wrapped.no_sync():
                yield
        else:
            yield
