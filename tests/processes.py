"""Scripts and processes that tests start."""

from __future__ import annotations

import multiprocessing
import runpy
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes


def run_script(script: Path, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a script in this process, which has everything imported; its exit status."""
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def start_ranks(work: Callable[..., None], *arguments: Any, world: int) -> None:
    """Run `work(rank, *arguments)` in each process of a group; they import the libraries once for
    all.
    """
    multiprocessing.set_forkserver_preload(["cocoa_pl.run"])
    with tempfile.TemporaryDirectory() as folder:
        given = (work, arguments, world, f"file://{folder}/meeting")
        start_processes(_in_group, args=given, nprocs=world, start_method="forkserver")


def _in_group(
    rank: int, work: Callable[..., None], arguments: Sequence[Any], world: int, meeting: str
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    work(rank, *arguments)
    dist.barrier()  # no process leaves while another waits for it
    dist.destroy_process_group()


def children_of(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    """Whether a process is there and not merely waiting for its parent to look at how it ended."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
