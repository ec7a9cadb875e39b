"""Stand-ins for a learned swap: whole vectors, and the same swap in a random subspace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftlab.interventions import Intervention

if TYPE_CHECKING:
    from reftlab.runtime import BoundModel

__all__ = ["edited", "in_place", "turned", "whole"]


class _Instead(Intervention):
    """Stands in the place of a built swap, and has its directions."""

    takes_source = "required"

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.averages_source = getattr(inner, "averages_source", False)  # type: ignore[misc]

    @property
    def directions(self) -> int | None:
        return getattr(self.inner, "directions", None)


class _Whole(_Instead):
    """Swaps whole vectors, whatever the directions."""

    def edited(
        self, base: Float[Tensor, "n width"], source: Float[Tensor, "n width"] | None = None, **extra: Any
    ) -> Float[Tensor, "n width"]:
        assert source is not None
        return source


class _Turned(_Instead):
    """The swap in coordinates that a random rotation gives: `h + Q (swap(Qᵀ h, Qᵀ s) − Qᵀ h)`."""

    def __init__(self, inner: Any, generator: torch.Generator) -> None:
        super().__init__(inner)
        self._generator = generator
        self._turn: Tensor | None = None

    def edited(
        self, base: Float[Tensor, "n width"], source: Float[Tensor, "n width"] | None = None, **extra: Any
    ) -> Float[Tensor, "n width"]:
        assert source is not None
        if self._turn is None:
            numbers = torch.randn(base.shape[1], base.shape[1], generator=self._generator)
            found, upper = torch.linalg.qr(numbers)
            # With these signs the rotation is drawn uniformly (Mezzadri 2007).
            self._turn = found * upper.diagonal().sign()
        turn = self._turn.to(base)
        there = base @ turn
        new = edited(self.inner, there, source @ turn, **extra)
        return base + (new - there) @ turn.T


def whole(inner: Any) -> Intervention:
    """A swap of whole vectors in the place of a built one."""
    return _Whole(inner)


def turned(inner: Any, generator: torch.Generator) -> Intervention:
    """A built swap in randomly rotated coordinates: as many directions, in a random subspace."""
    return _Turned(inner, generator)


def edited(inner: Any, base: Tensor, source: Tensor, **extra: Any) -> Tensor:
    """What a built swap, or any module that takes its place, makes of base and source."""
    new: Tensor = (
        inner.edited(base, source, **extra) if isinstance(inner, Intervention) else inner(base, source)
    )
    return new


@contextlib.contextmanager
def in_place(reft: BoundModel, built: Mapping[str, nn.Module]) -> Iterator[None]:
    """Other swaps in the place of built ones, by key, inside a `with` block."""
    with contextlib.ExitStack() as stack:
        for key, intervention in built.items():
            stack.enter_context(reft.replaced(key, intervention.eval()))
        yield
