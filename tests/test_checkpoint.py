"""A checkpoint holds all that trains, and is loaded completely or refused."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cocoa_pl.distributed.strategies import FullySharded, trained_state
from cocoa_pl.errors import UserError
from cocoa_pl.models.adapters import check_trained
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.loading import Loaded
from cocoa_pl.stages import checkpoint
from cocoa_pl.stages.checkpoint import LastCheckpoint
from tests.adapters import low_rank

LoadTiny = Callable[..., Loaded]


def adapted(load_tiny: LoadTiny) -> Backbone:
    """A backbone with adapters that look trained."""
    adapter = low_rank(alpha=4, use_dora=False, target_modules=[r".*language_model.*\.(q|v)_proj"])
    backbone = adapter(load_tiny().backbone)
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return backbone


def state_of(backbone: Backbone) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trained_state(backbone).items()}


def test_adapters_come_back_as_they_were(load_tiny: LoadTiny, tmp_path: Path) -> None:
    saved, other = state_of(adapted(load_tiny)), adapted(load_tiny)
    path, state = tmp_path / "last.ckpt", {f"backbone.{n}": v for n, v in saved.items()}
    torch.save({"state_dict": state | {"log_scale": torch.tensor(1.0)}, "cocoa": {}}, path)
    found = checkpoint.read_weights(path, checkpoint.read(path))
    checkpoint.load_trained(other, found, where="last.ckpt")
    assert found.keys() == saved.keys()
    assert all("lora_" in name for name in saved)
    for name, value in trained_state(other).items():
        assert torch.equal(value, saved[name])


def test_weights_that_do_not_fit_are_refused_by_name_and_change_nothing(
    load_tiny: LoadTiny,
) -> None:
    backbone, state = adapted(load_tiny), state_of(adapted(load_tiny))
    before = {n: v.clone() for n, v in backbone.state_dict().items()}
    name = min(n for n in state if "lora_A" in n)
    missing = {n: v + 1 for n, v in state.items() if n != name}
    unexpected = state | {"model.extra.lora_A.weight": torch.ones(1)}
    for wrong, message in (
        (missing, f"last.ckpt misses 1 weights, first {name}"),
        (unexpected, "last.ckpt has unexpected 1 weights, first model.extra.lora_A"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            checkpoint.load_trained(backbone, wrong, where="last.ckpt")
    assert all(torch.equal(backbone.state_dict()[n], v) for n, v in before.items())


def test_adapters_that_never_trained_are_refused_and_a_part_of_them_is_not(
    load_tiny: LoadTiny, caplog: pytest.LogCaptureFixture
) -> None:
    """Pairs of texts alone leave the vision tower's as they began."""
    state = state_of(adapted(load_tiny))
    first, *others = sorted(n for n in state if "lora_B" in n)
    check_trained(state, where="last.ckpt")
    assert not caplog.text
    state[first].zero_()
    check_trained(state, where="last.ckpt")
    assert f"last.ckpt: 1 of {1 + len(others)} lora_B are zero, first {first}" in caplog.text
    for name in others:
        state[name].zero_()
    with pytest.raises(UserError, match=r"last\.ckpt was never trained: all lora_B are zero"):
        check_trained(state, where="last.ckpt")


def test_adapters_on_another_base_are_refused(load_tiny: LoadTiny) -> None:
    first, other = adapted(load_tiny), adapted(load_tiny)
    content = {"cocoa": {"base": checkpoint.base_of(first)}}
    base = checkpoint.base_of(other)
    checkpoint.check_base(content, base, where="last.ckpt")  # adapters may differ
    frozen = next(p for p in other.parameters() if not p.requires_grad)
    frozen.data.view(-1)[0] += 1e-3
    with pytest.raises(UserError, match=r"last\.ckpt was trained on another base"):
        checkpoint.check_base(content, checkpoint.base_of(other), where="last.ckpt")


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: b"not a checkpoint at all",
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:100] + bytes(100) + whole[200:],
    ],
    ids=["empty", "text", "half", "zeros inside"],
)
def test_a_damaged_checkpoint_is_named_by_path(
    damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"cocoa": {}, "state_dict": {"a": torch.ones(500)}}, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"last\.ckpt cannot be read as a checkpoint"):
        checkpoint.read(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(UserError, match=r"last\.ckpt is not a checkpoint of cocoa_pl"):
        checkpoint.read(path)
    path.unlink()
    with pytest.raises(UserError, match=r"there is no checkpoint .*last\.ckpt"):
        checkpoint.read(path)


class Toy(L.LightningModule):
    """One trained weight, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Parameter(torch.zeros(1))
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return (self.trained - batch[0]).square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(path: Path, *, steps: int, every: int, module: Toy) -> None:
    saver = LastCheckpoint(path, every=every, position={"stage": "toy", "stage_index": 0})
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[saver],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path.parent,
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.ones(20, 1))))


def test_a_run_does_not_go_on_with_another_kind_of_checkpoint(tmp_path: Path) -> None:
    shards, file = tmp_path / "shards.ckpt", tmp_path / "file.ckpt"
    shards.mkdir()
    file.touch()
    with pytest.raises(UserError, match=r"shards\.ckpt holds sharded .*init_from=FOLDER instead"):
        fit(shards, steps=1, every=1, module=Toy())
    strategy = FullySharded()
    trainer = L.Trainer(accelerator="cpu", strategy=strategy, logger=False, barebones=True)
    saver = LastCheckpoint(file, every=1, position={})
    with pytest.raises(UserError, match=r"file\.ckpt holds whole .*init_from=FOLDER instead"):
        saver.setup(trainer, Toy(), "fit")


def test_a_checkpoint_holds_what_trains_and_needs_no_room_where_temporary_files_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))
    with pytest.raises(OSError, match="full"):
        tempfile.mkstemp()
    fit(tmp_path / "last.ckpt", steps=2, every=100, module=(module := Toy()))
    content = checkpoint.read(tmp_path / "last.ckpt")
    assert content["global_step"] == 2  # the last step is always saved
    assert content["cocoa"] == {"stage": "toy", "stage_index": 0}
    assert content["state_dict"] == {"trained": module.trained.detach()}
    assert [left.name for left in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    fit(path, steps=1, every=1, module=Toy())
    before = path.read_bytes()

    def full(content: Any, file: IO[bytes]) -> None:
        file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    message = r"of step 2 cannot be written \(no space left on device\); .*last\.ckpt is as it was"
    with pytest.raises(UserError, match=message):
        fit(path, steps=2, every=2, module=Toy())
    assert path.read_bytes() == before
    assert [left.name for left in tmp_path.iterdir()] == ["last.ckpt"]
