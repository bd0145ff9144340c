"""Stages chained, stopped and resumed: the same bits whatever happened in between."""

from __future__ import annotations

import math
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import lightning as L
import pytest
import torch

from cocoa_pl.data.items import Item, Pair
from cocoa_pl.data.processor import Processor
from cocoa_pl.data.sources import PairSource
from cocoa_pl.errors import Interrupted, UserError
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.stages import checkpoint
from tests.adapters import low_rank
from tests.files import Metrics, read_metrics, series
from tests.stages.lab import Lab, Weights, equal, weights_of

STEPS = 5
NAMES = ["pretrain", "warmup", "reconstruct", "contrast"]


class StopAt(L.Callback):
    """Presses Ctrl-C when a step of a run is about to be computed; the first step is 1."""

    def __init__(self, step: int, *, number: int = signal.SIGINT) -> None:
        self.step = step
        self.number = number
        self.seen = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.seen += 1
        if self.seen == self.step:
            os.kill(os.getpid(), self.number)


class PowerCut(Exception):
    """Ends a run without a chance to save anything."""


def fall(*_: Any) -> None:
    raise PowerCut


@dataclass
class FewPairs:
    """A few pairs, to train on and to validate on."""

    training: list[Pair]
    validation: list[Pair]
    caption_subsets: Sequence[str] | None = None

    def train_pairs(self) -> list[Pair]:
        return self.training

    def validation_pairs(self) -> list[Pair]:
        return self.validation


class Whole(NamedTuple):
    """What an uninterrupted run leaves."""

    folder: Path
    weights: Weights
    metrics: Metrics
    lineage: list[dict[str, Any]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, lab: Lab) -> Whole:
    folder, backbone = tmp_path_factory.mktemp("whole"), lab.fresh()
    lineage = lab.train(folder, lab.stages(steps=STEPS), backbone)
    return Whole(folder, weights_of(backbone), read_metrics(folder / "metrics.csv"), lineage)


@pytest.fixture
def go_on(whole: Whole, tmp_path: Path, lab: Lab) -> Callable[..., None]:
    """Resumes the test's run, which then has left what an uninterrupted one leaves, bit by bit."""

    def resume(*, num_workers: int = 0) -> None:
        stages, backbone = lab.stages(steps=STEPS), lab.fresh()
        lineage = lab.train(tmp_path, stages, backbone, resume=True, num_workers=num_workers)
        assert lineage == whole.lineage
        assert read_metrics(tmp_path / "metrics.csv") == whole.metrics
        assert equal(weights_of(backbone), whole.weights)

    return resume


def test_all_four_stages_run_one_after_the_other(whole: Whole) -> None:
    assert [entry["stage"] for entry in whole.lineage] == NAMES
    assert list(dict.fromkeys(stage for stage, *_ in whole.metrics)) == NAMES
    for stage in NAMES:
        steps = [r[1] for r in whole.metrics if r[0] == stage and r[2] == "train/loss"]
        assert steps == list(range(STEPS))
    assert all(entry["validation"] for entry in whole.lineage)
    assert [entry["policy"] for entry in whole.lineage] == [
        "causal",
        "bidirectional",
        "eos_bridge",
        "bidirectional",
    ]


@pytest.mark.parametrize(
    ("stops", "num_workers"),
    [
        ([2, 1], 0),  # in the middle of pretrain, where a validation is due, and again
        pytest.param([STEPS], 1, marks=pytest.mark.slow),  # with its last step
        pytest.param([2 * STEPS + 1], 0, marks=pytest.mark.slow),  # after a step of reconstruct
        pytest.param([4 * STEPS], 0, marks=pytest.mark.slow),  # with the very last step
    ],
)
def test_a_stopped_run_goes_on_bit_by_bit(
    stops: list[int], num_workers: int, tmp_path: Path, go_on: Callable[..., None], lab: Lab
) -> None:
    stages, resume = lab.stages(steps=STEPS), False
    for stop in stops:
        options: dict[str, Any] = {"num_workers": num_workers, "callbacks": [StopAt(stop)]}
        with pytest.raises(Interrupted, match="stopped in"):
            lab.train(tmp_path, stages, resume=resume, **options)
        resume = True
    go_on(num_workers=num_workers)


