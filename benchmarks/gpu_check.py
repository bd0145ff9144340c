"""What works on a GPU, and how fast: one command for a machine without a network, in 8 minutes.

python -m benchmarks.gpu_check pack          here: fetch what a bare machine lacks into .gpu/
python -m benchmarks.gpu_check [PART ...]    there: run the parts, all if none is named
python -m benchmarks.gpu_check --rehearse    anywhere: all of it on the CPU, tiny

    look     versions, ceilings, and whether kernels do what this project relies on
    tests    the tests marked gpu, every one
    recipe   `python train.py` on the GPU, against the floors that the CPU reaches
    steps    own steps at the true dimensions of Qwen2-VL-2B, random weights
    bench    benchmarks beside re-created peers, one by one

Each part leaves JSON in $OUT (.gpu/out), also of what failed; summary.json has all of it, and goes
into the page of results. Only the standard library is imported: the rest may not be there yet.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
STORE = ROOT / ".gpu"
WHEELS, SITE, COMMIT = STORE / "wheels", STORE / "site", STORE / "commit"

# A bare machine has torch, transformers, lightning, pytest and what they need, on Python 3.12.
# Versions are those of constraints.txt.
FETCHED = ("hydra-core", "omegaconf", "datasets", "dill", "multiprocess", "xxhash", "peft")
BUILT = ("antlr4-python3-runtime",)  # hydra-core's; the index has its source alone
NOT_PINNED = ("httpx==0.28.1",)  # of the oldest transformers; the pinned one needs another
TARGET = ["--python-version", "3.12", "--implementation", "cp", "--only-binary=:all:"]
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")

LIMIT = 465.0  # seconds for everything
KEPT_BACK = 8.0  # of them, for the summary
LEAST = 15.0  # a process that has less would not get beyond its imports
FLOORS = {"scene_i2t": 0.80, "scene_t2i": 0.80, "bridge_gain": 1.0}
# By worth, until time is over: whole steps, then their parts, then what runs on the CPU.
BENCHMARKS = (
    *("contrast_step", "warmup_step", "reconstruct_step", "encode", "dora", "dora_same_dropout"),
    *("attention_bridge", "masked_head", "gradient_cache", "vision_attention", "packing"),
    *("vision_attention_4d", "similarities", "images_whole_path", "images", "images_672"),
    *("images_on_one_core", "scoring", "scoring_shared"),
)

Found = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """One run of the check.

    Attributes:
        out: where JSON goes.
        end: by the monotonic clock, when all must be over.
        rehearse: on the CPU with tiny sizes; floors are printed and not held.
        scratch: for what is not kept.
    """

    out: Path
    end: float
    rehearse: bool
    scratch: Path

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def room(self, most: float) -> float:
        """Seconds for something that takes so many at most."""
        return min(most, self.end - KEPT_BACK - time.monotonic())

    def run(self, name: str, command: Sequence[str], *, most: float) -> Found:
        """Run a Python process with its children, for so long at most.

        Returns:
            Its `status` and `seconds`, with an `error` of its last lines where it failed; `skipped`
            where there was no time to begin or to end.
        """
        room, start = self.room(most), time.monotonic()
        if room < LEAST:
            return {"skipped": "no time left"}
        log, over = self.scratch / f"{name}.log", False
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its children end with it
            )
            try:
                status = process.wait(timeout=room)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                status = process.wait()
                over = room < most  # the whole check's time, not its own
        text = log.read_text(errors="replace")
        with (self.out / "log.txt").open("a") as everything:
            everything.write(f"==== {name}: {' '.join(command)}\n{text}\n")
        found: Found = {"status": status, "seconds": round(time.monotonic() - start, 1)}
        if over:
            found["skipped"] = "no time left"
        elif status:
            found["error"] = " | ".join([f"status {status}", *text.strip().splitlines()[-3:]])
        outcome = found.get("error") or found.get("skipped", "done")
        print(f"{name}: {outcome[:300]} ({found['seconds']} s)", flush=True)
        return found


def environment() -> dict[str, str]:
    """Of all processes: this copy of the package, installed or not, and nothing from a network."""
    paths = [*([SITE] if SITE.is_dir() else []), ROOT / "src", ROOT]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, [*paths, os.environ.get("PYTHONPATH", "")])),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "TOKENIZERS_PARALLELISM": "false",
    }


def write_json(file: Path, content: object) -> None:
    """Whole or not at all: what was found stays readable whatever happens next."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, default=str) + "\n")
    partial.replace(file)


def read_json(file: Path) -> Found:
    return json.loads(file.read_text()) if file.is_file() else {}


# --- Packing -----------------------------------------------------------------------------------


