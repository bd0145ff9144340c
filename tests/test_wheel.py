"""The wheel, installed where no repository is, holds all that the commands need."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cocoa_pl.embedder import Embedder
from cocoa_pl.evaluation.results import Results, SubsetScore
from cocoa_pl.export.folder import export
from tests.files import write_noise, write_rows

ROOT = Path(__file__).resolve().parents[1]

# Every command on what lies in the working directory; cocoa_pl is the wheel's.
COMMANDS = """
    import sys
    from pathlib import Path
    import cocoa_pl
    from cocoa_pl import cli

    assert Path(cocoa_pl.__file__).is_relative_to(sys.argv[1]), cocoa_pl.__file__
    rows = "data=pairs data.path=rows.jsonl data.image_root=pictures data.validation_fraction=0.3"
    ran = set()
    for line in (
        "attention eos_bridge",
        f"doctor {rows} stage.contrast.batch_size=4 stage=contrast workers=0 out=checkup",
        "plan stage=contrast gpus=1 trainer=cpu",
        "export run --to hf --out exported",
        f"mine run {rows} out=mined device=cpu",
        "report run other",
        "search pictures dog --model exported --device cpu",
    ):
        name, *rest = line.split()
        assert cli.run([name, *rest]) == 0, line
        ran.add(name)
    assert ran == set(cli.COMMANDS)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a copy, as setuptools leaves a build folder, and without network."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("src", "conf"):
        unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=unwanted)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", target, source], check=True)
    return target


def test_the_wheel_holds_what_the_repository_has(installed: Path) -> None:
    package = installed / "cocoa_pl"
    for folder, place in ((ROOT / "src/cocoa_pl", package), (ROOT / "conf", package / "conf")):
        wanted = {path.relative_to(folder) for path in folder.rglob("*.*") if path.is_file()}
        assert len(wanted) > 50
        for path in wanted:
            if "__pycache__" not in path.parts and "conf" not in path.parts:
                assert (place / path).read_bytes() == (folder / path).read_bytes()


@pytest.mark.slow
def test_every_command_runs_from_the_wheel(
    installed: Path, embedder: Embedder, tmp_path: Path
) -> None:
    export(embedder, tmp_path / "run/model", lineage=[])
    for run in ("run", "other"):
        (tmp_path / run).mkdir(exist_ok=True)
        subset = SubsetScore("scene", "Retrieval", True, 0.5, 0.25, 40, 40, 0.1)
        Results("digits", run, (subset,), ()).write_json(tmp_path / run / "results.json")
    rows = [{"query_image": f"{n}.png", "positive": f"dog {n}"} for n in range(12)]
    for number, row in enumerate(rows):
        write_noise(tmp_path / "pictures" / row["query_image"], (56, 28), seed=number)
    write_rows(tmp_path / "rows.jsonl", rows)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMMANDS), installed],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
