"""A user's own file: columns, placeholders, validation, and messages that name file and line."""

import io
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cocoa_pl.data.holdout import hold_out
from cocoa_pl.data.items import IMAGE_SLOT, Item, Pair
from cocoa_pl.data.pair_table import has_images
from cocoa_pl.data.pairs import read_pairs
from cocoa_pl.data.sources import PairsData
from cocoa_pl.errors import UserError

SLOT = IMAGE_SLOT
_buffer = io.BytesIO()
Image.new("RGB", (4, 4), (1, 2, 3)).save(_buffer, "PNG")
PNG = _buffer.getvalue()
GOOD = {"query": "Find the caption", "query_image": "a.png", "positive": "a dog asleep on a sofa"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def write(root: Path, *rows: dict[str, Any], name: str = "dogs.jsonl") -> Path:
    path = root / name
    if path.suffix == ".parquet":
        columns = dict.fromkeys(key for row in rows for key in row)
        table = pa.table({column: [row.get(column) for row in rows] for column in columns})
        pq.write_table(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, on_bad_row: Any = "fail") -> list[Pair]:
    return read_pairs(path, subset="dogs", image_root=path.parent, on_bad_row=on_bad_row)


@pytest.mark.parametrize("name", ["dogs.jsonl", "dogs.parquet"])
def test_image_comes_first_unless_the_text_places_it(root: Path, name: str) -> None:
    placed = {
        "query": "",
        "query_image": "a.png",
        "positive": "The dog in <|image_1|> sleeps",
        "positive_image": "b.png",
    }
    path = write(root, GOOD, placed, name=name)
    first, second = read(path)
    assert first.query == Item(f"{SLOT}\nFind the caption", (root / "a.png",))
    assert first.positive == Item("a dog asleep on a sofa")
    assert second.query == Item(SLOT, (root / "a.png",))
    assert second.positive == Item(f"The dog in {SLOT} sleeps", (root / "b.png",))
    assert first.subset == second.subset == "dogs"
    numbers = ["line 1", "line 2"] if path.suffix == ".jsonl" else ["row 0", "row 1"]
    assert [first.row_id, second.row_id] == [f"{path} {number}" for number in numbers]


@pytest.mark.parametrize("name", ["dogs.jsonl", "dogs.parquet"])
def test_negatives_are_text_image_or_both(root: Path, name: str) -> None:
    negatives = [
        {"text": "a cat", "image": None},
        {"text": None, "image": "b.png"},
        {"text": "cat", "image": "b.png"},
    ]
    (pair,) = read(write(root, GOOD | {"negatives": negatives}, name=name))
    images = (root / "b.png",)
    assert pair.negatives == (Item("a cat"), Item(SLOT, images), Item(f"{SLOT}\ncat", images))


# --- Images in the rows themselves ------------------------------------------------------------

BYTES = pa.binary()
STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})  # what `datasets` writes


def embedded(root: Path, kind: pa.DataType) -> Path:
    """Ten rows in which every second one has an image in `kind`, and all have such negatives."""
    (root / "a.png").write_bytes(PNG)

    def image(row: int) -> Any:
        if row % 2:
            return {"bytes": None, "path": None} if kind == STRUCT else None
        return {"bytes": PNG, "path": "elsewhere.png"} if kind == STRUCT else PNG

    images: list[Any] = [image(row) for row in range(10)]
    if kind == STRUCT:
        images[4] = {"bytes": b"", "path": "a.png"}
    elif pa.types.is_list(kind):
        images = [[{"bytes": one, "path": None}] if one else [] for one in images]
    negatives = [
        [{"text": "no", "image": image}, {"text": "never", "image": None}] for image in images
    ]
    negative = pa.struct({"text": pa.string(), "image": kind})
    columns = {
        "query": pa.array([f"q {row}" for row in range(10)]),
        "query_image": pa.array(images, kind),
        "positive": pa.array([f"p {row}" for row in range(10)]),
        "negatives": pa.array(negatives, pa.list_(negative)),
    }
    pq.write_table(pa.table(columns), root / "embedded.parquet")
    return root / "embedded.parquet"


