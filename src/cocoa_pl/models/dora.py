"""peft's DoRA layers with less work for the same outputs.

DoRA (arXiv 2402.09353) divides by the row norms of W + s B A, held constant in the backward pass
(its section 4.3). peft rebuilds B A from an identity matrix, and the norm with it, in every forward
pass. Here B A is a product of the two factors, and within `shared_norms` the norm is taken once:
weights do not change between two optimizer steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear, LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.nn.functional import linear


class LeanDora(DoraLinearLayer):
    """Takes the place of peft's layer of one adapted linear module, with the same parameter.

    The norm is taken in float32 or wider, outside autocast; peft's is of a `B A` in the type that
    autocast computes in.
    """

    def __init__(self, original: DoraLinearLayer) -> None:
        super().__init__(fan_in_fan_out=original.fan_in_fan_out)
        self.weight = original.weight
        self._sharing = False
        self._shared: Tensor | None = None  # the norm, once it is taken

    def share(self, sharing: bool) -> None:
        """From now on keep the norm, or take it in every forward pass; forgets what it kept."""
        self._sharing, self._shared = sharing, None

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: nn.Linear,
        lora_B: nn.Linear,
        scaling: float,
        base_layer: nn.Linear,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        """What DoRA adds to the output of the base layer: (T, in) -> (T, out).

        Args:
            base_result: the output of the base layer for the same x; None where x is not what the
                base layer got (dropout).
        """
        weight = base_layer.weight
        norm = self._shared
        if norm is None:
            norm = row_norms(weight, lora_A.weight, lora_B.weight, scaling)  # (out)
            self._shared = norm if self._sharing else None
        ratio = self.weight / norm
        if base_result is None:
            # Under autocast the product casts by itself: no float32 copy of a half-precision base.
            half = torch.is_autocast_enabled(x.device.type)
            base_result = linear(x, weight if half else weight.to(x.dtype))
        elif base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        return (ratio - 1) * base_result + ratio * lora_B(lora_A(x)) * scaling


class BaseWithoutDropout(DoraLinearVariant):
    """DoRA whose dropout falls on the low-rank path only, as in LoRA.

    peft also drops inputs of the term (m / norm - 1) W x, which is then a second product with W,
    forward and backward; without that the base layer's own output serves. The mean over dropout is
    the same, the draws are not: equal to peft's at dropout 0.
    """

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        added: Tensor = module.lora_magnitude_vector[active_adapter](
            module.lora_dropout[active_adapter](x),
            lora_A=module.lora_A[active_adapter],
            lora_B=module.lora_B[active_adapter],
            scaling=module.scaling[active_adapter],
            base_layer=module.get_base_layer(),
            base_result=result,
            adapter_name=active_adapter,
        )
        return result + added


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Norms of the rows of W + scaling B A.

    Args:
        weight: (out, in).
        a: (rank, in).
        b: (out, rank).

    Returns:
        (out) in float32 (float64 for float64), without a graph.
    """
    wide = torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.float32)
    with torch.autocast(weight.device.type, enabled=False):
        whole = torch.addmm(weight.to(wide), b.to(wide), a.to(wide), alpha=scaling)
        norm: Tensor = torch.linalg.vector_norm(whole, dim=1)
    return norm


def make_lean(model: nn.Module, *, dropout_on_base: bool) -> None:
    """Replace the DoRA layers of a peft model; parameters and their names stay.

    Args:
        dropout_on_base: as peft does it; see `BaseWithoutDropout`.
    """
    for module in model.modules():
        if not isinstance(module, Linear):
            continue
        for name, layer in module.lora_magnitude_vector.items():
            assert isinstance(layer, DoraLinearLayer)
            module.lora_magnitude_vector[name] = LeanDora(layer)
            if not dropout_on_base:
                module.lora_variant[name] = BaseWithoutDropout()


@contextmanager
def shared_norms(model: nn.Module) -> Iterator[None]:
    """Within this, each layer takes its norm once: for the passes between two optimizer steps.

    Parameters must not change inside. The end of the context is what forgets a norm, not the
    version of a parameter: a fused optimizer step and the gathering of sharded parameters (FSDP2)
    both write into parameters without raising it.
    """
    layers = [module for module in model.modules() if isinstance(module, LeanDora)]
    for layer in layers:
        layer.share(True)
    try:
        yield
    finally:
        for layer in layers:
            layer.share(False)
