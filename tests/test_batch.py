"""Packing, cutting and putting together again."""

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from cocoa_pl.batch import Batch, Encoded, cut_by_cost, pack

IMAGES = (1, 0, 2, 0, 1)
MakeSamples = Callable[..., list[Encoded]]


@pytest.fixture
def samples(make_samples: MakeSamples) -> list[Encoded]:
    return make_samples(IMAGES, targets=True)


def fields_equal(first: Batch, second: Batch) -> bool:
    pairs = [
        (getattr(first, field.name), getattr(second, field.name))
        for field in dataclasses.fields(Batch)
    ]
    return all(
        torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else a == b
        for a, b in pairs
    )


def cut(batch: Batch, token_budget: int) -> list[Tensor]:
    return cut_by_cost(batch.lengths, batch.costs, token_budget)


def text_sample(tokens: int, *, name: str = "toy") -> Encoded:
    return Encoded(
        input_ids=torch.arange(tokens),
        position_ids=torch.arange(tokens).expand(3, -1),
        text_mask=torch.ones(tokens, dtype=torch.bool),
        image_mask=torch.zeros(tokens, dtype=torch.bool),
        segment_lengths=(tokens - 1, 1, 0),
        patches=torch.empty(0, 12, dtype=torch.uint8),
        grids=torch.empty(0, 3, dtype=torch.int64),
        key=0,
        seed=0,
        row_id=name,
    )


def test_pack_lays_samples_end_to_end(samples: list[Encoded]) -> None:
    batch = pack(samples)
    assert batch.num_samples == len(samples)
    assert batch.num_tokens == sum(len(s.input_ids) for s in samples)
    assert batch.lengths.tolist() == [len(s.input_ids) for s in samples]
    assert batch.input_ids.tolist() == [i for s in samples for i in s.input_ids.tolist()]
    assert torch.equal(batch.position_ids, torch.cat([s.position_ids for s in samples], dim=1))
    assert batch.images_per_sample.tolist() == list(IMAGES)
    assert batch.patches_per_sample.tolist() == [len(s.patches) for s in samples]
    assert batch.keys.tolist() == [s.key for s in samples]
    assert batch.seeds.tolist() == [s.seed for s in samples]
    assert batch.row_ids == tuple(s.row_id for s in samples)
    assert batch.patches.dtype == torch.uint8


def test_visual_tokens_and_patches_are_counted_alike(samples: list[Encoded]) -> None:
    batch = pack(samples)
    assert len(batch.patches) == 4 * int(batch.image_mask.sum())
    assert not (batch.image_mask & batch.text_mask).any()


def test_eos_positions_are_where_the_end_token_was_written(samples: list[Encoded]) -> None:
    batch = pack(samples)
    starts = [sum(batch.lengths.tolist()[:i]) for i in range(len(samples))]
    expected = [start + s.segment_lengths[0] for start, s in zip(starts, samples, strict=True)]
    assert batch.eos_positions.tolist() == expected
    assert len(batch.input_ids[batch.eos_positions].unique()) == 1


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (0, 1), (1, 2), (2, 5), (3, 4), (1, 4)])
def test_selected_samples_are_those_packed_alone(
    start: int, stop: int, samples: list[Encoded]
) -> None:
    assert fields_equal(pack(samples).select(start, stop), pack(samples[start:stop]))


def test_selection_copies_nothing(samples: list[Encoded]) -> None:
    batch = pack(samples)
    piece = batch.select(2, 4)
    for name in ("input_ids", "position_ids", "text_mask", "patches"):
        whole, part = getattr(batch, name), getattr(piece, name)
        assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


@pytest.mark.parametrize("order", [[0], [4, 2], [3, 3, 0, 1], [4, 3, 2, 1, 0], []])
def test_taken_samples_are_those_packed_in_that_order(
    order: list[int], samples: list[Encoded]
) -> None:
    taken = pack(samples).take(torch.tensor(order, dtype=torch.int64))
    if order:
        assert fields_equal(taken, pack([samples[place] for place in order]))
    else:
        assert taken.num_samples == taken.num_tokens == len(taken.patches) == len(taken.grids) == 0


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        ([4, 4, 4, 4], 8, [[0, 1], [2, 3]]),
        ([4, 4, 4, 4], 9, [[0, 1], [2, 3]]),
        ([4, 4, 4, 4], 7, [[0], [1], [2], [3]]),
        ([4, 4, 4, 4], 16, [[0, 1, 2, 3]]),
        ([20, 2, 2], 8, [[0], [1, 2]]),
        ([2, 20, 2, 2], 8, [[1], [0, 2, 3]]),
        ([2, 3, 20, 5], 8, [[2], [3, 1], [0]]),
        ([3], 2, [[0]]),
    ],
)
def test_pieces_hold_the_dearest_first_and_never_exceed_the_token_budget(
    lengths: Sequence[int], budget: int, expected: list[list[int]]
) -> None:
    pieces = cut(pack([text_sample(n) for n in lengths]), budget)
    assert [piece.tolist() for piece in pieces] == expected


@pytest.mark.parametrize("budget", [1, 10, 20, 40, 10_000])
def test_pieces_hold_every_sample_once(budget: int, samples: list[Encoded]) -> None:
    pieces = cut(pack(samples), budget)
    assert torch.cat(pieces).sort().values.tolist() == list(range(len(samples)))
    assert all(len(piece) for piece in pieces)


def test_an_image_is_dearer_than_a_text_of_as_many_tokens(samples: list[Encoded]) -> None:
    picture = samples[0]
    text = text_sample(len(picture.input_ids) + 1)
    text = dataclasses.replace(text, patches=torch.empty(0, picture.patches.shape[1]).byte())
    (piece,) = cut(pack([text, picture]), 1000)
    assert piece.tolist() == [1, 0]


def test_sorted_pieces_are_fuller_and_alike() -> None:
    """Rows of a pair are a long and a short sample; beside each other they would fill a piece."""
    batch = pack([text_sample(n) for n in [300, 20] * 32])
    pieces = cut(batch, 1000)
    assert len(pieces) == 11 + 1
    assert sum(len(batch.lengths[piece].unique()) > 1 for piece in pieces) == 1


def test_bookkeeping_stays_on_the_host_when_the_batch_moves(samples: list[Encoded]) -> None:
    moved = pack(samples).to("meta")
    on_host = ("segment_lengths", "grids", "images_per_sample")
    for field in dataclasses.fields(Batch):
        value = getattr(moved, field.name)
        if isinstance(value, Tensor):
            assert value.device.type == ("cpu" if field.name in on_host else "meta"), field.name
