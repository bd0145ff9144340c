"""Speed beside peers: `python -m benchmarks`. This file needs nothing but Python."""

import json
import os
import subprocess
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is looked up on the network

ROOT = Path(__file__).resolve().parents[1]
PACKED_COMMIT = ROOT / ".gpu" / "commit"  # written by `make gpu-pack`


def commit_of(root: Path = ROOT) -> str:
    """With a plus where something is not committed; outside of a repository what was packed."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()

    try:
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return PACKED_COMMIT.read_text() if PACKED_COMMIT.is_file() else ""


def write_json(file: Path, content: object) -> None:
    """Whole or not at all: what was found stays readable whatever happens next."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(content, indent=1, default=str) + "\n")
    partial.replace(file)
