"""Batches of streams: shared by ranks and workers, and exactly resumable under Lightning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cocoa_pl.batch import Rows
from cocoa_pl.config.build import register_resolvers
from cocoa_pl.config.command_line import CONFIGS
from cocoa_pl.data.datamodule import Encoder, StageData, check_mixing, collate
from cocoa_pl.data.examples import PairExamples
from cocoa_pl.data.sampler import Mixing
from cocoa_pl.data.stream import StreamData
from cocoa_pl.data.stream_loader import LaneState, StreamBatches, Streamed
from cocoa_pl.data.tokenize import Processor
from cocoa_pl.errors import UserError
from cocoa_pl.run import build_stages

MakeStream = Callable[..., StreamData]
Names = tuple[str, ...]


def mixing(**changes: Any) -> Mixing:
    values: dict[str, Any] = {
        "composition": "shuffled",
        "sub_batches": None,
        "exponent": 1.0,
        "weights": None,
    }
    return Mixing(**(values | changes))


SHUFFLED = mixing()
ONE_SUBSET = mixing(composition="one_subset")
INTERLEAVED = mixing(composition="interleaved", sub_batches=2)


def as_they_are(rows: Rows) -> Rows:
    """What a stage would make of rows."""
    return rows


def loaded(data: StageData) -> list[Rows]:
    return [streamed.batch.content for streamed in data.train_dataloader()]


def stage_data(source: StreamData, processor: Processor, **changes: Any) -> StageData:
    values: dict[str, Any] = {
        "make_samples": PairExamples(max_negatives=0),
        "mixing": INTERLEAVED,
        "batch_size": 4,
        "validation_batch_size": 3,
        "steps": 12,
        "start_step": 0,
        "seed": 0,
        "num_workers": 0,
        "on_bad_row": "fail",
        "pinned": False,
        "prepare": as_they_are,
        "prepare_validation": as_they_are,
    }
    return StageData(
        source.train_pairs(),
        source.validation_pairs(),
        processor=processor,
        **(values | changes),
    )


def subsets_of(rows: Rows) -> list[str]:
    return [name[0] for name in rows.batch.row_ids[: rows.num_rows]]


def keys_of(rows: Rows) -> list[int]:
    """What was read, whatever the reader's name: keys of the queries."""
    return rows.batch.keys[: rows.num_rows].tolist()


# --- Composition -----------------------------------------------------------------------------


def test_batches_are_composed_as_the_mixing_says(
    make_stream: MakeStream, processor: Processor
) -> None:
    source = make_stream(subsets=["A", "B", "E"])
    for chosen, size in ((ONE_SUBSET, 4), (INTERLEAVED, 2)):
        batches = loaded(stage_data(source, processor, mixing=chosen, steps=20))
        runs = [
            subsets_of(rows)[start : start + size]
            for rows in batches
            for start in range(0, 4, size)
        ]
        assert all(len(set(run)) == 1 for run in runs)
        assert {run[0] for run in runs} == {"A", "B", "E"}


def test_weights_decide_where_sizes_are_unknown(
    make_stream: MakeStream, processor: Processor
) -> None:
    def count(*, rows: dict[str, int] | None = None, **changes: Any) -> list[int]:
        source = make_stream(rows=rows)
        data = stage_data(source, processor, batch_size=32, mixing=mixing(**changes), steps=32)
        drawn = data.train_dataloader().dataset.subsets.ravel().tolist()
        return [drawn.count(0), drawn.count(1)]

    assert count() == [512, 512]
    assert count(weights={"B": 3}) == [256, 768]
    assert abs(count(rows={"A": 23, "B": 17})[0] - 1024 * 23 / 40) <= 1


def batches(
    source: StreamData,
    processor: Processor,
    *,
    rank: int,
    world_size: int,
    start_step: int = 0,
    states: list[LaneState | None] | None = None,
) -> list[Streamed]:
    """A rank's batches in this process, as if it had one worker."""
    return list(
        StreamBatches(
            source.train_pairs(),
            INTERLEAVED,
            Encoder(PairExamples(max_negatives=0), processor, on_bad_row="fail"),
            collate,
            batch_size=4,
            steps=10,
            start_step=start_step,
            seed=0,
            on_bad_row="fail",
            rank=rank,
            world_size=world_size,
            lanes=1,
            states=states or [None],
        )
    )


def test_ranks_read_other_rows_of_the_same_subsets(
    make_stream: MakeStream, processor: Processor
) -> None:
    shares = [batches(make_stream(), processor, rank=rank, world_size=2) for rank in (0, 1)]
    for mine, others in zip(*shares, strict=True):
        assert mine.batch.num_rows == others.batch.num_rows == 2
        assert Counter(subsets_of(mine.batch)) == Counter(subsets_of(others.batch))
    seen = [Counter(key for one in share for key in keys_of(one.batch)) for share in shares]
    assert not set(seen[0]) & set(seen[1])


def test_each_of_two_ranks_resumes_where_it_stood(
    make_stream: MakeStream, processor: Processor
) -> None:
    for rank in (0, 1):
        whole = batches(make_stream(), processor, rank=rank, world_size=2)
        resumed = batches(
            make_stream(),
            processor,
            rank=rank,
            world_size=2,
            start_step=4,
            states=[whole[3].state],
        )
        found, wanted = ([one.batch for one in part] for part in (resumed, whole[4:]))
        assert [rows.batch.row_ids for rows in found] == [r.batch.row_ids for r in wanted]
        assert [keys_of(rows) for rows in found] == [keys_of(rows) for rows in wanted]


