"""MMEB-train, MoCa-CL-Pairs and mmE5's files as they are published: splits, caps, odd rows."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cocoa_pl.data.items import IMAGE_SLOT
from cocoa_pl.data.sources import MmebData
from cocoa_pl.errors import UserError

DataConfig = Callable[[str], dict[str, Any]]
Source = Callable[..., MmebData]
PUBLISHED = (
    *("ImageNet_1K", "N24News", "HatefulMemes", "VOC2007", "SUN397", "OK-VQA", "A-OKVQA"),
    *("DocVQA", "InfographicsVQA", "ChartQA", "Visual7W", "VisDial", "CIRR", "VisualNews_t2i"),
    *("VisualNews_i2t", "MSCOCO_t2i", "MSCOCO_i2t", "NIGHTS", "WebQA", "MSCOCO"),
)


def row(number: int, **changes: str) -> dict[str, str]:
    return {
        "qry": f"question {number}",
        "qry_image_path": "",
        "pos_text": f"answer {number}",
        "pos_image_path": "",
    } | changes


def write(root: Path, subset: str, rows: list[dict[str, Any]], *, split: str = "original") -> None:
    (root / subset).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), root / subset / f"{split}-00000-of-00001.parquet")


@pytest.fixture
def source(data_config: DataConfig, tmp_path: Path) -> Source:
    """`data=mmeb` on one subset of a test's own folder."""

    def make(**changes: Any) -> MmebData:
        config = data_config("mmeb")
        assert config.pop("_target_") == "cocoa_pl.data.sources.MmebData"
        config |= {"root": str(tmp_path), "image_root": str(tmp_path), "on_bad_row": "fail"}
        config |= {"subsets": ["A"], "caption_subsets": [], "validation_fraction": 0}
        return MmebData(**(config | changes))

    return make


def names(data: MmebData) -> list[str]:
    return [pair.row_id for pair in data.train_pairs()]


def test_config_names_the_published_subsets(data_config: DataConfig) -> None:
    config = data_config("mmeb")
    assert sorted(config["subsets"]) == sorted(PUBLISHED)
    assert set(config["caption_subsets"]) < set(PUBLISHED)


@pytest.mark.parametrize(("name", "extra"), [("moca_cl", 7), ("mmeb_hardneg", 4)])
def test_configs_of_mined_negatives_have_the_published_subsets_and_more(
    data_config: DataConfig, name: str, extra: int
) -> None:
    config = data_config(name)
    assert len(config["subsets"]) == len(set(config["subsets"])) == 20 + extra
    assert set(PUBLISHED) < set(config["subsets"])
    assert config["split"] == "train"


def test_one_split_is_read_and_the_legacy_file_beside_it_is_not(
    tmp_path: Path, source: Source
) -> None:
    write(tmp_path, "A", [row(0)])
    write(tmp_path, "A", [row(1)], split="diverse_instruction")
    write(tmp_path, "A", [{"something": "else"}], split="train")
    assert names(source()) == ["A row 0"]
    other = source(split="diverse_instruction").train_pairs()
    assert [pair.query.text for pair in other] == ["question 1"]


def test_both_splits_are_read_in_turn_and_named(tmp_path: Path, source: Source) -> None:
    write(tmp_path, "A", [row(0), row(1)])
    write(tmp_path, "A", [row(2), row(3)], split="diverse_instruction")
    both = source(split=["original", "diverse_instruction"], max_rows=1)
    assert names(both) == ["A (original) row 0", "A (diverse_instruction) row 0"]
    assert {pair.subset for pair in both.train_pairs()} == {"A"}
    with pytest.raises(UserError, match="no split asked for"):
        source(split=[]).train_pairs()


def test_image_is_held_out_of_both_splits(tmp_path: Path, source: Source) -> None:
    (tmp_path / "images").mkdir()
    for number in range(6):
        Image.new("RGB", (4, 4)).save(tmp_path / f"images/{number}.png")

    def rows(wording: str) -> list[dict[str, str]]:
        return [
            row(n, qry=f"<|image_1|> {wording}", qry_image_path=f"images/{n}.png") for n in range(6)
        ]

    write(tmp_path, "A", rows("what is it"))
    write(tmp_path, "A", rows("tell me"), split="diverse_instruction")
    data = source(split=["original", "diverse_instruction"], validation_fraction=0.3)
    held_out = {pair.query.media for pair in data.validation_pairs()}
    assert (len(data.validation_pairs()), len(held_out)) == (4, 2)
    assert not held_out & {pair.query.media for pair in data.train_pairs()}


def test_caps_limit_single_subsets(tmp_path: Path, source: Source) -> None:
    for subset in "ABC":
        write(tmp_path, subset, [row(number) for number in range(5)])
    data = source(subsets=list("ABC"), max_rows=3, caps={"B": 1, "C": None})
    assert Counter(pair.subset for pair in data.train_pairs()) == {"A": 3, "B": 1, "C": 5}
    with pytest.raises(UserError, match=r"data\.caps names D, not among data\.subsets"):
        source(caps={"D": 1})


def test_repeated_rows_are_left_out_and_counted(
    tmp_path: Path, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "A", [row(0), row(1), row(0), row(1), row(0, pos_text="another"), row(0)])
    with caplog.at_level(logging.INFO):
        assert names(source()) == ["A row 0", "A row 1", "A row 4"]
    assert "left out 3 repeated row(s): A row 2 as A row 0; A row 3 as A row 1;" in caplog.text


def test_negatives_as_mined_files_hold_them(tmp_path: Path, source: Source) -> None:
    """Lists in strings; a negative of neither text nor image is none."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    negatives = {
        "neg_text": "['first', '', \"it's [third]\", '<|image_1|>\\nRepresent']",
        "neg_image_path": "['', '', '', 'a.png']",
    }
    write(tmp_path, "A", [row(0, **negatives)], split="train")
    (pair,) = source(split="train").train_pairs()
    assert [item.text for item in pair.negatives] == [
        "first",
        "it's [third]",
        f"{IMAGE_SLOT}\nRepresent",
    ]
    assert [len(item.media) for item in pair.negatives] == [0, 0, 1]


def test_null_negatives_are_none(tmp_path: Path, source: Source) -> None:
    none: dict[str, Any] = {"neg_text": None, "neg_image_path": None}
    write(tmp_path, "A", [row(0, neg_text="a", neg_image_path=""), row(1) | none])
    assert [len(pair.negatives) for pair in source().train_pairs()] == [1, 0]


def test_placeholder_without_an_image_is_refused_or_taken_out(
    tmp_path: Path, source: Source
) -> None:
    orphan = row(0, pos_text="<|image_1|>\nRepresent the page")
    orphan |= {"neg_text": "['<|image_1|>\\nof nothing']", "neg_image_path": "['']"}
    write(tmp_path, "A", [orphan])
    with pytest.raises(UserError, match=r"A row 0: the positive text holds .* names no image"):
        source().train_pairs()
    (pair,) = source(drop_orphan_slots=True).train_pairs()
    assert pair.positive.text == "\nRepresent the page"
    assert [item.text for item in pair.negatives] == ["\nof nothing"]


def test_text_that_was_only_a_placeholder_is_still_a_bad_row(
    tmp_path: Path, source: Source
) -> None:
    write(tmp_path, "A", [row(0, pos_text="<|image_1|>\n")])
    with pytest.raises(UserError, match="A row 0: the positive is empty"):
        source(drop_orphan_slots=True).train_pairs()
