"""Data configs: published layouts, caps, what is held out, the hub, and a source for each stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image

from cocoa_pl.data import sources
from cocoa_pl.data.sources import DataOfStages, PairSource, local_folder, source_of
from cocoa_pl.errors import UserError
from tests.files import write_rows

DataConfig = Callable[[str], dict[str, Any]]
MakeSource = Callable[..., PairSource]
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


def write(root: Path, subset: str, rows: list[dict[str, Any]], *, file: str = "original-0") -> None:
    write_rows(root / subset / f"{file}.parquet", rows)


@pytest.fixture
def mmeb(tmp_path: Path, pair_source: MakeSource) -> MakeSource:
    """`data=mmeb` on one subset of a test's own folder."""

    def make(**changes: Any) -> PairSource:
        root = str(tmp_path)
        options = {"root": root, "image_root": root, "subsets": ["A"], "caption_subsets": []}
        return pair_source("mmeb", **(options | changes))

    return make


@pytest.fixture
def own(tmp_path: Path, pair_source: MakeSource) -> MakeSource:
    """`data=pairs` with these rows."""

    def make(rows: list[dict[str, Any]], *, name: str = "dogs.jsonl", **changes: Any) -> PairSource:
        path = write_rows(tmp_path / name, rows)
        return pair_source("pairs", path=str(path), image_root=str(tmp_path), **changes)

    return make


def names(data: PairSource) -> list[str]:
    return [pair.row_id for pair in data.train_pairs()]


def texts(pairs: Any) -> list[str]:
    return [pair.positive.text for pair in pairs]


# --- Layouts ---------------------------------------------------------------------------------


def test_configs_name_the_published_subsets(data_config: DataConfig) -> None:
    for name in ("mmeb", "mmeb_hub", "mmeb_stream"):
        assert sorted(data_config(name)["subsets"]) == sorted(PUBLISHED)
        assert set(data_config(name)["caption_subsets"]) < set(PUBLISHED)
    for name, extra in (("moca_cl", 7), ("mmeb_hardneg", 4)):
        config = data_config(name)
        assert len(config["subsets"]) == len(set(config["subsets"])) == 20 + extra
        assert set(PUBLISHED) < set(config["subsets"])
        assert config["split"] == "train"


def test_rows_are_numbered_through_the_files_of_a_subset(tmp_path: Path, mmeb: MakeSource) -> None:
    write(tmp_path, "B", [row(0), row(1)])
    write(tmp_path, "A", [row(2)])
    negatives: dict[str, Any] = {"neg_text": ["no"], "neg_image_path": [""]}
    write(tmp_path, "A", [row(3) | negatives, row(4) | negatives], file="original-1")
    write(tmp_path, "A", [{"something": "else"}], file="train-0")
    write(tmp_path, "A", [row(5)], file="diverse_instruction-0")
    data = mmeb(subsets=["B", "A"])
    assert names(data) == ["B row 0", "B row 1", "A row 0", "A row 1", "A row 2"]
    assert [len(pair.negatives) for pair in data.train_pairs()] == [0, 0, 0, 1, 1]
    assert names(mmeb(max_rows=2)) == ["A row 0", "A row 1"]
    both = mmeb(split=["original", "diverse_instruction"], max_rows=1)
    assert names(both) == ["A (original) row 0", "A (diverse_instruction) row 0"]
    assert {pair.subset for pair in both.train_pairs()} == {"A"}


def test_arrays_of_a_folder_are_subsets(tmp_path: Path, pair_source: MakeSource) -> None:
    rows = [{"image_path": "a.png", "caption": f"caption {n}", "id": n} for n in (0, 0, 1, 2)]
    for name in ("more", "captions"):
        write_rows(tmp_path / f"{name}.json", rows)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    root = str(tmp_path)
    data = pair_source("cocoa_json", root=root, image_root=root, max_rows=3)
    assert names(data) == [f"{name}.json row {n}" for name in ("captions", "more") for n in (0, 2)]
    assert {pair.subset for pair in data.train_pairs()} == {"captions", "more"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subsets": ["C"]}, r"C: .*C/original-\*\.parquet does not exist; .* has B; check root"),
        ({"subsets": ["B"], "split": "test"}, "B has original-0.parquet; check root and split"),
        ({"root": "/nowhere"}, "A: /nowhere/A/.* does not exist; /nowhere is no folder with files"),
        ({"subsets": []}, r"data\.subsets is empty"),
        ({"split": []}, r"data\.split is empty"),
        ({"caps": {"D": 1}}, r"data\.caps names D, not among data\.subsets"),
        ({"caption_subsets": ["D"]}, r"data\.caption_subsets names D, not among data\.subsets"),
        ({"validation_path": "b", "validation_fraction": 0.1}, "are both set"),
        ({"subsets": ["B"]}, "B/original-0.parquet: the columns qry and .* are needed; it has qry"),
    ],
)
def test_what_is_not_there_is_named(
    tmp_path: Path, mmeb: MakeSource, changes: dict[str, Any], message: str
) -> None:
    write(tmp_path, "B", [{"qry": "a"}])
    with pytest.raises(UserError, match=message):
        mmeb(**changes).train_pairs()


# --- Validation ------------------------------------------------------------------------------


