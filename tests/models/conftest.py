"""A batch for the tiny models, and adapters on them, as they are after some training."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cocoa_pl.data.batch import Batch, Sample
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.loading import Loaded
from tests.adapters import low_rank


@pytest.fixture
def batch(make_samples: Callable[..., list[Sample]], packed: Callable[..., Batch]) -> Batch:
    return packed(make_samples((1, 0, 2)))


@pytest.fixture(scope="session")
def after_training() -> Callable[[Any], Any]:
    """Random `B` and magnitudes in place of a new adapter's."""

    def change(module: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if ".lora_B." in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
                elif ".lora_magnitude_vector." in name:
                    parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator))
        return module

    return change


@pytest.fixture(scope="session")
def adapted(
    load_tiny: Callable[..., Loaded],
    after_training: Callable[[Any], Any],
) -> Callable[..., Backbone]:
    """A tiny model with a `low_rank` adapter, new or as after some training."""

    def make(
        *, trained: bool = True, dtype: str = "float32", checkpointing: bool = False, **changes: Any
    ) -> Backbone:
        torch.manual_seed(0)
        loaded = load_tiny(dtype=dtype, gradient_checkpointing=checkpointing)
        backbone = low_rank(**changes)(loaded.backbone).eval()
        return after_training(backbone) if trained else backbone

    return make
