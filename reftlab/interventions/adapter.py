"""Bottleneck adapters, and edits behind a learned gate."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from reftlab.errors import InterventionError
from reftlab.interventions.base import Affine, Intervention, number, whole
from reftlab.interventions.gate import SoftGate
from reftlab.interventions.reft import ACTIVATIONS, check_activation

__all__ = ["Adapter", "Gated"]


class Adapter(Intervention):
    """A bottleneck adapter: add a small network's answer to the vector.

        h + W2 f(W1 h + b1) + b2

    `W1` (k × width) goes down to the bottleneck of k numbers, `W2` (width × k) up again; `f` is the
    activation. `W2` and `b2` are 0 at first, so that the untrained edit changes nothing.

    Houlsby et al., "Parameter-Efficient Transfer Learning for NLP" (2019, arXiv:1902.00751),
    section 2.1.

    Args:
        bottleneck: k.
        activation: f, one of relu, gelu, silu, tanh, sigmoid, softplus; None for the identity.

    >>> edit = Adapter(2).build(width=4)
    >>> edit(torch.ones(1, 4)).tolist()
    [[1.0, 1.0, 1.0, 1.0]]
    """

    def __init__(self, bottleneck: int, activation: str | None = "relu") -> None:
        super().__init__()
        self.bottleneck, self.activation = whole(bottleneck, "bottleneck", 1), activation
        check_activation(activation)

    def setup(self, width: int) -> None:
        self.down = nn.Linear(width, self.bottleneck)
        self.up = nn.Linear(self.bottleneck, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(
        self, base: Float[Tensor, "n width"], source: Float[Tensor, "n width"] | None = None
    ) -> Float[Tensor, "n width"]:
        inner = functional.linear(base, self.down.weight.float(), self.down.bias.float())
        if self.activation is not None:
            inner = ACTIVATIONS[self.activation](inner)
        return base + functional.linear(inner, self.up.weight.float(), self.up.bias.float())

    def affine(self) -> Affine | None:
        if self.activation is not None:
            return None
        down, up = self.down.weight.detach().float(), self.up.weight.detach().float()
        return Affine(up, down, up @ self.down.bias.detach().float() + self.up.bias.detach().float())


class Gated(Intervention):
    """Another edit, as far as a learned gate opens for the vector.

        h + g(h) (inner(h) − h),   g(h) = σ(w · h + b)

    The gate learns with the edit which tokens it is for; it starts half open everywhere. The
    penalty `sparsity · mean(g)` asks it to stay shut. See `SoftGate`. What the inner edit takes, a
    source, a subspace, positions, this one takes too.

    Args:
        inner: the edit behind the gate.
        sparsity: weight of the penalty, in the units of the training loss.

    >>> from reftlab.interventions.simple import Zero
    >>> Gated(Zero()).build(width=2)(torch.tensor([[4.0, 6.0]])).tolist()
    [[2.0, 3.0]]
    """

    def __init__(self, inner: Intervention, sparsity: float = 0.0) -> None:
        super().__init__()
        if not isinstance(inner, Intervention):
            raise InterventionError(f"inner={inner!r}: expected an intervention, as in Gated(LoReFT(rank=4))")
        self.inner, self.sparsity = inner, number(sparsity, "sparsity", 0.0)
        for trait in (
            "takes_source", "takes_subspace", "counts_positions", "counts_rows", "averages_source"
        ):  # fmt: skip
            setattr(self, trait, getattr(inner, trait))

    def setup(self, width: int) -> None:
        self.inner = self.inner.build(width)
        self.gate = SoftGate(width, self.sparsity)

    @property
    def directions(self) -> int | None:
        """Those of the inner edit."""
        return self.inner.directions

    def forward(
        self,
        base: Float[Tensor, "n width"],
        source: Float[Tensor, "n width"] | None = None,
        *,
        subspace: Bool[Tensor, "n directions"] | None = None,
        **extra: Any,
    ) -> Float[Tensor, "n width"]:
        if subspace is not None:
            extra["subspace"] = subspace
        return base + self.gate(base)[:, None] * (self.inner(base, source, **extra) - base)

    def check_source(self, given: bool) -> None:
        self.inner.check_source(given)

    def penalty(self) -> Float[Tensor, ""] | None:
        """The gate's penalty and the inner edit's, None where there is neither."""
        terms = [term for term in (self.gate.penalty(), self.inner.penalty()) if term is not None]
        return torch.stack(terms).sum() if terms else None

    def schedule(self, progress: float) -> None:
        """Hand the share of training that is done to the inner edit."""
        self.inner.schedule(progress)
