"""What all tests share: one compute thread each, and GPU tests skipped where there is no GPU."""

import os

# Before torch is imported, and for the processes that tests start. Tests compute on small tensors,
# where threads cost more than they bring; one thread gives the same bits on every machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without CUDA, `-m gpu` skips with a reason instead of failing one by one."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
