"""Alternating runs, the ratio within pairs, and its interval."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from benchmarks.timing import Pairs, Sample, alternate, median_and_interval

CPU = torch.device("cpu")


def test_runs_alternate_peer_ours_ours_peer() -> None:
    order: list[str] = []
    found = alternate(
        lambda: order.append("peer"),
        lambda: order.append("ours"),
        device=CPU,
        seconds=0,
        min_pairs=4,
    )
    assert order == ["peer", "ours", "ours", "peer"] * 2
    assert len(found.peer) == len(found.ours) == 4


def test_time_ends_the_pairs_but_not_before_the_least_number() -> None:
    def slow() -> None:
        time.sleep(0.01)

    few = alternate(slow, slow, device=CPU, seconds=0.001, min_pairs=3)
    assert len(few.ours) == 3
    many = alternate(slow, slow, device=CPU, seconds=60, min_pairs=1, max_pairs=5)
    assert len(many.ours) == 5


def test_one_function_may_stand_on_both_sides() -> None:
    count = [0]

    def run() -> None:
        count[0] += 1

    found = alternate(run, run, device=CPU, seconds=0, min_pairs=6)
    assert count == [12]
    assert len(found.peer) == len(found.ours) == 6


def test_the_ratio_is_taken_within_pairs() -> None:
    """While the machine is slow, both are: the ratio of medians would be 1.5 here."""
    peer = tuple(Sample(wall, cpu=1.0) for wall in (2.0, 3.0, 20.0))
    ours = tuple(Sample(wall, cpu=0.5) for wall in (1.0, 2.0, 10.0))
    found = Pairs(peer, ours)
    assert found.ratios == [2.0, 1.5, 2.0]
    assert found.cpu_ratios == [2.0, 2.0, 2.0]
    assert median_and_interval(found.ratios)[0] == 2.0


def test_the_interval_holds_the_median_and_narrows_with_more_pairs() -> None:
    draws = np.random.default_rng(0).normal(10, 1, size=400)
    widths = []
    for count in (10, 400):
        median, (low, high) = median_and_interval(draws[:count].tolist())
        assert low <= median <= high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2
    assert median_and_interval([3.0] * 9) == (3.0, (3.0, 3.0))


def test_processor_time_does_not_count_sleep() -> None:
    found = alternate(
        lambda: time.sleep(0.02), lambda: time.sleep(0.02), device=CPU, seconds=0, min_pairs=1
    )
    assert found.ours[0].wall == pytest.approx(0.02, rel=0.9)
    assert found.ours[0].cpu < found.ours[0].wall
