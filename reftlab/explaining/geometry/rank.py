"""How many dimensions an edit has: those of its linear part, and those that it uses on data."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from scipy.stats import entropy  # type: ignore[import-untyped]
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from reftlab.explaining.geometry.directions import Directions
    from reftlab.explaining.geometry.vectors import EditVectors

__all__ = ["Rank", "effective_rank", "rank_of"]


@dataclass(frozen=True, eq=False)
class Rank:
    """How many dimensions an edit has, counted and weighed.

    The numerical rank counts singular values, however small against the largest; the effective rank is
    the number of equal ones that would be as spread out, see `effective_rank`. An edit of rank 8 whose
    effective rank is 1.2 does nearly all it does along one direction.

    Attributes:
        edit: key of the edit.
        numerical: rank of the linear part M; None where it was not found.
        linear: effective rank of M; None where its singular values were not found.
        written: effective rank of the vectors Δ that the edit wrote.
        varying: the same of Δ less its mean: of what differs from token to token. 0 for a constant edit.
        vectors: how many vectors were written; neither of the last two can be more.
        spectra: singular values, descending, by `linear`, `written` and `varying`; M's without unit, the
            others as root mean squares over the vectors, in the units of the site.
    """

    edit: str
    numerical: int | None
    linear: float | None
    written: float
    varying: float
    vectors: int
    spectra: dict[str, tuple[float, ...]]

    def to_frame(self) -> pd.DataFrame:
        """One line: edit, numerical, linear, written, varying, vectors."""
        import pandas as pd

        return pd.DataFrame(
            {
                "edit": [self.edit],
                "numerical": [self.numerical],
                "linear": [self.linear],
                "written": [self.written],
                "varying": [self.varying],
                "vectors": [self.vectors],
            }
        )

    def plot(self) -> Figure:
        """The singular values as shares of their sum, with each effective rank."""
        from reftlab.plotting.lens import rank_figure

        return rank_figure(
            self.edit,
            self.spectra,
            {"linear": self.linear, "written": self.written, "varying": self.varying},
        )

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>"

    def __repr__(self) -> str:
        linear = "not found" if self.linear is None else f"{self.linear:.3g} of {self.numerical}"
        return (
            f"Rank({self.edit!r}: effective rank of the linear part {linear}, of what it wrote "
            f"{self.written:.3g}, {self.varying:.3g} about the mean, {self.vectors} vectors)"
        )


def effective_rank(values: Float[Tensor, " k"]) -> float:
    """Number of equal singular values that would be spread out as these are.

    `exp(−Σ p_k ln p_k)` with `p_k = σ_k / Σ σ`: 1 for one value alone, k for k equal ones, and anything
    between. No threshold decides what counts.

    Args:
        values: singular values σ, none negative.

    Returns:
        From 1 to k; 0 where all are 0.

    Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality" (2007).

    >>> round(effective_rank(torch.tensor([3.0, 3.0, 0.0])), 6)
    2.0
    """
    kept = values[values > 0].double()
    return float(torch.as_tensor(entropy(kept.numpy())).exp()) if len(kept) else 0.0


def rank_of(directions: Directions, vectors: EditVectors) -> Rank:
    """Count the dimensions of an edit's linear part and of what it wrote.

    Args:
        directions: the edit's directions, with their spectrum.
        vectors: what the edit was given and made.

    >>> rank_of(found, vectors)                                        # doctest: +SKIP
    Rank('emoji': effective rank of the linear part 2.9 of 4, of what it wrote 1.3, …)
    """
    delta = vectors.delta.double()
    count = max(1, len(delta))
    floor = _rounding(vectors)
    spectra: dict[str, Any] = {} if directions.spectrum is None else {"linear": directions.spectrum}
    for name, matrix in (("written", delta), ("varying", delta - delta.mean(0))):
        values = torch.linalg.svdvals(matrix)
        spectra[name] = values[values > floor] / count**0.5
    ranks = {name: effective_rank(values) for name, values in spectra.items()}
    return Rank(
        directions.edit,
        directions.rank,
        ranks.get("linear"),
        ranks["written"],
        ranks["varying"],
        len(delta),
        {name: tuple(values.tolist()) for name, values in spectra.items()},
    )


def _rounding(vectors: EditVectors) -> float:
    """Singular values up to which what was written may be rounding.

    Δ is a difference of two float32 vectors, whose last digits are lost where Δ is small against them:
    noise in every feature, of which the largest singular value is about its size times √n + √width.
    """
    count, width = vectors.delta.shape
    size = vectors.after.double().square().mean().sqrt() if count else torch.zeros(())
    return float(torch.finfo(torch.float32).eps * size * (count**0.5 + width**0.5))
