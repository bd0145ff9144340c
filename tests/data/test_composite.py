"""A source of its own for each stage, and files fetched from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from cocoa_pl.data import hub
from cocoa_pl.data.composite import DataOfStages, source_of
from cocoa_pl.errors import UserError


class Source:
    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def training_texts(self) -> tuple[str, ...]:
        return self.texts

    def validation_subsets(self) -> list[str]:
        return [f"subset of {self.texts[0]}"]


def test_each_stage_has_its_own_source() -> None:
    captions, pairs = Source("b", "a"), Source("c", "b")
    data = DataOfStages(stages={"warmup": captions, "contrast": pairs}, scored="contrast")
    assert source_of(data, "warmup") is captions
    assert source_of(data, "contrast") is pairs
    assert data.validation_subsets() == ["subset of c"]
    assert data.training_texts() == ["a", "b", "c"]
    with pytest.raises(UserError, match=r"stage pretrain has no data; .* holds warmup, contrast"):
        source_of(data, "pretrain")


def test_any_other_source_serves_all_stages() -> None:
    source: Any = Source("a")
    assert source_of(source, "warmup") is source_of(source, "contrast") is source


def test_scored_stage_must_have_a_source() -> None:
    with pytest.raises(UserError, match=r"data\.scored names contrast; data\.stages holds warmup"):
        DataOfStages(stages={"warmup": Source("a")}, scored="contrast")


def test_only_the_parquet_files_of_the_subsets_are_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    def fetch(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    folder = hub.snapshot(
        "some/corpus", subsets=["A", "B"], split=["original", "other"], revision="v1"
    )
    assert folder == str(tmp_path)
    assert asked == {
        "repo": "some/corpus",
        "repo_type": "dataset",
        "revision": "v1",
        "allow_patterns": [
            "A/original-*.parquet",
            "A/other-*.parquet",
            "B/original-*.parquet",
            "B/other-*.parquet",
        ],
    }


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("no network"), OSError("disk full")])
def test_hub_out_of_reach_is_one_sentence_with_the_command(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fetch(repo: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    with pytest.raises(UserError, match=r"some/corpus cannot be fetched .*hf download some/corpus"):
        hub.snapshot("some/corpus", subsets=["A"], split="original", revision=None)


def test_offline_without_a_copy_is_that_sentence(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="nobody/nothing cannot be fetched"):
        hub.snapshot("nobody/nothing", subsets=["A"], split="original", revision=None)
