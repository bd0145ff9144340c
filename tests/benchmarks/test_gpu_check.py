"""The GPU check without a GPU: its clock, what it does when something fails, its wheels, and a
rehearsal of all of it on the CPU.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check, gpu_parts, registry
from benchmarks.gpu_check import BENCHMARKS, BUILT, FETCHED, PARTS, ROOT, Check, failures
from benchmarks.page import write_page

# Of a bare machine, which has what gpu_check packs and what transformers and lightning bring.
MISSING = (
    *("mteb", "flask", "waitress", "selenium", "sentence_transformers", "submitit"),
    *("hydra_plugins", "mkdocs", "mkdocstrings", "codespell_lib", "mypy", "pip"),
)


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check(tmp_path, time.monotonic() + 60, True, tmp_path)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu_check, "WHEELS", tmp_path / "wheels")
    monkeypatch.setattr(gpu_check, "SITE", tmp_path / "site")
    return tmp_path


# --- Time --------------------------------------------------------------------------------------


def test_nothing_takes_more_than_is_left_nor_more_than_its_own(check: Check) -> None:
    assert check.room(10) == 10
    assert 60 - gpu_check.KEPT_BACK - 5 < check.room(500) <= 60 - gpu_check.KEPT_BACK


def test_without_time_a_process_is_skipped_which_is_no_failure(tmp_path: Path) -> None:
    late = Check(tmp_path, time.monotonic() + 10, True, tmp_path)
    found = late.run("late", ["-c", "1 / 0"], most=100)
    assert found == {"skipped": "no time left"}
    assert failures({"bench": {"late": found}}) == []


def test_a_process_that_the_end_stops_is_no_failure(tmp_path: Path) -> None:
    check = Check(tmp_path, time.monotonic() + gpu_check.KEPT_BACK + 1, True, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_check, "LEAST", 0)
        found = check.run("long", ["-c", "import time; time.sleep(60)"], most=100)
    assert (found["status"], found["skipped"]) == (-9, "no time left")
    assert failures({"bench": {"long": found}}) == []


def test_a_process_that_takes_too_long_is_stopped_with_its_children(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "LEAST", 0)
    code = """
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print(child.pid, flush=True)
        time.sleep(60)
    """
    found = check.run("slow", ["-c", textwrap.dedent(code)], most=2)
    child = (check.scratch / "slow.log").read_text().strip()
    assert found["error"] == f"status -9 | {child}"
    assert found["seconds"] < 10
    assert child in (check.out / "log.txt").read_text()
    status, end = Path(f"/proc/{child}/status"), time.monotonic() + 20
    while status.is_file() and "zombie" not in status.read_text():
        assert time.monotonic() < end
        time.sleep(0.05)


# --- What fails --------------------------------------------------------------------------------


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


def test_an_error_ends_its_case_alone(tmp_path: Path) -> None:
    file, found, end = tmp_path / "steps.json", gpu_check.Found(), time.monotonic() + 60
    works = {"bad": lambda: {"x": 1 / 0}, "good": lambda: {"x": 1}, "late": lambda: {"x": 2}}
    for name, work in works.items():
        gpu_parts.attempt(found, file, name, work, end=end - 100 * (name == "late"))
        assert json.loads(file.read_text()) == found
    assert {name: case.pop("took", None) for name, case in found.items()}["late"] is None
    assert found == {
        "bad": {"error": "ZeroDivisionError: division by zero"},
        "good": {"x": 1},
        "late": {"skipped": "no time left"},
    }


def test_a_case_that_would_not_end_in_time_is_not_begun(tmp_path: Path) -> None:
    found = {"long": {"took": 30.0}}
    end = time.monotonic() + 20
    gpu_parts.attempt(found, tmp_path / "steps.json", "next", lambda: {"x": 1}, end=end)
    assert found["next"] == {"skipped": "no time left"}


def test_failed_tests_are_named_with_their_reason(tmp_path: Path) -> None:
    junit = tmp_path / "tests.xml"
    junit.write_text(
        """<testsuites><testsuite><testcase classname="a" name="good"/>
        <testcase classname="a" name="bad"><failure message="1 is not 2"/></testcase>
        <testcase classname="a" name="broken"><error message="no fixture"/></testcase>
        <testcase classname="a" name="other"><skipped/></testcase></testsuite></testsuites>"""
    )
    found = gpu_check.tests_of(junit)
    failed = {"a::bad": "1 is not 2", "a::broken": "no fixture"}
    assert found == {"tests": 4, "skipped": 1, "failed": failed}


def test_the_recipe_is_held_to_its_floors_strictly() -> None:
    good = {"precision_at_1": 0.9, "precision_at_1_strict": 0.9}
    tied = good | {"precision_at_1_strict": 0.5}
    lineage = [
        {"stage": "warmup", "validation": {}},
        {"stage": "reconstruct", "validation": {"bridge_gain": float("nan")}},
    ]
    found = gpu_check.recipe_of({"subsets": {"scene_i2t": good, "scene_t2i": tied}}, lineage)
    assert found["below"] == ["scene_t2i", "bridge_gain"]


def test_a_machine_without_a_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    for arguments, message in ((["look"], "no NVIDIA GPU here"), (["lok"], "no part lok")):
        with pytest.raises(SystemExit, match="2"):
            gpu_check.main(arguments)
        assert message in capsys.readouterr().err


# --- Wheels ------------------------------------------------------------------------------------


def test_wheels_are_unpacked_without_pip_and_come_first(store: Path) -> None:
    gpu_check.WHEELS.mkdir()
    with zipfile.ZipFile(gpu_check.WHEELS / "toy-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("toy/__init__.py", "")
    gpu_check.unpack()
    assert (store / "site" / "toy" / "__init__.py").is_file()
    first, second, *_ = gpu_check.environment()["PYTHONPATH"].split(os.pathsep)
    assert (first, second) == (str(store / "site"), str(ROOT / "src"))


@pytest.mark.usefixtures("store")
def test_missing_wheels_are_reported_in_one_sentence() -> None:
    with pytest.raises(SystemExit, match=r"hydra is not installed .*gpu_check pack"):
        gpu_check.unpack()


def test_what_is_packed_is_pinned() -> None:
    pins = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {*FETCHED, *BUILT} <= pins


# --- Beside the rest ---------------------------------------------------------------------------


def test_every_benchmark_is_among_those_by_worth() -> None:
    assert sorted(BENCHMARKS) == sorted(benchmark.name for benchmark in registry.BENCHMARKS)


def test_a_summary_becomes_a_section_of_the_results(tmp_path: Path) -> None:
    versions = {"device": "NVIDIA H200", "date": "2026-12-01", "torch": "2.11.0"}
    case = {"samples_per_second": 15.25, "share_of_ceiling": 0.25, "peak_gib": 11.0, "seconds": 1.6}
    summary = {
        "commit": "0123456789abcdef",
        "rehearsal": False,
        "look": {"versions": versions | {"transformers": "5.17.0", "peft": "0.21.2"}},
        "steps": {
            "process": {"status": 0, "seconds": 99},
            "warmup dora": case | {"profile": {"kernels": 25_722}},
            "warmup lora": {"error": "OutOfMemoryError"},
        },
    }
    out = tmp_path / "results.md"
    write_page([summary], out=out)
    page = out.read_text()
    assert "measured on NVIDIA H200\n\nCommit 0123456789; 2026-12-01; torch 2.11.0" in page
    assert "| warmup dora | 15.2 | 25 % | 11 | 1.6 | 25,722 |" in page
    assert "lora" not in page
    for nothing in ({"rehearsal": True}, {"look": {}}):
        with pytest.raises(SystemExit, match="nothing to show"):
            write_page([summary | nothing], out=out)


# --- A bare machine ----------------------------------------------------------------------------


def needs(node: ast.AST) -> list[str]:
    """Packages that an import statement asks for, and modules of this project that need mteb."""
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    tops = [n.split(".")[0] for n in names if n.split(".")[0] in MISSING]
    return tops + [n for n in names if n.startswith("cocoa_pl.for_mteb")]


def test_optional_packages_are_imported_behind_importorskip() -> None:
    """Else no GPU test runs on a bare machine: a module that cannot be imported stops them all."""
    for file in sorted(ROOT.glob("tests/**/*.py")):
        skips = False
        for node in ast.parse(file.read_text()).body:
            skips = skips or "pytest.importorskip(" in ast.unparse(node)
            assert skips or not needs(node), f"{file}, line {node.lineno}"


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
        assert found.keys() == {"process", *gpu_parts.CASES}
        for case in gpu_parts.CASES:
            assert found[case]["profile"]["kernels"] > 50
    elif part == "bench":
        assert list(found) == list(BENCHMARKS)
        assert all(record["ratio"] > 0 for record in found.values())
    elif part == "tests":
        assert found["tests"] > 100
    elif part == "recipe":
        assert "bridge_gain" in found["reached"]
