"""`cocoa doctor` as it is typed: digits, the user's own pairs, models that are not at hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cocoa_pl.errors import UserError
from tests.files import write_noise, write_rows

from .conftest import SMALL, Checkup, mmeb, row, write_set

FEW_DIGITS = (
    *("data.scenes=60", "data.task_rows=20", "data.validation_rows=60"),
    *("benchmark.scenes=60", "benchmark.task_rows=20"),
)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight healthy rows."""
    root = tmp_path_factory.mktemp("healthy")
    for number in range(8):
        write_noise(root / f"images/{number}.png", seed=number)
    return write_set(root, [row(f"images/{n}.png", f"dog number {n}") for n in range(8)])


def test_digits_are_healthy(check_up: Callable[..., Checkup]) -> None:
    small = [override for override in SMALL if not override.startswith("model.max_length")]
    found = check_up(*FEW_DIGITS, *small, "workers=0")
    assert found.status == 0
    severities = {about["severity"] for about in found.report["kinds"].values()}
    assert severities <= {"informs"}
    assert found.report["rows"].keys() == {"train", "validation", "digits"}
    assert all(found.report["rows"].values())
    measured = [one["stage"] for one in found.report["lengths"]]
    assert measured == ["pretrain", "warmup", "reconstruct", "contrast"]


def test_rows_are_healthy_and_those_of_mteb_are_listed_as_not_checked(
    healthy: Path, check_up: Callable[..., Checkup]
) -> None:
    tasks = "benchmark.tasks=[cocoa_pl.for_mteb.digits.DigitCount]"
    found = check_up(*mmeb(healthy), "evaluate=true", "benchmark=mteb", tasks)
    assert found.report["rows"].keys() == {"train", "validation"}
    assert (found.status, found.report["kinds"]) == (0, {})
    assert found.report["images"]["visual_tokens"]["max"] == 1
    assert "nothing would stop training" in found.text
    assert "rows of the benchmark" in found.report["not_checked"][-1]


def test_without_the_model_lengths_are_not_checked_and_the_rest_is(
    healthy: Path, check_up: Callable[..., Checkup]
) -> None:
    overrides = [o for o in mmeb(healthy) if not o.startswith("model.")]
    found = check_up(*overrides, "model=qwen2vl", *SMALL[1:5])
    (sentence,) = found.report["not_checked"]
    assert sentence.startswith("token lengths: Qwen/Qwen2-VL-2B-Instruct is not on this disk")
    assert "model.source.path=" in sentence
    assert "not checked: token lengths" in found.text
    assert (found.status, found.report["lengths"]) == (0, [])
    assert found.report["images"]["count"] == 8


def test_a_folder_that_is_no_model_is_the_users_mistake(
    healthy: Path, tmp_path: Path, check_up: Callable[..., Checkup]
) -> None:
    overrides = [o for o in mmeb(healthy) if not o.startswith("model.")]
    with pytest.raises(UserError, match="is no model folder"):
        check_up(*overrides, "model=qwen2vl", f"model.source.path={tmp_path}")


def test_a_stream_is_refused_with_what_to_do(
    healthy: Path, check_up: Callable[..., Checkup]
) -> None:
    with pytest.raises(UserError, match=r"fetch a part of the corpus and check that with data="):
        check_up(
            *("data=mmeb_stream", f"data.path={healthy}", f"data.image_root={healthy}"),
            *("data.subsets=[Set]", "data.caption_subsets=[Set]", "data.validation_rows=2"),
            *("evaluate=false", "workers=0", *SMALL),
        )


