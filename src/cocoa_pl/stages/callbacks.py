"""What a stage shows and writes while it trains: progress, metrics, loggers and pictures."""

import csv
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import rich
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cocoa_pl.errors import UserError, extra, first_line

log = logging.getLogger(__name__)

LINES = 10  # about a stage, in a log file


class StageProgress(L.Callback):
    """Stage, step, loss, samples/s and time left: a bar in a terminal, a line now and then in a log
    file; logs samples and tokens a second.
    """

    bar = True  # in a terminal; False with `trainer.enable_progress_bar=false`, or another bar

    def __init__(self) -> None:
        self.progress = Progress(disable=True)
        self._samples = self._tokens = 0
        self._line = ""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first_step = trainer.global_step
        self._started = self._since = time.perf_counter()
        self.label, self.steps = str(pl_module.label), trainer.max_steps
        console = rich.get_console()
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[line]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (self.bar and console.is_terminal and trainer.is_global_zero),
        )
        self.task = self.progress.add_task(
            self.label, total=self.steps, completed=trainer.global_step, line=""
        )
        self.progress.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        world = trainer.world_size  # a batch is a list of `Batch`
        self._samples += sum(one.num_rows for one in batch) * world
        self._tokens += sum(one.num_tokens for one in batch) * world
        step = trainer.global_step
        if step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            seconds = time.perf_counter() - self._since
            pl_module.log_dict(
                {
                    "train/samples_per_second": self._samples / seconds,
                    "train/tokens_per_second": self._tokens / seconds,
                }
            )
            loss = trainer.callback_metrics.get("train/loss", torch.tensor(torch.nan))
            self._line = f"loss {loss.item():.3f}  {self._samples / seconds:.0f} samples/s"
            self._samples = self._tokens = 0
            self._since = time.perf_counter()
        if not self.progress.disable:
            self.progress.update(self.task, completed=step, line=self._line)
        elif step % max(1, self.steps // LINES) == 0 and trainer.is_global_zero:
            left = (time.perf_counter() - self._started) / (step - self._first_step)
            minutes, seconds = divmod(int(left * (self.steps - step)), 60)
            done = f"{self.label} {step}/{self.steps}"
            log.info("%s %s %d:%02d left", done, self._line, minutes, seconds)

    def on_train_end(self, *_: Any) -> None:
        self.progress.stop()

    def on_exception(self, *_: Any) -> None:
        self.progress.stop()


class Pictures(L.Callback):
    """Shows what the stage does on the first validation batch, each time it validates: in
    `pictures/`, and in every logger that can show it.
    """

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,  # list[Batch]
        batch_idx: int,
        *_: Any,
    ) -> None:
        if batch_idx:
            return
        # On all ranks, because sharded parameters are gathered by all together.
        pictures: dict[str, Any] = pl_module.pictures(batch)  # type: ignore[operator]
        if not trainer.is_global_zero:
            return
        stage, step = str(pl_module.label).split()[-1], trainer.global_step
        folder = Path(trainer.default_root_dir) / "pictures"
        folder.mkdir(exist_ok=True)
        for name, content in pictures.items():
            title, is_text = f"{stage}/{name}", isinstance(content, str)
            if is_text:
                (folder / f"{stage}_{name}.md").write_text(content + "\n")
            else:
                picture = Image.fromarray((content * 255).astype(np.uint8))
                picture.save(folder / f"{stage}_{name}.png")
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger) and is_text:
                    logger.experiment.add_text(title, content, step)
                elif isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_image(title, content, step, dataformats="HWC")
                elif isinstance(logger, WandbLogger) and is_text:
                    logger.log_text(title, columns=["text"], data=[[content]], step=step)
                elif isinstance(logger, WandbLogger):
                    logger.log_image(title, [content], step=step)


class Metrics(Logger):
    """`metrics.csv` of the whole run: one value a row, appended as it comes.

    Columns: stage, step, name, value; `step` counts the optimizer steps behind the weights that the
    value was measured with. What a resumed run writes again is replaced, not doubled.
    """

    def __init__(self, run_dir: Path, stage: str, *, start_step: int, steps: int) -> None:
        super().__init__()
        self.path = run_dir / "metrics.csv"
        self.stage = stage
        self.start_step = start_step
        self.steps = steps
        self._drop_what_comes_again()

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return self.stage

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        rows = [(self.stage, step, n, f"{v:.6g}") for n, v in metrics.items() if n != "epoch"]
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerows(rows)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The resolved config lies beside it already."""

    @rank_zero_only
    def _drop_what_comes_again(self) -> None:
        def comes_again(step: int, name: str) -> bool:
            # Validation after the step of the checkpoint is over, unless it is the stage's last.
            is_over = name.startswith("validation/") and step == self.start_step < self.steps
            return step >= self.start_step and not is_over

        rows = [["stage", "step", "name", "value"]]
        if self.path.exists():
            with self.path.open(newline="") as file:
                before = list(csv.reader(file))[1:]
            rows += [r for r in before if r[0] != self.stage or not comes_again(int(r[1]), r[2])]
        with self.path.open("w", newline="") as file:
            csv.writer(file).writerows(rows)


def check_login(*, offline: bool) -> None:
    """Find out whether Weights & Biases lets this machine in, before hours of training.

    Raises:
        UserError: if not.
    """
    wandb = extra("wandb", of="wandb", wanted_by="logger=wandb")
    if offline or os.environ.get("WANDB_MODE", "online") != "online":
        return
    try:
        wandb.login()
    except wandb.Error as error:
        raise UserError(
            f"logger=wandb: {first_line(error)} Or give logger.wandb.offline=true"
        ) from error


def close(loggers: Sequence[Logger]) -> None:
    """End what loggers of a stage keep for the whole process: the next stage's would join it."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
