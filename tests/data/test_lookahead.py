"""Threads that work ahead keep the order, a bounded distance, and end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from cocoa_pl.data.item_batches import map_ahead, some_threads


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "item_batches" in thread.name]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert names() == []


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_come_in_the_order_of_the_values(threads: int) -> None:
    def slow_first(value: int) -> int:
        time.sleep(0.02 if value % 4 == 0 else 0)
        return value * value

    with some_threads(threads) as pool:
        found = list(map_ahead(pool, slow_first, range(20), ahead=5))
    assert found == [value * value for value in range(20)]


def test_work_goes_on_ahead_of_use_but_only_so_far() -> None:
    begun: list[int] = []
    with some_threads(2) as pool:
        results = map_ahead(pool, lambda v: begun.append(v), range(100), ahead=5)
        next(results)
        deadline = time.monotonic() + 5
        while len(begun) < 5 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert sorted(begun) == [0, 1, 2, 3, 4]
        next(results)
        deadline = time.monotonic() + 5
        while len(begun) < 6 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert len(begun) == 6


def test_without_threads_nothing_is_computed_before_it_is_needed() -> None:
    begun: list[int] = []
    with some_threads(0) as pool:
        results = map_ahead(pool, lambda v: begun.append(v), range(9), ahead=5)
        next(results)
    assert begun == [0]


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_the_first_value_that_fails_decides_whichever_thread_was_faster(threads: int) -> None:
    def work(value: int) -> int:
        if value == 3:
            time.sleep(0.05)
        if value in (3, 4, 5):
            raise ValueError(str(value))
        return value

    taken: list[int] = []
    with pytest.raises(ValueError, match="3"), some_threads(threads) as pool:  # noqa: PT012
        for result in map_ahead(pool, work, range(50), ahead=10):
            taken.append(result)
    assert taken == [0, 1, 2]


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
