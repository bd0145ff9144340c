"""How a model lies on several processes: whole on each, or split over all of them.

Replicated: DistributedDataParallel would reduce gradients once for each chunk, average them, wait
for unused parameters, and keep buckets as large as the parameters. Here a step adds gradients up
once, when it has them all (`collectives.sum_gradients`).

Fully sharded (FSDP2): weights, gradients and optimizer state are split block by block. A block's
weights are gathered while it runs and its gradients are reduced at once, so a process never holds
more than its share and one block (torch.distributed.fsdp.fully_shard; ZeRO, arXiv 1910.02054, stage
3). Checkpoints are folders, to which every process writes its share.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from cocoa_pl.errors import UserError, first_line

# Lightning's names. META is all that is not a tensor of the model or the optimizer.
META, MODEL, OPTIMIZER = "meta.pt", "state_dict", "optimizer_0"
TIMEOUT = timedelta(minutes=30)  # for which a process waits for the others in one exchange


class Replicated(DDPStrategy):
    """Lightning's DDP with its launching of processes, and nothing around the module."""

    def configure_ddp(self) -> None:
        """Give all processes rank 0's values, instead of wrapping the module."""
        assert self.model is not None
        for value in chain(self.model.parameters(), self.model.buffers()):
            dist.broadcast(value.detach(), src=0)


class FullySharded(ModelParallelStrategy):
    """Lightning's strategy for FSDP2 over all processes of a job.

    Checkpoints hold what trains and nothing else, as on one process, and load on any number of
    processes.
    """

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's shares of the trained parameters."""
        assert self.model is not None
        reshard(self.model)
        return dict(trained_state(self.model))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: Any = None) -> dict[str, Any]:
        """Load what both have; the caller compares the names and refuses what does not match.

        Of the optimizer that is the state of the parameters that had one: AdamW makes it at the
        first gradient, and some never get any (an untied vocabulary head in contrast, the vision
        tower on texts alone).
        """
        assert self.model is not None
        path, mine = Path(checkpoint_path), self.lightning_module_state_dict()
        with readable(path):
            meta = torch.load(path / META, map_location="cpu", weights_only=True)
            found = set(saved_below(path, f"{MODEL}."))
            load_shards({MODEL: {n: mine[n] for n in found & set(mine)}}, checkpoint_id=path)
            had = {key.rpartition(".")[0] for key in saved_below(path, f"{OPTIMIZER}.state.")}
            for optimizer in self.optimizers if found == set(mine) else ():
                state: dict[str, Any] = get_optimizer_state_dict(self.model, optimizer)  # of all
                state["state"] = {name: state["state"][name] for name in had}
                load_shards({OPTIMIZER: state}, checkpoint_id=path)
                set_optimizer_state_dict(
                    self.model,
                    optimizer,
                    optim_state_dict=state,
                    options=StateDictOptions(strict=False),  # others begin at their first gradient
                )
        return meta | {"state_dict": dict.fromkeys(found)}


def saved_below(folder: Path, prefix: str) -> dict[str, Any]:
    """What shards hold of the names that begin so, by the rest of the name: types and sizes."""
    entries = FileSystemReader(folder).read_metadata().state_dict_metadata.items()
    return {key.removeprefix(prefix): entry for key, entry in entries if key.startswith(prefix)}


def shard(
    parts: Iterable[nn.Module],
    *,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    compute_dtype: torch.dtype | None,
) -> None:
    """Split parameters in place; a part that is split already stays as it is. Gradients are summed
    over ranks, not averaged.

    Args:
        parts: modules that are called from outside, each with all its parameters.
        blocks: their repeated blocks, gathered one at a time.
        compute_dtype: weights are gathered in this type; None for their own.
    """
    precision = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for module in (*blocks, *parts):
        if isinstance(module, FSDPModule):
            module.reshard()
            continue
        fully_shard(module, mesh=mesh, mp_policy=precision)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other


def reshard(module: nn.Module) -> None:
    """Give up gathered parameters: a forward pass that no backward pass follows keeps them, and
    after an optimizer step they would be stale.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that train (with adapters: those and the heads, not the frozen base); of
    sharded ones this rank's shares.
    """
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def first_reason(error: BaseException) -> str:
    """What lies at the bottom of a failed read or write, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return first_line(error)


@contextmanager
def readable(path: Path, *more: type[BaseException]) -> Iterator[None]:
    """Turn what fails when a checkpoint is read, these errors too, into a UserError."""
    known = (CheckpointException, OSError, EOFError, pickle.UnpicklingError)
    try:
        yield
    except known + more as error:
        reason = first_reason(error)
        raise UserError(f"{path} cannot be read as a checkpoint: {reason}") from error
