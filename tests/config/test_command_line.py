"""Values arrive as they are typed, and mistakes are one sentence, also in own configs."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from omegaconf import DictConfig

from cocoa_pl.config.command_line import CONFIGS, run_app
from cocoa_pl.errors import UserError, typed

ROOT = CONFIGS.parent
Start = Callable[..., list[DictConfig]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Start the app of train.py with these words: the configs of its runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setenv("HOME", "/home/me (you)")

    def run(*words: str) -> list[DictConfig]:
        configs: list[DictConfig] = []
        run_app("train", configs.append, words)
        return configs

    return run


ODD = (
    *("数据.jsonl", "pairs (1).jsonl", "it's.jsonl", "a=b", "a#b", " lead", "[1].jsonl", 'say "x"'),
    *("a!b & c;d", "photos(2)", "back\\", "two  spaces", "plain/file.jsonl", "a:b%c@d"),
)


# Texts that a config holds.
KEYS = ("path", "image_root", "root", "files", "split", "validation_path")
PASTED = (*ODD, "a,b", "{x}", "[1]", "null", "1e3", "~/x", 'a\\"b', "'q'")


@pytest.mark.parametrize("first", range(0, len(PASTED), len(KEYS)))
def test_values_arrive_as_they_are_typed_or_pasted_from_a_message(first: int, start: Start) -> None:
    given = dict(zip(KEYS, PASTED[first:], strict=False))
    plain = [f"data.{key}={value}" for key, value in given.items() if value in ODD]
    pasted = " ".join(typed(f"data.{key}", value) for key, value in given.items())
    for words in (plain, shlex.split(pasted)):
        (cfg,) = start("data=pairs", *words)
        for key in (word.partition("=")[0].removeprefix("data.") for word in words):
            assert cfg.data[key] == given[key]


def test_a_tilde_is_the_home_folder(start: Start) -> None:
    (cfg,) = start("data=mmeb", "data.root=~/MMEB")
    assert cfg.data.root == "/home/me (you)/MMEB"
    both = start("-m", "data=mmeb", "data.root=~/数据,b (2)", "hydra.sweep.dir=sweep")
    assert [cfg.data.root for cfg in both] == ["/home/me (you)/数据", "b (2)"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sede=3"], "unknown key sede (did you mean seed?)"),
        (
            ["stage.contrast.batchsize=3"],
            "unknown key stage.contrast.batchsize (did you mean stage.contrast.batch_size?)",
        ),
        (["model=tinny"], "model=tinny does not exist (did you mean tiny?); there are qwen25vl_3b"),
        (["benchmark=foo"], "benchmark=foo does not exist; there are digits, held_out, "),
        (
            ["attention@stage.contrast.policy=causall"],
            "attention=causall does not exist (did you mean causal?)",
        ),
        (
            ["attention@stage.contrst.policy=causal"],
            "key attention@stage.contrst.policy (did you mean attention@stage.contrast.policy?)",
        ),
        (
            ["stage.contrast.policy=causal"],
            "holds several values; did you mean attention@stage.contrast.policy=causal?",
        ),
        (["stage.contrast.optimization=adam"], "did you mean stage.contrast.optimization.KEY=...?"),
        (["-m", "seed=0,1", "sede=2"], "unknown key sede"),
        (["+experiment=ablatoin"], "experiment=ablatoin does not exist (did you mean ablation?)"),
        (["+sede=3"], "unknown key sede (did you mean seed?)"),
        (["+note=3"], "unknown key note, which nothing reads"),
        (["+trainer.strategy=ddp"], "trainer.strategy is there already; write it without +"),
        (["hydra/launcher=joblib"], "needs a package: pip install hydra-joblib-launcher"),
        (["hydra/sweeper=optuna"], "needs a package: pip install hydra-optuna-sweeper"),
        (["++experiment=ablatoin"], "force-add of config groups is not supported"),
        (["contrast"], "contrast: write key=value"),
        (["a key=3"], "a key=3: write key=value"),
        (["data=pairs", "data.path=a,b"], "-m runs one by one; one is written 'data.path=\"a,b\"'"),
        (["data.subsets=[数据]"], "'data.subsets=[\"数据\"]' for a list or 'data.subsets="),
        (["--config-dir", "nowhere"], "Additional config directory '"),
        (["--config-name", "nothing"], "Cannot find primary config 'nothing'"),
        (["--experimental-rerun", "x.pickle"], "would write into the folder of the run"),
        (["-m", "--cfg", "job"], "Only one of --run, --multirun, --cfg"),
        (["--config-dir", "OWN", "experiment=mien"], "does not exist (did you mean mine?)"),
        (["hydra.searchpath=[OWN]", "experiment=mien"], "(did you mean mine?)"),
        (["--config-dir", "OWN", "experiment=forgetful"], "arm=recipeee does not exist (did you"),
        (["--config-dir", "OWN", "experiment=misspelt"], "stage.warmup.stepss (did you mean steps"),
        (["--config-dir", "OWN", "experiment=aside"], "unknown key sede (did you mean seed?)"),
        (["--config-dir", "OWN", "experiment=cut_off"], 'experiment/cut_off.yaml", line 2'),
        (["--config-dir", "OWN/.."], "train.yaml comes first; name it otherwise"),
        (["-m", "experiment=ablation,typo", "arm=base"], "experiment=typo does not exist"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    arguments: list[str],
    message: str,
    start: Start,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = tmp_path / "own files"
    (own / "experiment").mkdir(parents=True)
    (tmp_path / "train.yaml").write_text("seed: 1\n")
    header = "# @package _global_\n"
    (own / "experiment" / "mine.yaml").write_text(header + "seed: 3\n")
    (own / "experiment" / "misspelt.yaml").write_text(header + "stage: {warmup: {stepss: 3}}\n")
    (own / "experiment" / "aside.yaml").write_text(header + "sede: 3\n")
    (own / "experiment" / "cut_off.yaml").write_text(header + "seed: [")
    (own / "experiment" / "forgetful.yaml").write_text(
        header + "defaults: [override /arm: recipeee]\n"
    )
    assert not start(*(word.replace("OWN", str(own)) for word in arguments))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not any(tmp_path.glob("runs/*"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config-dir", str(ROOT / "docs" / "examples" / "conf"), "data=colours"],
        ["hydra.searchpath=[.]", "experiment=mine"],
        ["seed=range(0,2)", "-m", "attention@stage.contrast.policy=causal,bidirectional"],
        [
            *("data.validation_path=x", "data=pairs", "data.path=a", "data.image_root=b"),
            *("stage.contrast.module.matryoshka_dims=[16,32]", "+trainer.max_time={hours: 1}"),
            'model.eos_token="<|endoftext|>"',
        ],
    ],
)
def test_what_hydra_allows_is_allowed(arguments: list[str], start: Start, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    own = tmp_path / "experiment" / "mine.yaml"
    own.write_text("# @package _global_\nmy_seed: 3\nseed: ${my_seed}\n")
    assert start(*arguments)


@pytest.mark.parametrize(
    "words", ["seed=1 --cfg job data=digits --resolve", "--help", "--info all"]
)
def test_what_only_shows_something_makes_no_folder(
    words: str, start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with suppress(SystemExit):  # of the helps
        assert start(*words.split()) == []
    assert capsys.readouterr().out
    assert not any(tmp_path.iterdir())


def test_of_a_sweep_a_mistake_ends_one_run_and_an_interruption_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    seeds: list[int] = []

    def task(cfg: DictConfig) -> None:
        seeds.append(cfg.seed)
        raise [UserError("no such row"), KeyboardInterrupt][cfg.seed]

    with pytest.raises(SystemExit, match="130"):
        run_app("train", task, ["-m", "seed=0,1,2"])
    assert seeds == [0, 1]
    assert capsys.readouterr().err.splitlines() == ["error: no such row", "interrupted"]
