"""LoRA and DoRA on the tiny models: sizes, merging; and lean DoRA layers against peft's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cocoa_pl.data.batch import Batch
from cocoa_pl.errors import UserError
from cocoa_pl.models import dora
from cocoa_pl.models.adapters import (
    FullTuning,
    merged,
)
from cocoa_pl.models.backbone import Backbone
from cocoa_pl.models.dora import LeanDora, make_lean, row_norms, shared_norms
from cocoa_pl.models.loading import FAMILIES, Loaded
from tests.adapters import low_rank
from tests.configs import composed

# in and out features of the adapted layers of the tiny models: 2 text layers, 2 vision blocks
TEXT = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
VISION = {
    "qwen2_vl": [(32, 96), (32, 64), (64, 32)],
    "qwen2_5_vl": [(32, 96), (32, 64), (32, 64), (64, 32)],
    "qwen3_vl": [(32, 96), (32, 64), (64, 32)],
}
FAN_IN, FAN_OUT, RANK, TOKENS = 24, 40, 2, 7
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
def test_new_adapters_change_nothing_until_they_train(
    use_dora: bool, adapted: Adapted, loaded: Loaded, batch: Batch
) -> None:
    backbone = adapted(use_dora=use_dora, dropout=0.1, trained=False)
    torch.testing.assert_close(
        embed(backbone, batch), embed(loaded.backbone, batch), rtol=0, atol=1e-5
    )


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
        (
            {"lean_dora": False, "dropout_on_base": False},
            "dropout_on_base=false needs adapter.lean_dora=true",
        ),
    ],
)
def test_what_an_adapter_cannot_be_is_refused(
    changes: dict[str, Any], message: str, adapted: Adapted
) -> None:
    with pytest.raises(UserError, match=message):
        adapted(**changes)


# --- Lean DoRA -------------------------------------------------------------------------------


def pass_through(backbone: Backbone, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Embeddings and the gradients of a random linear function of them, in training mode."""
    backbone.train()
    torch.manual_seed(1)  # of dropout
    embeddings = backbone.embed(batch)
    weight = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(2))
    (embeddings * weight).sum().backward()
    gradients = {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None}
    backbone.zero_grad()
    return embeddings.detach(), gradients


def assert_same(
    found: tuple[Tensor, dict[str, Tensor]],
    expected: tuple[Tensor, dict[str, Tensor]],
    *,
    tolerance: float,
) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        error = (found[1][name] - gradient).norm() / gradient.norm()
        assert error < 30 * tolerance, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_outputs_and_gradients_are_those_of_peft(
    dropout: float, adapted: Adapted, batch: Batch
) -> None:
    """With activation checkpointing on the lean side, which runs every block twice."""
    expected = pass_through(adapted(dropout=dropout, lean_dora=False), batch)
    lean = adapted(dropout=dropout, checkpointing=True)
    assert any(isinstance(module, LeanDora) for module in lean.modules())
    assert_same(pass_through(lean, batch), expected, tolerance=1e-5)
    with shared_norms(lean):
        first, second = pass_through(lean, batch), pass_through(lean, batch)
    assert_same(first, expected, tolerance=1e-5)
    assert_same(second, first, tolerance=1e-7)


def test_dropout_off_the_base_is_something_else_in_training_only(
    adapted: Adapted, batch: Batch
) -> None:
    without = adapted(dropout_on_base=False)
    assert_same(pass_through(without, batch), pass_through(adapted(), batch), tolerance=1e-5)
    theirs, lean = adapted(dropout=0.3), adapted(dropout=0.3, dropout_on_base=False)
    assert (pass_through(lean, batch)[0] - pass_through(theirs, batch)[0]).abs().max() > 1e-3
    with torch.no_grad():
        pair = [backbone.eval().embed(batch) for backbone in (lean, theirs)]
    torch.testing.assert_close(*pair, rtol=0, atol=1e-5)


# --- One layer --------------------------------------------------------------------------------


