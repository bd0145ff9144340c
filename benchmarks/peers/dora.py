"""A linear layer with DoRA's arithmetic of peft 0.11."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear


class DoraLinear(nn.Module):
    """DoRA (arXiv 2402.09353) as peft 0.11.1 computes it, the version that CoCoA pins.

    In every forward pass it multiplies B A out, takes the norm of the rows of W + s B A, and
    multiplies x, after dropout, with W a second time.

    Args:
        base: W and its bias; stays as it is.
        a, b, magnitude: values of the low-rank factors (rank, in) and (out, rank) and of the
            magnitudes (out); copied in the type of W, in which peft 0.11.1 keeps adapters.
    """

    def __init__(
        self,
        base: nn.Linear,
        *,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor,
        scaling: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.base, self.scaling, self.dropout = base, scaling, dropout
        self.a, self.b, self.magnitude = (
            nn.Parameter(values.detach().to(base.weight.dtype, copy=True))
            for values in (a, b, magnitude)
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x)
        dropped = dropout(x, self.dropout, self.training)
        weight = self.base.weight
        adapted = weight + self.scaling * (self.b @ self.a)
        norm = torch.linalg.norm(adapted, dim=1).to(weight.dtype).detach()
        ratio = self.magnitude / norm
        low_rank = linear(linear(dropped, self.a), self.b)
        return result + (ratio - 1) * linear(dropped, weight) + ratio * low_rank * self.scaling


def adapt(
    model: nn.Module,
    adapters: dict[str, tuple[Tensor, Tensor, Tensor]],
    *,
    scaling: float,
    dropout: float,
) -> None:
    """Put `DoraLinear` in the place of linear layers; everything else is frozen.

    Args:
        adapters: by module name, the values of `a`, `b` and `magnitude`.
    """
    model.requires_grad_(False)
    for name, values in adapters.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        child = name.rpartition(".")[2]
        base, (a, b, magnitude) = getattr(parent, child), values
        layer = DoraLinear(base, a=a, b=b, magnitude=magnitude, scaling=scaling, dropout=dropout)
        setattr(parent, child, layer)
