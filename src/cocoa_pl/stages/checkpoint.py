"""Trainer checkpoints: what trains is saved, and what is loaded must be exactly that, by name.

A checkpoint is a file, or with sharded parameters a folder to which every process writes its share
(`distributed/strategies.py`).
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_shards

from cocoa_pl.distributed.processes import ECHO_SECONDS, handle_stops, is_lost_worker, stop_handlers
from cocoa_pl.distributed.strategies import (
    META,
    MODEL,
    FullySharded,
    first_reason,
    readable,
    saved_below,
    trained_state,
)
from cocoa_pl.errors import UserError
from cocoa_pl.models.exported import digest_of

LAST = Path("checkpoints") / "last.ckpt"  # in a run folder


def check_names(expected: set[str], found: set[str], *, where: str) -> None:
    """Refuse a checkpoint that is not exactly what is needed.

    Raises:
        UserError: naming missing and unexpected keys. Loading adapters by halves is how peers lose
            them silently.
    """
    for problem, names in (("misses", expected - found), ("has unexpected", found - expected)):
        if names:
            raise UserError(f"{where} {problem} {len(names)} weights, first {sorted(names)[0]}")


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's content, on the CPU; of a folder without its tensors (see `read_weights`).

    Raises:
        UserError: if there is none, or it cannot be read.
    """
    if not (path.is_file() or (path / META).is_file()):
        raise UserError(f"there is no checkpoint {path}")
    file = path / META if path.is_dir() else path
    with readable(path, RuntimeError, KeyError, ValueError):
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or "cocoa" not in content:
        raise UserError(f"{path} is not a checkpoint of cocoa_pl")
    return content


