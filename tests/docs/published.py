"""Small folders in the layouts of published data, and small models in place of published weights,
so that commands which name them can be run.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from cocoa_pl.config.build import build
from cocoa_pl.config.command_line import compose_overrides
from cocoa_pl.data.mmeb_eval import READERS
from tests.files import write_noise, write_rows

ROWS, IMAGES = 20, 24
PLACEHOLDER = "<|image_1|>"


def write_published(folder: Path) -> None:
    """All that the pages name: MMEB's folders, MY_EVAL, MoCa-CL-Pairs, CoCoA's JSON."""
    for data, root, images, file in (
        ("mmeb", "MMEB-train", "MMEB-train/images", "original-0"),
        ("moca_cl", "MoCa-CL-Pairs", "IMAGES/images", "train-0"),
    ):
        _images(folder / images)
        for subset in compose_overrides("train", [f"data={data}", "data.root=x"]).data.subsets:
            write_rows(folder / root / subset / f"{file}.parquet", _pairs(subset))
    given = ["ckpt=x", "benchmark.root=x", "benchmark.image_root=x"]
    tables = {
        name: compose_overrides("evaluate", [f"benchmark={name}", *given]).benchmark.table
        for name in ("mmeb_v1", "mmeb_v2")
    }
    for table, root, images in (
        (tables["mmeb_v1"], "MMEB-eval", "MMEB-eval/eval_images/x"),
        (tables["mmeb_v2"], "MMEB_Test_Instruct", "MMEB-V2/image-tasks/x"),
        ({"RefCOCO": {}, "Manuals": {}}, "MY_EVAL", "MY_EVAL/x"),
    ):
        _images(folder / images)
        for subset, about in table.items():
            reader = about.get("reader")
            sees = reader is None or READERS[reader].query == "image"
            rows = _tasks(subset, slots="" if reader else PLACEHOLDER, sees=sees)
            write_rows(folder / root / subset / "test-0.parquet", rows)
    for name, image, text in (
        ("CAPTIONS", "image_path", "caption"),
        ("QUERIES", "qry_image_path", "pos_text"),
    ):
        rows = [{image: f"images/{n}.png", text: f"picture {n} of {name}"} for n in range(ROWS)]
        if name == "QUERIES":
            rows = [{"qry": f"{PLACEHOLDER}\nsay it", **row} for row in rows]
        _images(folder / name / "images")
        write_rows(folder / name / "part.json", rows)


def write_models(folder: Path, *, texts: list[str]) -> dict[str, Path]:
    """A small model for each family that a config of real weights names, by that config."""
    found = {}
    for twin, names in (
        ("tiny", ("qwen2vl", "qwen2vl_7b")),
        ("tiny_qwen25vl", ("qwen25vl_3b", "qwen25vl_7b")),
    ):
        small = ["model.source.text.num_hidden_layers=1", "model.source.vision.depth=1"]
        cfg = compose_overrides("train", [f"model={twin}", f"cache_dir={folder}", *small])
        path = build(cfg.model.source).folder(lambda: texts)
        found |= dict.fromkeys(names, path)
    return found


def _images(folder: Path) -> None:
    for number in range(IMAGES):
        write_noise(folder / f"{number}.png", (56, 56), seed=number)


def _pairs(subset: str) -> list[dict[str, str]]:
    return [
        {
            "qry": f"{PLACEHOLDER}\nFind it in {subset}\n",
            "qry_image_path": f"images/{number}.png",
            "pos_text": f"picture {number} of {subset}",
            "pos_image_path": "",
            "neg_text": f"['picture {number + 1} of {subset}', 'no picture']",
            "neg_image_path": "['', '']",
        }
        for number in range(ROWS)
    ]


def _tasks(subset: str, *, slots: str, sees: bool) -> list[dict[str, Any]]:
    """V1 has placeholders (`slots`) in the texts; V2 in instructions of their own, in those of
    queries only where they see an image.
    """
    draw, slot = random.Random(subset), f"{slots}\n".lstrip()
    rows = []
    for number in range(6):
        targets = draw.sample(range(IMAGES), 4)
        rows.append(
            {
                "qry_inst": f"{PLACEHOLDER} Find it:" if sees else "Find it:",
                "qry_text": f"{slot}which is {number}?",
                "qry_img_path": f"x/{number}.png",
                "tgt_inst": f"{PLACEHOLDER} Represent it.",
                "tgt_text": [f"{slot}picture {n}" for n in targets],
                "tgt_img_path": [f"x/{n}.png" for n in targets],
            }
        )
    return rows
