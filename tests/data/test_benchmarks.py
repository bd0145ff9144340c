"""MMEB-V1 and V2 folders as published: strings to the letter, names that collapse, few subsets."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table

from cocoa_pl.data.mmeb import EvalSubset
from cocoa_pl.data.mmeb_eval import READERS, MmebBenchmark
from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.benchmark import evaluate
from cocoa_pl.evaluation.report import score_table
from cocoa_pl.items import IMAGE_SLOT, Item

SLOT = IMAGE_SLOT
CONFIGS = Path(__file__).parents[2] / "conf" / "benchmark"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def config(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert values.pop("_target_") == "cocoa_pl.data.mmeb_eval.MmebBenchmark"
    return values | {"on_bad_row": "fail"}


def read(
    root: Path,
    subset: str,
    rows: list[dict[str, Any]],
    *,
    benchmark: str = "mmeb_v2",
    on_bad_row: str = "fail",
) -> EvalSubset:
    """The subset as the published benchmark's own table says."""
    (root / subset).mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), root / subset / "test-00000-of-00001.parquet")
    values = config(benchmark) | {"root": str(root), "image_root": str(root), "subsets": [subset]}
    (found,) = MmebBenchmark(**(values | {"on_bad_row": on_bad_row})).subsets()
    return found


def candidates(subset: EvalSubset, row: int = 0) -> list[Item]:
    return [subset.candidates[number] for number in subset.candidate_index[row]]


# --- V2: one row of each meta-task ---------------------------------------------------------------


def test_classification_reads_bare_texts_and_nothing_else_of_the_targets(root: Path) -> None:
    row = {
        "qry_inst": "<|image_1|>\nRepresent the given image for classification",
        "qry_text": "",
        "qry_img_path": "a.png",
        "tgt_inst": None,  # unused columns may hold anything
        "tgt_text": ["coucal", "hen"],
        "tgt_img_path": [],
    }
    found = read(root, "ImageNet-1K", [row])
    assert found.queries == [
        Item(f"{SLOT}\nRepresent the given image for classification\n", (root / "a.png",))
    ]
    assert candidates(found) == [Item("coucal"), Item("hen")]
    assert (found.group, found.in_distribution) == ("classification", True)


def test_question_stands_on_a_line_of_its_own(root: Path) -> None:
    row = {
        "qry_inst": "<|image_1|> Represent the image with the following question: ",
        "qry_text": "what is it?",
        "qry_img_path": "a.png",
        "tgt_text": ["a dog", "a cat"],
    }
    found = read(root, "OK-VQA", [row])
    (query,) = found.queries
    assert query.text == f"{SLOT}\nRepresent the image with the following question: what is it?\n"
    # Without the line break that questions get, as in image-to-text retrieval:
    caption = read(root, "MSCOCO_i2t", [row | {"qry_inst": "<|image_1|>\nFind a caption:"}])
    assert caption.queries[0].text == f"{SLOT}\nFind a caption: what is it?\n"
    assert candidates(caption) == [Item("a dog"), Item("a cat")]


def text_to_image(**changes: Any) -> dict[str, Any]:
    return {
        "qry_inst": "Find me an image that matches:",
        "qry_text": "a dog",
        "tgt_inst": "<|image_1|>\nRepresent the given image.",
        "tgt_text": ["", ""],
        "tgt_img_path": ["a.png", "b.png"],
    } | changes


@pytest.mark.parametrize(("subset", "end"), [("MSCOCO_t2i", "\n"), ("VisDial", "\n\n")])
def test_text_looks_for_images(root: Path, subset: str, end: str) -> None:
    found = read(root, subset, [text_to_image()])
    assert found.queries == [Item(f"Find me an image that matches: a dog{end}")]
    target = f"{SLOT}\nRepresent the given image.\n"
    assert candidates(found) == [Item(target, (root / n,)) for n in ("a.png", "b.png")]


