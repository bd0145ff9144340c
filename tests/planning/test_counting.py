"""What is counted of operations: by hand where it can be worked out by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cocoa_pl.planning.counting import ACTIVATIONS, HOST_VALUES, Call, Count, Counting, count


def test_operations_bytes_and_kernels_by_operator() -> None:
    a, b, table = torch.ones(4, 8), torch.ones(8, 16), torch.ones(100, 4)
    rows = torch.tensor([3, 3, 7])

    def run() -> None:
        product = a @ b  # 2 x 4 x 8 x 16 operations; reads a and b, writes 4 x 16
        product.t().reshape(16, 4).add_(1.0)  # a view costs nothing; reads and writes 16 x 4
        table.index_select(0, rows)  # reads three rows of a hundred, and their numbers
        a[:1].expand(4, 8) + a  # a row that stands for four is there once

    found = count(run).by_operator()
    assert found == {
        "aten.mm": (1024, 4 * (32 + 128 + 64), 1),
        "aten.add_": (0, 4 * (64 + 64), 1),
        "aten.index_select": (0, 4 * (12 + 12) + 8 * 3, 1),
        "aten.add": (0, 4 * (8 + 32 + 32), 1),
    }
    assert count(run).total == (1024, sum(bytes for _, bytes, _ in found.values()), 4)


def test_what_is_written_over_is_not_read() -> None:
    a, b = torch.ones(10), torch.ones(10)
    assert count(lambda: a.copy_(b)).total.bytes == 80
    assert count(lambda: a.zero_()).total.bytes == 40
    assert count(lambda: a.mul_(b)).total.bytes == 120


def test_packed_attention_costs_its_segments_without_values_too() -> None:
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    with FakeTensorMode() as fake:
        q, k, v = (torch.empty(12, 2, 16, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
        there = fake.from_tensor(bounds)
        setattr(there, HOST_VALUES, np.array([0, 5, 12]))

        def run() -> None:
            out = torch.ops.torch_attn._varlen_attn(q, k, v, there, there, 7, 7)[0]
            out.sum().backward()

        found = count(run).by_operator()
    scores = 5 * 5 + 7 * 7
    assert found["torch_attn._varlen_attn"].flops == 4 * scores * 2 * 16
    assert found["torch_attn._varlen_attn_backward"].flops == 10 * scores * 2 * 16


def test_bytes_alive_by_kind() -> None:
    weight = torch.ones(100)
    with Counting() as counting:
        counting.hold([weight], "weights")
        first = weight * 2
        second = first * 2
        del first  # before the peak
        third = torch.ones(300)
        counting.hold([second], "other")
        fourth = second[:50]  # a view
        del third, second, fourth
        torch.ones(10)
    assert counting.result.peak == {"weights": 400, ACTIVATIONS: 400 + 1200}
    assert counting.highest == 1600
    assert counting.alive == {"weights": 400, ACTIVATIONS: 0, "other": 0}


def test_an_operation_takes_as_long_as_its_numbers_or_its_bytes() -> None:
    calls = Counter(
        {
            Call("aten.mm", "bfloat16", 8 * 10**12, 10**12): 3,  # 2 s of computing, 1 s of bytes
            Call("aten.mm", "float32", 10**12, 10**12): 1,  # 5 s of computing
            Call("aten.add", "bfloat16", 0, 4 * 10**12): 1,  # 4 s of bytes
        }
    )
    found = Count(calls, {}, 0).seconds({"bfloat16": 4.0, "float32": 0.2}, 1.0)
    assert found == pytest.approx(3 * 2 + 5 + 4)
