"""Mistakes on a command line are reported in one sentence, also with a user's own configs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cocoa_pl.config.build import register_resolvers
from cocoa_pl.config.command_line import CONFIGS, check_command_line
from cocoa_pl.errors import UserError

ROOT = CONFIGS.parent


@pytest.fixture(autouse=True)
def resolvers() -> None:
    register_resolvers()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sede=3"], r"unknown key sede \(did you mean seed\?\)"),
        (
            ["stage.contrast.batchsize=3"],
            r"unknown key stage\.contrast\.batchsize \(did you mean stage\.contrast\.batch_size",
        ),
        (["model=tinny"], r"model=tinny does not exist \(did you mean tiny\?\); there are .*tiny"),
        (["benchmark=foo"], r"benchmark=foo does not exist; there are digits, held_out, "),
        (
            ["attention@stage.contrast.policy=causall"],
            r"policy=causall does not exist \(did you mean causal\?\)",
        ),
        (
            ["attention@stage.contrst.policy=causal"],
            r"unknown key stage\.contrst\.policy \(did you mean stage\.contrast\.policy\?\)",
        ),
        (
            ["stage.contrast.policy=causal"],
            r"holds several values; did you mean attention@stage\.contrast\.policy=causal\?",
        ),
        (["seed=many"], r"seed=many must be a whole number from 0 to "),
        (["stage.order=contrast"], r"stage\.order=contrast must be a list"),
        (["-m", "seed=0,1", "sede=2"], r"unknown key sede"),
        (["-m", "model=tiny,tinny"], r"model=tinny does not exist"),
        (["++experiment=ablatoin"], r"experiment=ablatoin does not exist \(did you mean ablation"),
        (["contrast"], r"Error parsing override 'contrast'; write key=value"),
        (["=3"], r"."),
    ],
)
def test_a_slip_of_the_hand_is_answered_with_the_nearest_name(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(UserError, match=message):
        check_command_line("train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-dir", "OWN", "experiment=typo"], r"experiment=typo does not exist; there are"),
        (["--config-dir", "OWN", "experiment=mien"], r"does not exist \(did you mean mine\?\)"),
        (["--config-dir", "OWN", "experiment=mine", "sede=1"], r"unknown key sede \(did you"),
        (["hydra.searchpath=[OWN]", "experiment=mien"], r"\(did you mean mine\?\)"),
        (["--config-dir", "OWN", "experiment=forgetful"], "Could not find 'arm/recipeee'"),
        (
            ["--config-dir", "OWN", "experiment=misspelt"],
            r"stage\.warmup\.stepss \(did you mean",
        ),
        (["--config-dir", "OWN/.."], r"train\.yaml is never read: .*conf.train\.yaml comes first"),
        (["--config-dir", "nowhere"], "--config-dir: there is no folder nowhere"),
        (["--config-path", "OWN"], "Cannot find primary config 'train'"),
        (["--config-name", "evaluate", "sede=1"], r"unknown key sede \(did you mean seed\?\)"),
        (["-m", "experiment=[ablation,typo]", "arm=base"], "experiment=typo does not exist"),
        (["--experimental-rerun", "x.pickle"], "would write into the folder of the run"),
    ],
)
def test_checks_hold_with_configs_of_the_users_own(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    (own / "experiment").mkdir(parents=True)
    (tmp_path / "train.yaml").write_text("seed: 1\n")
    header = "# @package _global_\n"
    (own / "experiment" / "mine.yaml").write_text(header + "seed: 3\n")
    (own / "experiment" / "misspelt.yaml").write_text(header + "stage: {warmup: {stepss: 3}}\n")
    (own / "experiment" / "forgetful.yaml").write_text(
        header + "defaults: [override /arm: recipeee]\n"
    )
    words = [word.replace("OWN", str(own)) for word in arguments]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(UserError, match=message):
        check_command_line("train")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config-dir", str(ROOT / "docs" / "examples" / "conf"), "data=colours"],
        [],
        ["-m", "seed=0,1", "attention@stage.contrast.policy=causal,bidirectional"],
        ["-m", "seed=range(0,3)"],
        ["--cfg", "job"],
        ["stage=contrast", "stage.warmup.steps=3"],  # a logged line says that it has no effect
        ["stage.contrast.epochs=2", "stage.contrast.steps=null"],
        ["stage.contrast.optimization.lr=1e-3", "stage.contrast.module.temperature=1"],
        ["stage.contrast.module.matryoshka_dims=[16,32]"],
        ["hydra.run.dir=runs/a"],
        ["data=mmeb", "data.root=x", "model=qwen2vl", "model.source.path=y"],
        ["data.validation_path=x", "data=pairs", "data.path=a", "data.image_root=b"],
    ],
)
def test_what_hydra_allows_is_allowed(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    check_command_line("train")
