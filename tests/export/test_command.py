"""`cocoa export`: what it writes, and errors that leave nothing behind."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cocoa_pl.embedder import Embedder
from cocoa_pl.errors import UserError
from cocoa_pl.evaluation.results import Results, SubsetScore, TaskScore
from cocoa_pl.export import command
from cocoa_pl.export.folder import export
from cocoa_pl.export.parity import Compared, images_only

STAGE = {"stage": "contrast", "steps": 7, "batch_size": 4, "lr": 1e-4, "policy": "all", "seed": 3}
SCORES = Results(
    "digits", "run", (SubsetScore("scene", "Retrieval", True, 0.5, 0.25, 40, 40, 0.1),), ()
)


@pytest.fixture
def run_folder(embedder: Embedder, tmp_path: Path) -> Path:
    """A run that kept its model and its scores, but no checkpoint."""
    run = tmp_path / "run"
    export(embedder, run / "model", lineage=[STAGE], rounding=5e-5)
    SCORES.write_json(run / "results.json")
    data = "data:\n  _target_: Mine\n  root: /home/user\n  stages: {warmup: {path: /x, rows: 3}}\n"
    (run / "config.yaml").write_text(data)
    return run


@pytest.fixture
def console() -> Console:
    return Console(width=120, record=True, quiet=False)


def test_a_run_becomes_a_folder_of_sentence_transformers(
    run_folder: Path, console: Console
) -> None:
    from sentence_transformers import SentenceTransformer

    assert command.run([str(run_folder), "--to", "sentence-transformers"], console) == 0
    folder = run_folder / "sentence-transformers"
    output = console.export_text()
    for way in ("training", "Embedder", "transformers", "sentence-transformers"):
        assert way in output
    assert str(folder) in output
    with images_only():
        model = SentenceTransformer(str(folder), device="cpu")
    texts = ["a red dog", "two boats"]
    expected = Embedder.load(str(run_folder), device="cpu").encode(texts)
    np.testing.assert_allclose(model.encode(texts), expected, atol=1e-5)
    np.testing.assert_allclose(
        Embedder.load(str(folder), device="cpu").encode(texts), expected, atol=1e-6
    )


def test_the_card_holds_recipe_scores_and_parity(run_folder: Path, console: Console) -> None:
    out = run_folder.parent / "out" / "named"
    arguments = [str(run_folder), "--to", "hf", "--out", str(out), "--name", "me/named"]
    assert command.run(arguments, console) == 0
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "# me/named" in card
    assert "| contrast | 7 | 4 | 0.0001 | all | 3 |" in card
    assert "| overall | 50.0 | 35.0 to 65.0 |" in card
    assert "| Retrieval | 50.0 | 35.0 to 65.0 |" in card
    assert "| training | 5.0e-05 | when training ended |" in card
    for way in ("Embedder", "transformers"):
        assert re.search(rf"^\| {way} \| \d\.\de[-+]\d\d \|", card, re.MULTILINE)
    assert "_target_: Mine\nstages:\n  warmup:\n    rows: 3\n```" in card
    assert "/home/user" not in card
    assert "SentenceTransformer" not in card
    assert not (out / "modules.json").exists()


@pytest.mark.slow
def test_code_of_the_card_runs(run_folder: Path, console: Console) -> None:
    """The transformers example, word for word, gives the Embedder's vector."""
    assert command.run([str(run_folder), "--to", "hf"], console) == 0
    card = (run_folder / "hf" / "README.md").read_text()
    code = next(c for c in card.split("```python\n") if "AutoModel" in c).split("```")[0]
    names: dict[str, Any] = {}
    with images_only():
        exec(code.replace('from_pretrained("run"', f'from_pretrained("{run_folder / "hf"}"'), names)
    expected = Embedder.load(str(run_folder), device="cpu").encode(["a text"])
    np.testing.assert_allclose(names["vectors"].numpy(), expected, atol=1e-5)


def test_vectors_that_differ_leave_nothing_behind(
    run_folder: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "compare", lambda *_, **__: (Compared("transformers", 0.01),))
    before = sorted(run_folder.iterdir())
    with pytest.raises(UserError, match="transformers does not give the trained model's vectors"):
        command.run([str(run_folder), "--to", "hf"], console)
    assert sorted(run_folder.iterdir()) == before
    assert "1.0e-02" in console.export_text()


def test_what_is_no_export_is_not_replaced(run_folder: Path, console: Console) -> None:
    model = str(run_folder / "model")
    (run_folder / "model/README.md").write_text("mine")  # `export` writes none there
    for out, message in (
        (run_folder / "notes", "exists and is no exported model"),
        (run_folder / "model", r"README\.md is of no export and would be overwritten"),
    ):
        out.mkdir(exist_ok=True)
        with pytest.raises(UserError, match=message):
            command.run([str(run_folder), "--to", "hf", "--out", str(out)], console)
    with pytest.raises(UserError, match="replaced by itself"):
        command.run([model, "--to", "hf", "--out", model], console)


def test_a_run_that_mteb_scored_is_exported(run_folder: Path, console: Console) -> None:
    task = TaskScore("CI*RR", "Any2AnyRetrieval", "ndcg_at_10", 0.51)
    results = Results("mteb", "run", (), is_partial=True, tasks=(task,))
    results.write_json(run_folder / "results.json")
    assert command.run([str(run_folder), "--to", "hf"], console) == 0
    card = (run_folder / "hf/README.md").read_text()
    assert "| | score | metric |\n|---|---|---|\n| CI\\*RR | 51.0 | ndcg_at_10 |" in card


@pytest.mark.parametrize("name", ["results.json", "config.yaml"])
def test_a_damaged_file_of_a_run_is_refused(name: str, run_folder: Path, console: Console) -> None:
    (run_folder / name).write_text("{")
    with pytest.raises(UserError, match=f"{name} is damaged"):
        command.run([str(run_folder), "--to", "hf"], console)
    assert not (run_folder / "hf").exists()


def test_a_hub_id_needs_a_place(console: Console) -> None:
    with pytest.raises(UserError, match="--out"):
        command.run(["user/some-model", "--to", "hf"], console)


def test_without_sentence_transformers_it_is_reported_as_not_computed(
    run_folder: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cocoa_pl.export import parity

    monkeypatch.setattr(parity, "_installed", lambda _: False)
    assert command.run([str(run_folder), "--to", "sentence-transformers"], console) == 0
    assert "not computed" in console.export_text()
    assert (
        "| sentence-transformers | not computed |"
        in (run_folder / "sentence-transformers" / "README.md").read_text()
    )
