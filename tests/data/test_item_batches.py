"""Items in batches of similar cost, without decoding them first."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cocoa_pl.data import processor as processing
from cocoa_pl.data.batch import Sample
from cocoa_pl.data.images import open_image
from cocoa_pl.data.item_batches import item_batches, map_ahead, some_threads
from cocoa_pl.data.items import IMAGE_SLOT, Item
from cocoa_pl.data.processor import Processor
from cocoa_pl.errors import UserError

MakeItem = Callable[..., Item]
Batches = list[tuple[np.ndarray, list[Sample]]]


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


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_batches_are_full_sorted_by_cost_and_the_same_for_any_number_of_threads(
    batch_tokens: int, items: list[Item], processor: Processor
) -> None:
    one, many = (
        batches_of(items, processor, batch_tokens=batch_tokens, threads=threads)
        for threads in (0, 3)
    )
    assert [n.tolist() for n, _ in one] == [n.tolist() for n, _ in many]
    for numbers, samples in one:
        assert [s.row_id for s in samples] == [f"item {number}" for number in numbers]
        assert sum(s.num_tokens for s in samples) <= batch_tokens or len(samples) == 1
    costs = [sample.cost for _, samples in one for sample in samples]
    assert costs == sorted(costs, reverse=True)


def test_no_picture_is_decoded_to_measure_it(
    items: list[Item], processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr(
        processing,
        "open_image",
        lambda source: (opened.append(source), open_image(source))[1],
    )
    get = items.__getitem__
    batches = item_batches(len(items), get, processor, list, batch_tokens=60, threads=0)
    numbers, _ = next(batches)
    assert opened == [image for number in numbers for image in items[number].media]
    batches.close()


def test_the_same_bad_item_is_named_for_any_number_of_threads(
    items: list[Item], processor: Processor, tmp_path: Path, make_image: Callable[..., Image.Image]
) -> None:
    whole = io.BytesIO()
    make_image((56, 56)).save(whole, "PNG")
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.getvalue()[:-400])  # its header is whole
    bad = [Item(IMAGE_SLOT, (image,)) for image in (cut, tmp_path / "none.png", b"no picture")]
    given = [*items[:9], bad[0], *items[9:20], bad[1], *items[20:], bad[2], bad[1]]
    messages = set()
    for threads in (0, 1, 4):
        with pytest.raises(UserError) as error:
            batches_of(given, processor, threads=threads)
        messages.add(str(error.value))
    assert messages == {
        f"item 21: image {tmp_path / 'none.png'} does not exist; check the path and the image root"
    }
    with pytest.raises(UserError, match=r"item 9: image .*cut\.png cannot be read"):
        batches_of([*items[:9], bad[0], *items[9:20]], processor, threads=4)


# --- Threads that work ahead ------------------------------------------------------------------


def test_work_goes_on_ahead_of_use_but_only_so_far() -> None:
    begun: list[int] = []
    with some_threads(2) as pool:
        results = map_ahead(pool, lambda v: begun.append(v), range(100), ahead=5)
        for expected in (5, 6):
            next(results)
            deadline = time.monotonic() + 5
            while len(begun) < expected and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.05)
            assert sorted(begun) == list(range(expected))


def test_two_maps_one_feeding_the_other_share_the_threads() -> None:
    with some_threads(1) as pool:
        doubled = map_ahead(pool, lambda v: 2 * v, range(30), ahead=4)
        assert list(map_ahead(pool, lambda v: v + 1, doubled, ahead=3)) == list(range(1, 61, 2))


def test_what_has_not_begun_when_the_block_is_left_never_does() -> None:
    begun: list[int] = []

    def work(value: int) -> None:
        begun.append(value)
        time.sleep(0.02)

    with pytest.raises(KeyboardInterrupt), some_threads(1) as pool:  # noqa: PT012
        next(map_ahead(pool, work, range(50), ahead=20))
        raise KeyboardInterrupt
    assert len(begun) < 5