def test_a_stopped_run_says_where_and_leaves_a_whole_checkpoint(
    tmp_path: Path, go_on: Callable[..., None], lab: Lab
) -> None:
    """In the middle of warmup, where no validation is due."""
    before = signal.getsignal(signal.SIGTERM)
    stop = StopAt(STEPS + 3, number=signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped in warmup at step 3 of 5"):
        lab.train(tmp_path, lab.stages(steps=STEPS), num_workers=1, callbacks=[stop])
    content = checkpoint.read(tmp_path / "checkpoints" / "last.ckpt")
    assert content["global_step"] == 3
    assert content["cocoa"]["stage"] == "warmup"
    assert [entry["stage"] for entry in content["cocoa"]["lineage"]] == ["pretrain"]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    assert signal.getsignal(signal.SIGTERM) is before
    go_on(num_workers=1)


def test_data_that_changed_is_no_data_to_resume_on(tmp_path: Path, lab: Lab) -> None:
    """Whatever the workers have read ahead; a file that is written again as it was is no change."""
    file = tmp_path / "train.jsonl"
    lines = Path(lab.data.place).read_text().splitlines()

    def reading(lines: list[str]) -> PairSource:
        file.write_text("\n".join(lines))
        made = copy(lab.data)
        vars(made).pop("_parts", None)  # it has read nothing yet
        made.place = str(file)
        return made

    stages = lab.stages("stage.order=[contrast]", steps=STEPS)
    stopped: dict[str, Any] = {"num_workers": 2, "callbacks": [StopAt(2)]}
    with pytest.raises(Interrupted):
        lab.train(tmp_path, stages, data=reading(lines), **stopped)
    edited = [lines[0].replace("sofa", "sea"), *lines[1:]]
    other = "as many rows, of other content or in another order"
    for changed, said in (
        (lines[:-1], "13 rows then, 12 now"),
        (lines[::-1], other),
        (edited, other),
    ):
        refused = rf"stage contrast changed .* \({said}\).*init_from=FOLDER"
        with pytest.raises(UserError, match=refused):
            lab.train(tmp_path, stages, data=reading(changed), num_workers=2, resume=True)
    lab.train(tmp_path, stages, data=reading([*lines, ""]), num_workers=2, resume=True)


@pytest.mark.parametrize(
    "step", [4, *(pytest.param(STEPS + n, marks=pytest.mark.slow) for n in (1, 4))]
)
def test_a_crashed_run_goes_on_from_its_last_regular_checkpoint(
    step: int, tmp_path: Path, go_on: Callable[..., None], lab: Lab
) -> None:
    crash = StopAt(step, number=signal.SIGUSR2)
    before = signal.signal(signal.SIGUSR2, fall)
    with pytest.raises(PowerCut):
        lab.train(tmp_path, lab.stages(steps=STEPS), checkpoint_every=2, callbacks=[crash])
    signal.signal(signal.SIGUSR2, before)
    go_on()


def test_a_finished_run_resumes_to_itself(
    whole: Whole, tmp_path: Path, go_on: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole.folder, tmp_path, dirs_exist_ok=True)
    digest = MagicMock(side_effect=checkpoint.digest_of)
    monkeypatch.setattr(checkpoint, "digest_of", digest)
    go_on()
    digest.assert_called_once()  # minutes for a large frozen model


@pytest.mark.slow
def test_dropout_of_adapters_goes_on_too(tmp_path: Path, lab: Lab) -> None:
    adapter = low_rank(alpha=4, dropout=0.5, target_modules=[r".*language_model.*\.(q|k|v|o)_proj"])
    stages = lab.stages("stage.order=[reconstruct,contrast]", steps=STEPS)

    def run(name: str, seed: int, **values: Any) -> Backbone:
        torch.manual_seed(seed)  # an adapter's first values are the caller's
        backbone = adapter(lab.fresh())
        lab.train(tmp_path / name, stages, backbone, **values)
        return backbone

    once = run("once", 0)
    for stop in (3, STEPS + 2):
        folder = f"stopped {stop}"
        with pytest.raises(Interrupted):
            run(folder, 0, callbacks=[StopAt(stop)])
        assert equal(weights_of(run(folder, 1, resume=True)), weights_of(once))
    untrained = weights_of(adapter(lab.fresh()))
    assert not equal(weights_of(once), untrained)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(
    tmp_path: Path, lab: Lab
) -> None:
    stages = lab.stages("stage.order=[contrast]", steps=1)
    assert [entry["steps"] for entry in lab.train(tmp_path, stages, resume=True)] == [1]
    (tmp_path / "checkpoints" / "last.ckpt").unlink()
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=r"there is no checkpoint .*last\.ckpt"):
        lab.train(tmp_path, stages, resume=True)  # it is finished


