"""A signal that asks a command to stop ends it with status 130 and one line, whatever it does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import lightning as L
import pytest
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.demos.boring_classes import BoringModel

from cocoa_pl.cli import run as cocoa
from cocoa_pl.config.command_line import CONFIGS
from cocoa_pl.config.process import guarded
from cocoa_pl.distributed.processes import STOPPING
from cocoa_pl.embedder import Embedder
from cocoa_pl.export.folder import export
from tests.processes import run_script
from tests.small import SMALL_BENCHMARK, SMALL_DIGITS, SMALL_TRAINING

ROOT = CONFIGS.parent
MODULE = "cocoa_pl.stages.base.StageModule"


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_ends_a_command(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(n) for n in STOPPING]

    def run() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        except Exception:  # as of a library that goes on whatever happens
            pytest.fail("the signal was caught")

    assert guarded(run) == 130
    assert capsys.readouterr().err == f"interrupted by {signal.Signals(number).name}\n"
    assert [signal.getsignal(n) for n in STOPPING] == before


def test_what_a_signal_left_half_done_is_not_reported(capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        try:
            stop()
        finally:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated")

    assert guarded(run) == 130
    assert capsys.readouterr().err == "interrupted by SIGTERM\n"


def test_a_second_signal_that_is_no_echo_ends_a_command_at_once() -> None:
    """torchrun and srun hand on what a terminal or SLURM has delivered already."""

    def run() -> None:
        try:
            stop()
        finally:
            stop()
            time.sleep(1.1)
            stop()
            time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=guarded, args=(run,))
    process.start()
    process.join(10)
    assert process.exitcode == 130


def test_workers_that_a_pool_ends_die_as_ever(capsys: pytest.CaptureFixture[str]) -> None:
    ended = []

    fork = multiprocessing.get_context("fork")
    begun = fork.Event()

    def work() -> None:
        begun.set()
        time.sleep(60)

    def run() -> None:
        worker = fork.Process(target=work)
        worker.start()
        begun.wait()
        worker.terminate()
        worker.join(10)
        ended.append(worker.exitcode)

    assert guarded(run) == 0
    assert ended == [-signal.SIGTERM]
    assert capsys.readouterr().err == ""


def test_ctrl_c_that_a_shell_keeps_from_its_background_jobs_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert guarded(lambda: os.kill(os.getpid(), signal.SIGINT)) == 0
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"cache_dir={tmp_path_factory.mktemp('cache')}"


def signal_in(where: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process a signal when a function or method is first called."""
    path, _, name = where.rpartition(".")
    owner = resolve_name(path)
    function = getattr(owner, name)

    def called(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(owner, name, function)
        os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, called)


PHASES = (
    ("cocoa_pl.data.digits.DigitsData.train_pairs", signal.SIGTERM),  # reading
    ("cocoa_pl.run.open_model", signal.SIGUSR1),
    (f"{MODULE}.configure_model", signal.SIGINT),  # here Lightning would end with 1
    (f"{MODULE}.on_validation_epoch_end", signal.SIGTERM),  # after the last step
    ("cocoa_pl.run.export", signal.SIGUSR1),
    ("cocoa_pl.run.score_subsets", signal.SIGTERM),
)


@pytest.mark.slow
def test_training_can_be_stopped_in_every_phase_and_resumed(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    few = [o for o in SMALL_TRAINING if "epochs" not in o and ("steps" not in o or "contrast" in o)]
    words = [*few, *SMALL_DIGITS, *SMALL_BENCHMARK, cache, "stage=contrast", "hydra.run.dir=run"]
    for where, number in PHASES:
        signal_in(where, number, monkeypatch)
        assert run_script(ROOT / "train.py", words, monkeypatch) == 130, where
        said = f"interrupted by {signal.Signals(number).name}\n"
        if "validation" in where:
            said = "stopped in contrast at step 2 of 2\n"
        assert capsys.readouterr().err == said
        words = ["resume=run"]
    assert run_script(ROOT / "train.py", words, monkeypatch) == 0
    assert (tmp_path / "run" / "results.json").is_file()


@pytest.mark.parametrize("command", ["evaluate", "mine"])
def test_other_long_commands_can_be_stopped(
    command: str,
    embedder: Embedder,
    cache: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    export(embedder, tmp_path / "model", lineage=[], settings={})
    capsys.readouterr()
    embed = "cocoa_pl.embedder.Embedder.encode"
    signal_in(embed, signal.SIGUSR1, monkeypatch)
    if command == "mine":
        status = cocoa(["mine", "model", *SMALL_DIGITS, cache, "out=mined"])
    else:
        status = run_script(
            ROOT / "evaluate.py", ["ckpt=model", *SMALL_BENCHMARK, cache], monkeypatch
        )
    assert status == 130
    assert capsys.readouterr().err == "interrupted by SIGUSR1\n"


def test_slurm_never_requeues_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lightning would write a checkpoint of its own, and load it into every later stage."""
    slurm = {"NTASKS": "1", "JOB_NAME": "cocoa", "JOB_ID": "7", "PROCID": "0", "LOCALID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)

    class Preempted(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert signal.getsignal(signal.SIGUSR1) is ours
            os.kill(os.getpid(), signal.SIGUSR1)

    def run() -> None:
        nonlocal ours
        ours = signal.getsignal(signal.SIGUSR1)
        environment: Any = trainer._accelerator_connector.cluster_environment  # type: ignore
        assert isinstance(environment, SLURMEnvironment)
        assert environment.auto_requeue
        trainer.fit(BoringModel())

    ours: Any = None
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[Preempted()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    assert guarded(run) == 130
    assert capsys.readouterr().err.endswith("interrupted by SIGUSR1\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_job_script_hands_signals_on_and_requeues(number: int, tmp_path: Path) -> None:
    """With stand-ins: an srun that leaves as train.py does, and an scontrol that writes."""
    leaving = "trap 'exit 130' USR1; echo $@ > asked; while :; do sleep 0.1; done"
    for name, script in {"srun": leaving, "scontrol": "echo $@ > requeued"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "RUN": "run"}
    process = subprocess.Popen(
        ["bash", str(ROOT / "docs" / "train.sbatch"), "seed=1"],
        cwd=tmp_path,
        env=os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "asked").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)  # until the script waits
    process.send_signal(number)
    assert process.wait(30) == 130
    assert (
        "train.py seed=1 trainer.num_nodes=2 hydra.run.dir=run" in (tmp_path / "asked").read_text()
    )
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
