"""The model whole on every process, without a wrapper around it.

DistributedDataParallel would reduce gradients once for each chunk, average them, wait for unused
parameters, and keep buckets as large as the parameters. Here a step adds gradients up once, when it
has them all (`distributed.sum_gradients`).
"""

from __future__ import annotations

from datetime import timedelta
from itertools import chain

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

STRATEGY = "replicated"  # its name in trainer configs; each stage gets a fresh one


class Replicated(DDPStrategy):
    """Lightning's DDP with its launching of processes, and nothing around the module.

    Args:
        timeout_minutes: how long a process waits for the others in one exchange.
    """

    def __init__(self, *, timeout_minutes: float) -> None:
        super().__init__(timeout=timedelta(minutes=timeout_minutes))

    def configure_ddp(self) -> None:
        """Instead of wrapping: all processes start from rank 0's values."""
        assert self.model is not None
        for value in chain(self.model.parameters(), self.model.buffers()):
            dist.broadcast(value.detach(), src=0)


StrategyRegistry.register(
    STRATEGY, Replicated, description="the model whole on every process", timeout_minutes=30
)
