"""Files become pairs that are made when asked for: names, bad rows, and a few bytes a row."""

from __future__ import annotations

import gc
import json
import logging
import pickle
import re
import tracemalloc
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cocoa_pl.data.pairs import Pairs
from cocoa_pl.data.rows import KEPT, RowErrors
from cocoa_pl.data.sources import PairSource
from cocoa_pl.errors import UserError
from tests.files import write_rows

MakeSource = Callable[..., PairSource]
Read = Callable[..., Pairs]
GOOD = {"query": "Find the caption", "positive": "a dog asleep on a sofa"}


@pytest.fixture
def read(tmp_path: Path, pair_source: MakeSource) -> Read:
    """The pairs of a file of one's own."""

    def make(path: Path, on_bad_row: str = "fail", **changes: Any) -> Pairs:
        root = str(tmp_path)
        source = pair_source(
            "pairs", path=str(path), image_root=root, on_bad_row=on_bad_row, **changes
        )
        pairs = source.train_pairs()
        assert isinstance(pairs, Pairs)
        return pairs

    return make


def texts(pairs: Pairs) -> list[str]:
    return [pair.positive.text for pair in pairs]


@pytest.mark.parametrize(
    ("name", "numbers"),
    [("my [1].jsonl", "line 1, line 2"), ("a.parquet", "row 0, row 1"), ("a.json", "row 0, row 1")],
)
def test_rows_are_named_by_file_and_line_or_row(
    tmp_path: Path, read: Read, name: str, numbers: str
) -> None:
    path = write_rows(
        tmp_path / name, [GOOD, GOOD | {"positive": "b", "negatives": [{"text": "é"}]}]
    )
    pairs = read(path)
    assert [pair.row_id for pair in pairs] == [f"{path} {n}" for n in numbers.split(", ")]
    assert texts(pairs) == ["a dog asleep on a sofa", "b"]
    assert [item.text for item in pairs[1].negatives] == ["é"]
    assert {pair.subset for pair in pairs} == {path.stem}


def test_blank_lines_and_byte_order_marks_are_no_rows(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff\n" + json.dumps(GOOD) + "\r\n\n \n", encoding="utf-8")
    assert [pair.row_id for pair in read(path)] == [f"{path} line 2"]
    array = tmp_path / "a.json"
    array.write_text("\ufeff" + json.dumps([GOOD]), encoding="utf-8")
    assert texts(read(array)) == [GOOD["positive"]]


BAD_LINES = {
    "empty": (b'{"query": "a"}', "positive: it is empty"),
    "cut off": (b'{"query": "a"', "not valid JSON"),
    "not UTF-8": (b'{"query": "\xff"}', "not valid JSON"),
    "too deep": (b"[" * 100_000, "not valid JSON"),
    "another type": (b'{"query": ["a"], "positive": "b"}', "query: it must be a text"),
    "no object": (b'["a", "b"]', "a row must be an object, found list"),
    "again": (json.dumps(GOOD).encode(), "same query and positive as .*line 1; remove one"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_row_stops_or_is_left_out_and_counted(
    tmp_path: Path, read: Read, line: bytes, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    rows = [json.dumps(GOOD).encode(), line, json.dumps(GOOD | {"positive": "b"}).encode()]
    path.write_bytes(b"\n".join(rows))
    with pytest.raises(UserError, match=rf"a\.jsonl line 2(: |, ){message}"):
        read(path)
    with caplog.at_level(logging.WARNING):
        pairs = read(path, on_bad_row="skip")
    assert [pair.row_id for pair in pairs] == [f"{path} line 1", f"{path} line 3"]
    assert f"skipped 1 bad row(s): {path} line 2" in caplog.text


def test_a_thousand_errors_of_a_kind_are_kept_and_all_are_counted(
    tmp_path: Path, pair_source: MakeSource, caplog: pytest.LogCaptureFixture
) -> None:
    def num_errors() -> int:
        gc.collect()
        return sum(isinstance(one, UserError) for one in gc.get_objects())

    gone = [GOOD | {"query_image": f"{n}.png"} for n in range(KEPT + 200)]
    path = write_rows(tmp_path / "a.jsonl", [*gone, *[GOOD] * (KEPT + 300), {"query": "a"}])
    options = {"path": str(path), "image_root": str(tmp_path), "on_bad_row": "skip"}
    source = pair_source("pairs", repeated="drop", **options)
    before = num_errors()
    with caplog.at_level(logging.INFO):
        (kept,) = source.train_pairs()
    assert num_errors() - before == len(source.left_out) == 2 * KEPT + 1
    counts = {"missing_image": KEPT + 200, "repeated_row": KEPT + 299, "empty_text": 1}
    assert source.left_out.counts == counts
    assert "skipped 1201 bad row(s): " in caplog.text
    repeats = f"{path} line 1202: same query and positive as {kept.row_id}; "
    assert f"skipped 1299 repeated row(s): {repeats}" in caplog.text
    assert deepcopy(source.left_out).counts == counts
    both = RowErrors()
    for _ in range(2):
        both.join(source.left_out)
    assert both.counts == {kind: 2 * count for kind, count in counts.items()}
    assert len(both) == 2 * KEPT + 2


def damaged(path: Path) -> None:
    rows = [{"query": f"{n}" * 999, "positive": str(n)} for n in range(9)]
    write_rows(path, rows)
    content = path.read_bytes()
    path.write_bytes(content[:40] + b"\0" * 200 + content[240:])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"\n\n", "no usable row"),
        ("a.parquet", b"PAR1", "cannot be read as parquet"),
        ("a.parquet", damaged, "cannot be read as parquet"),
        (
            "a.parquet",
            lambda path: write_rows(path, [{"other": 1}]),
            "unknown column other; known",
        ),
        ("a.json", b'{"a": 1}', "not a JSON array of objects, but dict"),
        ("a.json", b'[{"a": "\xff"}]', "not a JSON array"),
        ("a.json", b"[" * 100_000, "not a JSON array"),
        ("a.csv", b"query,positive\n", r"files ending in '\.csv' are not read"),
    ],
)
def test_an_unusable_file_is_an_error_whatever_on_bad_row_says(
    tmp_path: Path, read: Read, name: str, content: Any, message: str
) -> None:
    path = tmp_path / name
    content(path) if callable(content) else path.write_bytes(content)
    for on_bad_row in ("fail", "skip"):
        with pytest.raises(UserError, match=rf"{name}:? .*{message}|{name}: {message}"):
            read(path, on_bad_row=on_bad_row)


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path, read: Read) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "self.jsonl").symlink_to("self.jsonl")
    for name, said in (
        ("a.jsonl", "does not exist; set data.path to a .jsonl, .json or .parquet file"),
        ("folder.jsonl", "is a folder; set data.path to a file, or read all of it: data.path="),
        ("self.jsonl", "cannot be reached: Too many levels of symbolic links; it is a link to"),
    ):
        with pytest.raises(UserError, match=re.escape(f"{tmp_path / name} {said}")):
            read(tmp_path / name)


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_texts_of_any_type_are_texts(tmp_path: Path, read: Read, kind: pa.DataType) -> None:
    plain = pa.table({name: [value, value.upper()] for name, value in GOOD.items()})
    columns = {name: plain[name].combine_chunks().cast(kind) for name in plain.column_names}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    pairs = read(tmp_path / "a.parquet")
    assert texts(pairs) == [GOOD["positive"], GOOD["positive"].upper()]
    assert pairs.fingerprint


