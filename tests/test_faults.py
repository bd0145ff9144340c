"""What happens to runs of several processes when a process dies, the disk is full, or the cluster
wants its machines back.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cocoa_pl.config.command_line import CONFIGS
from cocoa_pl.stages.checkpoint import read, read_weights
from tests.files import series
from tests.processes import children_of, is_running
from tests.small import SMALL_DIGITS

ROOT = CONFIGS.parent
STEPS = 24
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ALONE = {"cpu": ["trainer.devices=1"], "ddp": []}  # more than the trainer's own config

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Starts a contrastive run of two processes that checkpoints every 4 steps."""
    cache = tmp_path_factory.getbasetemp() / "faults-cache"
    small = [
        f"cache_dir={cache}",
        "stage=contrast",
        *SMALL_DIGITS,
        f"stage.contrast.steps={STEPS}",
        "stage.contrast.optimization.warmup_steps=0",
        "stage.contrast.batch_size=16",
        "stage.validate_every=1000",
        "model.source.text.num_hidden_layers=1",
        "model.source.vision.depth=1",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        "trainer.log_every_n_steps=1",
        "logger=none",
        "num_workers=0",
        "checkpoint_every=4",
        "evaluate=false",
    ]

    def begin(*arguments: str) -> subprocess.Popen[str]:
        given = arguments if arguments[0].startswith("resume=") else (*small, *arguments)
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *given],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin


def finish(process: subprocess.Popen[str], *, within: float = 240) -> tuple[int, str]:
    """Exit status, and stderr."""
    _, output = process.communicate(timeout=within)
    return process.returncode, output


def wait_for_checkpoint(process: subprocess.Popen[str], run_dir: Path) -> None:
    deadline = time.monotonic() + 120
    while not (run_dir / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of rank 0 and rank 1."""
    return [process.pid, *children_of(process.pid)]


def assert_as_if_nothing_had_happened(run_dir: Path, undisturbed: Path) -> None:
    found, expected = (series(run, "train/loss") for run in (run_dir, undisturbed))
    assert len(expected) == STEPS
    assert found == pytest.approx(expected, rel=1e-5)
    paths = [folder / "checkpoints" / "last.ckpt" for folder in (run_dir, undisturbed)]
    weights, others = (read_weights(path, read(path)) for path in paths)
    for name, value in others.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5, msg=name)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_job_and_the_run_goes_on_exactly(
    trainer: str, victim: int, start: Start, tmp_path: Path
) -> None:
    process = start(f"trainer={trainer}", "hydra.run.dir=run")
    wait_for_checkpoint(process, tmp_path / "run")
    ranks = ranks_of(process)
    killed = time.monotonic()
    os.kill(ranks[victim], signal.SIGKILL)
    status, output = finish(process, within=60)
    while any(is_running(pid) for pid in ranks):
        assert time.monotonic() - killed < 60
        time.sleep(0.1)
    assert status == (-signal.SIGKILL if victim == 0 else 3)
    assert "error: " in output
    assert "of this job was killed" in output
    assert "resume=RUN" in output
    assert "Traceback" not in output
    assert finish(start("resume=run"))[0] == 0
    assert finish(start(f"trainer={trainer}", "hydra.run.dir=undisturbed"))[0] == 0
    assert_as_if_nothing_had_happened(tmp_path / "run", tmp_path / "undisturbed")


def descendants(pid: int) -> list[int]:
    return [found for child in children_of(pid) for found in (child, *descendants(child))]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("trainer", ["cpu", "ddp"])
def test_data_workers_end_with_a_run_that_was_killed(
    trainer: str, start: Start, tmp_path: Path
) -> None:
    process = start(f"trainer={trainer}", *ALONE[trainer], "hydra.run.dir=run", "num_workers=2")
    wait_for_checkpoint(process, tmp_path / "run")
    started = descendants(process.pid)
    assert len(started) >= {"cpu": 2, "ddp": 1 + 4}[trainer]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 15
    while left := [pid for pid in started if is_running(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_data_worker_is_reported_in_one_sentence_and_the_run_goes_on(
    start: Start, tmp_path: Path
) -> None:
    process = start("trainer=cpu", *ALONE["cpu"], "hydra.run.dir=run", "num_workers=2")
    wait_for_checkpoint(process, tmp_path / "run")
    os.kill(descendants(process.pid)[0], signal.SIGKILL)
    status, output = finish(process, within=60)
    assert status == 3
    assert "error: a data worker was killed, probably because memory ran out" in output
    assert "resume=RUN goes on from the last checkpoint" in output
    assert "Traceback" not in output
    assert finish(start("resume=run"))[0] == 0
    assert read(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == STEPS


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs prlimit")
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_a_full_disk_leaves_the_checkpoint_before(
    trainer: str, start: Start, tmp_path: Path
) -> None:
    """A limit on the size of files fails a write as a full disk does, after some of it."""
    process = start(f"trainer={trainer}", "hydra.run.dir=run")
    wait_for_checkpoint(process, tmp_path / "run")
    for pid in ranks_of(process):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    status, output = finish(process)
    assert status == 2
    assert "cannot be written (" in output
    assert "last.ckpt is as it was. Make room, then resume the run" in output
    assert "Traceback" not in output
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = read(path)
    assert content["global_step"] % 4 == 0
    assert read_weights(path, content)
    assert len(list(path.parent.iterdir())) == (2 if trainer == "fsdp" else 1)
    assert finish(start("resume=run"))[0] == 0
    assert read(path)["global_step"] == STEPS


@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_a_terminated_run_saves_itself(trainer: str, start: Start, tmp_path: Path) -> None:
    """SIGTERM, which SLURM sends before it takes the machines away."""
    process = start(f"trainer={trainer}", "hydra.run.dir=run", "checkpoint_every=1000")
    log = tmp_path / "run" / "log.txt"
    deadline = time.monotonic() + 120
    while not (log.exists() and f"/{STEPS}" in log.read_text()):  # it has done some steps
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    status, output = finish(process, within=60)
    assert status == 130
    assert "stopped in contrast at step " in output
    saved = read(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"]
    assert 0 < saved < STEPS
    assert finish(start("resume=run"))[0] == 0
    assert finish(start(f"trainer={trainer}", "hydra.run.dir=undisturbed"))[0] == 0
    assert_as_if_nothing_had_happened(tmp_path / "run", tmp_path / "undisturbed")
