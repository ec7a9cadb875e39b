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

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

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


class Parts(NamedTuple):
    """The numbers of one of the family, or of several with an axis of members before the others."""

    directions: Tensor
    """Rᵀ or W2ᵀ, `(width, rank)`."""
    weight: Tensor | None
    """W or W1, `(rank, width)`; None where the target is a constant."""
    bias: Tensor | None
    """b, `(rank,)`."""


_Own = TypeVar("_Own", bound="_LowRank")


def check_activation(name: str | None) -> None:
    """Refuse a name that no activation has; None is the identity."""
    if name is not None and name not in ACTIVATIONS:
        hint = did_you_mean(str(name), ACTIVATIONS)
        raise InterventionError(
            f"activation={name!r}: expected None or one of {', '.join(ACTIVATIONS)}.{hint}"
        )


def _stack(parts: Sequence[Tensor | None]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    return torch.stack(given) if given else None


class _LowRank(Intervention):
    """What the family shares: `h + s · dropout(amounts(h)) · directions`."""

    takes_subspace = "basis"
    rank: int
    dropout: float = 0.0
    scale: float = 1.0
    activation: str | None = None
    bias: bool = True

    def _check(self) -> None:
        self.rank = whole(self.rank, "rank", 1)
        self.dropout = number(self.dropout, "dropout", 0.0, 1.0)
        self.scale = number(self.scale, "scale")
        check_activation(self.activation)
        flag(self.bias, "bias")

    def setup(self, width: int) -> None:
        check_rank(self.rank, width)
        self.drop = nn.Dropout(self.dropout)

    def _parts(self) -> Parts:
        """The numbers of this edit in float32."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its parts are")

    def _amounts(self, base: Tensor, parts: Parts) -> Tensor:
        """How far to go along each direction, `(n, rank)`; members come first where `parts` are stacked."""
        raise NotImplementedError(f"{type(self).__name__} does not say how far it goes")

    def forward(
        self,
        base: Float[Tensor, "n width"],
        source: Float[Tensor, "n width"] | None = None,
        *,
        subspace: Bool[Tensor, "n rank"] | None = None,
    ) -> Float[Tensor, "n width"]:
        return self._moved(base, self._parts(), subspace)

    def _moved(self, base: Tensor, parts: Parts, subspace: Tensor | None) -> Tensor:
        """The vectors moved by `_amounts` along those directions that are chosen."""
        amounts = self._amounts(base, parts)
        if subspace is not None:
            amounts = amounts.masked_fill(~subspace, 0.0)
        # In a generation this runs once a token, so what would change nothing is left out.
        amounts = self.drop(amounts) if self.dropout else amounts
        step = amounts @ parts.directions.mT
        return base + (step if self.scale == 1.0 else self.scale * step)

    def stack_key(self) -> Hashable | None:
        # A subclass from elsewhere may compute something else, and each member draws its own dropout.
        if type(self).__module__ != __name__ or (self.dropout and self.drop.training):
            return None
        device = next(self.parameters()).device
        return (type(self), self.width, self.rank, self.bias, self.activation, self.scale, device)

    @classmethod
    def stacked(cls: type[_Own], members: Sequence[_Own]) -> Parts:
        directions, weights, biases = zip(*(member._parts() for member in members), strict=True)
        return Parts(torch.stack(directions), _stack(weights), _stack(biases))

    def grouped(
        self,
        stack: Parts,
        base: Float[Tensor, "member n width"],
        subspace: Bool[Tensor, "member n rank"] | None = None,
    ) -> Float[Tensor, "member n width"]:
        return self._moved(base, stack, subspace)


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

    def _with_target(self, directions: Tensor) -> Parts:
        bias = self.linear.bias
        return Parts(directions, self.linear.weight.float(), None if bias is None else bias.float())

    def _target(self, base: Tensor, parts: Parts) -> Tensor:
        """The target f(W h + b)."""
        assert parts.weight is not None
        if parts.weight.dim() == 2:
            values = functional.linear(base, parts.weight, parts.bias)
        else:
            values = base @ parts.weight.mT
            values = values if parts.bias is None else values + parts.bias[:, None]
        return values if self.activation is None else ACTIVATIONS[self.activation](values)

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

    def _parts(self) -> Parts:
        return self._with_target(self.basis())

    def _amounts(self, base: Tensor, parts: Parts) -> Tensor:
        return self._target(base, parts) - base @ parts.directions

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

    def _parts(self) -> Parts:
        return self._with_target(self.basis())

    def _amounts(self, base: Tensor, parts: Parts) -> Tensor:
        return self._target(base, parts)

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

    def _parts(self) -> Parts:
        return self._with_target(self.projection.weight.float().T)

    def _amounts(self, base: Tensor, parts: Parts) -> Tensor:
        return self._target(base, parts) - base @ parts.directions

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

    def _parts(self) -> Parts:
        return self._with_target(self.projection.weight.float().T)

    def _amounts(self, base: Tensor, parts: Parts) -> Tensor:
        return self._target(base, parts)

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

    def _parts(self) -> Parts:
        return Parts(self.basis(), None, self.target.float())

    def _target(self, base: Tensor, parts: Parts) -> Tensor:
        """The constant b for each vector."""
        assert parts.bias is not None
        return parts.bias.unsqueeze(-2).expand(*base.shape[:-1], -1)


class ConsReFT(_Constant):
    """Set the vector to a learned constant inside an r-dimensional subspace.

        h + s Rᵀ(b − R h)

    Args:
        rank: number of directions r.
        dropout: probability of dropping each of the r amounts during training.
        scale: s.
    """

    def _amounts(self, base: Tensor, parts: Parts) -> Tensor:
        return self._target(base, parts) - base @ parts.directions

    def affine(self) -> Affine:
        basis, target = self.basis().detach(), self.target.detach().float()
        return Affine(self.scale * basis, -basis.T, self.scale * (basis @ target))


class LobiReFT(_Constant):
    """Add a learned constant from an r-dimensional subspace: a trained steering vector.

        h + s Rᵀ b

    Arguments as for `ConsReFT`.
    """

    def _amounts(self, base: Tensor, parts: Parts) -> Tensor:
        return self._target(base, parts)

    def affine(self) -> Affine:
        return Affine.adding(self.scale * (self.basis().detach() @ self.target.detach().float()))
