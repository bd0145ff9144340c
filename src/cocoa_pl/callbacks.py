"""What a person sees while a stage trains: a progress line, and pictures at validation."""

import logging
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cocoa_pl.loggers import show

log = logging.getLogger(__name__)


class StageProgress(L.Callback):
    """Stage, step, loss, samples/s and time left: a bar in a terminal, a line now and then in a log
    file.

    Args:
        label: e.g. "2/4 warmup".
        steps: of the stage.
        lines: how many lines a log file gets for the whole stage.
    """

    def __init__(self, label: str, *, steps: int, console: Console, lines: int) -> None:
        self.label = label
        self.steps = steps
        self.console = console
        self.every = max(1, steps // lines)
        self.progress: Progress | None = None
        self._samples = 0
        self._tokens = 0
        self._since = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first_step = trainer.global_step
        self._started = self._since = time.perf_counter()
        if self.console.is_terminal and trainer.is_global_zero:
            self.progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[told]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.progress.add_task(
                self.label, total=self.steps, completed=trainer.global_step, told=""
            )
            self.progress.start()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,  # `stages.chunks.Step`
        batch_idx: int,
    ) -> None:
        world = trainer.world_size
        self._samples += batch.num_rows * world
        self._tokens += batch.num_tokens * world
        step = trainer.global_step
        if batch.skipped:
            log.warning("skipped %d bad rows, first: %s", len(batch.skipped), batch.skipped[0])
        if step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            seconds = time.perf_counter() - self._since
            pl_module.log_dict(
                {
                    "train/samples_per_second": self._samples / seconds,
                    "train/tokens_per_second": self._tokens / seconds,
                }
            )
            self._told = self._line(trainer)
            self._samples = self._tokens = 0
            self._since = time.perf_counter()
            if self.progress is not None:
                self.progress.update(self.task, told=self._told)
        if self.progress is not None:
            self.progress.update(self.task, completed=step)
        elif step % self.every == 0 and trainer.is_global_zero:
            left = (time.perf_counter() - self._started) / (step - self._first_step)
            left *= self.steps - step
            log.info(
                "%s %d/%d %s %d:%02d left",
                self.label,
                step,
                self.steps,
                self._told,
                *divmod(int(left), 60),
            )

    def _line(self, trainer: L.Trainer) -> str:
        loss = trainer.callback_metrics.get("train/loss", torch.tensor(torch.nan))
        rate = self._samples / (time.perf_counter() - self._since)
        return f"loss {loss.item():.3f}  {rate:.0f} samples/s"

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    _told = ""


class Pictures(L.Callback):
    """Shows what the stage does on the first validation batch, each time it validates."""

    def __init__(self, run_dir: Path, stage: str) -> None:
        self.run_dir = run_dir
        self.stage = stage

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,  # `stages.chunks.Step`
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx:
            return
        # On all ranks, because sharded parameters are gathered by all together.
        pictures: dict[str, Any] = pl_module.illustrate(batch)  # type: ignore[operator]
        if not trainer.is_global_zero:
            return
        loggers: list[Logger] = trainer.loggers
        for name, content in pictures.items():
            show(loggers, self.run_dir, f"{self.stage}/{name}", content, trainer.global_step)