def pack() -> None:
    """Fetch wheels for a bare machine, and note which commit goes there."""
    shutil.rmtree(WHEELS, ignore_errors=True)
    WHEELS.mkdir(parents=True)
    pip, common = [sys.executable, "-m", "pip"], ["-q", "--no-deps", "-c", "constraints.txt"]
    target = TARGET + [f"--platform={platform}" for platform in PLATFORMS]
    download = [*pip, "download", *common, *target, "-d", str(WHEELS), *FETCHED, *NOT_PINNED]
    for command in (download, [*pip, "wheel", *common, "-w", str(WHEELS), *BUILT]):
        subprocess.run(command, cwd=ROOT, check=True)
    COMMIT.write_text(commit_of(ROOT))
    sizes = [file.stat().st_size for file in WHEELS.iterdir()]
    print(f"{len(sizes)} wheels, {sum(sizes) / 2**20:.1f} MiB, in {STORE}: take it along")


def unpack() -> None:
    """Lay the wheels out where Python finds them, without pip.

    Raises:
        SystemExit: if there are none.
    """
    wheels = sorted(WHEELS.glob("*.whl"))
    if not wheels:
        raise SystemExit(
            f"hydra is not installed and there are no wheels in {WHEELS}: run "
            "`python -m benchmarks.gpu_check pack` where there is a network, and take .gpu along"
        )
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(SITE)