# --- What rows cost, and their fingerprint ------------------------------------------------------


def test_a_row_costs_a_few_bytes(tmp_path: Path, read: Read) -> None:
    count = 5000
    rows = {
        "query": [f"what is number {n} of the things that are shown?" for n in range(count)],
        "positive": [f"answer {n}" for n in range(count)],
    }
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    read(tmp_path / "a.parquet")  # what is imported and cached once
    tracemalloc.start()
    arrow = pa.total_allocated_bytes()
    pairs = read(tmp_path / "a.parquet")
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(pairs) == count
    assert kept / count < 40
    assert pa.total_allocated_bytes() - arrow < 1e6  # rows are on disk
    assert len(pickle.dumps(pairs)) / count < 40


def test_a_fingerprint_is_of_content_order_and_mapping(tmp_path: Path, read: Read) -> None:
    rows = [GOOD | {"positive": str(n), "query_image": None} for n in range(300)]
    path = write_rows(tmp_path / "a.parquet", rows)
    first = read(path).fingerprint
    pq.write_table(pq.read_table(path), path, row_group_size=7, compression="none")
    assert read(path).fingerprint == first  # however the file is laid out

    changes: list[Callable[[list[dict[str, Any]]], object]] = [
        lambda rows: rows.reverse(),
        lambda rows: rows.pop(),
        lambda rows: rows[150].update(positive="x"),
        lambda rows: rows[150].update(query_image=b"png"),
        lambda rows: rows[150].update(query_image=b"another"),
    ]
    found = {first}
    for change in changes:
        changed = [dict(row) for row in rows]
        change(changed)
        found.add(read(write_rows(path, changed)).fingerprint)
    write_rows(path, rows)
    columns = [{"query": {"text": "positive"}, "positive": {"text": "query"}, "required": []}]
    found.add(read(path, columns=columns, other_columns=True).fingerprint)
    assert len(found) == len(changes) + 2
    assert read(path)[1:].fingerprint != read(path)[:-1].fingerprint != first
    assert read(path).fingerprint == first
