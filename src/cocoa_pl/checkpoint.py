"""Trainer checkpoints: what trains is saved, and what is loaded must be exactly that, by name."""

from __future__ import annotations

import os
import pickle
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from cocoa_pl.errors import UserError
from cocoa_pl.models.adapters import untouched_adapters

BACKBONE = "backbone."


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that train (with adapters: those and the heads, not the frozen base)."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


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
    """A checkpoint's content, on the CPU.

    Raises:
        UserError: if there is none, or it cannot be read.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        told = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} cannot be read as a checkpoint: {told}") from error
    if not isinstance(content, dict) or "cocoa" not in content:
        raise UserError(f"{path} is not a checkpoint of cocoa_pl")
    found: dict[str, Any] = content
    return found


def load_backbone(backbone: nn.Module, content: dict[str, Any], *, where: str) -> None:
    """Put a checkpoint's trained weights into a backbone, all of them or none.

    Raises:
        UserError: for missing, unexpected or untouched (all-zero) adapter weights, by name.
    """
    state = {
        name.removeprefix(BACKBONE): value
        for name, value in content["state_dict"].items()
        if name.startswith(BACKBONE)
    }
    check_names(set(trained_state(backbone)), set(state), where=where)
    if untouched := untouched_adapters(state):
        raise UserError(
            f"{where}: {len(untouched)} adapters were never trained, first {untouched[0]}"
        )
    backbone.load_state_dict(state, strict=False)


class LastCheckpoint(L.Callback):
    """Keeps `last.ckpt`: every few steps, at the end of a stage, and when somebody wants the run to
    stop.

    Ctrl-C and SIGTERM end the run after the step at hand, so the file is never of half a step. It
    is written beside the old one and then takes its place.

    Args:
        path: of the file.
        every: steps between two saves.
        position: where in the run this is: stage, stage_index and the lineage of the stages before.
    """

    def __init__(self, path: Path, *, every: int, position: dict[str, Any]) -> None:
        self.path = path
        self.every = every
        self.position = position
        self.stopped = False
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Not at on_fit_start: the trainer then puts its own SIGTERM handler over ours.
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._stop)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        kept = trained_state(pl_module)
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}
        checkpoint["cocoa"] = {
            **self.position,
            "finished": trainer.global_step >= trainer.max_steps,
        }

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        found = set(checkpoint["state_dict"])
        check_names(set(trained_state(pl_module)), found, where="the checkpoint to resume")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        # A signal may reach the ranks at different steps; they must end at the same one.
        asked = self._signal is not None
        self.stopped = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if self.stopped:
            trainer.should_stop = True
            if step % trainer.val_check_interval:  # should_stop asks for a validation of its own
                trainer.limit_val_batches = 0
        if step % self.every == 0 or step >= trainer.max_steps or self.stopped:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._give_back()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:  # asked twice: at once
            raise KeyboardInterrupt
        self._signal = number

    def _save(self, trainer: L.Trainer) -> None:
        partial = self.path.with_suffix(".partial")
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            os.replace(partial, self.path)
