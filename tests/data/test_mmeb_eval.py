"""Evaluation folders of MMEB V1 and V2 are read to the letter; every bad row is named."""

from __future__ import annotations

import logging
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cocoa_pl.config.build import build, check_values
from cocoa_pl.config.command_line import compose_overrides
from cocoa_pl.data.items import IMAGE_SLOT, EvalSubset, Item
from cocoa_pl.data.mmeb_eval import READERS, MmebBenchmark
from cocoa_pl.errors import UserError
from tests.files import write_noise, write_rows

SLOT = IMAGE_SLOT
CONFIGS = Path(__file__).parents[2] / "conf" / "benchmark"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "c.png"):
        write_noise(tmp_path / name)
    return tmp_path


def config(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert values.pop("_target_") == "cocoa_pl.data.mmeb_eval.MmebBenchmark"
    return values | {"on_bad_row": "fail"}


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
        "unlisted": None,
        "subsets": None,
        "published": [],
        "on_bad_row": "fail",
    }
    return MmebBenchmark(**(values | changes))


def write(root: Path, subset: str, rows: list[dict[str, Any]]) -> None:
    write_rows(root / subset / "test-00000-of-00001.parquet", rows)


def read(
    root: Path,
    subset: str,
    rows: list[dict[str, Any]],
    *,
    benchmark: str = "mmeb_v2",
    on_bad_row: str = "fail",
) -> EvalSubset:
    """The subset as the published benchmark's own table says."""
    write(root, subset, rows)
    values = config(benchmark) | {"root": str(root), "image_root": str(root), "subsets": [subset]}
    (found,) = MmebBenchmark(**(values | {"on_bad_row": on_bad_row})).subsets()
    return found


def candidates(subset: EvalSubset, row: int = 0) -> list[Item]:
    return [subset.candidates[number] for number in subset.candidate_index[row]]


# --- V1 ----------------------------------------------------------------------------------------

REFCOCO = {
    "qry_text": "<|image_1|>\nSelect the portion of the image that follows the language: the cup\n",
    "qry_img_path": "a.png",
    "tgt_text": ["<|image_1|>\nRepresent the crop", "<|image_1|>\nRepresent the crop"],
    "tgt_img_path": ["b.png", "a.png"],
}


def classes(label: int, *, count: int = 5) -> dict[str, Any]:
    words = [f"class {label}", *(f"class {other}" for other in range(count) if other != label)]
    return {
        "qry_text": "<|image_1|>\nWhat is it?",
        "qry_img_path": "a.png" if label % 2 else "b.png",
        "tgt_text": words,
        "tgt_img_path": [""] * count,
    }


def read_v1(root: Path, rows: list[dict[str, Any]], **changes: Any) -> EvalSubset:
    """Rows of a subset of one's own."""
    write(root, "Set", rows)
    table = {"Set": {"group": "grounding", "in_distribution": False}}
    (found,) = benchmark(root, table=table, **changes).subsets()
    return found


def test_row_is_read_to_the_letter(root: Path) -> None:
    subset = read_v1(root, [REFCOCO])
    assert (subset.name, subset.group, subset.in_distribution) == ("Set", "grounding", False)
    query = REFCOCO["qry_text"].replace("<|image_1|>", SLOT)
    assert subset.queries == [Item(query, (root / "a.png",))]
    assert candidates(subset) == [
        Item(f"{SLOT}\nRepresent the crop", (root / name,)) for name in REFCOCO["tgt_img_path"]
    ]
    assert subset.row_ids == ["Set row 0"]
    with pytest.raises(UserError, match="group 'ranking' is not one of classification, vqa"):
        replace(subset, group="ranking")


