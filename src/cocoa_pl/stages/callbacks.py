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
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image
from rich.progress import Progress, TextColumn
from torch import Tensor

from cocoa_pl.data.batch import Batch
from cocoa_pl.data.masking import hidden_patches, with_noise
from cocoa_pl.data.processor import Processor
from cocoa_pl.errors import UserError, extra, first_line
from cocoa_pl.models.backbone import Backbone

log = logging.getLogger(__name__)

LINES = 10  # about a stage, in a log file
MAX_PICTURES = 8

Picture = NDArray[np.float32]  # (H, W, 3) in [0, 1]


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
        self._since = time.perf_counter()
        console = rich.get_console()
        self.progress = Progress(
            *Progress.get_default_columns(),
            TextColumn("{task.fields[line]}"),
            console=console,
            disable=not (self.bar and console.is_terminal and trainer.is_global_zero),
        )
        steps, done = trainer.max_steps, trainer.global_step
        self.progress.add_task(str(pl_module.label), total=steps, completed=done, line="")
        self.progress.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        world = trainer.world_size  # a batch is a list of `Batch`
        self._samples += sum(one.num_rows for one in batch) * world
        self._tokens += sum(one.num_tokens for one in batch) * world
        step, steps = trainer.global_step, trainer.max_steps
        is_logged = step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        is_line = self.progress.disable and step % max(1, steps // LINES) == 0
        seconds = time.perf_counter() - self._since
        if is_logged or is_line:
            loss = trainer.callback_metrics.get("train/loss", torch.tensor(torch.nan))
            rate = f"{self._samples / seconds:.0f} samples/s"
            self._line = f"{step}/{steps} loss {loss.item():.3f}  {rate}"
        if is_logged:
            pl_module.log_dict(
                {
                    "train/samples_per_second": self._samples / seconds,
                    "train/tokens_per_second": self._tokens / seconds,
                }
            )
            self._samples = self._tokens = 0
            self._since = time.perf_counter()
        (task,) = self.progress.tasks
        self.progress.update(task.id, completed=step, line=self._line)
        if is_line and trainer.is_global_zero:
            left = divmod(int(task.time_remaining or 0), 60)
            log.info("%s %s %d:%02d left", task.description, self._line, *left)

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
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if batch_idx:
            return
        # On all ranks, because sharded parameters are gathered by all together.
        pictures: dict[str, Any] = pl_module.pictures(batch)
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


def hidden_text(batch: Batch, guesses: Tensor, processor: Processor) -> str:
    """The first samples' CONTEXT | TARGET with hidden tokens as blanks, and below it with the
    model's guesses in their place (Markdown).

    Args:
        batch: on the host.
        guesses: (M) int64, what the model takes the hidden tokens for.
    """
    decode = processor.tokenizer.decode
    unseen = {processor.image_id, processor.vision_start_id, processor.vision_end_id}
    guessed = dict(zip((batch.token_rows + 1).tolist(), guesses.tolist(), strict=True))
    ids = dict(enumerate(batch.input_ids.tolist()))
    ids |= dict(zip((batch.token_rows + 1).tolist(), batch.targets.tolist(), strict=True))
    lines, start = [], 0
    lengths = batch.segment_lengths[: min(MAX_PICTURES, batch.num_samples)].sum(1).tolist()
    for length, bottleneck in zip(lengths, batch.bottleneck_rows.tolist(), strict=False):
        shown = [p for p in range(start, start + length) if ids[p] not in unseen]
        words = {p: " | " if p in bottleneck else decode([ids[p]]) for p in shown}
        masked = "".join("▁" if p in guessed else words[p] for p in shown)
        rebuilt = "".join(decode([guessed[p]]) if p in guessed else words[p] for p in shown)
        masked, rebuilt = (" ".join(t.split()).replace("`", "'") for t in (masked, rebuilt))
        lines.append(f"- `{masked}`\n  → `{rebuilt}`")
        start += length
    return "\n".join(lines)


def image_triptychs(backbone: Backbone, batch: Batch, predicted: Tensor) -> Picture:
    """Original, masked and rebuilt image side by side, one row for each of the first images.

    Args:
        batch: on the device of the model, with hidden visual tokens.
        predicted: (N, merge_size ** 2 * B), normalised pixels of the hidden visual tokens.
    """
    merge_size = backbone.merge_size
    clean = backbone.pixels(batch)
    patches = predicted.to(clean.dtype).view(-1, clean.shape[1])
    rebuilt = clean.index_copy(0, hidden_patches(batch, merge_size), patches)
    versions = (clean, with_noise(clean, batch, merge_size=merge_size), rebuilt)
    rows, start = [], 0
    for grid in batch.grids.tolist()[:MAX_PICTURES]:
        stop = start + grid[0] * grid[1] * grid[2]
        rows.append(
            np.concatenate([unpatchify(backbone, v[start:stop], grid) for v in versions], axis=1)
        )
        start = stop
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows]
    return np.concatenate(padded)


def unpatchify(backbone: Backbone, pixels: Tensor, grid: list[int]) -> Picture:
    """Normalised patches (p, B) of one image back to (H, W, 3) in [0, 1]."""
    merge, (_, height, width) = backbone.merge_size, grid
    channels = len(backbone.byte_values)
    side = int((pixels.shape[1] // channels) ** 0.5)
    low, high = backbone.byte_values[:, :1], backbone.byte_values[:, -1:]
    values = (pixels.float().view(len(pixels), channels, -1) - low) / (high - low)
    blocks = values.view(height // merge, width // merge, merge, merge, channels, side, side)
    image = blocks.permute(0, 2, 5, 1, 3, 6, 4).reshape(height * side, width * side, channels)
    return image.clamp(0, 1).cpu().numpy().astype(np.float32)


def heat_map(similarity: Tensor) -> Picture:
    """A similarity matrix in [-1, 1] as colours."""
    values = (similarity.float().cpu().numpy() + 1) / 2
    coloured = colormaps["viridis"](values)[..., :3].astype(np.float32)
    return coloured.repeat(4, axis=0).repeat(4, axis=1)


class Metrics(Logger):
    """`metrics.csv` of the whole run: one value a row, appended as it comes.

    Columns: stage, step, name, value; `step` counts the optimizer steps behind the weights that the
    value was measured with. What a resumed run writes again is replaced, not doubled.
    """

    name = "metrics"
    version = ""  # the stage

    def __init__(self, run_dir: Path, stage: str, *, start_step: int, steps: int) -> None:
        super().__init__()
        self.path = run_dir / "metrics.csv"
        self.version = stage
        self.start_step = start_step
        self.steps = steps
        self._drop_what_comes_again()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        rows = [(self.version, step, n, f"{v:.6g}") for n, v in metrics.items() if n != "epoch"]
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
            rows += [r for r in before if r[0] != self.version or not comes_again(int(r[1]), r[2])]
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
