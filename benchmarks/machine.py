"""What a figure must be read with: device, versions, commit, and how fast matrix products are."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import measured

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "peft", "numpy", "pillow")
CEILING_RUNS = 15


def environment(device: torch.device) -> dict[str, Any]:
    """Plain data for the JSON."""
    commit = _git("rev-parse", "HEAD")
    return {
        "device": device_name(device),
        "processor": processor_name(),
        "device_type": device.type,
        "date": date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "commit": commit,
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def device_name(device: torch.device) -> str:
    """As its maker calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def processor_name() -> str:
    """What data workers and scoring run on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()} (1 of {os.cpu_count()} cores)"


def matrix_product_ceiling(device: torch.device, *, side: int | None = None) -> dict[str, Any]:
    """Operations per second of a large square product: what nothing here can exceed.

    bfloat16 on a GPU, float32 on the CPU; the best of `CEILING_RUNS`.

    Args:
        side: rows and columns; None for a size that fills the device.
    """
    cuda = device.type == "cuda"
    side = side or (8192 if cuda else 1024)
    dtype = torch.bfloat16 if cuda else torch.float32
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    runs = [measured(lambda: left @ right, device).own(device) for _ in range(CEILING_RUNS)]
    return {
        "flops_per_second": 2 * side**3 / min(runs),
        "side": side,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _git(*arguments: str) -> str:
    """Empty outside of a repository."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