def test_every_distinct_side_occurs_once_and_rows_keep_their_candidates(root: Path) -> None:
    rows = [classes(number % 5, count=5 + number % 2) for number in range(50)]
    rows[7] |= {"tgt_text": ["a", "class 0", "a"], "tgt_img_path": [""] * 3}  # twice in a row
    subset = read_v1(root, rows)
    assert len(subset.queries) == len(set(subset.queries)) == 2
    assert len(subset.candidates) == len(set(subset.candidates)) == 7
    for number, row in enumerate(rows):
        assert [item.text for item in candidates(subset, number)] == row["tgt_text"]
        query = subset.queries[subset.query_index[number]]
        assert query.media == (root / row["qry_img_path"],)
    assert subset.query_index.dtype == subset.candidate_index[0].dtype == np.int32


@pytest.mark.parametrize("is_struct", [True, False])
def test_images_in_the_rows_are_images(root: Path, is_struct: bool) -> None:
    """As `datasets` writes them, and plain bytes."""
    encoded = [(root / "a.png").read_bytes(), b"another"]

    def image(content: bytes | None) -> Any:
        return {"bytes": content, "path": None} if is_struct else content

    targets = {"tgt_text": ["<|image_1|>", "t"], "tgt_img_path": [image(encoded[1]), image(None)]}
    queries = [("<|image_1|> a", encoded[0]), ("<|image_1|> a", encoded[1]), ("a", None)]
    rows = [{"qry_text": text, "qry_img_path": image(one), **targets} for text, one in queries]
    subset = read_v1(root, rows)
    assert [item.media for item in subset.queries] == [(encoded[0],), (encoded[1],), ()]
    assert subset.candidates == [Item(SLOT, (encoded[1],)), Item("t")]


BAD_V1_ROWS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"tgt_img_path": [""]}, "tgt_text has 5 entries and tgt_img_path 1"),
    ({"tgt_text": [], "tgt_img_path": []}, "no candidates"),
    ({"qry_text": None}, "qry_text holds a null"),
    ({"tgt_text": ["a", None, "b", "c", "d"]}, "tgt_text holds a null"),
    ({"tgt_text": None}, "tgt_text must be a list"),
    ({"qry_img_path": "d.png"}, "query: image .* does not exist"),
    ({"tgt_text": ["<|image_1|>"] * 5, "tgt_img_path": ["d.png"] * 5}, "candidate: image .* does"),
    ({"tgt_text": ["a", "", "b", "c", "d"]}, "candidate: it is empty"),
    ({"qry_text": "What?"}, "query: it has image"),
)


@pytest.mark.parametrize(("changes", "message"), BAD_V1_ROWS)
def test_bad_row_fails_or_is_skipped_and_counted(
    root: Path, changes: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [classes(0), classes(1) | changes, classes(2)]
    with pytest.raises(UserError, match=f"^Set row 1.*{message}"):
        read_v1(root, rows)
    with caplog.at_level(logging.WARNING):
        subset = read_v1(root, rows, on_bad_row="skip")
    assert subset.row_ids == ["Set row 0", "Set row 2"]
    assert "skipped 1 bad row(s): Set row 1" in caplog.text
    assert [item.text for item in subset.candidates] == [f"class {number}" for number in range(5)]
    assert [item.text for item in candidates(subset, 1)] == classes(2)["tgt_text"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qry_text": b"a"}, "qry_text holds bytes; write a string"),
        ({"qry_img_path": ["a.png"]}, "qry_img_path holds list"),
        ({"tgt_img_path": [{"url": "x"}]}, "tgt_img_path holds dict"),
    ],
)
def test_a_subset_without_a_usable_row_is_an_error(
    root: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=f"Set row 0.*{message}"):
        read_v1(root, [REFCOCO | changes])
    with pytest.raises(UserError, match=r"no usable row in .*\(1 skipped\)"):
        read_v1(root, [REFCOCO | changes], on_bad_row="skip")


