"""Exit statuses, and what a command writes when it ends."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
from safetensors import SafetensorError

from cocoa_pl.config.process import MISTAKE, check_processes, guarded, set_up_logging
from cocoa_pl.distributed import collectives
from cocoa_pl.errors import Interrupted, UserError
from cocoa_pl.models.adapters import LowRank
from cocoa_pl.models.loading import Loaded

LOST = (
    "error: a data worker was killed, probably because memory ran out; fewer of them need less "
    "(num_workers=1); resume=RUN goes on from the last checkpoint\n"
)


@pytest.mark.parametrize(
    ("error", "status", "written"),
    [
        (None, 0, ""),
        (UserError("no such row"), 2, "error: no such row\n"),
        (Interrupted("stopped at step 3"), 130, "stopped at step 3\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            OSError(errno.EISDIR, "Is a directory", "runs"),
            *(2, "error: runs: Is a directory; name a file\n"),
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            *(2, "error: No space left on device; make room, or name a folder elsewhere\n"),
        ),
        (RuntimeError("Symlink loop from 'a'"), 2, "error: Symlink loop from 'a'\n"),
        (SafetensorError("I/O error: File too large"), 2, "error: I/O error: File too large\n"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), 3, LOST),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), 3, LOST),
    ],
)
def test_how_a_command_ends(
    error: BaseException | None, status: int, written: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:
        if error is not None:
            raise error

    assert guarded(run) == status
    assert capsys.readouterr().err == written


def test_a_reader_that_has_seen_enough_is_no_error(capfd: pytest.CaptureFixture[str]) -> None:
    """As `cocoa plan --help | head` ends."""

    def run() -> None:
        raise BrokenPipeError(32, "Broken pipe")

    stdout = os.dup(1)
    assert guarded(run) == 141
    os.dup2(stdout, 1)
    assert capfd.readouterr().err == ""


def test_adapters_are_made_without_warnings_to_developers(load_tiny: Callable[..., Loaded]) -> None:
    adapted = partial(LowRank, rank=2, alpha=4, dropout=0.0, init=True, use_dora=False)

    def run() -> None:
        adapted(target_modules=[".*q_proj"], lean_dora=False, dropout_on_base=True)(
            load_tiny().backbone
        )

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert guarded(run) == 0
    assert not [one.message for one in seen if one.category is FutureWarning]


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "8", "RANK": "0", "LOCAL_RANK": "0"}
SLURM = {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_NAME": "cocoa"}
SRUN = SLURM | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "nodes", "said"),
    [
        ({}, 1, None),
        ({}, 2, "is 1 x 2, and 1 processes were started"),
        ({"NODE_RANK": "0"}, 2, None),  # as Lightning's own way on several machines has it
        (TORCHRUN | {"WORLD_SIZE": "1"}, 1, None),
        (TORCHRUN, 1, "is 1 x 1, and 8 processes were started"),
        (SLURM, 8, "is 1 x 8, and 1 processes were started"),  # not by srun
        (SRUN, 8, None),
        (SRUN, 1, "is 1 x 1, and 8 processes were started"),
        (SRUN | {"SLURM_NTASKS": "1"}, 1, None),
        ({"PL_TRAINER_FAST_DEV_RUN": "1"}, 1, r"unset it and give trainer\.fast_dev_run="),
    ],
)
def test_processes_that_nobody_starts_are_not_waited_for(
    environment: dict[str, str],
    nodes: int,
    said: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = SimpleNamespace(num_devices=1, num_nodes=nodes)
    for name in {*TORCHRUN, *SRUN, "NODE_RANK"}:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with nullcontext() if said is None else pytest.raises(UserError, match=said):
        check_processes(trainer, tmp_path)  # type: ignore[arg-type]


def test_a_checkpoint_that_lightning_would_load_by_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hpc_ckpt_1.ckpt").touch()
    with pytest.raises(UserError, match=r"hpc_ckpt_1\.ckpt .* would load into every stage"):
        check_processes(L.Trainer(logger=False), tmp_path)


@pytest.mark.parametrize(
    "bug",
    [
        RuntimeError("Pin memory thread exited unexpectedly"),
        RuntimeError("a row says: DataLoader worker (pid 7) is killed by signal: Killed. "),
        OSError(9, "Bad descriptor"),
    ],
)
def test_a_bug_keeps_its_traceback(bug: Exception) -> None:
    def run() -> None:
        raise bug

    with pytest.raises(type(bug), match=re.escape(bug.args[-1])):
        guarded(run)


@pytest.mark.parametrize("lines", [1, 5000])  # that wait in memory, and more
@pytest.mark.parametrize("to", ["stdout", "log.txt"])
def test_output_that_a_disk_does_not_take_is_one_sentence(
    to: str,
    lines: int,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As `cocoa plan > FILE` ends on a full disk, and a run whose log.txt lies on one."""
    (tmp_path / to).symlink_to("/dev/full")

    def run() -> None:
        set_up_logging(tmp_path)
        for _ in range(lines):
            logging.getLogger("cocoa_pl").info("a line")

    with (tmp_path / "stdout").open("w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert guarded(run) == MISTAKE
    said = "error: No space left on device; make room, or name a folder elsewhere\n"
    assert capfd.readouterr().err == said


def test_a_word_that_is_no_text_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it names could be read, and then stand in no config, table or log."""
    monkeypatch.setattr(sys, "argv", ["train.py", os.fsdecode(b"data.path=na\xefve.jsonl")])
    assert guarded(lambda: 0) == MISTAKE
    assert capsys.readouterr().err.startswith(r"error: 'data.path=na\udcefve.jsonl' is not UTF-8")


def test_a_lost_process_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(collectives, "world_size", lambda: 2)

    def run() -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")

    assert guarded(run) == 3
    written = capsys.readouterr().err
    assert written.startswith("error: another process of this job was killed")
    assert written.count("\n") == 1
