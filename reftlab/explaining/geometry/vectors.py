"""The vectors that each edit sees and makes: how large the change is, and where the vectors move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["CommonAxes", "EditVectors", "Sizes", "common_axes", "sizes_of"]


@dataclass(frozen=True, eq=False)
class EditVectors:
    """What one edit was given and what it made of it, vector by vector.

    Attributes:
        edit: key of the edit in `BoundModel.interventions`.
        base: the vectors at the site just before this edit, with every other edit in force,
            `(vector, width)` float32.
        delta: what the edit adds to them, its strength included.
        source: mean of the source's vectors `(width,)`, or None without a source.
        rows: `(vector,)`, the example that each vector belongs to, counted from 0.
        positions: `(vector,)`, its token's number in the example, counted from 0.
    """

    edit: str
    base: Float[Tensor, "vector width"]
    delta: Float[Tensor, "vector width"]
    source: Float[Tensor, " width"] | None
    rows: Int[Tensor, " vector"]
    positions: Int[Tensor, " vector"]

    @property
    def after(self) -> Float[Tensor, "vector width"]:
        """The vectors after the edit."""
        return self.base + self.delta


@dataclass(frozen=True, eq=False)
class Sizes:
    """How large an edit is against the vectors that it changes.

    Attributes:
        edit: key of the edit.
        relative: `‖Δ‖ / ‖h‖` of each vector, `(vector,)`, without unit; h is the vector before the
            edit and Δ what the edit adds.
        absolute: `‖Δ‖` in the units of the site.
        cosine: cosine between h and h + Δ, from −1 to 1.
        rows, positions: as in `EditVectors`.
    """

    edit: str
    relative: Float[Tensor, " vector"]
    absolute: Float[Tensor, " vector"]
    cosine: Float[Tensor, " vector"]
    rows: Int[Tensor, " vector"]
    positions: Int[Tensor, " vector"]

    @property
    def median(self) -> float:
        """Median of `relative`."""
        return float(self.relative.quantile(0.5))

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of `relative`."""
        low, high = self.relative.quantile(torch.tensor([0.25, 0.75])).tolist()
        return low, high

    def to_frame(self) -> pd.DataFrame:
        """One line a vector: edit, example, position, relative, absolute, cosine."""
        import pandas as pd

        return pd.DataFrame(
            {
                "edit": self.edit,
                "example": self.rows.numpy(),
                "position": self.positions.numpy(),
                "relative": self.relative.numpy(),
                "absolute": self.absolute.numpy(),
                "cosine": self.cosine.numpy(),
            }
        )

    def plot(self) -> Figure:
        from reftlab.plotting import sizes_figure

        return sizes_figure(self.edit, self.rows.tolist(), self.relative.tolist(), self.cosine.tolist())

    def _repr_html_(self) -> str:
        return str(self.to_frame().to_html(index=False, float_format="{:.3g}".format))

    def __repr__(self) -> str:
        low, high = self.quartiles
        return (
            f"Sizes({self.edit!r}: median {self.median:.3g} of the vector's length, quartiles {low:.3g} to "
            f"{high:.3g}, {len(self.relative)} vectors)"
        )


@dataclass(frozen=True, eq=False)
class CommonAxes:
    """Vectors before and after an edit on the same two principal axes.

    Attributes:
        edit: key of the edit.
        before: coordinates `(vector, 2)` in the units of the site, the union's mean at 0.
        after: the same after the edit.
        axes: `(2, width)`, orthonormal.
        explained: share of the union's variance along each axis, `(2,)`.
        rows, positions: as in `EditVectors`.
    """

    edit: str
    before: Float[Tensor, "vector 2"]
    after: Float[Tensor, "vector 2"]
    axes: Float[Tensor, "2 width"]
    explained: Float[Tensor, "2"]
    rows: Int[Tensor, " vector"]
    positions: Int[Tensor, " vector"]

    def to_frame(self) -> pd.DataFrame:
        """One line a vector and state: edit, example, position, state, axis_1, axis_2."""
        import pandas as pd

        parts = [
            pd.DataFrame(
                {
                    "edit": self.edit,
                    "example": self.rows.numpy(),
                    "position": self.positions.numpy(),
                    "state": state,
                    "axis_1": points[:, 0].numpy(),
                    "axis_2": points[:, 1].numpy(),
                }
            )
            for state, points in (("before", self.before), ("after", self.after))
        ]
        return pd.concat(parts, ignore_index=True)

    def plot(self) -> Figure:
        from reftlab.plotting import axes_figure

        return axes_figure(self.edit, self.before.numpy(), self.after.numpy(), self.explained.tolist())

    def _repr_html_(self) -> str:
        return str(self.to_frame().to_html(index=False, float_format="{:.3g}".format))

    def __repr__(self) -> str:
        one, two = self.explained.tolist()
        return f"CommonAxes({self.edit!r}: {len(self.before)} vectors, axes hold {one:.0%} and {two:.0%})"


def sizes_of(vectors: EditVectors) -> Sizes:
    """Measure an edit's change against the vectors it changes."""
    absolute = vectors.delta.norm(dim=1)
    return Sizes(
        vectors.edit,
        absolute / vectors.base.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny),
        absolute,
        torch.nn.functional.cosine_similarity(vectors.base, vectors.after, dim=1),
        vectors.rows,
        vectors.positions,
    )


def common_axes(vectors: EditVectors) -> CommonAxes:
    """Principal component analysis of the vectors before and after, fitted on both together.

    The union is centred, and the axes are the first two right singular vectors of it; each points
    the way in which the edit moves the vectors on average.
    """
    union = torch.cat([vectors.base, vectors.after]).double()
    centred = union - union.mean(0)
    _, values, axes = torch.linalg.svd(centred, full_matrices=False)
    variance = values.square()
    explained = variance / variance.sum().clamp(min=torch.finfo(torch.float64).tiny)
    if len(axes) < 2:
        axes = torch.cat([axes, axes.new_zeros(2 - len(axes), axes.shape[1])])
        explained = torch.cat([explained, explained.new_zeros(2 - len(explained))])
    axes = axes[:2]
    moved = axes @ vectors.delta.double().mean(0)
    axes = axes * torch.where(moved < 0, -1.0, 1.0)[:, None]
    points = (centred @ axes.T).float()
    before, after = points.split(len(vectors.base))
    return CommonAxes(
        vectors.edit, before, after, axes.float(), explained[:2].float(), vectors.rows, vectors.positions
    )
