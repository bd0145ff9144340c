"""Exit statuses, and what a command writes when it ends."""

from __future__ import annotations

import pytest

from cocoa_pl.config.process import guarded
from cocoa_pl.distributed import collectives
from cocoa_pl.errors import Interrupted, UserError


@pytest.mark.parametrize(
    ("error", "status", "written"),
    [
        (None, 0, ""),
        (UserError("no such row"), 2, "error: no such row\n"),
        (Interrupted("stopped at step 3"), 130, "stopped at step 3\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (IsADirectoryError(21, "Is a directory", "runs"), 2, "error: runs: Is a directory\n"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device\n"),
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


def test_a_bug_keeps_its_traceback() -> None:
    def run() -> None:
        raise RuntimeError("a bug of ours")

    with pytest.raises(RuntimeError, match="a bug of ours"):
        guarded(run)


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