@pytest.mark.slow
def test_bridge_gain_tells_a_learnt_bridge_from_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lab: Lab
) -> None:
    def gain(name: str, backbone: Backbone, *, lr: float, steps: int) -> float:
        stages = lab.stages(
            "stage.order=[reconstruct]",
            "stage.reconstruct.module.text_ratio=1.0",  # nothing of TARGET is left
            "stage.token_budget=1000",
            "stage.validate_every=500",
            "stage.validation_batch_size=4",
            f"stage.reconstruct.optimization.lr={lr}",
            steps=steps,
        )
        caplog.clear()
        few = lab.data.train_pairs()[:4]
        entry = lab.train(tmp_path / name, stages, backbone, data=FewPairs(few, few))[0]
        found: float = entry["validation"]["bridge_gain"]
        assert f"bridge gain {found:.2f} nats/token" in caplog.text
        assert ("EOS still carries nothing" in caplog.text) == (found < 0.05)
        return found

    caplog.set_level("INFO", logger="cocoa_pl")
    cut = lab.fresh()
    for layer in cut.stock.model.language_model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    assert abs(gain("cut", cut, lr=1e-9, steps=1)) < 1e-4
    assert gain("learnt", lab.fresh(), lr=5e-3, steps=120) > 0.3


def test_a_row_alone_has_no_other_context_and_does_not_count(tmp_path: Path, lab: Lab) -> None:
    """Five rows by two: the last batch has one, whose own loss must not be held against it."""
    gains = []
    for size, count in ((2, 4), (2, 5)):
        stages = lab.stages(
            "stage.order=[reconstruct]",
            f"stage.validation_batch_size={size}",
            "stage.reconstruct.optimization.lr=1e-9",
            steps=1,
        )
        pairs = lab.data.train_pairs()
        few = FewPairs(pairs, pairs[:count])
        entry = lab.train(tmp_path / str(count), stages, data=few)[0]
        gains.append(entry["validation"]["bridge_gain"])
    assert gains[0] == pytest.approx(gains[1], abs=1e-5)


def test_a_gradient_that_is_not_finite_names_its_rows(tmp_path: Path, lab: Lab) -> None:
    backbone = lab.fresh()
    for parameter in backbone.stock.model.language_model.norm.parameters():
        parameter.data.fill_(torch.nan)
    before = {name: w for name, w in weights_of(backbone).items() if w.isfinite().all()}
    with pytest.raises(UserError, match=r"step 0: the gradient is nan; .*train\.jsonl line \d+, "):
        lab.train(tmp_path, lab.stages(), backbone)
    bad = (tmp_path / "bad_batch.txt").read_text().splitlines()
    assert len(bad) == len(set(bad)) == lab.stages()[0].batch_size
    assert all("train.jsonl line " in row_id for row_id in bad)
    after = backbone.state_dict()
    assert before
    assert all(torch.equal(after[name], value) for name, value in before.items())  # not even decay


def test_a_stage_counts_its_steps_or_its_epochs(lab: Lab) -> None:
    for steps, epochs, expected in (("7", "null", 7), ("null", "2", 6), ("null", "0.01", 1)):
        stage = lab.stages(f"stage.warmup.steps={steps}", f"stage.warmup.epochs={epochs}")[1]
        assert stage.count_steps(13) == expected
    with pytest.raises(UserError, match=r"stage warmup: a stream has no length.* give steps"):
        stage.count_steps(None)
    for steps, epochs in (("7", "2"), ("null", "null")):
        with pytest.raises(UserError, match="stage pretrain: give either steps or epochs"):
            lab.stages(f"stage.pretrain.steps={steps}", f"stage.pretrain.epochs={epochs}")