@pytest.mark.parametrize("kind", [BYTES, pa.large_binary(), STRUCT, pa.list_(STRUCT)], ids=str)
def test_images_in_the_rows_are_images(root: Path, kind: pa.DataType) -> None:
    table = read_pairs(embedded(root, kind), subset="s", image_root=root, on_bad_row="fail")
    expected = []
    for row in range(10):
        image = (root / "a.png",) if row == 4 and kind == STRUCT else (PNG,)
        query, negative = Item(f"q {row}"), Item("no")
        if row % 2 == 0:
            query, negative = Item(f"{SLOT}\nq {row}", image), Item(f"{SLOT}\nno", image)
        expected.append((query, Item(f"p {row}"), (negative, Item("never"))))
    for pairs in (list(table), [table[row] for row in range(10)]):
        assert [(pair.query, pair.positive, pair.negatives) for pair in pairs] == expected
    assert has_images(table).tolist() == [[row % 2 == 0, False] for row in range(10)]
    train, held_out = hold_out(table, fraction=0.3, seed=0, source="s")
    keys = [{pair.query.key for pair in part} for part in (train, held_out)]
    assert len(keys[0]) + len(keys[1]) == 10
    with_image = [sum(bool(pair.query.media) for pair in part) for part in (train, held_out)]
    assert sorted(with_image) in ([0, 5], [1, 4])  # equal pictures stay together


