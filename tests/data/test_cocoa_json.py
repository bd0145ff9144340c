"""CoCoA's JSON files: both kinds of rows, read piece by piece, and messages that name the place."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from cocoa_pl.data import cocoa_json
from cocoa_pl.data.cocoa_json import CocoaJsonData, iterate_array, read_cocoa_json
from cocoa_pl.data.examples import describing
from cocoa_pl.data.items import IMAGE_SLOT, Item
from cocoa_pl.data.pair_table import PairTable
from cocoa_pl.errors import UserError

CAPTION = {"image_path": "a.png", "caption": "a dog asleep on a sofa", "id": 17}
QUERY = {
    "qry": "<|image_1|>\nFind the caption",
    "qry_image_path": "b.png",
    "pos_text": "a cat",
    "neg_text": "ignored",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def read(root: Path, **changes: Any) -> PairTable:
    options: dict[str, Any] = {"image_root": root, "on_bad_row": "fail", "max_rows": None}
    return read_cocoa_json(root, **(options | changes))


def write(root: Path, *rows: Any, name: str = "captions.json") -> Path:
    path = root / name
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def test_captions_and_queries_become_pairs(root: Path) -> None:
    write(root, CAPTION, QUERY | {"qry": "no placeholder"}, {"qry": "only", "pos_text": "text"})
    write(root, QUERY, name="a_first.json")
    first, caption, query, text = read(root)
    assert (first.row_id, first.subset) == ("a_first.json row 0", "a_first")
    assert first.query == Item(f"{IMAGE_SLOT}\nFind the caption", (root / "b.png",))
    assert (first.positive, first.negatives) == (Item("a cat"), ())
    assert (caption.row_id, caption.subset) == ("captions.json row 0", "captions")
    assert caption.query == Item(IMAGE_SLOT, (root / "a.png",))
    assert caption.positive == Item("a dog asleep on a sofa")
    assert query.query.text == f"{IMAGE_SLOT}\nno placeholder"
    assert (text.query, text.positive) == (Item("only"), Item("text"))
    assert len(describing(read(root), None)) == 4


def test_absolute_path_below_the_image_root_is_accepted(root: Path) -> None:
    write(root, CAPTION | {"image_path": str(root / "b.png")})
    assert read(root)[0].query.media == (root / "b.png",)
    write(root, CAPTION | {"image_path": "/etc/hostname"})
    with pytest.raises(UserError, match=r"captions\.json row 0, image: .* is absolute"):
        read(root)


def test_rows_are_limited_by_file_and_repeated_ones_left_out(root: Path) -> None:
    rows = [CAPTION | {"caption": f"caption {number}"} for number in (0, 0, 1, 2)]
    write(root, *rows)
    write(root, *rows, name="more.json")
    found = [pair.row_id for pair in read(root, max_rows=3)]
    assert found == [f"{name}.json row {n}" for name in ("captions", "more") for n in (0, 2)]


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "no object": ("text", "a row must be an object, found str"),
    "other keys": ({"image": "a.png", "text": "b"}, "has image, text; it needs image_path and"),
    "no caption": (CAPTION | {"caption": ""}, "the caption is empty"),
    "null": (CAPTION | {"caption": None}, "the caption is empty"),
    "no image": (CAPTION | {"image_path": "c.png"}, r"image .*c\.png does not exist"),
    "outside": (CAPTION | {"image_path": "../a.png"}, "leaves the image root"),
    "orphan": (QUERY | {"qry_image_path": ""}, "query text holds .* names no image"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_row_is_named_or_skipped(root: Path, bad: Any, message: str) -> None:
    write(root, CAPTION, bad, QUERY)
    with pytest.raises(UserError, match=message) as caught:
        read(root)
    assert str(caught.value).startswith("captions.json row 1")
    assert [pair.row_id for pair in read(root, on_bad_row="skip")] == [
        "captions.json row 0",
        "captions.json row 2",
    ]


# --- Reading piece by piece ------------------------------------------------------------------

ARRAYS = [
    [],
    [{}],
    [1, 23, 456, -7.5e3, True, None, "a]b,c", '"'],
    [{"a": [1, {"b": "}]\\"}]}, "é\u2028", [[], [[]]]],
]


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("array", ARRAYS)
def test_array_is_the_same_in_pieces_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, array: list[Any], indent: Any, chunk: int
) -> None:
    monkeypatch.setattr(cocoa_json, "_CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text(f"\n {json.dumps(array, indent=indent)} \n", encoding="utf-8")
    assert list(iterate_array(path)) == array


BROKEN = {
    "nothing": (b"", "breaks at element 0"),
    "an object": (b'{"a": 1}', "breaks at element 0"),
    "lines": (b'{"a": 1}\n{"a": 2}\n', "breaks at element 0"),
    "cut off": (b'[{"a": 1}, {"a"', "breaks at element 1"),
    "no end": (b'[{"a": 1}', "breaks at element 0"),
    "no comma": (b'[{"a": 1} {"a": 2}]', "breaks at element 0"),
    "more behind": (b"[1] 2", "something follows its JSON array: '2'"),
    "not JSON": (b'[{"a": 1}, {a: 2}]', "breaks at element 1"),
    "not UTF-8": (b'[{"a": "\xff"}]', "not UTF-8"),
    "too deep": (b"[" * 100_000, "breaks at element 0"),
}


@pytest.mark.parametrize("chunk", [3, 1 << 20])
@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_file_is_an_error_that_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str, chunk: int
) -> None:
    if len(content) > 1000 and chunk < 1000:
        pytest.skip("quadratic in the depth")
    monkeypatch.setattr(cocoa_json, "_CHUNK", chunk)
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.json: .*{message}"):
        list(iterate_array(tmp_path / "a.json"))


def test_large_file_costs_little_memory(tmp_path: Path) -> None:
    text = "a long caption of a picture " * 20
    with (tmp_path / "a.json").open("w") as file:
        file.write("[")
        file.write(",".join(json.dumps({"caption": f"{text}{n}"}) for n in range(20_000)))
        file.write("]")
    tracemalloc.start()
    count = sum(1 for _ in iterate_array(tmp_path / "a.json"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 8e6  # the file has 12 MB, its objects 17


def test_folder_without_files_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \.json file; set data\.root"):
        read(tmp_path)


# --- Source ----------------------------------------------------------------------------------


def test_source_holds_out_images_of_every_file(root: Path) -> None:
    for name in ("c", "d"):
        rows = [
            {"image_path": image, "caption": f"{name} {number} of {image}"}
            for image in ("a.png", "b.png")
            for number in range(3)
        ]
        write(root, *rows, name=f"{name}.json")
    config = yaml.safe_load(
        (Path(__file__).parents[2] / "conf" / "data" / "cocoa_json.yaml").read_text()
    )
    assert config.pop("_target_") == "cocoa_pl.data.cocoa_json.CocoaJsonData"
    config |= {"root": str(root), "image_root": str(root), "on_bad_row": "fail"}
    source = CocoaJsonData(**(config | {"validation_rows": 2}))
    train, validation = source.train_pairs(), source.validation_pairs()
    assert (len(train), len(validation)) == (6, 6)
    for subset in ("c", "d"):
        images = [
            {p.query.media for p in pairs if p.subset == subset} for pairs in (train, validation)
        ]
        assert not images[0] & images[1]
    assert [len(one.row_ids) for one in source.validation_subsets()] == [2, 2]
    assert len(source.training_texts()) == 7  # six captions, and the query that is only an image
