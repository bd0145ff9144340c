"""What Lightning users type reaches the trainer, or is refused with a reason."""

from __future__ import annotations

import inspect
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from cocoa_pl.distributed.strategies import FullySharded, Replicated
from cocoa_pl.errors import UserError
from cocoa_pl.run import trainer_parts
from cocoa_pl.stages import checkpoint
from cocoa_pl.stages.callbacks import StageProgress, check_login, close
from cocoa_pl.stages.recipe import Interrupted
from cocoa_pl.stages.trainer import REFUSED, Parts, checked_precision, make_trainer
from tests.configs import composed
from tests.files import series
from tests.stages.lab import Lab, Weights, equal, weights_of
from tests.stages.test_recipe import StopAt

ONLY_CONTRAST = "stage.order=[contrast]"
BEST = Path("checkpoints") / "best.ckpt"


def trainer_of(run_dir: Path, *words: str, **arguments: Any) -> L.Trainer:
    """Of a stage of 10 steps; `arguments` are objects, which a config would build."""
    parts = trainer_parts(composed("trainer=cpu", "logger=none", *words), run_dir, "warmup")
    trainer = partial(L.Trainer, **parts.trainer.keywords | arguments)
    return make_trainer(parts._replace(trainer=trainer), steps=10, validate_every=4)


# A value that is not Lightning's default.
REFUSED_VALUES: dict[str, Any] = {
    "logger": False,
    "max_epochs": 3,
    "min_epochs": 1,
    "min_steps": 5,
    "limit_test_batches": 2,
    "limit_predict_batches": 2,
    "overfit_batches": 2,
    "val_check_interval": 0.5,
    "check_val_every_n_epoch": 2,
    "enable_checkpointing": False,
    "accumulate_grad_batches": 4,
    "gradient_clip_val": 1.0,
    "gradient_clip_algorithm": "norm",
    "use_distributed_sampler": False,
    "barebones": True,
    "sync_batchnorm": True,
    "reload_dataloaders_every_n_epochs": 1,
    "default_root_dir": "elsewhere",
    "model_registry": "name",
}


def test_every_argument_of_lightnings_trainer_reaches_it_or_is_refused(tmp_path: Path) -> None:
    names = set(inspect.signature(L.Trainer).parameters)
    assert set(REFUSED) == set(REFUSED_VALUES) < names
    given: dict[str, Any] = dict.fromkeys(names - set(REFUSED), "asked")
    bar, given["callbacks"], given["max_steps"] = StageProgress(), LearningRateMonitor(), 3
    given |= {"limit_train_batches": 0.4, "precision": "bf16", "enable_progress_bar": False}
    make = MagicMock(return_value=MagicMock(world_size=1))
    parts = Parts("warmup", tmp_path, "float32", partial(make, **given), [bar], [])
    make_trainer(parts, steps=10, validate_every=4)
    reached = make.call_args.kwargs
    assert all(reached[name] == "asked" for name, value in given.items() if value == "asked")
    assert (reached["max_steps"], reached["val_check_interval"]) == (3, 4)
    assert reached["precision"] == "bf16-mixed"
    assert reached["callbacks"] == [given["callbacks"], bar]
    assert not bar.bar
    assert trainer_of(tmp_path, limit_train_batches=0.4).max_steps == 4
    assert isinstance(trainer_of(tmp_path, strategy="fsdp").strategy, FullySharded)
    assert isinstance(trainer_of(tmp_path, devices=2).strategy, Replicated)
    profiler: Any = trainer_of(tmp_path, profiler="simple").profiler  # type: ignore[attr-defined]
    assert profiler.dirpath == tmp_path


