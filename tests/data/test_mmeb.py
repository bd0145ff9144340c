"""MMEB rows become Items exactly as published; every bad row has a name and a choice of outcome."""

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cocoa_pl.data.cocoa_json import CocoaJsonData
from cocoa_pl.data.items import IMAGE_SLOT, Item, Pair
from cocoa_pl.data.mmeb import read_train
from cocoa_pl.data.sources import MmebData, PairsData
from cocoa_pl.data.stream import StreamData
from cocoa_pl.errors import UserError

SLOT = IMAGE_SLOT

# Rows as in TIGER-Lab/MMEB-train; the negative image of VisDial has no placeholder there, either.
VISDIAL = {
    "qry": "Represent the given dialogue about an image, which is used for image retrieval: "
    "Q:is the photo in color\nA:yes\n\n",
    "qry_image_path": "",
    "pos_text": "<|image_1|>\nRepresent the given image\n",
    "pos_image_path": "images/VisDial/Train/VisDial_image_0.jpg",
    "neg_text": "",
    "neg_image_path": "images/VisDial/Train/VisDial_image_61616.jpg",
}
MSCOCO_I2T = {
    "qry": "<|image_1|>\nFind an image caption describing the given everyday image.\n",
    "qry_image_path": "images/a.png",
    "pos_text": "A man with a red helmet on a small moped on a dirt road.",
    "pos_image_path": "",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in (
        "images/a.png",
        "images/b.png",
        "images/VisDial/Train/VisDial_image_0.jpg",
        "images/VisDial/Train/VisDial_image_61616.jpg",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    return tmp_path


def write(
    root: Path, rows: list[dict[str, Any]], *, subset: str = "Set", split: str = "original"
) -> None:
    folder = root / subset
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")


def read(root: Path, **changes: Any) -> list[Pair]:
    options: dict[str, Any] = {
        "subsets": ["Set"],
        "split": "original",
        "image_root": root,
        "on_bad_row": "fail",
        "max_rows": None,
    }
    return read_train(root, **(options | changes))


def test_published_visdial_row_is_read_to_the_letter(root: Path) -> None:
    write(root, [VISDIAL], subset="VisDial")
    (pair,) = read(root, subsets=["VisDial"])
    folder = root / "images/VisDial/Train"
    assert pair == Pair(
        query=Item(VISDIAL["qry"]),
        positive=Item(f"{SLOT}\nRepresent the given image\n", (folder / "VisDial_image_0.jpg",)),
        negatives=(Item(SLOT, (folder / "VisDial_image_61616.jpg",)),),
        subset="VisDial",
        row_id="VisDial row 0",
    )


def test_row_without_negative_columns_has_no_negatives(root: Path) -> None:
    write(root, [MSCOCO_I2T])
    (pair,) = read(root)
    assert (
        pair.query.text == f"{SLOT}\nFind an image caption describing the given everyday image.\n"
    )
    assert pair.query.media == (root / "images/a.png",)
    assert pair.positive == Item(MSCOCO_I2T["pos_text"])
    assert pair.negatives == ()


def test_subsets_files_and_rows_keep_their_order_and_names(root: Path) -> None:
    def rows(*texts: str) -> list[dict[str, Any]]:
        return [MSCOCO_I2T | {"pos_text": text} for text in texts]

    write(root, rows("one", "two"), subset="B")
    write(root, rows("three", "four"), subset="A")
    pq.write_table(
        pa.Table.from_pylist(rows("five")), root / "A" / "original-00001-of-00002.parquet"
    )
    write(root, rows("other split"), subset="A", split="diverse_instruction")
    pairs = read(root, subsets=["B", "A"])
    assert [(pair.subset, pair.row_id, pair.positive.text) for pair in pairs] == [
        ("B", "B row 0", "one"),
        ("B", "B row 1", "two"),
        ("A", "A row 0", "three"),
        ("A", "A row 1", "four"),
        ("A", "A row 2", "five"),
    ]
    limited = read(root, subsets=["B", "A"], max_rows=1)
    assert [pair.row_id for pair in limited] == ["B row 0", "A row 0"]


@pytest.mark.parametrize(
    ("texts", "images", "expected"),
    [
        ("", "", []),
        ("[]", "[]", []),
        ("a cat", "", [("a cat", None)]),
        ("['a cat', \"a dog's\"]", "", [("a cat", None), ("a dog's", None)]),
        ("['a cat', 'a dog']", "['', '']", [("a cat", None), ("a dog", None)]),
        ("['a cat', '']", "", [("a cat", None)]),
        ("", "['images/a.png', 'images/b.png']", [(SLOT, "a.png"), (SLOT, "b.png")]),
        (
            "['<|image_1|> red', 'plain']",
            "['images/a.png', '']",
            [(f"{SLOT} red", "a.png"), ("plain", None)],
        ),
        ("['no slot']", "images/b.png", [(f"{SLOT}\nno slot", "b.png")]),
        (["a cat", "a dog"], ["", "images/a.png"], [("a cat", None), (f"{SLOT}\na dog", "a.png")]),
    ],
)
def test_negatives_may_be_strings_lists_or_written_lists(
    root: Path, texts: Any, images: Any, expected: list[tuple[str, str | None]]
) -> None:
    write(root, [MSCOCO_I2T | {"neg_text": texts, "neg_image_path": images}])
    (pair,) = read(root)
    found = [(item.text, item.media[0].name if item.media else None) for item in pair.negatives]
    assert found == expected


@pytest.mark.parametrize(
    "expression", ["open({path!r}, 'w')", "__import__('pathlib').Path({path!r}).touch()"]
)
def test_negative_lists_are_parsed_never_executed(root: Path, expression: str) -> None:
    trap = root / "executed"
    text = "[" + expression.format(path=str(trap)) + "]"
    write(root, [MSCOCO_I2T | {"neg_text": text, "neg_image_path": ""}])
    with pytest.raises(UserError, match="Set row 0: neg_text looks like a list"):
        read(root)
    assert not trap.exists()


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "placeholder without an image": ({"qry_image_path": ""}, "query text holds .* names no image"),
    "image without a placeholder": ({"qry": "Find it"}, "query has image .* but no <|image_1|>"),
    "image for a plain positive": ({"pos_image_path": "images/b.png"}, "positive has image"),
    "empty caption": ({"pos_text": ""}, "positive is empty"),
    "caption of blanks": ({"pos_text": " \n\t"}, "positive is empty"),
    "empty query": ({"qry": "", "qry_image_path": ""}, "query is empty"),
    "null": ({"pos_text": None}, "positive is empty"),
    "reserved character": ({"pos_text": f"a {SLOT} b"}, "positive text holds U\\+FDD0"),
    "two placeholders": ({"qry": "<|image_1|><|image_1|>"}, "once"),
    "second image": ({"qry": "<|image_1|><|image_2|>"}, r"query text holds .* for 1 image\(s\)"),
    "two kinds": ({"qry": "<|image_1|> <image>"}, "query text holds both"),
    "missing image": ({"qry_image_path": "images/c.png"}, r"Set row 1, query: image .*c\.png does"),
    "image outside": ({"qry_image_path": "../a.png"}, "leaves the image root"),
    "absolute image": ({"qry_image_path": "/etc/hostname"}, "absolute"),
    "negatives of two lengths": (
        {"neg_text": "['a', 'b']", "neg_image_path": "['images/a.png']"},
        "neg_text has 2 entries and neg_image_path 1",
    ),
    "negatives of numbers": (
        {"neg_text": "[1, 2]"},
        "neg_text must be a string or a list of strings",
    ),
    "negatives broken off": ({"neg_text": "['a', ']"}, "looks like a list"),
    "negative without its image": ({"neg_text": "<|image_1|> b"}, "negative text holds"),
}


def _with_bad_row(changes: dict[str, Any]) -> list[dict[str, Any]]:
    blank = {"neg_text": "", "neg_image_path": ""}
    good = [MSCOCO_I2T | blank | {"pos_text": f"good {number}"} for number in range(2)]
    return [good[0], MSCOCO_I2T | blank | changes, good[1]]


@pytest.mark.parametrize(("changes", "message"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_row_is_an_error_that_names_it(
    root: Path, changes: dict[str, Any], message: str
) -> None:
    write(root, _with_bad_row(changes))
    with pytest.raises(UserError, match=message) as caught:
        read(root)
    assert str(caught.value).startswith("Set row 1")


@pytest.mark.parametrize("changes", [row for row, _ in BAD_ROWS.values()], ids=BAD_ROWS.keys())
def test_bad_row_is_skipped_counted_and_logged_on_request(
    root: Path, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    write(root, _with_bad_row(changes))
    with caplog.at_level(logging.WARNING):
        pairs = read(root, on_bad_row="skip")
    assert [pair.row_id for pair in pairs] == ["Set row 0", "Set row 2"]
    (record,) = caplog.records
    assert "skipped 1 bad row(s): Set row 1" in record.getMessage()


def test_many_skips_are_one_line_with_the_first_three_rows(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(root, [MSCOCO_I2T, *[MSCOCO_I2T | {"pos_text": ""}] * 9])
    with caplog.at_level(logging.WARNING):
        read(root, on_bad_row="skip")
    (record,) = caplog.records
    assert "skipped 9 bad row(s)" in record.getMessage()
    assert [f"row {number}:" in record.getMessage() for number in range(1, 6)] == [True] * 3 + [
        False
    ] * 2


def _no_rows(root: Path) -> None:
    table = pa.table({name: pa.array([], pa.string()) for name in MSCOCO_I2T})
    pq.write_table(table, root / "Set" / "original-0.parquet")


UNUSABLE_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no rows": (_no_rows, "no usable row"),
    "no rows and no columns": (lambda root: write(root, []), "no column qry"),
    "wrong type": (
        lambda root: write(root, [MSCOCO_I2T | {"pos_text": 3}]),
        "column pos_text holds int64",
    ),
    "missing columns": (
        lambda root: write(root, [{"qry": "a"}]),
        "no column qry_image_path, ",
    ),
    "another split": (
        lambda root: write(root, [MSCOCO_I2T], split="train"),
        r"no original-\*\.parquet .*train-",
    ),
    "broken": (
        lambda root: (root / "Set" / "original-0.parquet").write_text("PAR1"),
        "cannot be read as parquet",
    ),
}


@pytest.mark.parametrize("on_bad_row", ["fail", "skip"])
@pytest.mark.parametrize(("prepare", "message"), UNUSABLE_FILES.values(), ids=UNUSABLE_FILES.keys())
def test_unusable_file_is_an_error_whatever_on_bad_row_says(
    root: Path, on_bad_row: str, prepare: Callable[[Path], object], message: str
) -> None:
    (root / "Set").mkdir()
    prepare(root)
    with pytest.raises(UserError, match=message):
        read(root, on_bad_row=on_bad_row)


def test_subset_whose_rows_are_all_bad_is_an_error(root: Path) -> None:
    write(root, [MSCOCO_I2T | {"pos_text": ""}])
    with pytest.raises(UserError, match=r"no usable row \(1 skipped\)"):
        read(root, on_bad_row="skip")


def test_missing_subset_names_those_that_exist(root: Path) -> None:
    write(root, [MSCOCO_I2T], subset="CIRR")
    with pytest.raises(UserError, match=r"Set: no folder .*CIRR"):
        read(root)


def test_unknown_choice_for_bad_rows_is_an_error(root: Path) -> None:
    write(root, [MSCOCO_I2T])
    with pytest.raises(UserError, match="on_bad_row is 'warn'; choose fail or skip"):
        read(root, on_bad_row="warn")


# What `datasets` writes of an image, and plain bytes.
@pytest.mark.parametrize("is_struct", [True, False])
def test_images_in_the_rows_are_images(root: Path, is_struct: bool) -> None:
    encoded = [(root / "images/a.png").read_bytes(), b"another"]

    def image(content: bytes | None) -> Any:
        return {"bytes": content, "path": None} if is_struct else content

    rows: list[dict[str, Any]] = [
        {"qry": "<|image_1|> a", "qry_image_path": image(encoded[0]), "pos_text": "p"},
        {"qry": "b", "qry_image_path": image(None), "pos_text": "p"},
    ]
    rows[0] |= {"neg_text": ["", "n"], "neg_image_path": [image(encoded[1]), image(None)]}
    rows[1] |= {"neg_text": [], "neg_image_path": []}
    write(root, [row | {"pos_image_path": ""} for row in rows])
    first, second = read(root)
    assert first.query == Item(f"{SLOT} a", (encoded[0],))
    assert first.negatives == (Item(SLOT, (encoded[1],)), Item("n"))
    assert (second.query, second.negatives) == (Item("b"), ())


def test_a_column_of_anything_else_is_refused(root: Path) -> None:
    for column, value in (
        ("qry", b"text"),
        ("qry_image_path", 7),
        ("pos_image_path", {"url": "x"}),
    ):
        write(root, [MSCOCO_I2T | {column: value}])
        with pytest.raises(UserError, match=rf"Set: column {column} holds .*; it must hold string"):
            read(root)


# --- configs -----------------------------------------------------------------------------------


def make_source(root: Path, **changes: Any) -> MmebData:
    options: dict[str, Any] = {
        "root": str(root),
        "image_root": str(root),
        "subsets": ["A", "B"],
        "split": "original",
        "max_rows": None,
        "caps": None,
        "drop_orphan_slots": False,
        "caption_subsets": ["A"],
        "validation_fraction": 0.2,
        "validation_rows": 3,
        "validation_seed": 0,
        "on_bad_row": "fail",
    }
    return MmebData(**(options | changes))


def test_the_same_share_of_every_subset_is_held_out(root: Path) -> None:
    for subset, size in (("A", 10), ("B", 20)):
        rows = [
            {
                "qry": f"question {number}",
                "qry_image_path": "",
                "pos_text": f"{subset} {number}",
                "pos_image_path": "",
            }
            for number in range(size)
        ]
        write(root, rows, subset=subset)
    source = make_source(root)
    assert Counter(pair.subset for pair in source.train_pairs()) == {"A": 8, "B": 16}
    assert Counter(pair.subset for pair in source.validation_pairs()) == {"A": 2, "B": 4}
    sizes = {subset.name: len(subset.row_ids) for subset in source.validation_subsets()}
    assert sizes == {"A": 2, "B": 3}


def test_caption_subsets_must_be_among_the_subsets(root: Path) -> None:
    with pytest.raises(UserError, match=r"caption_subsets names C, not among data\.subsets"):
        make_source(root, caption_subsets=["A", "C"])


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("mmeb", MmebData),
        ("moca_cl", MmebData),
        ("mmeb_hardneg", MmebData),
        ("mmeb_hub", MmebData),
        ("pairs", PairsData),
        ("cocoa_json", CocoaJsonData),
        ("mmeb_stream", StreamData),
    ],
)
def test_configs_name_every_argument_and_nothing_else(
    data_config: Callable[[str], dict[str, Any]], file: str, kind: Callable[..., object]
) -> None:
    config = data_config(file)
    if "root" in config:
        config["root"] = "somewhere"
    assert config.pop("_target_") == f"{kind.__module__}.{kind.__qualname__}"
    kind(**(config | {"on_bad_row": "fail"}))