def test_captioned_images_are_known_by_their_image(root: Path) -> None:
    """WebQA and EDIS: the second caption of an image counts as the first."""
    row = text_to_image(
        tgt_inst="<|image_1|>\nRepresent the image with its caption:",
        tgt_text=["one", "two", "three"],
        tgt_img_path=["a.png", "b.png", "a.png"],
    )
    other = row | {"tgt_text": ["four", "five"], "tgt_img_path": ["b.png", "c.png"]}
    found = read(root, "WebQA", [row, other])
    prompt = f"{SLOT}\nRepresent the image with its caption:"
    assert [item.text for item in candidates(found)] == [
        f"{prompt} one\n",
        f"{prompt} two\n",
        f"{prompt} one\n",
    ]
    assert [item.text for item in candidates(found, 1)] == [f"{prompt} two\n", f"{prompt} five\n"]
    assert len(found.candidates) == 3


def test_first_caption_decides_whether_a_row_has_captions(root: Path) -> None:
    rows = [text_to_image(tgt_text=[" ", "two"]), text_to_image(tgt_text=["one", ""])]
    first = read(root, "MSCOCO_t2i", rows[:1])
    assert {item.text for item in first.candidates} == {f"{SLOT}\nRepresent the given image.\n"}
    second = read(root, "MSCOCO_t2i", rows[1:])
    assert [item.text for item in candidates(second)] == [
        f"{SLOT}\nRepresent the given image. one\n",
        f"{SLOT}\nRepresent the given image. \n",  # the harness's own blank
    ]


def image_to_image(**changes: Any) -> dict[str, Any]:
    return {
        "qry_inst": "<|image_1|> Select the portion of the image that follows: ",
        "qry_text": '"left dog"',
        "qry_img_path": "a.png",
        "tgt_inst": "<|image_1|>\nRepresent the given cropped image of the object",
        "tgt_text": ["", ""],
        "tgt_img_path": ["b.png", "c.png"],
    } | changes


def test_image_and_text_look_for_images(root: Path) -> None:
    found = read(root, "RefCOCO", [image_to_image()])
    query = f'{SLOT}\nSelect the portion of the image that follows: "left dog"\n'
    assert found.queries == [Item(query, (root / "a.png",))]
    target = f"{SLOT}\nRepresent the given cropped image of the object"  # no line break at the end
    assert candidates(found) == [Item(target, (root / n,)) for n in ("b.png", "c.png")]
    assert (found.group, found.in_distribution) == ("grounding", False)


def test_objects_of_one_image_are_told_apart_by_their_captions(root: Path) -> None:
    """RefCOCO-Matching: path and caption are the name, quotation marks around it are not."""
    row = image_to_image(
        tgt_text=['"left dog"', "right dog", "left dog"],
        tgt_img_path=["b.png", "b.png", "b.png"],
    )
    found = read(root, "RefCOCO-Matching", [row])
    prompt = f"{SLOT}\nRepresent the given cropped image of the object"
    assert [item.text for item in candidates(found)] == [
        f'{prompt} "left dog"\n',
        f"{prompt} right dog\n",
        f'{prompt} "left dog"\n',
    ]
    assert len(found.candidates) == 2