def test_many_candidates_cost_little_memory(root: Path) -> None:
    size = 400
    captions = pa.array([f"caption {number}, forty characters in length" for number in range(size)])
    offsets = pa.array(np.arange(size + 1) * size, pa.int32())
    turns = (np.arange(size)[:, None] + np.arange(size)).ravel() % size
    table = pa.table(
        {
            "qry_text": ["<|image_1|>\nFind the caption"] * size,
            "qry_img_path": ["a.png", "b.png"] * (size // 2),
            "tgt_text": pa.ListArray.from_arrays(offsets, captions.take(pa.array(turns))),
            "tgt_img_path": pa.ListArray.from_arrays(offsets, pa.array([""] * size * size)),
        }
    )
    (root / "A").mkdir()
    pq.write_table(table, root / "A" / "test-0.parquet")
    del table, turns
    own = benchmark(root, table={"A": {"group": "vqa", "in_distribution": True}})
    tracemalloc.start()
    (subset,) = own.subsets()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(subset.candidates) == size
    assert [int(row[0]) for row in subset.candidate_index] == list(range(size))
    assert peak < 3.2e6  # as many Items would be 16 MB and more


def test_a_damaged_page_is_named_by_its_file(root: Path) -> None:
    row = {"qry_text": "q", "qry_img_path": "", "tgt_text": ["a"], "tgt_img_path": [""]}
    write(root, "A", [{**row, "qry_text": f"{number}" * 999} for number in range(9)])
    path = root / "A" / "test-00000-of-00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:40] + b"\0" * 200 + content[240:])  # the footer is whole
    own = benchmark(root, table={"A": {"group": "vqa", "in_distribution": True}})
    with pytest.raises(UserError, match=rf"{path}: cannot be read as parquet .*download it again"):
        own.subsets()


# --- V2: one row of each meta-task ---------------------------------------------------------------

CLASSES = {
    "qry_inst": "<|image_1|>\nRepresent the given image for classification",
    "qry_text": "",
    "qry_img_path": "a.png",
    "tgt_inst": None,  # unused columns may hold anything
    "tgt_text": ["x", "y"],
    "tgt_img_path": [],
}
QUESTION = {
    "qry_inst": "<|image_1|> Answer the question: ",
    "qry_text": "what is it?",
    "qry_img_path": "a.png",
    "tgt_text": ["x", "y"],
}
CAPTION = QUESTION | {"qry_inst": "<|image_1|>\nFind a caption:"}
TEXT_TO_IMAGE = {
    "qry_inst": "Find me an image that matches:",
    "qry_text": "a dog",
    "tgt_inst": "<|image_1|>\nRepresent the given image.",
    "tgt_text": ["", ""],
    "tgt_img_path": ["a.png", "b.png"],
}
IMAGE_TO_IMAGE = {
    "qry_inst": "<|image_1|> Select the portion of the image that follows: ",
    "qry_text": '"left dog"',
    "qry_img_path": "a.png",
    "tgt_inst": "<|image_1|>\nRepresent the given cropped image of the object",
    "tgt_text": ["", ""],
    "tgt_img_path": ["b.png", "c.png"],
}
CAPTIONED = {
    "tgt_inst": "<|image_1|>\nRepresent the image with its caption:",
    "tgt_text": ["one", "two", "three"],
    "tgt_img_path": ["a.png", "b.png", "a.png"],
}
OBJECTS = {
    "tgt_text": ['"left dog"', "right dog", "left dog"],
    "tgt_img_path": ["b.png", "b.png", "b.png"],
}
FIND = "Find me an image that matches: a dog"
SELECT = f'{SLOT}\nSelect the portion of the image that follows: "left dog"\n'
IMAGE = f"{SLOT}\nRepresent the given image."
CROP = f"{SLOT}\nRepresent the given cropped image of the object"
SHOWN = f"{SLOT}\nRepresent the image with its caption:"


@pytest.mark.parametrize(
    ("subset", "row", "query", "targets"),
    [
        # V1's strings, whitespace included.
        ("VOC2007", CLASSES, f"{SLOT}\nRepresent the given image for classification\n", ["x", "y"]),
        # A question is put on a line of its own, other instructions are not.
        ("OK-VQA", QUESTION, f"{SLOT}\nAnswer the question: what is it?\n", ["x", "y"]),
        ("MSCOCO_i2t", CAPTION, f"{SLOT}\nFind a caption: what is it?\n", ["x", "y"]),
        ("MSCOCO_t2i", TEXT_TO_IMAGE, f"{FIND}\n", [f"{IMAGE}\n"] * 2),
        ("VisDial", TEXT_TO_IMAGE, f"{FIND}\n\n", [f"{IMAGE}\n"] * 2),
        # The first caption decides whether there are any; the blank is the harness's own.
        ("VisDial", TEXT_TO_IMAGE | {"tgt_text": [" ", "b"]}, f"{FIND}\n\n", [f"{IMAGE}\n"] * 2),
        (
            *("MSCOCO_t2i", TEXT_TO_IMAGE | {"tgt_text": ["one", ""]}),
            *(f"{FIND}\n", [f"{IMAGE} one\n", f"{IMAGE} \n"]),
        ),
        # WebQA and EDIS: the second caption of an image counts as the first.
        (
            *("WebQA", TEXT_TO_IMAGE | CAPTIONED, f"{FIND}\n"),
            [f"{SHOWN} one\n", f"{SHOWN} two\n", f"{SHOWN} one\n"],
        ),
        ("RefCOCO", IMAGE_TO_IMAGE, SELECT, [CROP] * 2),  # no line break at the end
        # Objects of one image differ by captions; quotation marks around them do not count.
        (
            *("RefCOCO-Matching", IMAGE_TO_IMAGE | OBJECTS, SELECT),
            [f'{CROP} "left dog"\n', f"{CROP} right dog\n", f'{CROP} "left dog"\n'],
        ),
    ],
)
def test_a_row_of_v2_is_read_to_the_letter(
    root: Path, subset: str, row: dict[str, Any], query: str, targets: list[str]
) -> None:
    found = read(root, subset, [row])
    images = [row["qry_img_path"]] if SLOT in query else []
    assert found.queries == [Item(query, tuple(root / name for name in images))]
    pictures = row["tgt_img_path"] if SLOT in targets[0] else [None] * len(targets)
    expected = [
        Item(text, () if name is None else (root / name,))
        for text, name in zip(targets, pictures, strict=True)
    ]
    assert candidates(found) == expected
    assert len(found.candidates) == len(set(expected))
    about = config("mmeb_v2")["table"][subset]
    assert (found.group, found.in_distribution) == (about["group"], about["in_distribution"])


def test_images_are_known_across_the_subset_by_the_first_caption(root: Path) -> None:
    row = TEXT_TO_IMAGE | CAPTIONED
    other = {"tgt_text": ["four", "five"], "tgt_img_path": ["b.png", "c.png"]}
    rows = [row | {"qry_text": str(number)} for number in range(130)]
    rows[100] |= other
    found = read(root, "WebQA", rows)
    assert [item.text for item in candidates(found, 100)] == [f"{SHOWN} two\n", f"{SHOWN} five\n"]
    assert len(found.candidates) == 3
    assert found.row_ids[129] == "WebQA row 129"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tgt_inst": None}, "tgt_inst holds a null"),
        ({"qry_img_path": ""}, "query: the text holds .* names no image"),
    ],
)
def test_bad_row_of_v2_is_named_or_skipped(
    root: Path, changes: dict[str, Any], message: str
) -> None:
    rows = [IMAGE_TO_IMAGE, IMAGE_TO_IMAGE | changes, IMAGE_TO_IMAGE | {"qry_text": "other"}]
    with pytest.raises(UserError, match=f"^NIGHTS row 1.*{message}"):
        read(root, "NIGHTS", rows)
    assert read(root, "NIGHTS", rows, on_bad_row="skip").row_ids == ["NIGHTS row 0", "NIGHTS row 2"]
    with pytest.raises(UserError, match="no column tgt_inst"):
        read(root, "NIGHTS", [{k: v for k, v in IMAGE_TO_IMAGE.items() if k != "tgt_inst"}])


