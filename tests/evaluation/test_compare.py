"""Runs side by side: means over seeds, labels, missing runs, differences, and what is refused."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pandas as pd
import pytest
import yaml
from rich.console import Console
from rich.table import Table

from cocoa_pl.errors import UserError
from cocoa_pl.evaluation import compare
from cocoa_pl.evaluation.compare import Run, compared, read_sweep, write_summary
from cocoa_pl.evaluation.results import Results, SubsetScore, TaskScore


def results(score: float, *, name: str = "scene_i2t", queries: int = 9) -> Results:
    """Overall and in distribution at `score`, and one of two subsets 0.1 above it."""
    pairs = ((name, score + 0.1), ("other", score - 0.1))
    subsets = [SubsetScore(n, "vqa", True, x, x, queries, 9, 0.1) for n, x in pairs]
    return Results("digits", "x", tuple(subsets))


def make_run(folder: Path, overrides: list[str], score: float | None) -> None:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    if score is not None:
        results(score).write_json(folder / "results.json")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    runs = [("causal", 1, 0.2), ("causal", 2, 0.4), ("bridge", 1, 0.6), ("bridge", 2, None)]
    for number, (attention, seed, score) in enumerate(runs):
        overrides = ["model=tiny", f"+attention={attention}", f"seed={seed}", "hydra.verbose=true"]
        make_run(tmp_path / str(number), overrides, score)
    return tmp_path


def printed_on(width: int, table: Table) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def summarised(sweep: Path, *subsets: str) -> str:
    """The summary.md of a sweep."""
    write_summary(sweep, read_sweep(sweep), subsets=subsets)
    return (sweep / "summary.md").read_text()


def test_a_summary_holds_means_and_sample_deviations_and_lists_missing_runs(sweep: Path) -> None:
    table = write_summary(sweep, read_sweep(sweep), subsets=["scene_i2t"])
    printed, markdown = " ".join(printed_on(120, table).split()), (sweep / "summary.md").read_text()
    for text in (printed, markdown):
        assert "1 of 2" in text
        assert "model=tiny attention=bridge seed=2: no results.json in 3" in text
    assert "| causal | 2 | 30.0 ± 14.1 | 30.0 ± 14.1 | 40.0 ± 14.1 |" in markdown
    assert "| bridge | 1 of 2 | 60.0 | 60.0 | 70.0 |" in markdown
    causal, bridge = pd.read_csv(sweep / "summary.csv").to_dict("records")
    assert list(causal)[:5] == ["configuration", "runs", "missing", "overall_mean", "overall_std"]
    assert (causal["runs"], bridge["runs"], bridge["missing"]) == (2, 1, 1)
    assert causal["scene_i2t_mean"] == pytest.approx(0.4)
    assert causal["overall_std"] == pytest.approx(0.02**0.5)  # (0.1² + 0.1²) / (2 - 1)
    assert pd.isna(bridge["overall_std"])
    assert (sweep / "summary.png").read_bytes().startswith(b"\x89PNG")
    of_its_folder = compare.open_runs([sweep])  # a sweep stands for its runs
    assert list(of_its_folder.members) == ["causal", "bridge"]
    assert len(of_its_folder.missing) == 1


def test_a_configuration_without_any_result_keeps_its_line(tmp_path: Path) -> None:
    for number, score in ((0, 0.5), (1, None), (2, 0.5)):
        make_run(tmp_path / str(number), [f"a={number}", "seed=1"], score)
    (tmp_path / "2" / "results.json").write_text("{")
    text = summarised(tmp_path)
    assert "| 1 | 0 of 1 | missing | missing |" in text
    assert "2/results.json is damaged (Expecting property name" in text
    for number in (0, 2):
        (tmp_path / str(number) / "results.json").unlink()
    assert "| 0 | 0 of 1 | missing |" in summarised(tmp_path, "scene_i2t")


def test_a_sweep_over_tasks_of_mteb_is_summarised_by_them(tmp_path: Path) -> None:
    for number, score in enumerate((-0.5, -0.7)):
        make_run(tmp_path / str(number), [f"seed={number}"], None)
        task = TaskScore("CIRR", "Any2AnyRetrieval", "ndcg_at_10", score)
        of_mteb = Results("mteb", "x", (), is_partial=True, tasks=(task,))
        of_mteb.write_json(tmp_path / str(number) / "results.json")
    text = summarised(tmp_path, "scene_i2t")
    assert "| configuration | runs | CIRR |" in text
    assert "| as configured | 2 | -60.0 ± 14.1 |" in text


def test_a_subset_that_a_run_lacks_is_an_error_that_names_the_run(sweep: Path) -> None:
    results(0.2, name="scene_t2i").write_json(sweep / "0" / "results.json")
    with pytest.raises(UserError, match=r"0/results.json: no score scene_i2t"):
        summarised(sweep, "scene_i2t")


def test_runs_come_in_numeric_order_with_the_words_that_were_typed(tmp_path: Path) -> None:
    words = ["++a.b=[1,2]", "c=x=y", "hydra.verbose=true", "hydra/launcher=x"]
    for number in (10, 9, 1):
        make_run(tmp_path / str(number), words, 0.5)
    make_run(tmp_path / "11", ["c=z", "+d=1"], 0.5)
    runs = read_sweep(tmp_path)
    assert [run.folder.name for run in runs] == ["1", "9", "10", "11"]
    assert runs[0].overrides == {"a.b": "[1,2]", "c": "x=y"}
    labels = re.findall(r"\| (\S+=.*?) \|", summarised(tmp_path))
    assert labels == ["a.b=\\[1,2], c=x=y", "c=z, d=1"]  # all that varies


def test_names_are_no_markup(tmp_path: Path) -> None:
    """Of rich, Markdown or matplotlib; and no control character reaches a terminal or a file."""
    hostile = "[red]a[/red] | $x$ *b* <i> _c_ \x1b[2J \\"
    make_run(tmp_path / "0", ["a=1"], None)
    results(0.5, name=hostile).write_json(tmp_path / "0" / "results.json")
    table = write_summary(tmp_path, read_sweep(tmp_path), subsets=[hostile])
    assert r"[red]a[/red] | $x$ *b* <i> _c_ \x1b[2J" in printed_on(200, table)
    markdown = (tmp_path / "summary.md").read_text()
    assert r"\[red]a\[/red] \| $x$ \*b\* \<i> \_c\_ \\x1b\[2J \\ |" in markdown


# --- Differences ---


def test_an_interval_over_seeds_holds_their_variance_too() -> None:
    one, two = Run(Path("a"), {}, results(0.4, queries=400)), results(0.5, queries=400)
    steady = [Run(Path(f"{n}"), {}, two) for n in range(2)]
    seeds = [Run(Path(f"{n}"), {}, results(x, queries=400)) for n, x in enumerate((0.45, 0.55))]
    key = ("mean", "overall")
    alike, apart = (compared([one, *s], ["a", "b", "b"]).cells[key][1] for s in (steady, seeds))
    assert alike.score == pytest.approx(apart.score)
    assert alike.differs == "above"
    assert apart.differs == ""
    query_variance = 2 * (0.5 * 0.5 + 0.3 * 0.7 + 0.4 * 0.6 + 0.6 * 0.4) / 400 / 4 / 2
    for cell, over_seeds in ((alike, 0), (apart, 0.1**2 / 2 / 2)):
        half = (cell.high - cell.low) / 2
        assert half == pytest.approx(1.96 * (query_variance + over_seeds) ** 0.5, rel=1e-3)


# --- Which runs ---


def configured(folder: Path, score: float, *, seed: int, rate: float) -> Path:
    folder.mkdir()
    results(score, queries=400).write_json(folder / "results.json")
    config = f"seed: {seed}\nlr: {rate}\nmodel: {{seed: {seed}}}\nbenchmark: {{seed: 0}}\n"
    (folder / "config.yaml").write_text(config)
    return folder


def test_runs_that_differ_in_their_seed_alone_are_one_configuration(tmp_path: Path) -> None:
    first = [configured(tmp_path / f"a{n}", 0.4 + n / 10, seed=n, rate=1) for n in range(2)]
    other = configured(tmp_path / "b", 0.6, seed=0, rate=2)
    found = compare.open_runs([*first, other])
    assert list(found.members) == ["a0, a1", "b"]
    assert [cell.text for cell in found.cells["mean", "overall"]] == ["45.0 ± 7.1", "60.0"]
    assert list(compare.open_runs(first).members) == ["a0", "a1"]  # else nothing is compared
    for folder in (*first, other):
        (folder / "config.yaml").unlink()
    assert list(compare.open_runs([*first, other]).members) == ["a0", "a1", "b"]


def test_runs_that_do_not_compare_are_refused(tmp_path: Path) -> None:
    one, two = (configured(tmp_path / name, 0.5, seed=0, rate=1) for name in ("a", "b"))
    other = configured(tmp_path / "c", 0.5, seed=0, rate=1)
    Results("mmeb_v1", "x", results(0.5).subsets).write_json(other / "results.json")
    (tmp_path / "empty").mkdir()
    for folders, message in (
        ([one], "2 runs or more"),
        ([one, one], "named twice"),
        ([one, other], "different benchmarks do not compare: digits, mmeb_v1"),
        ([one, tmp_path / "empty"], r"empty: no results.json in empty; .*evaluate.py ckpt="),
        ([tmp_path / "empty"], "no results.json"),
    ):
        with pytest.raises(UserError, match=message):
            compare.open_runs(folders)
    (two / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"b/results.json is damaged"):
        compare.open_runs([one, two])


def test_the_terminal_shows_means_and_the_page_leads_to_reports(tmp_path: Path) -> None:
    scores = (("a", 0.4), ("b #1%ü", 0.6))
    runs = [configured(tmp_path / name, x, seed=0, rate=x) for name, x in scores]
    (runs[1] / "report.html").touch()
    console = Console(width=80, record=True, file=io.StringIO())
    assert compare.run([*map(str, runs), "--out", str(tmp_path / "p/c.html")], console) == 0
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["overall", "40.0", "60.0+"] in lines
    assert ["vqa", "40.0", "60.0+"] in lines
    assert 'href="../b%20%231%25%C3%BC/report.html"' in (tmp_path / "p/c.html").read_text()