def commit_of(root: Path) -> str:
    """With a plus where something is not committed; outside of a repository what was packed."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()

    try:
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return COMMIT.read_text() if COMMIT.is_file() else ""


# --- Parts -------------------------------------------------------------------------------------


def measurements(check: Check, *, part: str, most: float) -> Found:
    """A part of `gpu_parts.py`, which writes its JSON itself, case by case."""
    file = check.out / f"{part}.json"
    given = [part, str(file), f"{check.room(most) - LEAST:.0f}", check.device]
    return {"process": check.run(part, ["-m", "benchmarks.gpu_parts", *given], most=most)} | (
        read_json(file)
    )


def tests(check: Check) -> Found:
    """Of the files that have some, so that nothing else need be collected."""
    marked = re.compile(r"\bmark\.gpu\b")
    files = [file for file in ROOT.glob("tests/**/test_*.py") if marked.search(file.read_text())]
    junit = check.scratch / "tests.xml"
    several = ["-n", "4", "--dist", "loadfile"] if find_spec("xdist") else []
    options = ["-m", "gpu", "-o", "minversion=7", "-p", "no:cacheprovider", f"--junitxml={junit}"]
    command = ["-m", "pytest", *options, *several, *map(str, sorted(files))]
    found: Found = {"process": check.run("tests", command, most=215)}
    if junit.is_file():
        found |= tests_of(junit)
        if found["skipped"] == found["tests"] and not check.rehearse:
            found["error"] = "every test was skipped"
    return found


def tests_of(junit: Path) -> Found:
    """How many there were, which failed and why, and how many were skipped."""
    cases = list(ElementTree.parse(junit).getroot().iter("testcase"))
    failed = {
        f"{case.get('classname')}::{case.get('name')}": (why.get("message") or "")[:300]
        for case in cases
        for why in (*case.findall("failure"), *case.findall("error"))
    }
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"tests": len(cases), "skipped": skipped, "failed": failed}


def recipe(check: Check) -> Found:
    """The main job, as the README has it."""
    run_dir, size = check.scratch / "run", ["logger=none", "num_workers=4"]
    if check.rehearse:
        from tests.small import SMALL_BENCHMARK, SMALL_DIGITS, SMALL_TRAINING

        size = [*SMALL_TRAINING, *SMALL_DIGITS, *SMALL_BENCHMARK]
    given = [f"hydra.run.dir={run_dir}", f"cache_dir={check.scratch}", *size]
    found: Found = {"process": check.run("recipe", ["train.py", *given], most=215)}
    if results := read_json(run_dir / "results.json"):
        found |= recipe_of(results, read_json(run_dir / "model" / "cocoa.json")["lineage"])
        if not check.rehearse:
            found["failed"] = {name: f"below {FLOORS[name]}" for name in found["below"]}
    return found


def recipe_of(results: Mapping[str, Any], lineage: Sequence[Mapping[str, Any]]) -> Found:
    """Scores, official and strict, and the bridge gain, and which are below their floors."""
    (gain,) = (e["validation"]["bridge_gain"] for e in lineage if e["stage"] == "reconstruct")
    reached = {
        name: min(subset["precision_at_1"], subset["precision_at_1_strict"])
        for name, subset in results["subsets"].items()
    } | {"bridge_gain": gain}
    below = [name for name, floor in FLOORS.items() if not reached[name] >= floor]
    return {"reached": reached, "below": below}


def bench(check: Check) -> Found:
    """Each benchmark in a process of its own: what fails or fills the device ends alone."""
    found: Found = {}
    effort = ["--seconds", "1", "--pairs", "3"]
    if check.rehearse:
        effort = ["--seconds", "0", "--pairs", "1", "--size", "test"]
    for name in BENCHMARKS:
        file = check.scratch / f"{name}.json"
        given = [name, "--device", check.device, *effort, "--no-curves", "--json", str(file)]
        ended = check.run(name, ["-m", "benchmarks", *given], most=120)
        found[name] = read_json(file) or ended
        write_json(check.out / "bench.json", found)
    return found


PARTS: dict[str, Callable[[Check], Found]] = {
    "look": partial(measurements, part="look", most=75),
    "tests": tests,
    "recipe": recipe,
    "steps": partial(measurements, part="steps", most=190),
    "bench": bench,
}
TOGETHER = (["look"], ["tests", "recipe"], ["steps"], ["bench"])  # what is not timed shares the GPU


def run_parts(check: Check, parts: Sequence[str]) -> Found:
    """What each part found, also where one failed."""

    def run(part: str) -> Found:
        try:
            found = PARTS[part](check)
        except Exception as error:  # the other parts go on
            found = {"error": f"{type(error).__name__}: {error}"}
        write_json(check.out / f"{part}.json", found)
        return found

    found: Found = {}
    for together in TOGETHER:
        chosen = [part for part in together if part in parts]
        with ThreadPoolExecutor() as pool:
            found |= zip(chosen, pool.map(run, chosen), strict=True)
    return found


# --- Summary -----------------------------------------------------------------------------------


def failures(found: object, where: str = "") -> list[str]:
    """Errors and what failed, wherever they stand; that there was no time is none."""
    if not isinstance(found, dict):
        return []
    lines = [f"{where}: {found['error']}"] if "error" in found else []
    lines += [f"{where}: {name}: {why}" for name, why in found.get("failed", {}).items()]
    for name, inner in found.items():
        lines += failures(inner, f"{where} {name}".strip())
    return lines


def show(found: Found) -> None:
    """A line a case, with short numbers."""
    short = json.loads(json.dumps(found), parse_float=lambda digits: float(f"{float(digits):.4g}"))
    for part, cases in short.items():
        print(f"== {part}")
        for name, case in cases.items():
            if "ratio" in (case if isinstance(case, dict) else {}):  # a benchmark's record
                case = {key: case.get(key) for key in ("ratio", "ours", "peer", "share_of_ceiling")}
            print(f"{name:32} {json.dumps(case)[:300]}")


def section(summary: Mapping[str, Any]) -> str:
    """Markdown for the page of results: the machine, and own steps.

    Raises:
        SystemExit: for what was not measured on a GPU.
    """
    found = summary.get("look", {}).get("versions", {})
    if summary["rehearsal"] or "device" not in found:
        raise SystemExit("this summary is of a rehearsal, or has no look: there is nothing to show")
    head = ("step", "samples/s", "of ceiling", "peak GiB", "seconds", "kernels")
    rows = [head, ("---",) * len(head)]
    for name, case in summary.get("steps", {}).items():
        if "seconds" in case and name != "process":
            share, kernels = f"{100 * case['share_of_ceiling']:.0f} %", case["profile"]["kernels"]
            figures = (case["samples_per_second"], share, case["peak_gib"], case["seconds"])
            texts = (f"{x:.3g}" if isinstance(x, float) else x for x in figures)
            rows.append((name, *texts, f"{kernels:,}"))
    return (
        f"## Steps at the dimensions of Qwen2-VL-2B, measured on {found['device']}\n\n"
        f"Commit {summary['commit'][:10]}; {found['date']}; torch {found['torch']}, transformers "
        f"{found['transformers']}, peft {found['peft']}. Random weights, bfloat16; a sample is a "
        "picture of 256 visual tokens and a text of 64. By `python -m benchmarks.gpu_check`.\n\n"
    ) + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for everything")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny")
    chosen = parser.parse_args(arguments)
    if chosen.parts == ["pack"]:
        pack()
        return 0
    if unknown := set(chosen.parts) - PARTS.keys():
        parser.error(f"there is no part {min(unknown)}, only {', '.join(PARTS)}; pack goes alone")
    if not (chosen.rehearse or shutil.which("nvidia-smi") or Path("/dev/nvidiactl").exists()):
        parser.error("there is no NVIDIA GPU here; --rehearse runs all of it on the CPU")
    started = time.monotonic()
    shutil.rmtree(SITE, ignore_errors=True)
    if find_spec("hydra") is None:
        unpack()
    out = Path(os.environ.get("OUT") or STORE / "out").resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").write_text("")
    with tempfile.TemporaryDirectory() as scratch:
        check = Check(out, started + chosen.limit, chosen.rehearse, Path(scratch))
        found = run_parts(check, chosen.parts or list(PARTS))
    failed, seconds = failures(found), round(time.monotonic() - started, 1)
    facts = {"commit": commit_of(ROOT), "rehearsal": check.rehearse, "seconds": seconds}
    write_json(out / "summary.json", facts | {"failures": failed} | found)
    show(found)
    print(*(f"FAILED {one[:400]}" for one in failed), sep="\n")
    print(f"{seconds} s, {len(failed)} failures; {out / 'summary.json'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
