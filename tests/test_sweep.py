"""A sweep's summary is written after every run and lists those that failed."""

import json
from pathlib import Path

import pytest

from tests.processes import run_script

SCRIPT = """
import pathlib, hydra
from cocoa_pl.evaluation.results import Results, SubsetScore
from hydra.core.hydra_config import HydraConfig

@hydra.main(config_path=".", config_name="config", version_base="1.3")
def main(config):
    if config.seed == config.fail:
        raise RuntimeError("this run fails")
    x = {"low": 0.2, "high": 0.8}[config.variant] + config.seed / 10
    subset = SubsetScore("scene_i2t", "vqa", True, x, x, 9, 9, 0.1)
    folder = pathlib.Path(HydraConfig.get().runtime.output_dir)
    Results("digits", "x", (subset,)).write_json(folder / "results.json")

main()
"""
CONFIG = {
    "seed": 0,
    "fail": -1,
    "variant": "low",
    "hydra": {
        "sweep": {"dir": "out", "subdir": "${hydra.job.num}"},
        "sweeper": {"params": {"variant": "low,high"}},
        "callbacks": {
            "summary": {"_target_": "cocoa_pl.sweep.SweepSummary", "subsets": ["scene_i2t"]}
        },
    },
}


def sweep(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> int:
    (folder / "script.py").write_text(SCRIPT)
    (folder / "config.yaml").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(folder)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)  # as another command may have left it
    return run_script(folder / "script.py", overrides, monkeypatch)


def test_a_sweep_ends_with_one_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path, monkeypatch, "-m", "seed=0,1") == 0
    assert "25.0 ± 7.1" in capsys.readouterr().out
    assert (
        "| high | 2 | 85.0 ± 7.1 | 85.0 ± 7.1 | 85.0 ± 7.1 |"
        in (tmp_path / "out/summary.md").read_text()
    )
    assert (tmp_path / "out/summary.png").is_file()


def test_failed_runs_of_a_sweep_are_listed_as_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sweep(tmp_path, monkeypatch, "-m", "seed=0,1", "fail=1") != 0
    text = (tmp_path / "out/summary.md").read_text()
    assert "| high | 1 of 2 | 80.0 | 80.0 | 80.0 |" in text
    assert "variant=low seed=1 fail=1: no results.json in 1" in text
    assert "not started" not in text