def test_ranks_that_cannot_share_a_batch_are_refused(
    make_stream: MakeStream, processor: Processor
) -> None:
    with pytest.raises(UserError, match="a batch of 4 cannot be shared by 3 ranks"):
        batches(make_stream(), processor, rank=0, world_size=3)


def test_bad_row_stops_the_run_or_leaves_the_batch(
    make_stream: MakeStream, processor: Processor, tmp_path: Path
) -> None:
    """Images that are not below the root are missing: all rows of A and B, none of E."""
    source = make_stream(image_root=str(tmp_path), subsets=["A", "E"])
    with pytest.raises(UserError, match=r"A \(streamed, .*\.png does not exist"):
        list(stage_data(source, processor, mixing=SHUFFLED).train_dataloader())
    skipping = stage_data(
        source, processor, mixing=SHUFFLED, batch_size=16, steps=2, on_bad_row="skip"
    )
    for rows in loaded(skipping):
        assert set(subsets_of(rows)) == {"E"}
        assert rows.num_rows + len(rows.skipped) == 16
        assert len(rows.skipped) > 2


# --- Resuming under Lightning ----------------------------------------------------------------


class Recorder(L.LightningModule):
    """Trains one number and writes down the batches it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[Names, list[int], list[int]]] = []

    def training_step(self, rows: Rows, batch_idx: int) -> Tensor:
        self.seen.append((rows.batch.row_ids, rows.batch.seeds.tolist(), keys_of(rows)))
        return self.weight.sum()

    def validation_step(self, rows: Rows, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: StageData, steps: int, *, folder: Path, resume: Path | None = None) -> Recorder:
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    module = Recorder()
    trainer.fit(module, data, ckpt_path=resume)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("num_workers", "stop"), [(0, 3), (0, 6), (2, 3)])
def test_interrupted_run_trains_on_the_same_rows_as_a_whole_one(
    make_stream: MakeStream, processor: Processor, tmp_path: Path, num_workers: int, stop: int
) -> None:
    """The loader reads ahead (two batches a worker, and Lightning one): that must not count."""

    def data(**changes: Any) -> StageData:
        source = make_stream(subsets=["A", "B", "E"], validation_rows=3)
        return stage_data(source, processor, num_workers=num_workers, **changes)

    whole = fit(data(), 12, folder=tmp_path).seen
    first = fit(data(), stop, folder=tmp_path).seen
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert len(content["StageData"]["lanes_of_ranks"][0]) == max(1, num_workers)
    rest = fit(data(start_step=stop), 12, folder=tmp_path, resume=tmp_path / "last.ckpt").seen
    assert len(whole) == 12
    assert first + rest == whole


@pytest.mark.filterwarnings("ignore")
def test_other_numbers_of_workers_or_ranks_are_refused(
    make_stream: MakeStream, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = stage_data(make_stream(), processor, num_workers=2).state_dict()
    stage_data(make_stream(), processor, num_workers=2).load_state_dict(state)
    with pytest.raises(
        UserError, match=r"1 ranks x 2 workers and cannot go on with 1 x 1; .* num_workers=2"
    ):
        stage_data(make_stream(), processor, num_workers=1).load_state_dict(state)
    monkeypatch.setattr("cocoa_pl.data.datamodule.world_size", lambda: 4)
    with pytest.raises(UserError, match="with 4 x 2"):
        stage_data(make_stream(), processor, num_workers=2).load_state_dict(state)


def test_data_that_need_no_state_keep_none(make_stream: MakeStream, processor: Processor) -> None:
    pairs = make_stream(validation_rows=8).validation_pairs()
    data = StageData(
        pairs,
        pairs,
        make_samples=PairExamples(max_negatives=0),
        processor=processor,
        mixing=SHUFFLED,
        batch_size=4,
        validation_batch_size=4,
        steps=2,
        start_step=0,
        seed=0,
        num_workers=0,
        on_bad_row="fail",
        pinned=False,
        prepare=as_they_are,
        prepare_validation=as_they_are,
    )
    assert data.state_dict() == {}
    assert isinstance(data.train_dataloader(), DataLoader)


# --- Before the first stage begins -----------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"C": 1}}, "mixing.weights names C, but the stage's data has A, B"),
        ({"composition": "interleaved", "sub_batches": 3}, "cannot be cut into 3 equal"),
    ],
)
def test_mixing_that_does_not_fit_is_told_of_pairs_and_of_streams(
    make_stream: MakeStream, changes: dict[str, Any], message: str
) -> None:
    source = make_stream(validation_rows=5)
    for train in (source.train_pairs(), source.validation_pairs()):
        check_mixing(train, INTERLEAVED, batch_size=4)
        with pytest.raises(UserError, match=message):
            check_mixing(train, mixing(**changes), batch_size=4)


def test_epochs_of_a_stream_cannot_be_counted() -> None:
    register_resolvers()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", overrides=["stage=reconstruct", "schedule=paper"])
    (stage,) = build_stages(cfg)
    assert stage.count_steps(6400) == 200
    with pytest.raises(UserError, match=r"stage reconstruct: a stream has no length.* give steps"):
        stage.count_steps(None)
