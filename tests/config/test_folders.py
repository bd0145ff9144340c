"""Run folders: no two runs share one, and no run writes into that of another."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from cocoa_pl.config import folders
from cocoa_pl.config.command_line import CONFIGS, run_app
from cocoa_pl.config.folders import CONFIG, SWEEP, claim_for_scores, claimed, new_folder
from cocoa_pl.errors import UserError

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "8"}
SLURM = {"SLURM_NTASKS": "16", "SLURM_JOB_NAME": "cocoa"}
EMPTY = OmegaConf.create({})


@pytest.fixture(scope="module")
def started() -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", ["seed=1"], return_hydra_config=True)


@pytest.fixture(autouse=True)
def alone(started: DictConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """One process that Hydra has started with `seed=1`."""
    for name in {*TORCHRUN, *SLURM, "RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"}:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=1"])
    monkeypatch.chdir(tmp_path)
    HydraConfig.instance().set_config(deepcopy(started))
    yield
    HydraConfig.instance().cfg = None


def start(*words: str) -> list[Path]:
    """The folders of the runs that train.py would begin with these words."""
    found: list[Path] = []

    def task(cfg: DictConfig) -> None:
        found.append(Path(HydraConfig.get().runtime.output_dir).relative_to(Path.cwd()))
        folders.check_free_for_run(found[-1])
        with claimed(cfg, found[-1]):
            pass

    HydraConfig.instance().cfg = None
    run_app("train", task, words)
    return found


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(new_folder, [tmp_path / "runs" / "noon"] * 8, [""] * 8))
    assert sorted(path.name for path in made) == ["noon", *(f"noon_{n}" for n in range(2, 9))]


def test_of_two_that_claim_a_folder_one_has_it(tmp_path: Path) -> None:
    def claim(seed: int) -> int | str:
        try:
            with claimed(OmegaConf.create({"seed": seed}), tmp_path):
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


def test_a_default_folder_is_new() -> None:
    noon = "hydra.run.dir=${run_dir:null,runs/noon}"
    assert [*start(noon), *start(noon)] == [Path("runs/noon"), Path("runs/noon_2")]
    assert len({folder.parent for _ in "12" for folder in start("-m", "seed=1")}) == 2


@pytest.mark.parametrize("made", ["config.yaml", "metrics.csv", "checkpoints/last.ckpt", "model"])
def test_a_new_run_does_not_go_into_the_folder_of_another(made: str) -> None:
    Path("of another", made).mkdir(parents=True)
    with pytest.raises(UserError, match="holds a run already: 'resume=\"of another\"' goes"):
        folders.check_free_for_run(Path("of another"))


def test_a_sweep_does_not_go_into_the_folder_of_another(capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ("-m", "seed=0,1", "hydra.sweep.dir=my sweep")
    assert not start(*sweep, "sede=0")  # began nothing
    assert start(*sweep) == [Path("my sweep/0"), Path("my sweep/1")]
    assert Path("my sweep", SWEEP).exists()
    assert capsys.readouterr().err.count("error") == 1
    with pytest.raises(SystemExit):
        start(*sweep)
    assert "my sweep holds the runs of another sweep" in capsys.readouterr().err


def test_a_mistake_before_training_gives_the_folder_back(tmp_path: Path) -> None:
    def fail(*made: str) -> None:
        with claimed(EMPTY, tmp_path):
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
    Path("mine").mkdir(exist_ok=True)
    cfg = OmegaConf.create({"ckpt": scored})
    if refused:
        with pytest.raises(UserError, match=refused):
            claim_for_scores(cfg, Path("mine"))
        return
    claim_for_scores(cfg, Path("mine"))
    assert Path("mine/.hydra").exists() == ("model" not in holds)


def test_processes_of_one_job_share_the_folder_that_the_first_has_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for rank in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK"):
        folder = tmp_path / rank
        folder.mkdir()
        for number in "01":
            monkeypatch.setenv(rank, number)
            folders.check_free_for_run(folder)
            with claimed(EMPTY, folder):
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
            folders.run_folder(None, "runs/noon")
        assert not Path("runs").exists()
    else:
        assert new_folder(Path("runs/noon"), "").is_dir()


def test_other_ranks_go_on_with_the_run_and_not_with_its_sweep() -> None:
    """Lightning starts them with the words of this process and the run folder in quotes."""
    name = 'my "runs" (2), ü=1'
    folder = Path(name)
    folder.mkdir(parents=True)
    (folder / CONFIG).touch()
    folders.hand_over(folder, ["trainer.devices=2"])
    words = [*sys.argv[1:], f'hydra.run.dir="{HydraConfig.get().run.dir}"']
    seen: list[Any] = []
    HydraConfig.instance().cfg = None
    run_app("train", lambda cfg: seen.extend((cfg, HydraConfig.get().runtime.output_dir)), words)
    assert (seen[0].resume, seen[0].trainer.devices) == (name, 2)
    assert seen[1] == str(folder.absolute())


def test_a_run_is_resumed_by_its_folder_or_its_last_checkpoint() -> None:
    folder = Path("runs/A")
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match=r"there is no run \(no config\.yaml\) in that folder"):
        folders.run_of("runs/A")
    (folder / CONFIG).touch()
    assert folders.run_of("runs/A") == folders.run_of("runs/A/checkpoints/last.ckpt") == folder
