"""Lightning loggers of one stage of a run: a plain CSV always, TensorBoard or W&B by config."""

import csv
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from PIL import Image

from cocoa_pl.errors import UserError

LoggerFactory = Callable[[Path, str], list[Logger]]


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
        self._prepare()

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

    def _comes_again(self, step: int, name: str) -> bool:
        """Validation after the step of the checkpoint is over, unless it is the stage's last."""
        is_over = name.startswith("validation/") and step == self.start_step < self.steps
        return step >= self.start_step and not is_over

    @rank_zero_only
    def _prepare(self) -> None:
        kept = [["stage", "step", "name", "value"]]
        if self.path.exists():
            with self.path.open(newline="") as file:
                rows = list(csv.reader(file))[1:]
            kept += [
                r for r in rows if r[0] != self.stage or not self._comes_again(int(r[1]), r[2])
            ]
        with self.path.open("w", newline="") as file:
            csv.writer(file).writerows(kept)


def tensorboard(run_dir: Path, stage: str) -> list[Logger]:
    """One TensorBoard run for each stage, below `tensorboard/`."""
    return [TensorBoardLogger(run_dir, name="tensorboard", version=stage)]


class Wandb:
    """One Weights & Biases run for each stage, grouped by run folder."""

    def __init__(self, *, project: str, offline: bool) -> None:
        if find_spec("wandb") is None:
            raise UserError('logger=wandb needs Weights & Biases: pip install "cocoa-pl[wandb]"')
        self.project = project
        self.offline = offline

    def __call__(self, run_dir: Path, stage: str) -> list[Logger]:
        return [
            WandbLogger(
                project=self.project,
                name=f"{run_dir.name}-{stage}",
                group=run_dir.name,
                save_dir=run_dir,
                offline=self.offline,
            )
        ]


def nothing(run_dir: Path, stage: str) -> list[Logger]:
    """Only `metrics.csv`."""
    return []


def show(
    loggers: list[Logger], run_dir: Path, name: str, content: str | NDArray[np.float32], step: int
) -> None:
    """A text or a picture (H, W, 3) in [0, 1] to `pictures/` and every logger that can show it."""
    folder = run_dir / "pictures"
    folder.mkdir(exist_ok=True)
    stem = name.replace("/", "_")
    if isinstance(content, str):
        (folder / f"{stem}.md").write_text(content + "\n")
    else:
        Image.fromarray((content * 255).astype(np.uint8)).save(folder / f"{stem}.png")
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger) and isinstance(content, str):
            logger.experiment.add_text(name, content, step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, content, step, dataformats="HWC")
        elif isinstance(logger, WandbLogger) and isinstance(content, str):
            logger.log_text(name, columns=["text"], data=[[content]], step=step)
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [content], step=step)
