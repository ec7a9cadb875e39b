"""Interventions without trained parameters: swap, add, scale, remove, disturb, limit, or any function."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reftlab.errors import InterventionError
from reftlab.interventions.base import Affine, Intervention, as_vector, check_width, number

__all__ = ["Add", "Clamp", "Function", "Mean", "Noise", "Scale", "Subtract", "Swap", "Zero"]

Vector = Tensor | Sequence[float] | float


class Swap(Intervention):
    """Replace the vector by the source's: interchange intervention, activation patching.

        source

    Geiger et al., "Causal Abstractions of Neural Networks" (2021, arXiv:2106.02997).
    """

    takes_source = "required"
    takes_subspace = "features"

    def __init__(self) -> None:
        super().__init__()

    def forward(
        self, base: Float[Tensor, "n width"], source: Float[Tensor, "n width"] | None = None
    ) -> Float[Tensor, "n width"]:
        assert source is not None
        return source


class Zero(Intervention):
    """Replace the vector by zeros: zero ablation.

    0
    """

    takes_subspace = "features"

    def __init__(self) -> None:
        super().__init__()

    def forward(
        self, base: Float[Tensor, "n width"], source: Float[Tensor, "n width"] | None = None
    ) -> Float[Tensor, "n width"]:
        return torch.zeros_like(base)

    def affine(self) -> Affine:
        eye = torch.eye(self.width or 0)
        return Affine(eye, -eye, eye.new_zeros(eye.shape[0]))


class Scale(Intervention):
    """Multiply the vector by a number.

    factor · h
    """

    takes_subspace = "features"

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = number(factor, "factor")

    def forward(
        self, base: Float[Tensor, "n width"], source: Float[Tensor, "n width"] | None = None
    ) -> Float[Tensor, "n width"]:
        return base * self.factor

    def affine(self) -> Affine:
        eye = torch.eye(self.width or 0)
        return Affine(eye, (self.factor - 1.0) * eye, eye.new_zeros(eye.shape[0]))


class _WithVector(Intervention):
    """What edits with a fixed vector share; the vector travels with `.to` and is saved."""

    takes_source = "optional"
    takes_subspace = "features"
    value: Tensor | None

    def __init__(self, value: Vector | None = None) -> None:
        super().__init__()
        self.register_buffer("value", as_vector(value, "value"))

    def setup(self, width: int) -> None:
        check_width(self.value, "value", width)

    def check_source(self, given: bool) -> None:
        if given == (self.value is not None):
            wrong = "has both a value and a source" if given else "has neither a value nor a source"
            raise InterventionError(f"{type(self).__name__} {wrong}; give one of them")

    def _vectors(self, source: Tensor | None) -> Tensor:
        """The source where there is one, else the fixed vector."""
        if source is not None:
            return source
        assert self.value is not None
        return self.value.float()

    @property
    def _sign(self) -> float | None:
        """The edit is `h + sign · value`, or None where it is not."""
        return None

    def affine(self) -> Affine | None:
        if self._sign is None or self.value is None:
            return None
        return Affine.adding(self._sign * self.value.float().expand(self.width or 0))


class Add(_WithVector):
    """Add a vector, or the source's vectors: steering by a fixed direction.

        h + value        or        h + source

    Args:
        value: `(width,)` or one number; leave it out where the edit has a source.
    """

    def forward(
        self, base: Float[Tensor, "n width"], source: Float[Tensor, "n width"] | None = None
    ) -> Float[Tensor, "n width"]:
        return base + self._vectors(source)

    @property
    def _sign(self) -> float:
        return 1.0


class Subtract(_WithVector):
    """Subtract a vector, or the source's vectors.

        h − value        or        h − source

    Args:
        value: `(width,)` or one number; leave it out where the edit has a source.
    """

    def forward(
        self, base: Float[Tensor, "n width"], source: Float[Tensor, "n width"] | None = None
    ) -> Float[Tensor, "n width"]:
        return base - self._vectors(source)

    @property
    def _sign(self) -> float:
        return -1.0


class Mean(_WithVector):
    """Replace the vector by a mean: mean ablation.

        value        or        mean of the row's source vectors

    Args:
        value: the mean over your data, `(width,)`; leave it out where the edit has a source, whose
            vectors are then averaged over their positions, row by row.
    """

    averages_source = True

    def forward(
        self, base: Float[Tensor, "n width"], source: Float[Tensor, "n width"] | None = None
    ) -> Float[Tensor, "n width"]:
        return self._vectors(source).expand_as(base)

    def affine(self) -> Affine | None:
        if self.value is None:
            return None
        eye = torch.eye(self.width or 0, device=self.value.device)
        return Affine(eye, -eye, self.value.float().expand(self.width or 0))


class Noise(Intervention):
    """Add Gaussian noise, the same at each run.

        h + std · ε,   ε ~ N(0, 1) for each token number and feature

    Each token number of a prompt has its own noise, drawn from `seed` and the number alone, so a
    row gets the same noise in any batch, padded on any side, with or without a cache. Corrupting
    a subject's embeddings this way follows Meng et al., "Locating and Editing Factual
    Associations in GPT" (2022, arXiv:2202.05262).

    Args:
        std: standard deviation, in units of the site's values.
        seed: any whole number; another seed is another noise.
    """

    counts_positions = True
    takes_subspace = "features"

    def __init__(self, std: float, seed: int = 0) -> None:
        super().__init__()
        self.std = number(std, "std", 0.0)
        if type(seed) is not int:
            raise InterventionError(f"seed={seed!r}: expected a whole number")
        self.seed = seed

    def forward(  # type: ignore[override]
        self,
        base: Float[Tensor, "n width"],
        source: Float[Tensor, "n width"] | None = None,
        positions: Int[Tensor, " n"] | None = None,
    ) -> Float[Tensor, "n width"]:
        if positions is None:
            positions = torch.arange(base.shape[0])
        numbers, where = positions.cpu().unique(return_inverse=True)
        rows = [self._row(int(number), base.shape[1]) for number in numbers]
        noise = torch.stack(rows)[where] if rows else base.new_zeros(base.shape)
        return base + self.std * noise.to(base)

    def _row(self, position: int, width: int) -> Tensor:
        digest = hashlib.sha256(f"{self.seed}/{position}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.randn(width, generator=generator)


class Clamp(Intervention):
    """Keep each feature between two bounds.

        min(max(h, low), high)

    Args:
        low: lowest value, or None for no bound.
        high: highest value, or None for no bound.
    """

    takes_subspace = "features"

    def __init__(self, low: float | None = None, high: float | None = None) -> None:
        super().__init__()
        self.low = None if low is None else number(low, "low")
        self.high = None if high is None else number(high, "high")
        if self.low is None and self.high is None:
            raise InterventionError("Clamp needs low=, high= or both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise InterventionError(f"low={self.low:g} is above high={self.high:g}")

    def forward(
        self, base: Float[Tensor, "n width"], source: Float[Tensor, "n width"] | None = None
    ) -> Float[Tensor, "n width"]:
        return base.clamp(self.low, self.high)


class Function(Intervention):
    """Apply any function of the base vectors, and of the source's where the edit has one.

        function(h)        or        function(h, source)

    It cannot be saved: an artifact never holds code. Write an `Intervention` subclass for that.

    Args:
        function: takes `(n, width)` tensors and returns one of the same shape.
    """

    takes_source = "optional"

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        if not callable(function):
            raise InterventionError(f"function={function!r} cannot be called")
        self.function = function

    def forward(
        self, base: Float[Tensor, "n width"], source: Float[Tensor, "n width"] | None = None
    ) -> Float[Tensor, "n width"]:
        # A copy, since the function may write in place and `base` is still needed.
        new = self.function(base.clone()) if source is None else self.function(base.clone(), source)
        if not isinstance(new, Tensor) or new.shape != base.shape:
            shape = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise InterventionError(
                f"function must return a tensor of shape {tuple(base.shape)}, it returned {shape}"
            )
        return new
