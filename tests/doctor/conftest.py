"""A small MMEB folder with a row for each kind of issue, and `cocoa doctor` run on a folder."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from tests.files import write_noise, write_rows

MAX_LENGTH = 18  # tokens: an image of 112 x 112 takes 19 with its marks and EOS

# Small enough for a dozen rows, and small files of a model that is built at once.
SMALL = (
    f"model.max_length={MAX_LENGTH}",
    *[f"stage.{stage}.batch_size=2" for stage in ("pretrain", "warmup", "reconstruct")],
    "stage.contrast.batch_size=2",
    *[f"model.source.text.{key}=8" for key in ("hidden_size", "intermediate_size")],
    "model.source.text.num_hidden_layers=1",
    "model.source.vision.depth=1",
)


@dataclass(frozen=True)
class Checkup:
    """What a run of `cocoa doctor` left behind."""

    status: int
    report: dict[str, Any]
    text: str
    out: Path

    def rows(self, kind: str) -> list[str]:
        """Numbers of the rows with this finding, as strings, without repetitions."""
        return list(dict.fromkeys(f["row_id"].rpartition(" ")[2] for f in self.findings(kind)))

    def findings(self, kind: str) -> list[dict[str, str]]:
        return [finding for finding in self.report["findings"] if finding["kind"] == kind]


def row(image: str = "", caption: str = "a dog", **changes: Any) -> dict[str, Any]:
    """A healthy row: an image with a question, and its caption."""
    return {
        "qry": "<|image_1|>\nName it",
        "qry_image_path": image,
        "pos_text": caption,
        "pos_image_path": "",
        "neg_text": "",
        "neg_image_path": "",
        **changes,
    }


def write_set(root: Path, rows: list[dict[str, Any]]) -> Path:
    """Training rows in MMEB's layout."""
    write_rows(root / "Set/original-00000-of-1.parquet", rows)
    return root


def issues(root: Path) -> dict[str, dict[str, Any]]:
    """Issue -> the row that has it; files are written below `root`."""
    images = root / "images"
    for number in range(12):
        write_noise(images / f"{number}.png", seed=number)
    write_noise(root.parent / "outside.png", seed=100)
    (images / "corrupt.png").write_bytes(b"not a picture at all")
    whole = io.BytesIO()
    Image.open(images / "1.png").resize((200, 200)).save(whole, "JPEG")
    (images / "cut.jpg").write_bytes(whole.getvalue()[:700])
    write_noise(images / "long.png", (1, 300), seed=101)
    write_noise(images / "large.png", (112, 112), seed=102)
    (images / "copy.png").write_bytes((images / "0.png").read_bytes())
    return {
        "healthy": row("images/0.png", "a red dog"),
        "missing": row("images/nowhere.png", "a lost dog"),
        "corrupt": row("images/corrupt.png", "a broken dog"),
        "cut": row("images/cut.jpg", "half a dog"),
        "elongated": row("images/long.png", "a long dog"),
        "outside": row("../outside.png", "a far dog"),
        "absolute": row("/etc/hostname", "a wrong dog"),
        "no placeholder": row("images/1.png", "a mute dog", qry="Name it"),
        "two placeholders": row("images/1.png", "two dogs", qry="<|image_1|><|image_1|>"),
        "empty": row("images/1.png", " "),
        "broken negatives": row("images/1.png", "a fine dog", neg_text="['a', ']"),
        "repeated": row("images/0.png", "a red dog"),
        "too long": row("images/2.png", " ".join(["a dog and a cat"] * 6)),
        "too large": row("images/large.png", "a large dog"),
        "forgotten": row("images/6.png", "a dog in <image>"),
        "two answers, first": row("", "one dog", qry="Who barks"),
        "two answers, second": row("", "one fox", qry="Who barks"),
        "copied image": row("images/copy.png", "another dog"),
        "wrong negative": row("images/4.png", "a good dog", neg_text="['a cat', 'a good dog']"),
        "other rows": row("images/5.png", "a last dog"),
    }


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("doctor_cache")


@pytest.fixture(scope="session")
def check_up(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkup]:
    """Run `cocoa doctor` with these overrides on a terminal of a given width."""
    from cocoa_pl.config.command_line import compose_overrides
    from cocoa_pl.doctor.command import check

    def run(*overrides: str, width: int = 120) -> Checkup:
        out = tmp_path_factory.mktemp("checkup")
        console = Console(file=io.StringIO(), record=True, width=width)
        given = [f"out={out}", f"cache_dir={cache_dir}", *overrides]
        status = check(compose_overrides("doctor", given), console)
        report = json.loads((out / "doctor.json").read_text())
        return Checkup(status, report, console.export_text(), out)

    return run


def mmeb(root: Path, *overrides: str) -> list[str]:
    """Overrides for a folder with the one subset `Set`."""
    return [
        "data=mmeb",
        f"data.root={root}",
        "data.subsets=[Set]",
        "data.caption_subsets=[Set]",
        "data.validation_fraction=0",
        "evaluate=false",
        "workers=0",
        *SMALL,
        *overrides,
    ]
