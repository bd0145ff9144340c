"""Processes that wait for a killed one end with an error."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import children_of, is_running

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Batches far larger than a pipe, which nobody takes: the workers are blocked on writing them.
FULL = """
import time
from torch.utils.data import DataLoader
from cocoa_pl.distributed.processes import end_with_parent

def rows(batch):
    return bytes(10**7)

if __name__ == "__main__":
    loader = DataLoader(range(64), batch_size=8, num_workers=2, collate_fn=rows,
                        worker_init_fn=lambda worker: end_with_parent())
    batches = iter(loader)
    next(batches)
    print("ready", flush=True)
    time.sleep(600)
"""


def start(folder: Path) -> subprocess.Popen[str]:
    (folder / "full.py").write_text(FULL)
    process = subprocess.Popen(
        [sys.executable, str(folder / "full.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_blocked_workers_end_with_the_process_that_was_killed(tmp_path: Path) -> None:
    process = start(tmp_path)
    workers = children_of(process.pid)
    assert len(workers) == 2
    time.sleep(1)  # until the pipe is full
    assert all(map(is_running, workers))
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(("policy", "spins"), [(None, "1000"), ("ACTIVE", "None")])
def test_threads_spin_for_a_short_time_unless_the_user_says_how_they_wait(
    policy: str | None, spins: str
) -> None:
    """It counts only if it is set before torch is imported."""
    code = (
        "import os, sys, cocoa_pl; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    )
    known = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    given = {} if policy is None else {"OMP_WAIT_POLICY": policy}
    found = subprocess.check_output([sys.executable, "-c", code], env=known | given, text=True)
    assert found == f"{spins} False\n"