def test_held_out_rows_leave_training_and_depend_on_no_order(own: MakeSource) -> None:
    rows = [{"query": f"question {n}", "positive": f"answer {n}"} for n in range(40)]
    forwards, backwards, other = (
        own(some, name=f"{n}.jsonl", validation_fraction=0.25, validation_seed=seed)
        for n, (some, seed) in enumerate([(rows, 0), (rows[::-1], 0), (rows, 1)])
    )
    # Runs that are compared validate on the same rows, whatever version they are of.
    assert texts(forwards.validation_pairs()) == [
        f"answer {n}" for n in (0, 2, 8, 9, 18, 19, 32, 34, 35, 36)
    ]
    assert set(texts(forwards.validation_pairs())) == set(texts(backwards.validation_pairs()))
    assert set(texts(other.validation_pairs())) != set(texts(forwards.validation_pairs()))
    training = set(texts(forwards.train_pairs()))
    assert len(training) == 30
    assert not training & set(texts(forwards.validation_pairs()))


def test_an_image_is_held_out_of_every_row_and_split(tmp_path: Path, mmeb: MakeSource) -> None:
    (tmp_path / "images").mkdir()
    for number in range(6):
        Image.new("RGB", (4, 4)).save(tmp_path / f"images/{number}.png")

    def rows(words: str) -> list[dict[str, str]]:
        text = f"<|image_1|> {words}"
        return [row(n, qry=text, qry_image_path=f"images/{n}.png") for n in range(6)]

    write(tmp_path, "A", rows("what is it"))
    write(tmp_path, "A", rows("tell me"), file="diverse_instruction-0")
    data = mmeb(split=["original", "diverse_instruction"], validation_fraction=0.3)
    held_out = {pair.query.media for pair in data.validation_pairs()}
    assert (len(data.validation_pairs()), len(held_out)) == (4, 2)
    assert not held_out & {pair.query.media for pair in data.train_pairs()}


def test_the_same_share_of_every_subset_is_held_out(tmp_path: Path, mmeb: MakeSource) -> None:
    for subset, size in (("A", 10), ("B", 20)):
        write(tmp_path, subset, [row(number) for number in range(size)])
    capped = mmeb(subsets=["A", "B"], max_rows=3, caps={"B": None})
    assert Counter(pair.subset for pair in capped.train_pairs()) == {"A": 3, "B": 20}
    data = mmeb(subsets=["A", "B"], validation_fraction=0.2, validation_rows=3)
    assert Counter(pair.subset for pair in data.train_pairs()) == {"A": 8, "B": 16}
    assert Counter(pair.subset for pair in data.validation_pairs()) == {"A": 2, "B": 4}
    sizes = {subset.name: len(subset.row_ids) for subset in data.validation_subsets()}
    assert sizes == {"A": 2, "B": 3}


def test_nothing_held_out_means_no_validation(own: MakeSource) -> None:
    data = own([{"query": "a", "positive": "b"}])
    assert (len(data.train_pairs()), len(data.validation_pairs())) == (1, 0)
    assert data.validation_subsets() == []
    with pytest.raises(UserError, match="set validation_fraction to 0"):
        own([{"query": "a", "positive": "b"}], validation_fraction=0.1).train_pairs()


def test_a_second_file_validates_without_other_right_answers(
    tmp_path: Path, own: MakeSource
) -> None:
    pairs = [("q1", "a"), ("q1", "b"), ("q2", "b"), ("q3", "c")]
    own([{"query": query, "positive": positive} for query, positive in pairs], name="b.jsonl")
    data = own([{"query": "a", "positive": "b"}], validation_path=str(tmp_path / "b.jsonl"))
    assert texts(data.train_pairs()) == ["b"]
    assert {pair.subset for pair in data.validation_pairs()} == {"dogs"}
    (subset,) = data.validation_subsets()
    found = [[subset.candidates[index].text for index in row] for row in subset.candidate_index]
    assert found == [["a", "c"], ["b", "c"], ["b", "a", "c"], ["c", "a", "b"]]
    assert [item.text for item in subset.queries] == ["q1", "q2", "q3"]
    assert subset.query_index.tolist() == [0, 0, 1, 2]


# --- The hub and stages ----------------------------------------------------------------------


def test_only_the_files_of_the_subsets_are_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mmeb: MakeSource
) -> None:
    asked: dict[str, Any] = {}

    def fetch(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(sources, "snapshot_download", fetch)
    for subset in "AB":
        write(tmp_path, subset, [row(0)])
    data = mmeb(root="some/corpus@v1", subsets=["A", "B"])
    assert names(data) == ["A row 0", "B row 0"]
    assert asked == {
        "repo": "some/corpus",
        "repo_type": "dataset",
        "revision": "v1",
        "allow_patterns": ["A/original-*.parquet", "B/original-*.parquet"],
    }


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("no network"), OSError("disk full")])
def test_hub_out_of_reach_is_one_sentence_with_the_command(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fetch(repo: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(sources, "snapshot_download", fetch)
    with pytest.raises(UserError, match=r"some/corpus .* cannot be .*hf download some/corp"):
        local_folder("some/corpus", ["A/*.parquet"])


def test_each_stage_has_its_own_source(own: MakeSource) -> None:
    captions, pairs = (
        own([{"query": text, "positive": "b"}], name=f"{text}.jsonl") for text in "ac"
    )
    data = DataOfStages(stages={"warmup": captions, "contrast": pairs}, scored="contrast")
    assert source_of(data, "warmup") is captions
    assert source_of(data, "contrast") is source_of(pairs, "warmup") is pairs
    assert data.training_texts() == ["a", "b", "c"]
    with pytest.raises(UserError, match=r"stage pretrain has no data; .* holds warmup, contrast"):
        source_of(data, "pretrain")
    with pytest.raises(UserError, match=r"data\.scored names contrast; data\.stages holds warmup"):
        DataOfStages(stages={"warmup": captions}, scored="contrast")