@pytest.mark.parametrize("name", REFUSED_VALUES)
def test_an_argument_that_cannot_be_honoured_is_refused_with_a_reason(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"trainer\.{name}=.* cannot be honoured: .{{20}}"):
        trainer_of(tmp_path, **{name: REFUSED_VALUES[name]})
    default = inspect.signature(L.Trainer).parameters[name].default
    trainer_of(tmp_path, **{name: default})  # no request


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.devices=0"], "trainer: .*0"),
        (["trainer.accelerator=gpu"], "trainer: .*cuda|trainer: .*[Gg][Pp][Uu]"),
        (["trainer.accelerator=abacus"], "trainer: .*abacus"),
        (["trainer.strategy=ddpp"], "trainer: .*ddpp"),
        (["trainer.strategy=ddp_spawn", "trainer.devices=2"], "ddp_spawn cannot be honoured: sums"),
        (["trainer.precision=16-mixed"], "16-mixed cannot be honoured: matrix products"),
        (["trainer.precision=bf16-true"], "bf16-true cannot be honoured: matrix products"),
        (["trainer.precision=64"], "64 cannot be honoured: matrix products are in"),
        (["+trainer.profiler=fast"], "trainer: .*profiler.*'simple'"),
        (["+trainer.max_time=soon"], "trainer: .*soon"),
    ],
)
def test_a_value_that_lightning_refuses_is_one_sentence(
    words: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        trainer_of(tmp_path, *words)


def test_precision_is_the_switch() -> None:
    assert checked_precision(None, "float32") == checked_precision(32, "float32") == "32-true"
    assert checked_precision(None, "bfloat16") == checked_precision("bf16", "float32")
    with pytest.raises(UserError, match=r"needs weights to match: model\.dtype=float32"):
        checked_precision("32-true", "bfloat16")


def test_parts_are_made_anew_for_each_stage(tmp_path: Path) -> None:
    """Patience, a W&B run, a profile: what one `fit` leaves must not reach the next."""
    cfg = composed(
        "logger=tensorboard",
        "+trainer.profiler._target_=lightning.pytorch.profilers.SimpleProfiler",
    )
    made: list[Parts] = [trainer_parts(cfg, tmp_path, stage) for stage in ("warmup", "contrast")]
    assert made[0].trainer.keywords["profiler"] is not made[1].trainer.keywords["profiler"]
    assert not {id(c) for c in made[0].callbacks} & {id(c) for c in made[1].callbacks}
    versions = [parts.loggers[0].version for parts in made]
    assert versions == ["warmup", "contrast"]
    assert isinstance(made[0].loggers[0], TensorBoardLogger)
    assert made[0].loggers[0].root_dir == str(tmp_path / "tensorboard")


def test_loggers_are_lightnings_own_and_learn_the_config(tmp_path: Path, lab: Lab) -> None:
    lab.train(
        tmp_path,
        lab.stages("stage.order=[warmup,contrast]"),
        lab.fresh(),
        trainer=["logger=[csv,tensorboard]"],
        config={"seed": 7},
    )
    for stage in ("warmup", "contrast"):
        assert "seed: 7" in (tmp_path / "csv" / stage / "hparams.yaml").read_text()
        assert "train/loss" in (tmp_path / "csv" / stage / "metrics.csv").read_text()
        assert list((tmp_path / "tensorboard" / stage).glob("events*"))


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["+trainer.max_steps=2"], 2),
        pytest.param(["+trainer.limit_train_batches=1"], 1, marks=pytest.mark.slow),
        pytest.param(["+trainer.max_time={milliseconds: 1}"], 1, marks=pytest.mark.slow),
    ],
)
def test_a_capped_stage_says_how_far_it_came(
    words: list[str],
    steps: int,
    tmp_path: Path,
    whole_contrast: Weights,
    caplog: pytest.LogCaptureFixture,
    lab: Lab,
) -> None:
    """The steps that are taken are those of the whole stage, and can be gone on from."""
    stages, backbone = lab.stages(ONLY_CONTRAST), lab.fresh()
    (entry,) = lab.train(tmp_path, stages, backbone, trainer=words)
    assert entry["steps"] == steps
    assert entry["validation"]
    assert f"1/1 contrast: ended at step {steps} of 3 by trainer.max_steps" in caplog.text
    assert checkpoint.read(tmp_path / checkpoint.LAST)["global_step"] == steps
    lab.train(tmp_path, stages, backbone, resume=True)
    assert equal(weights_of(backbone), whole_contrast)
    assert sorted(series(tmp_path, "train/loss")) == [0, 1, 2]


@pytest.fixture(scope="module")
def whole_contrast(tmp_path_factory: pytest.TempPathFactory, lab: Lab) -> Weights:
    """The weights after three steps of contrast."""
    backbone = lab.fresh()
    lab.train(tmp_path_factory.mktemp("whole"), lab.stages(ONLY_CONTRAST), backbone)
    return weights_of(backbone)


def test_fast_dev_run_writes_nothing(tmp_path: Path, lab: Lab) -> None:
    words = ["+trainer.fast_dev_run=true"]
    lineage = lab.train(tmp_path, lab.stages(), trainer=words)
    assert [entry["steps"] for entry in lineage] == [1, 1, 1, 1]
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("words", [["+trainer.limit_val_batches=0"], ["callbacks=none"]])
def test_validation_and_callbacks_can_be_left_out(
    words: list[str], tmp_path: Path, lab: Lab
) -> None:
    lineage = lab.train(tmp_path, lab.stages(ONLY_CONTRAST), trainer=words)
    assert bool(lineage[0]["validation"]) == ("callbacks" in words[0])
    assert not (tmp_path / BEST).exists()