def one_layer(*, dropout: float = 0.0, lean: bool = True, dropout_on_base: bool = True) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=RANK, lora_dropout=dropout, init_lora_weights=False, use_dora=True, target_modules=["0"]
    )
    model = peft.get_peft_model(nn.Sequential(nn.Linear(FAN_IN, FAN_OUT)), config)  # type: ignore[arg-type]
    if lean:
        make_lean(model, dropout_on_base=dropout_on_base)
    return model


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The norms that were taken, in order."""
    found: list[Tensor] = []

    def counted(*given: Any) -> Tensor:
        found.append(row_norms(*given))
        return found[-1]

    monkeypatch.setattr(dora, "row_norms", counted)
    return found


@pytest.mark.parametrize("fused", [False, True])
def test_no_norm_outlives_the_context_and_an_optimizer_step(
    fused: bool, taken: list[Tensor]
) -> None:
    """A fused step writes into parameters without raising their versions."""
    model, x = one_layer(), torch.randn(TOKENS, FAN_IN)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, fused=fused)
    for _ in range(2):
        with shared_norms(model):
            model(x).sum().backward()
        optimizer.step()
    assert len(taken) == 2
    assert (taken[0] - taken[1]).abs().max() > 1e-3


class Copies(TorchDispatchMode):
    """Float32 tensors of the size of the input that come into being."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.shape == (TOKENS, FAN_IN):
            self.count += out.dtype == torch.float32
        return out


@pytest.mark.parametrize("dropout", [0.0, 0.5])  # whose 1 / (1 - p) rounding leaves as they are
@pytest.mark.parametrize("kind", ["lora", "dora", "dora, dropout_on_base=false", "peft's dora"])
def test_in_bfloat16_no_adapter_but_pefts_own_dora_copies_its_input_to_float32(
    kind: str, dropout: float
) -> None:
    """And what the others give is the same, to the bit, as with such a copy."""
    torch.manual_seed(0)
    backbone: Any = nn.Module()
    backbone.model = nn.Sequential(nn.Linear(FAN_IN, FAN_OUT)).bfloat16()
    adapter = low_rank(
        dropout=dropout,
        use_dora="dora" in kind,
        target_modules=["0"],
        lean_dora=kind != "peft's dora",
        dropout_on_base="false" not in kind,
    )
    layer = adapter(backbone).model.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(TOKENS, FAN_IN, dtype=torch.bfloat16, requires_grad=True)
    found: list[tuple[Tensor, ...]] = []
    assert layer.cast_input_dtype_enabled == (kind == "peft's dora")
    for casting in (layer.cast_input_dtype_enabled, True):
        layer.cast_input_dtype_enabled = casting
        torch.manual_seed(1)  # of dropout
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), Copies() as copies:
            output = layer(x)
            trained = [p for p in layer.parameters() if p.requires_grad]
            found.append((output, *torch.autograd.grad(output.sum(), [x, *trained])))
        assert (copies.count > 0) == casting
    assert all(map(torch.equal, *found))


def counted(model: Any, *, passes: int) -> int:
    """FLOPs of matrix products, forward and backward."""
    model.train()
    x = torch.randn(TOKENS, FAN_IN)
    with FlopCounterMode(display=False) as counter, shared_norms(model):
        for _ in range(passes):
            model(x).sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("passes", [1, 8])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_is_saved_is_what_was_promised(dropout: float, passes: int) -> None:
    identity = 2 * FAN_IN * RANK * (FAN_IN + FAN_OUT)  # B A, from an identity matrix
    factors = 2 * FAN_IN * RANK * FAN_OUT  # B A, from its factors
    second = 2 * TOKENS * FAN_IN * FAN_OUT  # W x again, where x has dropout
    theirs, lean, without = (
        counted(one_layer(dropout=dropout, **choice), passes=passes)
        for choice in ({"lean": False}, {}, {"dropout_on_base": False})
    )
    assert theirs - lean == passes * identity - factors
    assert lean - without == (passes * second if dropout else 0)
