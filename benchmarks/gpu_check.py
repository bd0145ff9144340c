"""What works on a GPU, and how fast: one command for a machine without a network, in 8 minutes.

make gpu-pack                                here: fetch what a bare machine lacks into .gpu/
python -m benchmarks.gpu_check [PART ...]    there: run the parts, all if none is named
python -m benchmarks.gpu_check --rehearse    anywhere: all of it on the CPU, tiny

    look     versions, and how fast products and copies are
    tests    the tests marked gpu, every one
    recipe   `python train.py` on the GPU, against the floors that the CPU reaches
    steps    own steps at the true dimensions of Qwen2-VL-2B, random weights
    bench    benchmarks beside their peers, one by one until time is over

Each part leaves JSON in $OUT (.gpu/out), also of what failed; summary.json has all of it, and goes
into the page of results. Only the standard library is imported: the rest may not be there yet.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import ROOT, commit_of, write_json

STORE = ROOT / ".gpu"
WHEELS, SITE = STORE / "wheels", STORE / "site"

LIMIT = 465.0  # seconds for everything
KEPT_BACK = 8.0  # of them, for the summary
LEAST = 15.0  # a process that has less would not get beyond its imports
FLOORS = {"scene_i2t": 0.80, "scene_t2i": 0.80, "bridge_gain": 1.0}
NO_TIME = {"skipped": "no time left"}

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

    def run(self, name: str, command: Sequence[str], *, most: float) -> Found:
        """Run a Python process with its children, for so many seconds at most.

        Returns:
            Its `status` and `seconds`, with an `error` of its last lines where it failed; `skipped`
            where the whole check has no time for it to begin or to end.
        """
        left = self.end - KEPT_BACK - time.monotonic()
        if left < LEAST:
            return dict(NO_TIME)
        # Of coreutils: children end with it.
        limited = ["timeout", "--signal=KILL", f"{min(most, left):.1f}", sys.executable, *command]
        log, start = self.scratch / f"{name}.log", time.monotonic()
        with log.open("w") as output:
            status = subprocess.run(
                limited, cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT
            ).returncode
        text, took = log.read_text(errors="replace"), round(time.monotonic() - start, 1)
        with (self.out / "log.txt").open("a") as everything:
            everything.write(f"==== {name}: {' '.join(command)}\n{text}\n")
        found: Found = {"status": status, "seconds": took}
        if status and left <= took:
            found |= NO_TIME
        elif status:
            found["error"] = " | ".join([f"status {status}", *text.strip().splitlines()[-3:]])
        outcome = found.get("error") or found.get("skipped", "done")
        print(f"{name}: {outcome[:300]} ({took} s)", flush=True)
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
        "COLUMNS": "300",  # pytest cuts reasons to it
    }


def unpack() -> None:
    """Lay the wheels out where Python finds them, without pip."""
    wheels = sorted(WHEELS.glob("*.whl"))
    if not wheels:
        raise SystemExit(f"hydra is not installed and {WHEELS} is empty: `make gpu-pack` fills it")
    for wheel in wheels:
        shutil.unpack_archive(wheel, SITE, "zip")


def read_json(file: Path) -> Found:
    return json.loads(file.read_text()) if file.is_file() else {}


# --- Parts -------------------------------------------------------------------------------------


def measurements(check: Check, *, part: str, most: float) -> Found:
    """A part of `gpu_steps.py`, which writes its JSON itself, case by case."""
    file, device = check.out / f"{part}.json", "cpu" if check.rehearse else "cuda"
    given = [part, str(file), f"{min(most, check.end - time.monotonic()) - LEAST:.0f}", device]
    ended = check.run(part, ["-m", "benchmarks.gpu_steps", *given], most=most)
    return {"process": ended} | read_json(file)


def tests(check: Check) -> Found:
    """How many tests there were, which failed and why, and how many were skipped; of the files that
    have some marked gpu, so that nothing else need be collected.
    """
    marked = re.compile(r"\bmark\.gpu\b")
    files = [file for file in ROOT.glob("tests/**/test_*.py") if marked.search(file.read_text())]
    several = ["-n", "4", "--dist", "loadfile"] if find_spec("xdist") else []
    options = ["-m", "gpu", "-rfE", "-o", "minversion=7", "-p", "no:cacheprovider", *several]
    command = ["-m", "pytest", *options, *map(str, sorted(files))]
    process = check.run("tests", command, most=215)
    if "skipped" in process:
        return {"process": process}
    lines = (check.scratch / "tests.log").read_text(errors="replace").splitlines()
    said = (re.fullmatch(r"(?:FAILED|ERROR) (\S+)(?: - (.*))?", line) for line in lines)
    failed = {one[1]: (one[2] or "")[:300] for one in said if one}
    ended = {what: int(n) for n, what in re.findall(r"(\d+) ([a-z]+)", lines[-1])}
    passed, skipped = ended.get("passed", 0), ended.get("skipped", 0)
    counts = {"tests": passed + skipped + len(failed), "skipped": skipped, "failed": failed}
    none = {"error": "every test was skipped"} if not (passed or failed or check.rehearse) else {}
    return {"process": process, **counts, **none}


def recipe(check: Check) -> Found:
    """The main job, as the README has it: scores, the lower of official and strict ones, the bridge
    gain, and which are below their floors.
    """
    run_dir, size = check.scratch / "run", ["logger=none", "num_workers=4"]
    if check.rehearse:
        from tests.small import SMALL_BENCHMARK, SMALL_DIGITS, SMALL_TRAINING

        size = [*SMALL_TRAINING, *SMALL_DIGITS, *SMALL_BENCHMARK]
    given = [f"hydra.run.dir={run_dir}", f"cache_dir={check.scratch}", *size]
    found: Found = {"process": check.run("recipe", ["train.py", *given], most=215)}
    if results := read_json(run_dir / "results.json"):
        lineage = read_json(run_dir / "model" / "cocoa.json")["lineage"]
        (gain,) = (e["validation"]["bridge_gain"] for e in lineage if e["stage"] == "reconstruct")
        reached = {
            name: min(subset["precision_at_1"], subset["precision_at_1_strict"])
            for name, subset in results["subsets"].items()
        } | {"bridge_gain": gain}
        below = [name for name, floor in FLOORS.items() if not reached[name] >= floor]
        held = {} if check.rehearse else {name: f"below {FLOORS[name]}" for name in below}
        found |= {"reached": reached, "below": below, "failed": held}
    return found


def bench(check: Check) -> Found:
    """Records by name; what fails ends alone, and what there was no time for is not there."""
    file = check.scratch / "bench.json"
    effort = ["--device", "cuda", "--seconds", "1", "--pairs", "3"]
    if check.rehearse:
        effort = ["--size", "test", "--seconds", "0", "--pairs", "1"]
    command = ["-m", "benchmarks", "all", *effort, "--json", str(file)]
    process = check.run("bench", command, most=240)
    records = read_json(file).get("results", [])
    return {"process": process} | {record["name"]: record for record in records}


PARTS: dict[str, Callable[[Check], Found]] = {
    "look": partial(measurements, part="look", most=60),
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
    """A line a case."""
    for part, cases in found.items():
        print(f"== {part}")
        for name, case in cases.items():
            if isinstance(case, Mapping) and "ratio" in case:  # a benchmark's record
                case = {key: case.get(key) for key in ("ratio", "ours", "peer", "skipped")}
            print(f"{name:32} {json.dumps(case)[:300]}")


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
    if unknown := set(chosen.parts) - PARTS.keys():
        parser.error(f"there is no part {min(unknown)}, only {', '.join(PARTS)}")
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
    facts = {"commit": commit_of(), "rehearsal": check.rehearse, "seconds": seconds}
    write_json(out / "summary.json", facts | {"failures": failed} | found)
    show(found)
    print(*(f"FAILED {one[:400]}" for one in failed), sep="\n")
    print(f"{seconds} s, {len(failed)} failures; {out / 'summary.json'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