# --- Configs ---------------------------------------------------------------------------------


def test_tables_hold_the_same_subsets_in_the_same_groups() -> None:
    old, new = config("mmeb_v1")["table"], config("mmeb_v2")["table"]
    sizes = {"classification": 10, "vqa": 10, "retrieval": 12, "grounding": 4}
    assert [sum(info["group"] == g for info in old.values()) for g in sizes] == [*sizes.values()]
    assert sum(info["in_distribution"] for info in old.values()) == 20
    assert "CIFAR-100" not in old  # its folder lies among the published ones
    assert {name: info | {"reader": new[name]["reader"]} for name, info in old.items()} == new
    assert {info["reader"] for info in new.values()} == set(READERS)


def test_benchmark_reads_its_table_in_order_and_misses_nothing(root: Path) -> None:
    table: dict[str, Any] = {
        "VOC2007": {"group": "classification", "in_distribution": True},
        "RefCOCO": {"group": "grounding", "in_distribution": False},
    }
    write(root, "RefCOCO", [REFCOCO])
    write(root, "VOC2007", [classes(0)])
    found = benchmark(root, table=table).subsets()
    assert [(one.name, one.group, one.in_distribution) for one in found] == [
        (name, *info.values()) for name, info in table.items()
    ]
    with pytest.raises(UserError, match=r"GQA: .* does not exist"):
        benchmark(root, table=table | {"GQA": table["RefCOCO"]}).subsets()
    assert not benchmark(root, subsets=["C", "B", "A"]).is_partial
    few = benchmark(root, subsets=["C", "A"])
    assert few.is_partial
    assert list(few.table) == ["A", "C"]