def texts_alike(positives: str, *, queries: str = "abcdefgh") -> FewPairs:
    """Pairs of texts; a capital letter begins a subset of its own."""
    pairs = [
        Pair(Item(query), Item(positive), (), positive if positive.isupper() else "s", query)
        for query, positive in zip(queries, positives, strict=True)
    ]
    return FewPairs(pairs, pairs)


ONLY_CONTRAST = ("stage.order=[contrast]", "stage.validate_every=500")


def test_stages_that_predict_words_refuse_a_model_without_a_vocabulary_head(
    load_tiny: Callable[..., Any], headless_folder: Path, processor: Processor, lab: Lab
) -> None:
    *generative, contrast = lab.stages("stage=recipe")
    assert len(generative) == 3
    backbone = load_tiny(folder=headless_folder).backbone
    assert contrast.make_module(backbone, processor, steps=1, seed=0)
    for stage in generative:
        with pytest.raises(UserError, match="needs a vocabulary head, and the model's files hold"):
            stage.make_module(backbone, processor, steps=1, seed=0)


@pytest.mark.parametrize(
    ("few", "overrides", "message"),
    [
        (texts_alike("pppppppp"), [], "all 8 rows have the same positive, and there are no"),
        (
            texts_alike("pqrstuvw", queries="aaaaaaaa"),
            [],
            "all 8 rows have the same query, and there",
        ),
        (
            texts_alike("pqrstuvw"),
            ["stage.contrast.batch_size=1"],
            "a batch has one row, and there",
        ),
    ],
)
def test_rows_without_a_wrong_answer_are_refused_before_training(
    few: FewPairs, overrides: list[str], message: str, tmp_path: Path, lab: Lab
) -> None:
    with pytest.raises(UserError, match=f"stage contrast: {message}"):
        lab.train(tmp_path, lab.stages(*ONLY_CONTRAST, *overrides), data=few)
    assert not (tmp_path / "metrics.csv").exists()


def test_a_stage_that_has_learnt_nothing_is_no_success(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lab: Lab
) -> None:
    """Each batch is of one subset, and each subset has one answer."""
    overrides = [*ONLY_CONTRAST, "mixing@stage.contrast.mixing=one_subset"]
    stages, few = lab.stages(*overrides, steps=4), texts_alike("PPPPQQQQ")
    stop = StopAt(3)
    with pytest.raises(Interrupted):
        lab.train(tmp_path, stages, data=few, callbacks=[stop])
    with pytest.raises(UserError, match=r"learnt nothing: in all of its steps no query had a neg"):
        lab.train(tmp_path, stages, data=few, resume=True)
    assert [r.message[:31] for r in caplog.records if "said once" in r.message] == [
        "step 0: no query had a negative",
        "step 3: no query had a negative",
    ]
    found = series(tmp_path, "train/accuracy").values()
    assert [math.isnan(value) for value in found] == [True] * 4


def test_validation_without_a_wrong_answer_has_no_precision(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lab: Lab
) -> None:
    caplog.set_level("INFO", logger="cocoa_pl")
    few = texts_alike("pqrstuvw")
    for kept, message in (
        (few.training[:1], "and no query had a negative, so that says nothing"),
        (texts_alike("pppq", queries="abcd").training, "of the 50.0% of queries that had a neg"),
    ):
        few.validation = kept
        stages = lab.stages(*ONLY_CONTRAST, "stage.validation_batch_size=3", steps=1)
        caplog.clear()
        entry = lab.train(tmp_path, stages, data=few)[0]
        assert message in caplog.text
        assert ("accuracy" in entry["validation"]) == (len(kept) > 1)


def test_what_was_not_hidden_has_no_loss(processor: Processor, lab: Lab) -> None:
    stages = lab.stages()
    nothing = dict.fromkeys(("tokens", "loss", "hits", "patches", "errors"), torch.zeros(()))
    for stage, message in (
        (stages[1], "validation: no text was hidden, no image was hidden"),
        (stages[2], "validation: no text was hidden, no other context to measure the bridge gain"),
    ):
        module = stage.make_module(lab.fresh(), processor, steps=1, seed=0)
        assert module.means(nothing) == {}
        assert module.summary_line({}).startswith(message)
