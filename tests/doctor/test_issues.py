"""One row with each issue: the doctor names it and its severity, and says nothing of others."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cocoa_pl.config.build import build
from cocoa_pl.data.processor import Processor
from cocoa_pl.doctor.check import sides_of
from cocoa_pl.doctor.report import KINDS, SEVERITIES
from cocoa_pl.errors import UserError
from cocoa_pl.models.qwen_vl import Qwen2VLBackbone
from tests.configs import composed
from tests.docs.pages import pattern_of, troubles
from tests.files import write_noise

from .conftest import MAX_LENGTH, Checkup, issues, mmeb, row, write_set

# Kind -> the rows that have it, by their names in `issues`, with role and file of the first one;
# kinds that are not here are absent.
EXPECTED = {
    "missing_image": (["missing"], "query", "images/nowhere.png"),
    "path_outside_root": (["outside", "absolute"], "query", "../outside.png"),
    "corrupt_image": (["corrupt", "cut"], "query", "images/corrupt.png"),
    "elongated_image": (["elongated"], "query", "images/long.png"),
    "placeholder_mismatch": (["no placeholder", "two placeholders"], "query", ""),
    "empty_text": (["empty"], "positive", ""),
    "bad_row": (["broken negatives"], "", ""),
    "images_exceed_length": (["too large"], "query", "images/large.png"),
    "repeated_row": (["repeated"], "", ""),
    "truncated_text": (["too long"], "", ""),
    "negative_is_positive": (["wrong negative"], "negative", ""),
    # By content, the copied image makes the same query as the healthy one.
    "several_positives": (
        ["healthy", "two answers, first", "two answers, second", "copied image"],
        *("query", ""),
    ),
    "image_tag": (["forgotten"], "positive", ""),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a row of each issue."""
    root = tmp_path_factory.mktemp("issues") / "root"
    return write_set(root, list(issues(root).values()))


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name of an issue -> number of its row."""
    named = issues(tmp_path_factory.mktemp("names") / "root")
    return {name: str(number) for number, name in enumerate(named)}


@pytest.fixture(scope="module")
def checkup(root: Path, check_up: Callable[..., Checkup]) -> Checkup:
    return check_up(*mmeb(root), f"cache_dir={root.parent / 'cache'}")


@pytest.fixture(scope="module")
def by_three(root: Path, check_up: Callable[..., Checkup]) -> Checkup:
    """The same by three processes, on a narrow terminal."""
    cache = root.parent / "cache"
    return check_up(*mmeb(root), f"cache_dir={cache}", "workers=3", width=80)


@pytest.mark.parametrize("kind", EXPECTED)
def test_an_issue_is_found_in_its_rows_with_role_and_file(
    kind: str, checkup: Checkup, numbers: dict[str, str]
) -> None:
    names, role, file = EXPECTED[kind]
    assert checkup.rows(kind) == [numbers[name] for name in names]
    found = checkup.findings(kind)[0]
    assert (found["part"], found["role"]) == ("train", role)
    assert found["file"].endswith(file)
    assert bool(found["file"]) == bool(file)
    assert found["message"].startswith(found["row_id"])
    about = checkup.report["kinds"][kind]
    assert about["severity"] == KINDS[kind][0]
    assert about["count"] == about["listed"] == len(checkup.findings(kind))


def test_nothing_else_is_found(checkup: Checkup, numbers: dict[str, str]) -> None:
    assert set(checkup.report["kinds"]) == set(EXPECTED)
    named = {name for names, _, _ in EXPECTED.values() for name in names}
    assert numbers.keys() - named == {"other rows"}


def test_the_troubleshooting_page_quotes_what_is_said(checkup: Checkup) -> None:
    quoted = {kind: [pattern_of(one) for one in messages] for kind, messages in troubles()}
    said = [(one["kind"], one["message"]) for one in checkup.report["findings"]]
    assert [one for one in said if not any(q.search(one[1]) for q in quoted[one[0]])] == []


def test_the_exit_status_is_1_if_training_would_stop(checkup: Checkup) -> None:
    assert checkup.status == 1
    assert checkup.report["stops_training"] is True
    assert checkup.report["rows"] == {"train": 12, "validation": 0}
    assert "11 finding(s) would stop training" in checkup.text


@pytest.mark.parametrize("width", [80, 120])
def test_the_report_fits_the_terminal(width: int, checkup: Checkup, by_three: Checkup) -> None:
    shown = {80: by_three, 120: checkup}[width].text
    lines = [line for line in shown.splitlines() if not line.startswith("written: ")]
    assert max(map(len, lines)) <= width
    unwrapped = re.sub(r"\s+", " ", shown)
    for kind in EXPECTED:
        assert KINDS[kind][1] in unwrapped
    for words, _ in SEVERITIES.values():
        assert words in shown
    for stage in ("pretrain", "warmup", "reconstruct", "contrast"):
        assert re.search(rf"^ *{stage}( +[\d,]+){{8}}", shown, re.MULTILINE)


def test_the_report_does_not_depend_on_the_number_of_workers(
    checkup: Checkup, by_three: Checkup
) -> None:
    assert by_three.report == checkup.report


def test_a_row_stops_training_exactly_if_it_is_reported_so(
    checkup: Checkup, numbers: dict[str, str], root: Path, tmp_path: Path
) -> None:
    """Each row is read and tokenized on its own, by what training uses, and must raise or not."""
    (folder,) = (root.parent / "cache").glob("tiny-*")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = Processor(
        tokenizer,
        Qwen2VLBackbone.image_processor.from_pretrained(folder),
        max_length=MAX_LENGTH,
        min_pixels=784,
        max_pixels=12544,
        num_token_rows=len(tokenizer) + 1,
    )

    def stops(root: Path) -> bool:
        try:
            (pair,) = build(composed(*mmeb(root), name="doctor").data).train_pairs()
            for _, item in sides_of(pair):
                processor(item, None, key=0, row_id=pair.row_id)
        except UserError:
            return True
        return False

    expected = {
        finding["row_id"].rpartition(" ")[2]
        for finding in checkup.report["findings"]
        if KINDS[finding["kind"]][0] == "stops"
    }
    alone = tmp_path / "root"
    stopped = set()
    for name, content in issues(alone).items():
        if stops(write_set(alone, [content])):
            stopped.add(numbers[name])
    assert stopped == expected


def test_a_folder_without_a_subset_is_checked_all_the_same(
    root: Path, checkup: Checkup, check_up: Callable[..., Checkup]
) -> None:
    found = check_up(*mmeb(root), "data.subsets=[Gone,Set]")
    (missing,) = found.findings("unreadable_source")
    assert missing["message"].startswith("Gone: ")
    assert found.report["kinds"].keys() - {"unreadable_source"} == set(EXPECTED)
    assert found.report["rows"] == checkup.report["rows"]


def test_a_stage_that_finds_no_captions_is_named_and_the_others_are_measured(
    tmp_path: Path, check_up: Callable[..., Checkup]
) -> None:
    rows = []
    for number in range(4):
        write_noise(tmp_path / f"images/{number}.png", seed=number)
        write_noise(tmp_path / f"images/{number}b.png", seed=number + 10)
        both = {"pos_image_path": f"images/{number}b.png"}
        rows.append(row(f"images/{number}.png", f"<|image_1|> of dog {number}", **both))
    found = check_up(*mmeb(write_set(tmp_path, rows)))
    stages = [finding["message"].partition(":")[0] for finding in found.findings("too_few_rows")]
    assert stages == ["stage pretrain", "stage warmup", "stage reconstruct"]
    assert [one["stage"] for one in found.report["lengths"]] == ["contrast"]
    assert found.status == 1
    found = check_up(*mmeb(tmp_path), "stage.contrast.batch_size=5")
    message = found.findings("too_few_rows")[-1]["message"]
    assert message.startswith("stage contrast: the training data has 4 rows, fewer than one batch")
    assert [one["stage"] for one in found.report["lengths"]] == ["contrast"]
