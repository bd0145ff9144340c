"""`python train.py` with no argument: the promise of the README, on real handwriting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


TRAINERS = {
    "one process": [],
    "four processes": ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=4"],
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_main_job_reaches_its_floors(trainer: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, "train.py", f"hydra.run.dir={run_dir}", f"cache_dir={tmp_path}"]
    process = subprocess.Popen([*command, *TRAINERS[trainer]], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)  # of this child, whatever other tests have started
    assert status == 0

    results = json.loads((run_dir / "results.json").read_text())
    subsets = results["subsets"]
    for name in ("scene_i2t", "scene_t2i"):
        assert subsets[name]["num_candidates"] == 1000
        assert subsets[name]["precision_at_1"] >= 0.80
        assert subsets[name]["precision_at_1_strict"] >= 0.80
    for group, score in results["groups"].items():
        chances = [s["chance"] for s in subsets.values() if s["group"] == group]
        assert score > 3 * sum(chances) / len(chances), group

    lineage = json.loads((run_dir / "model" / "cocoa.json").read_text())["lineage"]
    assert [entry["stage"] for entry in lineage] == [
        "pretrain",
        "warmup",
        "reconstruct",
        "contrast",
    ]
    assert lineage[2]["validation"]["bridge_gain"] > 1.0  # nats per hidden token
    assert (run_dir / "report.html").is_file()

    assert usage.ru_maxrss * 1024 < 3e9  # Linux counts in KiB
