"""The GPU check without a GPU: its clock, what it does when something fails, its wheels, and a
rehearsal of all of it on the CPU.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ROOT, gpu_check, gpu_steps, measure
from benchmarks.__main__ import page
from benchmarks.gpu_check import KEPT_BACK, PARTS, Check, failures

# Of a bare machine, which has what gpu_check packs and what transformers and lightning bring.
MISSING = (
    *("mteb", "flask", "waitress", "selenium", "submitit", "hydra_plugins"),
    *("mkdocs", "mkdocstrings", "codespell_lib", "mypy", "pip"),
)


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    monkeypatch.setattr(gpu_check, "LEAST", 0)
    return Check(tmp_path, time.monotonic() + 60, True, tmp_path)


# --- Time, and what fails ----------------------------------------------------------------------


def test_that_there_is_no_time_to_begin_or_to_end_is_no_failure(check: Check) -> None:
    late = Check(check.out, time.monotonic() + KEPT_BACK - 1, True, check.scratch)
    assert late.run("late", ["-c", "1 / 0"], most=100) == {"skipped": "no time left"}
    short = Check(check.out, time.monotonic() + KEPT_BACK + 1, True, check.scratch)
    found = short.run("long", ["-c", "import time; time.sleep(60)"], most=100)
    assert found["skipped"] == "no time left"
    assert failures({"bench": {"long": found}, "tests": gpu_check.tests(late)}) == []


def test_a_process_that_takes_too_long_is_stopped_with_its_children(check: Check) -> None:
    code = """
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print(child.pid, flush=True)
        time.sleep(60)
    """
    found = check.run("slow", ["-c", textwrap.dedent(code)], most=3)
    child = (check.scratch / "slow.log").read_text().strip()
    assert found["error"].endswith(f" | {child}")
    assert found["seconds"] < 30
    assert child in (check.out / "log.txt").read_text()
    status, end = Path(f"/proc/{child}/status"), time.monotonic() + 20
    while status.is_file() and "zombie" not in status.read_text():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_an_error_ends_its_part_alone_and_all_is_in_the_json(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(check: Check) -> Any:
        raise ZeroDivisionError("no such device")

    monkeypatch.setitem(PARTS, "tests", breaks)
    monkeypatch.setitem(PARTS, "recipe", lambda check: {"failed": {"scene_i2t": "below 0.8"}})
    found = gpu_check.run_parts(check, ["recipe", "tests"])
    assert failures(found) == [
        "tests: ZeroDivisionError: no such device",
        "recipe: scene_i2t: below 0.8",
    ]
    for part, content in found.items():
        assert json.loads((check.out / f"{part}.json").read_text()) == content


def test_an_error_ends_its_case_alone_and_none_begins_that_would_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(name: str, ceiling: float) -> Any:
        if name == "slow":
            time.sleep(0.5)
        return {"x": 1 / (name != "bad")}

    monkeypatch.setattr(gpu_steps, "step", step)
    monkeypatch.setattr(gpu_steps, "CASES", ("bad", "slow", "late"))
    gpu_steps.main("steps", str(tmp_path / "steps.json"), "0.6", "cpu")
    found = json.loads((tmp_path / "steps.json").read_text())
    assert found["bad"]["error"] == "ZeroDivisionError: division by zero"
    assert found["slow"]["x"] == 1
    assert found["late"] == {"skipped": "no time left"}


def test_failed_tests_are_named_with_their_reason(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = check.scratch / "tests" / "test_one.py"
    file.parent.mkdir()
    file.write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_broken(none): pass\n"
        "@pytest.mark.skip\n"
        "def test_other(): pass\n"
    )
    (check.scratch / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.setattr(gpu_check, "ROOT", check.scratch)
    monkeypatch.setattr(gpu_check, "find_spec", lambda _: None)
    found = gpu_check.tests(check)
    assert found["failed"] == {
        "tests/test_one.py::test_bad": "assert 1 == 2",
        "tests/test_one.py::test_broken": "",
    }
    assert (found["tests"], found["skipped"]) == (4, 1)


def test_the_recipe_is_held_to_its_floors_strictly(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = {"precision_at_1": 0.9, "precision_at_1_strict": 0.9}
    tied = good | {"precision_at_1_strict": 0.5}
    gain = {"stage": "reconstruct", "validation": {"bridge_gain": float("nan")}}
    contents = {
        "results.json": {"subsets": {"scene_i2t": good, "scene_t2i": tied}},
        "cocoa.json": {"lineage": [{"stage": "warmup", "validation": {}}, gain]},
    }
    monkeypatch.setattr(Check, "run", lambda *_, **__: {"status": 0})
    monkeypatch.setattr(gpu_check, "read_json", lambda file: contents[file.name])
    real = Check(check.out, check.end, False, check.scratch)
    found = gpu_check.recipe(real)
    assert found["below"] == ["scene_t2i", "bridge_gain"]
    assert found["failed"] == {"scene_t2i": "below 0.8", "bridge_gain": "below 1.0"}


def test_a_machine_without_a_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    for arguments, message in ((["look"], "no NVIDIA GPU here"), (["lok"], "no part lok")):
        with pytest.raises(SystemExit, match="2"):
            gpu_check.main(arguments)
        assert message in capsys.readouterr().err


# --- What is taken along, and what comes back --------------------------------------------------


def test_wheels_are_unpacked_without_pip_and_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "WHEELS", tmp_path / "wheels")
    monkeypatch.setattr(gpu_check, "SITE", tmp_path / "site")
    with pytest.raises(SystemExit, match=r"hydra is not installed .*make gpu-pack"):
        gpu_check.unpack()
    gpu_check.WHEELS.mkdir()
    with zipfile.ZipFile(gpu_check.WHEELS / "toy-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("toy/__init__.py", "")
    gpu_check.unpack()
    assert (tmp_path / "site" / "toy" / "__init__.py").is_file()
    first, second, *_ = gpu_check.environment()["PYTHONPATH"].split(os.pathsep)
    assert (first, second) == (str(tmp_path / "site"), str(ROOT / "src"))


def test_what_is_packed_is_pinned() -> None:
    pins = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    (wheels,) = re.findall(r"GPU_WHEELS := (.*)", (ROOT / "Makefile").read_text())
    assert {wheel for wheel in wheels.split() if "==" not in wheel} <= pins


@pytest.mark.parametrize("nothing", [{"rehearsal": True}, {"look": {}}])
def test_a_check_that_measured_nothing_is_no_page(nothing: dict[str, Any]) -> None:
    summary = {"commit": "0", "rehearsal": False, "look": {"versions": {"device": "H200"}}}
    with pytest.raises(ValueError, match="shows nothing"):
        page([summary | nothing])


# --- A bare machine ----------------------------------------------------------------------------


@pytest.mark.slow
def test_gpu_tests_are_collected_on_a_bare_machine() -> None:
    code = f"""
        import sys
        from importlib.machinery import PathFinder

        class Bare(PathFinder):
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                return None if name.split(".")[0] in {MISSING} else super().find_spec(name, path)

        sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
        import pytest
        sys.exit(pytest.main(["-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-2000:]
    assert "tests/attention/test_gpu.py::" in ended.stdout
    assert "could not import 'mteb'" in ended.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", PARTS)
def test_a_rehearsal_runs_all_of_a_part(part: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check", part, "--rehearse", "--limit", "1500"]
    ended = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OUT": str(tmp_path)}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout[-3000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["failures"] == []
    found = summary[part]
    assert found == json.loads((tmp_path / f"{part}.json").read_text())
    if part == "steps":
        assert found.keys() == {"process", *gpu_steps.CASES}
        for case in gpu_steps.CASES:
            assert found[case]["profile"]["kernels"] > 50
    elif part == "bench":
        assert list(found) == ["process", *measure.BENCHMARKS]
        assert all(found[name]["ratio"] > 0 for name in measure.BENCHMARKS)
    elif part == "tests":
        assert found["tests"] > 100
    elif part == "recipe":
        assert "bridge_gain" in found["reached"]
