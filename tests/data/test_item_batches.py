"""Items cut into batches by what they cost, without decoding them first."""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cocoa_pl.batch import Encoded, cut_by_cost
from cocoa_pl.data import item_batches as module
from cocoa_pl.data import tokenize
from cocoa_pl.data.images import image_size, open_image
from cocoa_pl.data.item_batches import item_batches
from cocoa_pl.data.items import IMAGE_SLOT, Item
from cocoa_pl.data.tokenize import Processor
from cocoa_pl.errors import UserError

MakeItem = Callable[..., Item]
Batches = list[tuple[np.ndarray, list[Encoded]]]


@pytest.fixture(scope="module")
def items(make_item: MakeItem) -> list[Item]:
    return [make_item(seed, images=seed % 3) for seed in range(40)]


def batches_of(
    items: Sequence[Item], processor: Processor, *, batch_tokens: int = 60, threads: int = 0
) -> Batches:
    return list(
        item_batches(
            len(items),
            items.__getitem__,
            processor,
            list,
            batch_tokens=batch_tokens,
            threads=threads,
        )
    )


@pytest.mark.parametrize("threads", [0, 1, 4])
@pytest.mark.parametrize("window", [256, 4096])
def test_each_item_is_in_one_batch_with_its_own_sample(
    window: int,
    threads: int,
    items: list[Item],
    processor: Processor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_MEASURED_AT_ONCE", 7)
    monkeypatch.setattr(module, "WINDOW", window // 16)
    batches = batches_of(items, processor, threads=threads)
    numbers = np.concatenate([numbers for numbers, _ in batches])
    assert sorted(numbers.tolist()) == list(range(len(items)))
    for numbers, samples in batches:
        for number, sample in zip(numbers.tolist(), samples, strict=True):
            alone = processor.encode(items[number], None, key=0, seed=0, row_id=f"item {number}")
            assert sample.row_id == alone.row_id
            assert sample.input_ids.equal(alone.input_ids)
            assert sample.patches.equal(alone.patches)


def test_batches_are_the_same_for_any_number_of_threads(
    items: list[Item], processor: Processor
) -> None:
    one, many = (
        [numbers.tolist() for numbers, _ in batches_of(items, processor, threads=threads)]
        for threads in (0, 3)
    )
    assert one == many


@pytest.mark.parametrize("batch_tokens", [1, 40, 60, 10_000])
def test_a_batch_is_within_its_tokens_or_a_single_item(
    batch_tokens: int, items: list[Item], processor: Processor
) -> None:
    for _, samples in batches_of(items, processor, batch_tokens=batch_tokens):
        tokens = sum(len(sample.input_ids) for sample in samples)
        assert tokens <= batch_tokens or len(samples) == 1


def test_measures_are_the_tokens_that_encoding_finds(
    items: list[Item], make_processor: Callable[..., Processor]
) -> None:
    for max_length in (128, 60):  # some are cut at 60
        processor = make_processor(max_length=max_length)
        lengths = set()
        for number, item in enumerate(items):
            try:
                sample = processor.encode(item, None, key=0, seed=0, row_id="toy")
            except UserError:
                continue
            measure = module._measure(items.__getitem__, number, processor)
            assert measure.tokens == len(sample.input_ids)
            visual = int(sample.image_mask.sum())
            assert measure.cost == measure.tokens + module.VISUAL_TOKEN_COST * visual
            lengths.add(measure.tokens)
        assert len(lengths) > 5


def test_the_dearest_come_first_and_equals_keep_their_order() -> None:
    """An item that cannot be measured is infinitely dear."""
    tokens, costs = torch.tensor([3, 2, 3, 0, 4]), torch.tensor([3, 9, 3, math.inf, 4])
    for budget, expected in ((7, [[3, 1, 4], [0, 2]]), (1, [[3], [1], [4], [0], [2]])):
        assert [part.tolist() for part in cut_by_cost(tokens, costs, budget)] == expected


def test_neighbours_cost_alike(items: list[Item], processor: Processor) -> None:
    costs = [
        [len(sample.input_ids) + module.VISUAL_TOKEN_COST * int(sample.image_mask.sum())
         for sample in samples]
        for _, samples in batches_of(items, processor)
    ]  # fmt: skip
    flat = [cost for batch in costs for cost in batch]
    assert flat == sorted(flat, reverse=True)


def test_no_picture_is_decoded_to_measure_it(
    items: list[Item], processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr(
        tokenize,
        "open_image",
        lambda s, where: (opened.append(where), open_image(s, where=where))[1],
    )
    batches = item_batches(
        len(items), items.__getitem__, processor, list, batch_tokens=60, threads=0
    )
    numbers, _ = next(batches)
    assert set(opened) == {f"item {number}" for number in numbers if items[number].media}
    batches.close()


def test_only_a_few_batches_exist_at_once(items: list[Item], processor: Processor) -> None:
    many = items * 20
    alive, most, lock = 0, 0, threading.Lock()

    def lay_out(samples: list[Encoded]) -> int:
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)
        return len(samples)

    batches = item_batches(
        len(many), many.__getitem__, processor, lay_out, batch_tokens=100, threads=3
    )
    count = 0
    for numbers, size in batches:
        assert len(numbers) == size
        count += 1
        with lock:
            alive -= 1
    assert count > 50
    assert most <= 3 + 2 + 1


def test_the_same_bad_item_is_told_for_any_number_of_threads(
    items: list[Item], processor: Processor, tmp_path: Path, make_image: Callable[..., Image.Image]
) -> None:
    whole = io.BytesIO()
    make_image((56, 56)).save(whole, "PNG")
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.getvalue()[:-400])  # its header is whole
    bad = [Item(IMAGE_SLOT, (image,)) for image in (cut, tmp_path / "none.png", b"no picture")]
    given = [*items[:9], bad[0], *items[9:20], bad[1], *items[20:], bad[2], bad[1]]
    told = set()
    for threads in (0, 1, 4):
        with pytest.raises(UserError) as error:
            batches_of(given, processor, threads=threads)
        told.add(str(error.value))
    assert told == {
        f"item 21: image {tmp_path / 'none.png'} does not exist; check the path and the image root"
    }
    with pytest.raises(UserError, match=r"item 9: image .*cut\.png cannot be read"):
        batches_of([*items[:9], bad[0], *items[9:20]], processor, threads=4)


@pytest.mark.parametrize("kind", ["path", "bytes", "opened"])
def test_a_size_is_read_from_the_header(
    kind: str, tmp_path: Path, make_image: Callable[..., Image.Image]
) -> None:
    image = make_image((70, 40))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    half = buffer.getvalue()[: len(buffer.getvalue()) // 2]  # pixels are cut off
    (tmp_path / "half.png").write_bytes(half)
    source = {"path": tmp_path / "half.png", "bytes": half, "opened": image}[kind]
    assert image_size(source, where="toy") == (70, 40)


def test_a_header_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"toy: image .*none\.png cannot be read"):
        image_size(tmp_path / "none.png", where="toy")
    with pytest.raises(UserError, match=r"toy: .* cannot be read"):
        image_size(b"no picture", where="toy")
    with pytest.raises(UserError, match=r"toy: .* is 1000 x 2 pixels"):
        image_size(Image.new("RGB", (1000, 2)), where="toy")
