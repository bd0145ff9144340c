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
from cocoa_pl.models.adapters import LowRank, check_trained
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.loading import Loaded
from cocoa_pl.stages import checkpoint
from cocoa_pl.stages.checkpoint import LastCheckpoint

LoadTiny = Callable[..., Loaded]


def adapted(load_tiny: LoadTiny) -> Backbone:
    """A backbone with adapters that look trained."""
    adapter = LowRank(
        lean_dora=False,
        dropout_on_base=True,
        rank=2,
        alpha=4,
        dropout=0.0,
        init="gaussian",
        use_dora=False,
        target_modules=[r".*language_model.*\.(q|v)_proj"],
    )
    backbone = adapter(load_tiny().backbone)
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return backbone


def state_of(backbone: Backbone) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trained_state(backbone).items()}


def test_only_what_trains_is_saved(load_tiny: LoadTiny) -> None:
    saved = trained_state(adapted(load_tiny))
    assert saved
    assert all("lora_" in name for name in saved)


def test_adapters_come_back_as_they_were(load_tiny: LoadTiny, tmp_path: Path) -> None:
    saved, other = state_of(adapted(load_tiny)), adapted(load_tiny)
    path, state = tmp_path / "last.ckpt", {f"backbone.{n}": v for n, v in saved.items()}
    torch.save({"state_dict": state | {"log_scale": torch.tensor(1.0)}, "cocoa": {}}, path)
    found = checkpoint.read_weights(path, checkpoint.read(path))
    checkpoint.load_trained(other, found, where="last.ckpt")
    assert found.keys() == saved.keys()
    for name, value in trained_state(other).items():
        assert torch.equal(value, saved[name])


def test_fully_tuned_weights_come_back_as_they_were(load_tiny: LoadTiny) -> None:
    trained, other = (load_tiny().backbone.requires_grad_(True) for _ in range(2))
    for parameter in trained.parameters():
        parameter.data.add_(0.1)
    checkpoint.load_trained(other, state_of(trained), where="last.ckpt")
    for name, value in trained.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_a_missing_adapter_is_refused_by_name(load_tiny: LoadTiny) -> None:
    backbone = adapted(load_tiny)
    state = state_of(backbone)
    name = sorted(n for n in state if "lora_A" in n)[0]
    del state[name]
    message = re.escape(f"last.ckpt misses 1 weights, first {name}")
    with pytest.raises(UserError, match=message):
        checkpoint.load_trained(backbone, state, where="last.ckpt")


def test_an_unexpected_adapter_is_refused_by_name(load_tiny: LoadTiny) -> None:
    backbone = adapted(load_tiny)
    state = state_of(backbone) | {"model.extra.lora_A.weight": torch.ones(1)}
    with pytest.raises(UserError, match=r"has unexpected 1 weights, first model\.extra\.lora_A"):
        checkpoint.load_trained(backbone, state, where="last.ckpt")


def test_adapters_that_never_trained_are_refused_and_a_part_of_them_is_not(
    load_tiny: LoadTiny,
) -> None:
    """Pairs of texts alone leave the vision tower's as they began."""
    state = state_of(adapted(load_tiny))
    first, *others = sorted(n for n in state if "lora_B" in n)
    state[first].zero_()
    check_trained(state, where="last.ckpt")
    for name in others:
        state[name].zero_()
    with pytest.raises(UserError, match=r"last\.ckpt was never trained: all lora_B are zero"):
        check_trained(state, where="last.ckpt")


def test_a_refused_checkpoint_changes_nothing(load_tiny: LoadTiny) -> None:
    backbone = adapted(load_tiny)
    before = {n: v.clone() for n, v in backbone.state_dict().items()}
    state = state_of(adapted(load_tiny))
    del state[next(iter(state))]
    with pytest.raises(UserError):
        checkpoint.load_trained(backbone, state, where="last.ckpt")
    assert all(torch.equal(backbone.state_dict()[n], v) for n, v in before.items())


def test_renamed_folders_of_shards_stay(tmp_path: Path) -> None:
    for name in ("0-100.shards", "0-200.shards", "best.shards"):
        (tmp_path / name).mkdir()
    checkpoint._link(tmp_path / "last.ckpt", tmp_path / "0-200.shards")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["0-200.shards", "best.shards", "last.ckpt"]


def test_adapters_on_another_base_are_refused(load_tiny: LoadTiny) -> None:
    first, other = adapted(load_tiny), adapted(load_tiny)
    content = {"cocoa": {"base": checkpoint.base_of(first)}}
    base = checkpoint.base_of(other)
    checkpoint.check_base(content, base, where="last.ckpt")  # adapters may differ
    frozen = next(p for p in other.parameters() if not p.requires_grad)
    frozen.data.view(-1)[0] += 1e-3
    with pytest.raises(UserError, match=r"last\.ckpt was trained on another base"):
        checkpoint.check_base(content, checkpoint.base_of(other), where="last.ckpt")
    checkpoint.check_base({"cocoa": {}}, base, where="an older one")


def test_a_missing_checkpoint_is_named_by_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no checkpoint .*none\.ckpt"):
        checkpoint.read(tmp_path / "none.ckpt")


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


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], torch.ones(2)])
def test_a_foreign_checkpoint_is_refused(content: object, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(content, path)
    with pytest.raises(UserError, match=r"last\.ckpt is not a checkpoint of cocoa_pl"):
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


@pytest.mark.parametrize(("steps", "every"), [(4, 2), (4, 100), (5, 2)])
def test_the_last_step_is_always_saved(steps: int, every: int, tmp_path: Path) -> None:
    path, module = tmp_path / "last.ckpt", Toy()
    fit(path, steps=steps, every=every, module=module)
    content = checkpoint.read(path)
    assert content["global_step"] == steps
    assert content["cocoa"] == {"stage": "toy", "stage_index": 0}
    assert content["state_dict"].keys() == {"trained"}
    assert torch.equal(content["state_dict"]["trained"], module.trained.detach())


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


def test_a_checkpoint_needs_no_room_where_temporary_files_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))
    with pytest.raises(OSError, match="full"):
        tempfile.mkstemp()
    fit(tmp_path / "last.ckpt", steps=2, every=1, module=Toy())
    assert checkpoint.read(tmp_path / "last.ckpt")["global_step"] == 2
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