def own(root: Path, *overrides: str) -> MmebBenchmark:
    words = ("benchmark=mmeb", f"benchmark.root={root}", "ckpt=x")
    cfg = compose_overrides("evaluate", [*words, *overrides])
    check_values(cfg)
    found: MmebBenchmark = build(cfg.benchmark)
    return found


def test_a_benchmark_of_ones_own_is_what_lies_in_the_folder(root: Path) -> None:
    for name in ("RefCOCO", "Manuals", "Charts"):
        write(root, name, [REFCOCO])
    (root / "eval_of_last_year").mkdir()
    found = own(root, "+benchmark.table.Charts={group: vqa, in_distribution: false}")
    assert {one.name: (one.group, one.in_distribution) for one in found.subsets()} == {
        "Charts": ("vqa", False),
        "Manuals": ("retrieval", True),
        "RefCOCO": ("grounding", False),
    }
    assert (found.name, found.published, found.is_partial) == ("own_benchmark", [], False)
    assert own(root, "benchmark.subsets=[Manuals]").is_partial
    for words, message in (
        ("benchmark.subsets=[GQA]", "names GQA, but own_benchmark has Charts, Manuals, RefCOCO$"),
        ("benchmark.split=dev", rf"benchmark\.root={root} has no file <Subset>/dev-\*\.parquet$"),
        ("benchmark.root=nowhere", r"benchmark\.root=nowhere has no file <Subset>/test-"),
        ("+benchmark.table.Charts={kind: vqa}", r"table\.Charts\.kind is vqa; choose group, in_"),
        ("+benchmark.table.Charts={group: vga}", r"table\.Charts\.group is vga; choose classi"),
        ("+benchmark.table.Charts={reader: ocr}", r"table\.Charts\.reader is ocr; choose classi"),
        ("benchmark.subsets=[]", r"benchmark\.subsets=\[\] must be a list of at least one or null"),
        ("benchmark.subsets=A", "benchmark.subsets=A must be a list of at least one or null"),
    ):
        with pytest.raises(UserError, match=message):
            own(root, words)
    (root / "eval_images").mkdir()
    assert (found.image_root, own(root).image_root) == (root, root / "eval_images")