def read_weights(path: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    """The backbone's trained weights of a checkpoint that `read` has opened, named as in the
    backbone itself; those of shards are put together by this process alone.
    """
    weights: dict[str, Tensor] = content.get("state_dict", {})  # a folder's content has none
    if path.is_dir():
        with readable(path):
            for name, entry in saved_below(path, f"{MODEL}.").items():
                weights[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
            load_shards({MODEL: weights}, checkpoint_id=path, no_dist=True)
    own = "backbone."
    return {n.removeprefix(own): value for n, value in weights.items() if n.startswith(own)}


def read_chosen(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a checkpoint that a metric has chosen (`read_weights`), and what the lineage
    says of it: the steps it has learnt, and the score.

    Raises:
        UserError: if there is none, or it cannot be read.
    """
    content = read(path)
    found = {
        state["monitor"].removeprefix("validation/"): float(state["best_model_score"])
        for state in content["callbacks"].values()
        if Path(state.get("best_model_path", "")).name == path.name
    }
    chosen = {"steps": content["global_step"], "checkpoint": path.stem, "validation": found}
    return read_weights(path, content), chosen


def base_of(backbone: nn.Module) -> str:
    """A digest of the weights that do not train, which a checkpoint does not hold."""
    frozen = {name: p for name, p in backbone.named_parameters() if not p.requires_grad}
    return digest_of(frozen)


def check_base(content: dict[str, Any], base: str, *, where: str) -> None:
    """Refuse a checkpoint of adapters that were trained on other weights than `base_of` names:
    they would give other vectors.

    Raises:
        UserError: if it was written on another base.
    """
    if content["cocoa"]["base"] != base:
        raise UserError(
            f"{where} was trained on another base than the one that is there now: the model that "
            "the run started from was changed since"
        )


def begin_another(path: Path) -> str:
    """What to do where a run cannot go on exactly, for the end of a message."""
    command = f"cocoa export {shlex.quote(str(path))} --to hf --out FOLDER"
    return f"begin another run with its weights: {command}, then init_from=FOLDER instead of resume"


def load_trained(backbone: nn.Module, state: dict[str, Tensor], *, where: str) -> None:
    """Put the weights that `read_weights` finds into a backbone, all of them or none.

    Raises:
        UserError: for missing or unexpected weights, by name.
    """
    check_names(set(trained_state(backbone)), set(state), where=where)
    backbone.load_state_dict(state, strict=False)


class PlainFile(TorchCheckpointIO):
    """Writes a checkpoint beside its path and puts it there when it is whole. Lightning's way takes
    all of it into memory and then through TMPDIR, which may be full where the run's own disk has
    room.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        partial = Path(path).with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt`: every few steps, at the end of a stage, and when the run is to stop; once
    more behind a validation, for what other callbacks make of it (the best score, patience).

    Ctrl-C, SIGTERM and SIGUSR1 end the run after the step at hand, so the file is never of half a
    step.

    Args:
        path: of the file.
        every: steps between two saves.
        position: where in the run this is: stage, stage_index and the lineage of the stages before;
            and the digest of the base (`base_of`).
    """

    def __init__(self, path: Path, *, every: int, position: dict[str, Any]) -> None:
        self.path = path
        self.every = every
        self.position = position
        self.stopped = False
        self._saved = -1  # step
        self._asked_at: float | None = None
        self._before = stop_handlers()  # not the trainer's, which exchange among ranks

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.path.exists() and self.path.is_dir() != isinstance(trainer.strategy, FullySharded):
            kept = "sharded" if self.path.is_dir() else "whole"
            raise UserError(
                f"{self.path} holds {kept} parameters, and a run goes on with them {kept}: keep "
                f"the strategy of its config, or {begin_another(self.path)}"
            )
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # not a user's own plugin
            trainer.strategy.checkpoint_io = PlainFile()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Not at on_fit_start: the trainer then puts its own SIGTERM handler over ours.
        handle_stops(dict.fromkeys(self._before, self._stop))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn is TrainerFn.VALIDATING:  # the closing one: all steps are saved
            handle_stops(self._before)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        kept = trained_state(pl_module)
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}
        checkpoint["cocoa"] = self.position

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        found = set(checkpoint["state_dict"])
        check_names(set(trained_state(pl_module)), found, where="the checkpoint to resume")
        for state in checkpoint["callbacks"].values():
            if "dirpath" in state:  # ModelCheckpoint forgets the best score in a folder that moved
                state["dirpath"] = os.path.realpath(self.path.parent)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        # A signal may reach the ranks at different steps; they must end at the same one.
        asked = self._asked_at is not None
        self.stopped = trainer.strategy.reduce_boolean_decision(asked, all=False)
        is_last = step >= trainer.max_steps
        if self.stopped or is_last:
            trainer.should_stop = True  # asks for a validation
            if not is_last and step % trainer.val_check_interval:
                trainer.limit_val_batches = 0
        if step % self.every == 0 or is_last or self.stopped:
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn is TrainerFn.FITTING and self._saved == trainer.global_step:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        asked = self._asked_at is not None  # while the last step was validated
        self.stopped = trainer.strategy.reduce_boolean_decision(asked, all=False)
        handle_stops(self._before)
        if self._saved != trainer.global_step:  # a callback ended the stage
            self._save(trainer)

    def on_exception(self, *_: Any) -> None:
        handle_stops(self._before)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self._asked_at = self._asked_at or now
        if now - self._asked_at > ECHO_SECONDS:  # asked twice: at once
            handle_stops(self._before)
            signal.raise_signal(number)

    def _save(self, trainer: L.Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        step, path = trainer.global_step, self.path
        if isinstance(trainer.strategy, FullySharded):
            again = "-validated" if self._saved == step else ""
            path = path.with_name(f"{self.position['stage_index']}-{step}{again}.shards")
        reason = ""
        try:
            trainer.save_checkpoint(path)
        except (OSError, RuntimeError, CheckpointException) as error:
            if isinstance(error, RuntimeError) and is_lost_worker(error):  # while this writes
                raise
            reason = first_reason(error)
            # What rank 0 alone writes the others wait behind; what all write fails on all of them.
            trainer.strategy.barrier()
        if trainer.strategy.reduce_boolean_decision(bool(reason), all=False):
            if path != self.path:
                shutil.rmtree(path, ignore_errors=True)
            kept = f"{self.path} is as it was" if self.path.exists() else "there is none yet"
            raise UserError(
                f"the checkpoint of step {step} cannot be written "
                f"({reason or 'on another rank'}); {kept}. Make room, then resume the run"
            )
        self._saved = step
        if trainer.is_global_zero and path != self.path:
            _link(self.path, path)


def _link(path: Path, folder: Path) -> None:
    """Let `path` be a link to a new folder of shards, from one moment to the next."""
    link = path.with_name("last.link")
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    os.replace(link, path)
    for old in path.parent.glob("[0-9]*-[0-9]*.shards"):  # a user's copies have other names
        if old != folder:
            shutil.rmtree(old)
