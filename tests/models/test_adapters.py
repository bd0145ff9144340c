"""LoRA and DoRA on the tiny models: sizes, dtypes, merging."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from cocoa_pl.data.batch import Batch
from cocoa_pl.errors import UserError
from cocoa_pl.models.adapters import (
    FullTuning,
    merged,
)
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.loading import FAMILIES, Loaded
from tests.configs import composed

# in and out features of the adapted layers of the tiny models: 2 text layers, 2 vision blocks
TEXT = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
VISION = {
    "qwen2_vl": [(32, 96), (32, 64), (64, 32)],
    "qwen2_5_vl": [(32, 96), (32, 64), (32, 64), (64, 32)],
    "qwen3_vl": [(32, 96), (32, 64), (64, 32)],
}
every_family = pytest.mark.parametrize("family", sorted(FAMILIES), indirect=True, scope="session")
both_kinds = pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
LoadTiny = Callable[..., Loaded]
Adapted = Callable[..., Backbone]


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@torch.no_grad()
def embed(backbone: Backbone, batch: Batch) -> Tensor:
    return backbone.eval().embed(batch)


@every_family
@pytest.mark.parametrize("name", ["dora", "lora", "none"])
def test_adapter_files_train_adapters_alone_in_the_size_of_their_rank(
    name: str, family: str, load_tiny: LoadTiny
) -> None:
    adapter: Any = instantiate(composed(f"adapter={name}").adapter, _convert_="all")
    backbone = adapter(load_tiny().backbone)
    if isinstance(adapter, FullTuning):
        assert all(p.requires_grad for p in backbone.parameters())
        return
    kinds = (".lora_A.", ".lora_B.", ".lora_magnitude_vector.")
    assert all(any(kind in parameter for kind in kinds) for parameter in trained(backbone))
    layers = 2 * (TEXT + VISION[family])
    expected = sum(8 * (a + b) + (name == "dora") * b for a, b in layers)
    assert sum(p.numel() for p in trained(backbone).values()) == expected
    assert backbone.model.peft_config["default"].lora_alpha == 64


@both_kinds
def test_new_adapters_are_float32_and_change_nothing_until_they_train(
    use_dora: bool, adapted: Adapted, loaded: Loaded, batch: Batch
) -> None:
    backbone = adapted(use_dora=use_dora, dropout=0.1, trained=False)
    torch.testing.assert_close(
        embed(backbone, batch), embed(loaded.backbone, batch), rtol=0, atol=1e-5
    )
    half = adapted(use_dora=use_dora, dtype="bfloat16")
    dtypes = {(p.requires_grad, p.dtype) for p in half.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


@pytest.mark.parametrize(
    ("family", "use_dora"),
    [("qwen2_vl", False), *((family, True) for family in sorted(FAMILIES))],
    indirect=["family"],
    scope="session",
)
def test_every_adapter_gets_a_gradient_and_the_merged_model_embeds_alike(
    use_dora: bool, adapted: Adapted, loaded: Loaded, batch: Batch
) -> None:
    backbone = adapted(use_dora=use_dora)
    state = {name: value.clone() for name, value in backbone.state_dict().items()}
    before = embed(backbone, batch)
    plain = merged(backbone)
    torch.testing.assert_close(embed(plain, batch), before, rtol=0, atol=1e-5)
    assert (before - embed(loaded.backbone, batch)).abs().max() > 1e-2
    assert set(plain.state_dict()) == set(loaded.backbone.state_dict())
    assert merged(plain) is plain
    assert torch.equal(embed(backbone, batch), before), "the original stays"
    assert backbone.state_dict().keys() == state.keys()
    assert all(torch.equal(backbone.state_dict()[name], value) for name, value in state.items())

    weight = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    (backbone.train().embed(batch) * weight).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in trained(backbone).values())
    assert all(p.grad is None for p in backbone.parameters() if not p.requires_grad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": [r".*q_proj", r".*\.no_such_layer"]}, "no_such_layer' matches no mod"),
        ({"target_modules": [r"q_proj"]}, "adapter.target_modules: 'q_proj' matches no module"),
        ({"dropout_on_base": False}, "dropout_on_base=false needs adapter.lean_dora=true"),
    ],
)
def test_what_an_adapter_cannot_be_is_refused(
    changes: dict[str, Any], message: str, adapted: Adapted
) -> None:
    with pytest.raises(UserError, match=message):
        adapted(**changes)
