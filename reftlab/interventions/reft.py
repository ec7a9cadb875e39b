"""The ReFT family: low-rank edits of a frozen model's hidden vectors.

Symbols, for a vector `h` of `width` numbers and `rank` r:
`R` (r × width) has orthonormal rows; `W`, `W1`, `W2` (r × width) are free; `b` (r) is a bias; `f`
is the activation (identity unless given); `s` is the scale (1 unless given).

Source: Wu et al., "ReFT: Representation Finetuning for Language Models" (2024,
arXiv:2404.03592), section 3.2 for LoReFT and DiReFT. The other members are those of the authors'
library, under its names. Note the names there: the paper's DiReFT has neither orthonormality
nor difference, `h + W2ᵀ(W1 h + b)`; the authors' library, and so this one, calls that NodiReFT
and keeps orthonormal rows in DiReFT.

The r directions are the basis that `subspace=` chooses from: amounts along the others are not written.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from reftlab.errors import InterventionError, did_you_mean
from reftlab.interventions.base import Affine, Intervention, check_rank, flag, number, whole
from reftlab.interventions.basis import OrthonormalBasis

__all__ = ["ConsReFT", "DiReFT", "LoReFT", "LobiReFT", "NoReFT", "NodiReFT"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": functional.softplus,
}


def check_activation(name: str | None) -> None:
    """Refuse a name that no activation has; None is the identity."""
    if name is not None and name not in ACTIVATIONS:
        hint = did_you_mean(str(name), ACTIVATIONS)
        raise InterventionError(
            f"activation={name!r}: expected None or one of {', '.join(ACTIVATIONS)}.{hint}"
        )


class _LowRank(Intervention):
    """What the family shares: `h + s · dropout(target(h)) · directions`."""

    takes_subspace = "basis"
    rank: int
    dropout: float = 0.0
    scale: float = 1.0
    activation: str | None = None
    bias: bool = True

    def _check(self) -> None:
        whole(self.rank, "rank", 1)
        self.dropout = number(self.dropout, "dropout", 0.0, 1.0)
        self.scale = number(self.scale, "scale")
        check_activation(self.activation)
        flag(self.bias, "bias")

    def setup(self, width: int) -> None:
        check_rank(self.rank, width)
        self.drop = nn.Dropout(self.dropout)

    def _activate(self, values: Tensor) -> Tensor:
        return values if self.activation is None else ACTIVATIONS[self.activation](values)

    def _write(self, base: Tensor, amounts: Tensor, directions: Tensor, subspace: Tensor | None) -> Tensor:
        """Add `amounts` `(n, rank)` along those columns of `directions` `(width, rank)` that are chosen."""
        if subspace is not None:
            amounts = amounts.masked_fill(~subspace, 0.0)
        return base + self.scale * (self.drop(amounts) @ directions.T)


class _Learned(_LowRank):
    """The members whose target is a learned linear map of the base vector."""

    def __init__(
        self,
        rank: int,
        *,
        activation: str | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.rank, self.activation, self.dropout = rank, activation, dropout
        self.bias, self.scale = bias, scale
        self._check()

    def setup(self, width: int) -> None:
        super().setup(width)
        self.linear = nn.Linear(width, self.rank, bias=self.bias)

    def _target(self, base: Tensor) -> Tensor:
        bias = None if self.linear.bias is None else self.linear.bias.float()
        return self._activate(functional.linear(base, self.linear.weight.float(), bias))

    def _affine(self, write: Tensor, minus: Tensor | None) -> Affine | None:
        """`s · write (W − minus) h + s · write b`, without an activation."""
        if self.activation is not None:
            return None
        weight = self.linear.weight.detach().float()
        bias = self.linear.bias
        constant = write.new_zeros(write.shape[0]) if bias is None else write @ bias.detach().float()
        read = weight if minus is None else weight - minus.T
        return Affine(self.scale * write, read, self.scale * constant)


class LoReFT(_Learned):
    """Low-rank linear subspace ReFT: move the vector inside an r-dimensional subspace.

        h + s Rᵀ(f(W h + b) − R h)

    In the subspace spanned by `R` the vector is replaced by a learned function of it; outside it
    stays as it is. Wu et al. 2024, equation 2.

    Args:
        rank: number of directions r.
        activation: f, one of relu, gelu, silu, tanh, sigmoid, softplus; None for the identity.
        dropout: probability of dropping each of the r amounts during training.
        bias: whether there is a `b`.
        scale: s.

    >>> edit = LoReFT(rank=2).build(width=8)
    >>> edit(torch.zeros(3, 8)).shape
    torch.Size([3, 8])
    """

    def setup(self, width: int) -> None:
        super().setup(width)
        self.basis = OrthonormalBasis(width, self.rank)

    def forward(
        self,
        base: Float[Tensor, "n width"],
        source: Float[Tensor, "n width"] | None = None,
        *,
        subspace: Bool[Tensor, "n rank"] | None = None,
    ) -> Float[Tensor, "n width"]:
        basis = self.basis()
        return self._write(base, self._target(base) - base @ basis, basis, subspace)

    def affine(self) -> Affine | None:
        basis = self.basis().detach()
        return self._affine(basis, minus=basis)


class DiReFT(_Learned):
    """LoReFT without the difference: add a learned amount along orthonormal directions.

        h + s Rᵀ f(W h + b)

    As in the authors' library; the paper's DiReFT is `NodiReFT`. Arguments as for `LoReFT`.
    """

    def setup(self, width: int) -> None:
        super().setup(width)
        self.basis = OrthonormalBasis(width, self.rank)

    def forward(
        self,
        base: Float[Tensor, "n width"],
        source: Float[Tensor, "n width"] | None = None,
        *,
        subspace: Bool[Tensor, "n rank"] | None = None,
    ) -> Float[Tensor, "n width"]:
        return self._write(base, self._target(base), self.basis(), subspace)

    def affine(self) -> Affine | None:
        return self._affine(self.basis().detach(), minus=None)


class NoReFT(_Learned):
    """LoReFT without orthonormality.

        h + s W2ᵀ(f(W1 h + b) − W2 h)

    Arguments as for `LoReFT`.
    """

    def setup(self, width: int) -> None:
        super().setup(width)
        self.projection = nn.Linear(width, self.rank, bias=False)

    def forward(
        self,
        base: Float[Tensor, "n width"],
        source: Float[Tensor, "n width"] | None = None,
        *,
        subspace: Bool[Tensor, "n rank"] | None = None,
    ) -> Float[Tensor, "n width"]:
        directions = self.projection.weight.float().T
        return self._write(base, self._target(base) - base @ directions, directions, subspace)

    def affine(self) -> Affine | None:
        directions = self.projection.weight.detach().float().T
        return self._affine(directions, minus=directions)


class NodiReFT(_Learned):
    """Neither orthonormality nor difference; the paper's DiReFT, and LoRA's form on a hidden vector.

        h + s W2ᵀ f(W1 h + b)

    Wu et al. 2024, equation 3. Arguments as for `LoReFT`.
    """

    def setup(self, width: int) -> None:
        super().setup(width)
        self.projection = nn.Linear(width, self.rank, bias=False)

    def forward(
        self,
        base: Float[Tensor, "n width"],
        source: Float[Tensor, "n width"] | None = None,
        *,
        subspace: Bool[Tensor, "n rank"] | None = None,
    ) -> Float[Tensor, "n width"]:
        return self._write(base, self._target(base), self.projection.weight.float().T, subspace)

    def affine(self) -> Affine | None:
        return self._affine(self.projection.weight.detach().float().T, minus=None)


class _Constant(_LowRank):
    """The members whose target is a learned constant."""

    def __init__(self, rank: int, *, dropout: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        self.rank, self.dropout, self.scale = rank, dropout, scale
        self._check()

    def setup(self, width: int) -> None:
        super().setup(width)
        self.basis = OrthonormalBasis(width, self.rank)
        self.target = nn.Parameter(torch.rand(self.rank))


class ConsReFT(_Constant):
    """Set the vector to a learned constant inside an r-dimensional subspace.

        h + s Rᵀ(b − R h)

    Args:
        rank: number of directions r.
        dropout: probability of dropping each of the r amounts during training.
        scale: s.
    """

    def forward(
        self,
        base: Float[Tensor, "n width"],
        source: Float[Tensor, "n width"] | None = None,
        *,
        subspace: Bool[Tensor, "n rank"] | None = None,
    ) -> Float[Tensor, "n width"]:
        basis = self.basis()
        return self._write(base, self.target.float() - base @ basis, basis, subspace)

    def affine(self) -> Affine:
        basis, target = self.basis().detach(), self.target.detach().float()
        return Affine(self.scale * basis, -basis.T, self.scale * (basis @ target))


class LobiReFT(_Constant):
    """Add a learned constant from an r-dimensional subspace: a trained steering vector.

        h + s Rᵀ b

    Arguments as for `ConsReFT`.
    """

    def forward(
        self,
        base: Float[Tensor, "n width"],
        source: Float[Tensor, "n width"] | None = None,
        *,
        subspace: Bool[Tensor, "n rank"] | None = None,
    ) -> Float[Tensor, "n width"]:
        amounts = self.target.float().expand(base.shape[0], -1)
        return self._write(base, amounts, self.basis(), subspace)

    def affine(self) -> Affine:
        return Affine.adding(self.scale * (self.basis().detach() @ self.target.detach().float()))