def test_blank_lines_count_but_are_not_rows(root: Path) -> None:
    path = root / "dogs.jsonl"
    path.write_text("\n" + json.dumps(GOOD) + "\n\n")
    assert [pair.row_id for pair in read(path)] == [f"{path} line 2"]


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "no positive": ({"positive": None}, "the positive is empty"),
    "empty caption": ({"positive": " "}, "the positive is empty"),
    "no query": ({"query": "", "query_image": ""}, "the query is empty"),
    "placeholder without an image": ({"positive": "<|image_1|> a"}, "names no image"),
    "placeholders without images": ({"query": "<image> or <image>"}, "holds 2 <image> for 1"),
    "number as text": ({"positive": 7}, r"the positive must be a text .* found int"),
    "two images": ({"query_image": ["a.png", "b.png"]}, "the query has 2 images"),
    "object as image": ({"query_image": {"url": "a.png"}}, r"the query must .* found dict"),
    "missing image": ({"query_image": "c.png"}, r"c\.png does not exist"),
    "image outside": ({"query_image": "../a.png"}, "leaves the image root"),
    "reserved character": ({"query": f"a{SLOT}"}, "U\\+FDD0"),
    "half a character": ({"query": "a \ud800"}, "not valid Unicode"),
    "unknown column": ({"postive": "a"}, "unknown column postive; known are query, query_image"),
    "negatives of text": ({"negatives": "a cat"}, "negatives must be a list"),
    "negative as text": ({"negatives": ["a cat"]}, "a negative must be an object, found str"),
    "empty negative": ({"negatives": [{"text": ""}]}, "the negative is empty"),
    "duplicate": ({}, "same query and positive as .*line 1"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_row_fails_by_line_or_is_skipped(
    root: Path, changes: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(root, GOOD, GOOD | changes, GOOD | {"positive": "another"})
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path} line 2")
    with caplog.at_level(logging.WARNING):
        pairs = read(path, on_bad_row="skip")
    assert [pair.row_id for pair in pairs] == [f"{path} line 1", f"{path} line 3"]
    assert f"skipped 1 bad row(s): {path} line 2" in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"query": "a"', "not valid JSON"),
        (b'{"query": "\xff"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'["a", "b"]', "a row must be an object, found list"),
    ],
)
def test_line_that_is_no_row_fails_by_line_or_is_skipped(
    root: Path, line: bytes, message: str
) -> None:
    path = root / "dogs.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=rf"line 2: {message}"):
        read(path)
    assert len(read(path, on_bad_row="skip")) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dogs.jsonl", b"", "no usable row"),
        ("dogs.jsonl", b"\n\n", "no usable row"),
        ("dogs.parquet", b"PAR1", "cannot be read as parquet"),
        ("dogs.csv", b"query,positive\n", "files ending in '.csv' are not read"),
    ],
)
def test_unusable_file_is_an_error(root: Path, name: str, content: bytes, message: str) -> None:
    (root / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(root / name, on_bad_row="skip")


def test_missing_file_is_an_error(root: Path) -> None:
    with pytest.raises(UserError, match=r"dogs\.jsonl does not exist; set data\.path"):
        read(root / "dogs.jsonl")


def source(path: Path, **changes: Any) -> PairsData:
    options: dict[str, Any] = {
        "path": str(path),
        "image_root": str(path.parent),
        "captions": True,
        "validation_path": None,
        "validation_fraction": 0.25,
        "validation_rows": 100,
        "validation_seed": 0,
        "on_bad_row": "fail",
    }
    return PairsData(**(options | changes))


def texts(pairs: list[Pair]) -> list[str]:
    return [pair.positive.text for pair in pairs]


def test_held_out_rows_leave_training_and_depend_on_no_order(root: Path) -> None:
    rows = [{"query": f"question {n}", "positive": f"answer {n}"} for n in range(40)]
    forwards = source(write(root, *rows))
    backwards = source(write(root, *reversed(rows), name="turned.jsonl"))
    assert len(forwards.validation_pairs()) == 10
    assert set(texts(forwards.validation_pairs())) == set(texts(backwards.validation_pairs()))
    assert not set(texts(forwards.validation_pairs())) & set(texts(forwards.train_pairs()))
    assert len(forwards.train_pairs()) == 30
    other_seed = source(forwards.path, validation_seed=1)
    assert set(texts(other_seed.validation_pairs())) != set(texts(forwards.validation_pairs()))


def test_rows_of_one_image_stay_on_one_side(root: Path) -> None:
    rows = [
        {"query": f"caption {n}", "query_image": image, "positive": f"caption {n} of {image}"}
        for image in ("a.png", "b.png")
        for n in range(3)
    ]
    data = source(write(root, *rows), validation_fraction=0.01)
    assert len(data.validation_pairs()) == len(data.train_pairs()) == 3


def test_nothing_held_out_means_no_validation(root: Path) -> None:
    data = source(write(root, GOOD), validation_fraction=0)
    assert (len(data.train_pairs()), data.validation_pairs(), data.validation_subsets()) == (
        1,
        [],
        [],
    )


def test_training_texts_are_distinct_and_without_slots(root: Path) -> None:
    rows = [GOOD, GOOD | {"positive": "another", "negatives": [{"text": "a cat"}]}]
    data = source(write(root, *rows), validation_fraction=0)
    assert data.training_texts() == [
        "\nFind the caption", "a cat", "a dog asleep on a sofa", "another",
    ]  # fmt: skip


def test_one_row_cannot_be_held_out(root: Path) -> None:
    with pytest.raises(UserError, match="set validation_fraction to 0"):
        source(write(root, GOOD)).train_pairs()


def test_second_file_validates(root: Path) -> None:
    path = write(root, GOOD)
    other = write(root, GOOD | {"positive": "another dog"}, name="held_out.jsonl")
    data = source(path, validation_path=str(other), validation_fraction=0)
    assert (texts(data.train_pairs()), texts(data.validation_pairs())) == (
        [GOOD["positive"]],
        ["another dog"],
    )
    assert data.caption_subsets == ("dogs",)
    assert {pair.subset for pair in data.validation_pairs()} == {"dogs"}
    with pytest.raises(UserError, match="both set"):
        source(path, validation_path=str(other))


def test_validation_candidates_leave_out_other_right_answers(root: Path) -> None:
    rows = [
        {"query": "q1", "positive": "a"},
        {"query": "q1", "positive": "b"},
        {"query": "q2", "positive": "b"},
        {"query": "q3", "positive": "c"},
    ]
    other = write(root, *rows, name="held_out.jsonl")
    data = source(write(root, GOOD), validation_path=str(other), validation_fraction=0)
    (subset,) = data.validation_subsets()
    found = [[subset.candidates[index].text for index in row] for row in subset.candidate_index]
    assert found == [["a", "c"], ["b", "c"], ["b", "a", "c"], ["c", "a", "b"]]
    assert [item.text for item in subset.queries] == ["q1", "q2", "q3"]
    assert subset.query_index.tolist() == [0, 0, 1, 2]
