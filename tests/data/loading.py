"""What tests of samplers, streams and data modules share."""

from typing import Any

from torch import Tensor

from cocoa_pl.attention import Plan, make_plan
from cocoa_pl.data.batch import Collator
from cocoa_pl.data.datamodule import StageData
from cocoa_pl.data.processor import Processor
from cocoa_pl.data.sampler import Mixing
from tests.attention.oracle import OURS


def mixing(**changes: Any) -> Mixing:
    """All rows alike, with some values replaced."""
    values = {"composition": "shuffled", "sub_batches": None, "exponent": 1.0, "weights": None}
    return Mixing(**(values | changes))  # type: ignore[arg-type]


def plan(segment_lengths: Tensor, grids: Tensor) -> tuple[Plan, dict[str, Any]]:
    return make_plan(OURS["bidirectional"], segment_lengths), {}


COLLATOR = Collator(plan, token_budget=10**6)  # one batch a step


def stage_data(train: Any, validation: Any, processor: Processor, **changes: Any) -> StageData:
    values: dict[str, Any] = {
        "mixing": mixing(),
        "batch_size": 4,
        "validation_batch_size": 3,
        "steps": 6,
        "start_step": 0,
        "seed": 0,
        "num_workers": 0,
        "on_bad_row": "fail",
        "pinned": False,
        "collator": COLLATOR,
        "validation_collator": COLLATOR,
    }
    return StageData(train=train, validation=validation, processor=processor, **(values | changes))
