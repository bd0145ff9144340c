"""Run folders: no two runs share one, and no run writes into that of another."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hydra.conf import HydraConf
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from cocoa_pl.config.command_line import add_override
from cocoa_pl.config.folders import SWEEP, claimed, give_folder, new_folder
from cocoa_pl.config.process import check_named
from cocoa_pl.errors import UserError

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "8"}
SLURM = {"SLURM_NTASKS": "16", "SLURM_JOB_NAME": "cocoa"}
JOB = OmegaConf.create({"overrides": {"task": ["seed=1"]}})


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in {*TORCHRUN, *SLURM, "RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"}:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=1"])
    monkeypatch.chdir(tmp_path)


def composed(*, named: str | None = None, sweeps: bool = False) -> DictConfig:
    """What `check_command_line` gives, as far as folders go."""
    config = OmegaConf.create({"resume": None, "hydra": OmegaConf.structured(HydraConf)})
    config.hydra.mode = RunMode.MULTIRUN if sweeps else RunMode.RUN
    key = "sweep" if sweeps else "run"
    config.hydra[key].dir = named or "runs/noon"
    config.hydra.overrides.hydra = [f"hydra.{key}.dir={named}"] if named else []
    return config


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(new_folder, [tmp_path / "runs" / "noon"] * 8))
    assert sorted(path.name for path in made) == ["noon", *(f"noon_{n}" for n in range(2, 9))]


def test_of_two_that_claim_a_folder_one_has_it(tmp_path: Path) -> None:
    def claim(seed: int) -> int | str:
        try:
            with claimed(OmegaConf.create({"seed": seed}), tmp_path, JOB):
                return seed
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(8) as threads:
        winner, *others = sorted(threads.map(claim, range(8)), key=lambda got: got in range(8))[
            ::-1
        ]
    assert all("holds a run already" in str(other) for other in others)
    assert OmegaConf.load(tmp_path / "config.yaml").seed == winner
    assert OmegaConf.load(tmp_path / ".hydra" / "config.yaml").seed == winner


@pytest.mark.parametrize("sweeps", [False, True])
def test_a_default_folder_is_new_and_is_hydras_too(sweeps: bool) -> None:
    for ending in ("noon", "noon_2"):
        give_folder(composed(sweeps=sweeps), way="")
        assert sys.argv[-1].endswith(f"{ending}'")
        assert Path(sys.argv[-1].split("=")[1].strip("'")).is_dir()


@pytest.mark.parametrize("made", ["config.yaml", "metrics.csv", "checkpoints/last.ckpt", "model"])
def test_a_new_run_does_not_go_into_the_folder_of_another(made: str) -> None:
    give_folder(composed(named="mine"), way="")
    Path("mine", made).mkdir(parents=True)
    with pytest.raises(UserError, match=r"mine holds a run already: resume=mine goes on with it"):
        give_folder(composed(named="mine"), way="")


def test_a_sweep_does_not_go_into_the_folder_of_another() -> None:
    give_folder(composed(named="mine", sweeps=True), way="")
    assert Path("mine", SWEEP).exists()
    with pytest.raises(UserError, match="mine holds the runs of another sweep"):
        give_folder(composed(named="mine", sweeps=True), way="")


def test_a_mistake_before_training_gives_the_folder_back(tmp_path: Path) -> None:
    def fail(*made: str) -> None:
        with claimed(OmegaConf.create({}), tmp_path, JOB):
            for name in made:
                (tmp_path / name).touch()
            raise UserError("no such row")

    with pytest.raises(UserError, match="no such row"):
        fail()
    with pytest.raises(UserError, match="no such row"):
        fail("metrics.csv")
    assert (tmp_path / "config.yaml").exists()
    assert OmegaConf.load(tmp_path / ".hydra" / "overrides.yaml") == ["seed=1"]


@pytest.mark.parametrize(
    ("holds", "scored", "refused"),
    [
        ([], "runs/A", ""),
        (["log.txt"], "runs/A", ""),  # a killed evaluation is repeated
        (["results.json"], "runs/A", "holds scores already"),
        (["config.yaml", "model"], "mine", ""),  # trained with evaluate=false
        (["config.yaml", "model"], "mine/checkpoints/last.ckpt", ""),
        (["model"], "runs/A", "mine holds another run than runs/A"),
        (["config.yaml", "model", "results.json"], "mine", "holds scores already"),
    ],
)
def test_scores_lie_beside_their_own_model_or_none(
    holds: list[str], scored: str, refused: str
) -> None:
    for name in holds:
        Path("mine", name).mkdir(parents=True)
    if refused:
        with pytest.raises(UserError, match=refused):
            give_folder(composed(named="mine"), way="", scored=scored)
        return
    give_folder(composed(named="mine"), way="", scored=scored)
    assert ("hydra.output_subdir=null" in sys.argv) == ("model" in holds)


def test_processes_of_one_job_share_the_folder_that_the_first_has_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for rank in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK"):
        folder = tmp_path / rank
        monkeypatch.setenv(rank, "0")
        give_folder(composed(named=str(folder)), way="")
        folder.mkdir()
        with claimed(OmegaConf.create({}), folder, JOB):
            monkeypatch.setenv(rank, "1")
            give_folder(composed(named=str(folder)), way="")
            with claimed(OmegaConf.create({}), folder, JOB):
                pass
        monkeypatch.delenv(rank)


@pytest.mark.parametrize(
    ("environment", "refused"),
    [
        ({}, False),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, False),  # Lightning tells its processes
        (TORCHRUN, True),
        (TORCHRUN | {"WORLD_SIZE": "1"}, False),
        (SLURM, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        (SLURM | {"SLURM_JOB_NAME": "interactive"}, False),
    ],
)
def test_processes_started_from_outside_need_a_run_folder(
    environment: dict[str, str], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if refused:
        with pytest.raises(UserError, match=r"must share one run folder; give it as hydra\.run"):
            give_folder(composed(), way="hydra.run.dir=X")
        give_folder(composed(named="X"), way="")
    else:
        check_named("")


def test_a_word_for_hydra_goes_behind_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=1", "--config-dir", "own", "-m"])
    add_override("a=1")
    assert sys.argv == ["train.py", "--config-dir", "own", "-m", "seed=1", "a=1"]