def test_the_best_checkpoint_is_kept_beside_the_last(tmp_path: Path, lab: Lab) -> None:
    """By precision@1 among held-out rows, also over a resume in another folder."""
    stages = lab.stages(ONLY_CONTRAST, "stage.validate_every=1", steps=4)
    lab.train(tmp_path / "whole", stages)
    with pytest.raises(Interrupted):
        lab.train(tmp_path / "parts", stages, callbacks=[StopAt(3)])
    (tmp_path / "parts").rename(tmp_path / "moved")
    lab.train(tmp_path / "moved", stages, resume=True)
    found = {}
    for name in ("whole", "moved"):
        scores = series(tmp_path / name, "validation/precision_at_1")
        assert list(scores) == [1, 2, 3, 4]
        content = checkpoint.read(tmp_path / name / BEST)
        assert content["cocoa"]["stage"] == "contrast"
        assert scores[content["global_step"]] == max(scores.values())
        weights, chosen = checkpoint.read_chosen(tmp_path / name / BEST)
        assert chosen["validation"]["precision_at_1"] == pytest.approx(max(scores.values()))
        assert chosen["steps"] == content["global_step"]
        found[name] = weights
    assert equal(found["whole"], found["moved"])


def test_a_callback_takes_part_where_its_metric_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lab: Lab
) -> None:
    """Patience with the bridge gain ends the reconstruction, and contrast runs to its end."""
    caplog.set_level("INFO", logger="cocoa_pl")
    stop = "lightning.pytorch.callbacks.EarlyStopping"
    words = [
        *(f"+callbacks.stop._target_={stop}", "+callbacks.stop.monitor=validation/bridge_gain"),
        *("+callbacks.stop.patience=1", "+callbacks.stop.mode=min"),
        "+callbacks.stop.stopping_threshold=1e9",
        *(f"+callbacks.typo._target_={stop}", "+callbacks.typo.monitor=validation/los"),
    ]
    stages = lab.stages("stage.order=[reconstruct,contrast]", steps=5)
    lineage = lab.train(tmp_path, stages, trainer=words)
    assert [entry["steps"] for entry in lineage] == [2, 5]
    assert "EarlyStopping does nothing: no stage of this run logs validation/los" in caplog.text
    assert "ModelCheckpoint does nothing" not in caplog.text


def test_export_names_a_checkpoint_that_will_be_kept(tmp_path: Path, lab: Lab) -> None:
    with pytest.raises(UserError, match="export=best: stage warmup keeps no such checkpoint, only"):
        lab.train(tmp_path, lab.stages("stage.order=[warmup]"), export="best")
    with pytest.raises(UserError, match=r"export=bst: .* only best, last"):
        lab.train(tmp_path, lab.stages(ONLY_CONTRAST), export="bst")
    assert not (tmp_path / "metrics.csv").exists()


def test_bf16_mixed_rounds_matrix_products_and_no_loss(tmp_path: Path, lab: Lab) -> None:
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        backbone = lab.fresh()
        words = [f"trainer.precision={precision}"]
        lab.train(tmp_path / precision, lab.stages(ONLY_CONTRAST), backbone, trainer=words)
        assert all(p.dtype == torch.float32 for p in backbone.parameters())
        found = list(series(tmp_path / precision, "train/loss").values())
        losses[precision] = torch.tensor(found, dtype=torch.float64)
    exact, rounded = losses.values()
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0.05, atol=0)
    # A loss in bfloat16 would have 8 bits.
    assert not torch.equal(rounded, rounded.bfloat16().double())


def test_a_logger_ends_with_its_stage() -> None:
    """A W&B run is the process's own: the next stage's logger would write into it."""
    logger = MagicMock(spec=WandbLogger)
    close([logger])
    logger.experiment.finish.assert_called_once_with()


def test_what_a_logger_lacks_is_said_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"logger=wandb needs wandb: pip install 'cocoa_pl\[wandb"):
        check_login(offline=True)
    failing = MagicMock(Error=RuntimeError, login=MagicMock(side_effect=RuntimeError("No key.")))
    monkeypatch.setitem(sys.modules, "wandb", failing)
    check_login(offline=True)
    with pytest.raises(UserError, match=r"No key\. Or give logger\.wandb\.offline=true"):
        check_login(offline=False)
    words = ["+logger.mine._target_=lightning.pytorch.loggers.CometLogger"]
    with pytest.raises(UserError, match=r"logger\.mine cannot be made: .*comet"):
        trainer_of(tmp_path, *words)