def test_validation_rows_that_are_trained_on_are_found(
    tmp_path: Path, check_up: Callable[..., Checkup]
) -> None:
    """By content: the same picture under another name is the same picture."""
    for number in range(6):
        write_noise(tmp_path / f"{number}.png", seed=number)
    for number in range(3):
        (tmp_path / f"copy{number}.png").write_bytes((tmp_path / f"{number}.png").read_bytes())
    train = write_rows(
        tmp_path / "train.jsonl",
        [{"query_image": f"{n}.png", "query": "Name it", "positive": f"dog {n}"} for n in range(6)],
    )
    held_out = write_rows(
        tmp_path / "held_out.jsonl",
        [
            {"query_image": "copy0.png", "query": "Name it", "positive": "dog 0"},
            {"query_image": "copy1.png", "query": "Name it", "positive": "a fox"},
            {"query_image": "copy2.png", "query": "Look", "positive": "a cow"},
            {"query": "Name it", "positive": "dog 4"},
        ],
    )
    found = check_up(
        *("data=pairs", f"data.path={train}", f"data.image_root={tmp_path}"),
        *(f"data.validation_path={held_out}", "data.validation_fraction=0", "workers=0", *SMALL),
    )
    assert found.rows("overlap_pair") == ["1"]
    assert found.rows("overlap_query") == ["2"]
    assert found.rows("overlap_image") == ["3"]
    assert found.findings("overlap_pair")[0]["message"].endswith("held_out.jsonl line 1")
    assert found.status == 0


def test_rows_of_the_benchmark_that_are_trained_on_are_found(
    healthy: Path, tmp_path: Path, check_up: Callable[..., Checkup]
) -> None:
    """The right answer of a row counts, wrong candidates do not; bad rows stop the evaluation."""
    write_noise(tmp_path / "new.png", seed=50)
    (tmp_path / "old.png").write_bytes((healthy / "images/2.png").read_bytes())
    question = "<|image_1|>\nName it"
    rows = [
        ("old.png", ["dog number 2", "dog number 3"]),
        ("new.png", ["a fox", "dog number 4"]),
        ("gone.png", ["a fox", "a cow"]),
    ]
    content = [
        {"qry_text": question, "qry_img_path": image, "tgt_text": texts, "tgt_img_path": ["", ""]}
        for image, texts in rows
    ]
    (tmp_path / "Broken").mkdir()
    (tmp_path / "Broken/test-0.parquet").write_text("no table")
    write_rows(tmp_path / "Exam/test-0.parquet", content)
    found = check_up(
        *(o for o in mmeb(healthy) if not o.startswith("evaluate")),
        *("benchmark=mmeb", f"benchmark.root={tmp_path}"),
    )
    assert found.rows("overlap_pair") == ["2"]
    assert found.report["kinds"].keys() & {"overlap_query", "overlap_image"} == set()
    (missing,) = found.findings("missing_image")
    assert (missing["part"], missing["row_id"]) == ("own_benchmark", "Exam row 2")
    assert found.report["rows"]["own_benchmark"] == 2
    (broken,) = found.findings("unreadable_source")
    assert "Broken/test-0.parquet: cannot be read" in broken["message"]
    assert found.status == 1


def test_stages_with_data_of_their_own_are_checked_apart(
    healthy: Path, tmp_path: Path, check_up: Callable[..., Checkup]
) -> None:
    captions = write_rows(
        tmp_path / "captions.jsonl",
        [{"query_image": f"images/{n}.png", "positive": f"picture {n}"} for n in range(7)]
        + [{"query_image": name, "positive": "nothing"} for name in ("gone.png", "\ud800.png")],
    )
    own = ["root", "subsets", "caption_subsets", "validation_fraction"]
    contrast = [o for o in mmeb(healthy) if o.partition("=")[0] in {f"data.{key}" for key in own}]
    others = []
    for stage in ("warmup", "reconstruct"):
        node = f"data.stages.{stage}"
        others += [f"data@{node}=pairs", f"{node}.path={captions}", f"{node}.image_root={healthy}"]
    found = check_up(
        *("data=paper", "stage.order=[warmup,reconstruct,contrast]", *others, "workers=0", *SMALL),
        *(override.replace("data.", "data.stages.contrast.", 1) for override in contrast),
    )
    missing = found.findings("missing_image")
    assert {one["part"] for one in missing} == {"train (warmup)", "train (reconstruct)"}
    assert {one["row_id"] for one in missing} == {f"{captions} line {line}" for line in (8, 9)}
    assert missing[1]["file"].endswith("\ud800.png")
    assert found.report["rows"]["train (contrast)"] == 8