def test_rows_without_captions_collapse_across_the_subset_too(root: Path) -> None:
    rows = [image_to_image(tgt_img_path=["b.png", "c.png"], qry_text=str(n)) for n in range(130)]
    rows[100] = image_to_image(tgt_img_path=["c.png", "a.png"])
    found = read(root, "CIRR", rows)
    assert len(found.candidates) == 3
    assert [item.images[0].name for item in candidates(found, 100)] == ["c.png", "a.png"]
    assert found.row_ids[129] == "CIRR row 129"


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "lists of two lengths": ({"tgt_text": [""]}, "tgt_text has 1 entries and tgt_img_path 2"),
    "no candidates": ({"tgt_text": [], "tgt_img_path": []}, "no candidates"),
    "null": ({"tgt_inst": None}, "tgt_inst holds a null"),
    "null among the captions": ({"tgt_text": ["", None]}, "tgt_text holds a null"),
    "no query image": ({"qry_img_path": ""}, "query text holds .* names no image"),
    "missing image": ({"tgt_img_path": ["b.png", "d.png"]}, r"image .*d\.png does not exist"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_row_is_named_or_skipped(root: Path, changes: dict[str, Any], message: str) -> None:
    rows = [image_to_image(), image_to_image() | changes, image_to_image(qry_text="other")]
    with pytest.raises(UserError, match=message) as caught:
        read(root, "NIGHTS", rows)
    assert str(caught.value).startswith("NIGHTS row 1")
    assert read(root, "NIGHTS", rows, on_bad_row="skip").row_ids == ["NIGHTS row 0", "NIGHTS row 2"]


def test_missing_column_is_an_error(root: Path) -> None:
    row = text_to_image()
    del row["tgt_inst"]
    with pytest.raises(UserError, match="no column tgt_inst"):
        read(root, "EDIS", [row])


def test_strings_of_both_versions_are_the_same(root: Path) -> None:
    """What the newer annotations were made for: V1's strings, whitespace included."""
    plain = {
        "qry_text": "<|image_1|>\nRepresent the given image for classification\n",
        "qry_img_path": "a.png",
        "tgt_text": ["coucal", "hen"],
        "tgt_img_path": ["", ""],
    }
    instructed = {
        "qry_inst": "<|image_1|>\nRepresent the given image for classification",
        "qry_text": "",
        "qry_img_path": "a.png",
        "tgt_text": ["coucal", "hen"],
    }
    old = read(root, "VOC2007", [plain], benchmark="mmeb_v1")
    new = read(root, "VOC2007", [instructed])
    assert (old.queries, old.candidates) == (new.queries, new.candidates)


# --- Configs ---------------------------------------------------------------------------------


def test_tables_hold_the_same_subsets_in_the_same_groups() -> None:
    old, new = config("mmeb_v1")["table"], config("mmeb_v2")["table"]
    sizes = {"classification": 10, "vqa": 10, "retrieval": 12, "grounding": 4}
    assert [sum(info["group"] == g for info in old.values()) for g in sizes] == [*sizes.values()]
    assert sum(info["in_distribution"] for info in old.values()) == 20
    assert "CIFAR-100" not in old  # its folder lies among the published ones
    assert {name: info | {"reader": new[name]["reader"]} for name, info in old.items()} == new
    assert {info["reader"] for info in new.values()} == set(READERS)


def benchmark(root: Path, **changes: Any) -> MmebBenchmark:
    table = {
        name: {"group": "vqa", "in_distribution": True, "reader": "vqa"} for name in ("A", "B", "C")
    }
    values: dict[str, Any] = {
        "name": "mine",
        "root": str(root),
        "image_root": str(root),
        "split": "test",
        "table": table,
        "subsets": None,
        "published": [],
        "on_bad_row": "fail",
    }
    return MmebBenchmark(**(values | changes))


def test_choice_of_subsets_is_partial_and_keeps_the_order_of_the_table(root: Path) -> None:
    assert not benchmark(root).is_partial
    assert not benchmark(root, subsets=["C", "B", "A"]).is_partial
    few = benchmark(root, subsets=["C", "A"])
    assert few.is_partial
    assert list(few.table) == ["A", "C"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subsets": ["D"]}, "benchmark.subsets names D, but mine has A, B, C"),
        ({"subsets": []}, "benchmark.subsets is empty"),
        ({"subsets": "A"}, r"benchmark.subsets is a list; write benchmark.subsets=\[A\]"),
        (
            {"table": {"A": {"group": "vqa", "in_distribution": True, "reader": "ocr"}}},
            r"benchmark\.table\.A\.reader is ocr; choose classification, vqa",
        ),
    ],
)
def test_impossible_choice_is_refused(root: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        benchmark(root, **changes)


def test_choice_of_subsets_gives_no_means(root: Path) -> None:
    rows = [text_to_image(), text_to_image(tgt_img_path=["c.png", "a.png"], qry_text="a cat")]
    subset = read(root, "MSCOCO_t2i", rows)

    def encode(items: Sequence[Item]) -> np.ndarray:
        return np.eye(512, dtype=np.float32)[[item.key % 512 for item in items]]

    whole, few = (
        evaluate(encode, [subset], benchmark="b", checkpoint="c", is_partial=is_partial)
        for is_partial in (False, True)
    )
    content = few.to_json()
    means = (content["overall"], content["in_distribution"], content["groups"]["retrieval"])
    assert means == (None, None, None)
    assert content["subsets"] == whole.to_json()["subsets"]
    assert whole.to_json()["overall"] == whole.subsets[0].precision_at_1
    shown = [_text(score_table(results)) for results in (whole, few)]
    assert ["overall" in text for text in shown] == [True, False]
    assert all("MSCOCO_t2i" in text for text in shown)


def _text(table: Table) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    found: str = console.file.getvalue()  # type: ignore[attr-defined]
    return found
