"""A lens fitted to data: what a vector of some site has become when it enters the final norm."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from reftlab.address import View
from reftlab.errors import DataError
from reftlab.measuring.intervals import Estimate

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["DataLens"]

_WEAK = 0.5
"""Below this held-out R² a lens misses more than it tells."""


@dataclass(frozen=True, eq=False)
class DataLens:
    """An affine map from a site's vectors to what enters the final norm at the same token.

        ŷ = A h + b

    The logit lens reads a site's vector h as if it were what enters the final norm; what later blocks
    make of it is left out. This lens puts in between the affine map that fits best, in the mean square,
    what they made of the vectors of these examples, without any edits. Where the site is the residual
    stream, ridge regression predicts what the later blocks add, y − h, so that with little data
    the map falls back on the identity, which is the logit lens.

    The map is one of correlations: it says what comes with a vector, of which later blocks need not be the
    cause. A write direction may lie where the examples' vectors do not vary, and there the map knows
    nothing. The held-out scores say how far it can be believed, for vectors like those of the examples.

    Source: Din et al., "Jump to Conclusions: Short-Cutting Transformers With Linear Transformations"
    (2023, arXiv:2303.09435). Belrose et al., "Eliciting Latent Predictions from Transformers with the Tuned
    Lens" (2023, arXiv:2303.08112) train such a map by gradient descent on the divergence of the
    predictions, which needs far more text and counts only what the predictions show.

    Attributes:
        site: where h stands.
        matrix: A, `(stream width, width)`.
        constant: b, `(stream width,)`.
        alpha: the ridge penalty, as a multiple of tokens times the mean variance of h's features; the larger,
            the nearer to the identity (or to 0 beside the residual stream).
        r2: held-out share of the variance of y that ŷ explains, over all features; the examples of a fold
            were not fitted on, nor the penalty chosen on them.
        logit_r2: the same for h itself; None where it is not as wide as y.
        agreement: share of held-out tokens of which ŷ gives the model's own most likely next token, with a
            95% interval by the bootstrap over examples; of 1024 tokens at most, whole examples drawn at
            random.
        logit_agreement: the same for the logit lens; None as above.
        commonest: what share would agree by always naming the token that is most often most likely.
        tokens, examples: how many it was fitted on; a token that repeats an earlier example from its first
            token on counts once.
        note: what was left out, or an empty text.
        missing: why there is none, or None; then the matrix is empty.
        view: the heads or features of the site that it was fitted to, all unless given.
        fitted_to: what tells the model's weights from others, as in a saved artifact; empty where unknown.
    """

    site: str
    matrix: Float[Tensor, "out width"]
    constant: Float[Tensor, " out"]
    alpha: float
    r2: float
    logit_r2: float | None
    agreement: Estimate
    logit_agreement: Estimate | None
    commonest: float
    tokens: int
    examples: int
    note: str = ""
    missing: str | None = None
    view: View = field(default_factory=View)
    fitted_to: str = ""

    @classmethod
    def unavailable(cls, site: str, why: str, tokens: int = 0, examples: int = 0) -> DataLens:
        nan, empty = float("nan"), torch.zeros(0, 0)
        nothing = Estimate(nan, nan, nan)
        return cls(
            site, empty, empty[0:0, 0:0].reshape(0), nan, nan, None, nothing, None, nan, tokens, examples,
            missing=why,
        )  # fmt: skip

    def through(self, vectors: Float[Tensor, "n width"]) -> Float[Tensor, "n out"]:
        """What vectors of the site come to at the final norm: A h + b."""
        return self.carried(vectors) + self.constant

    def carried(self, directions: Float[Tensor, "n width"]) -> Float[Tensor, "n out"]:
        """What a step along a direction comes to: A u.

        Raises:
            DataError: there is no map, or it takes vectors of another width.
        """
        if self.missing is not None:
            raise DataError(f"the lens of {self.site} is not available: {self.missing}")
        if directions.shape[1] != self.matrix.shape[1]:
            raise DataError(
                f"directions of {directions.shape[1]} features: the lens of {self.site} takes "
                f"{self.matrix.shape[1]}"
            )
        return directions.float() @ self.matrix.T

    @property
    def caveat(self) -> str:
        """What to keep in mind when reading directions with it, or an empty text."""
        if self.missing is not None:
            return ""
        if self.r2 <= 0:
            return f"on held-out examples the map is no better than their mean (R² {self.r2:.2g})"
        if self.r2 < _WEAK:
            return (
                f"on held-out examples the map explains {self.r2:.0%} of the variance of what enters the "
                "final norm, so it misses most of what later blocks make of a vector"
            )
        if self.logit_agreement is not None and self.agreement.value < self.logit_agreement.value:
            return (
                f"on held-out examples the map names the model's next token less often than the logit lens "
                f"({self.agreement.value:.0%} against {self.logit_agreement.value:.0%})"
            )
        return ""

    def to_frame(self) -> pd.DataFrame:
        """One line a lens: lens, site, r2, agreement with its interval, tokens, examples."""
        import pandas as pd

        found: list[tuple[str, float | None, Estimate | None]] = [("data lens", self.r2, self.agreement)]
        found.append(("logit lens", self.logit_r2, self.logit_agreement))
        nothing = Estimate(float("nan"), float("nan"), float("nan"))
        lines = [
            {
                "lens": name,
                "site": self.site,
                "r2": r2,
                "agreement": (agreement or nothing).value,
                "low": (agreement or nothing).low,
                "high": (agreement or nothing).high,
                "tokens": self.tokens,
                "examples": self.examples,
            }
            for name, r2, agreement in found
        ]
        return pd.DataFrame(lines)

    def plot(self) -> Figure:
        """Agreement with the model's next token, and variance explained, beside the logit lens."""
        from reftlab.plotting import message_figure
        from reftlab.plotting.lens import lens_figure

        if self.missing is not None:
            return message_figure(f"Data lens of {self.site}", self.missing)
        scores: list[tuple[str, float | None, tuple[float, float, float] | None]] = [
            (name, r2, None if found is None else (found.value, found.low, found.high))
            for name, r2, found in (
                ("logit lens", self.logit_r2, self.logit_agreement),
                ("data lens", self.r2, self.agreement),
            )
        ]
        return lens_figure(self.site, scores, self.commonest)

    def _repr_html_(self) -> str:
        if self.missing is not None:
            return f"<p>{html.escape(repr(self))}</p>"
        table = self.to_frame().to_html(index=False, float_format="{:.3g}".format, na_rep="–")
        told = "".join(f"<p>{html.escape(text)}</p>" for text in (repr(self), self.note, self.caveat) if text)
        return told + table

    def __repr__(self) -> str:
        if self.missing is not None:
            return f"DataLens({self.site}: not available, {self.missing})"
        logit = "" if self.logit_agreement is None else f", logit lens {self.logit_agreement.value:.0%}"
        return (
            f"DataLens({self.site}: held-out R² {self.r2:.2g}, next token as the model's "
            f"{self.agreement.value:.0%}{logit}; {self.tokens} tokens of {self.examples} examples)"
        )
