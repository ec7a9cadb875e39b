"""What a sweep returns."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float

from reftlab.errors import DataError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Agreement", "SiteLabel", "SweepResult", "t_interval"]

What = Literal["effect", "normalised", "value", "attribution"]


@dataclass(frozen=True)
class SiteLabel:
    """A site of a sweep: its name in the model, the path that named it, and its block."""

    name: str
    path: str
    block: int | None


@dataclass(frozen=True)
class Agreement:
    """How far attribution patching is from the exact map, over all cells.

    Attributes:
        correlation: Pearson's, between estimated and exact effects; NaN where one of them is constant.
        mean_absolute: mean of |estimated − exact|.
        worst: largest |estimated − exact|.
        worst_cell: where that is: pair, site, head (or None) and token.
    """

    correlation: float
    mean_absolute: float
    worst: float
    worst_cell: tuple[int, str, int | None, str]

    def __str__(self) -> str:
        pair, site, head, token = self.worst_cell
        where = f"{site}{'' if head is None else f' head {head}'} at {token!r}, pair {pair}"
        return (
            f"correlation {self.correlation:.3f}, mean absolute error {self.mean_absolute:.3g}, "
            f"worst {self.worst:.3g} ({where})"
        )


@dataclass(frozen=True, eq=False)
class SweepResult:
    """The metric of every patched run.

    Attributes:
        metric: what was measured.
        unit: of its numbers; empty for pure numbers and functions of one's own.
        kind: `patch`, `ablate` or `noise`.
        direction: `denoise` or `noise`, for `patch`.
        sites: the sites, in the order of `values`' second axis.
        heads: numbers of the heads, or None where whole vectors were patched.
        columns: label of each column.
        every_token: whether each token is a column, and no column a position of several.
        tokens: for each pair, the text of each column's tokens in the run that was patched.
        values: the metric `(pair, site, head, column)`, float64; NaN where only attribution was wanted.
        clean, corrupt: the metric of the unpatched runs `(pair,)`; corrupt is NaN without such a run.
        estimates: attribution patching's effects `(pair, site, head, column)`, or None.
        counts: how many cells were computed, how many were found on disk, and how many were not run,
            by the reason.
        why: why whole passes were run in place of causal cones; empty where cones were.
        seconds: wall-clock time of this call.
    """

    metric: str
    unit: str
    kind: str
    direction: str
    sites: tuple[SiteLabel, ...]
    heads: tuple[int, ...] | None
    columns: tuple[str, ...]
    every_token: bool
    tokens: tuple[tuple[str, ...], ...]
    values: Float[np.ndarray, "pair site head column"]
    clean: Float[np.ndarray, " pair"]
    corrupt: Float[np.ndarray, " pair"]
    estimates: Float[np.ndarray, "pair site head column"] | None
    counts: Mapping[str, int]
    why: tuple[str, ...]
    seconds: float

    @property
    def pairs(self) -> int:
        """How many pairs of prompts there are, the n of every interval."""
        return len(self.values)

    @property
    def base(self) -> Float[np.ndarray, " pair"]:
        """The metric of the run that was patched."""
        return self.corrupt if self.kind == "patch" and self.direction == "denoise" else self.clean

    @property
    def effect(self) -> Float[np.ndarray, "pair site head column"]:
        """What each patch changed: the metric minus that of the unpatched run."""
        return self.values - self.base[:, None, None, None]

    @property
    def normalised(self) -> Float[np.ndarray, "pair site head column"]:
        """The metric on a scale on which the corrupted run is 0 and the clean run 1.

        NaN without corrupted prompts, and in pairs whose two runs measure the same.
        """
        between = (self.clean - self.corrupt)[:, None, None, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            found = (self.values - self.corrupt[:, None, None, None]) / between
        return np.where(np.isfinite(found), found, np.nan)

    @property
    def exact(self) -> bool:
        """Whether the cells were run, not only estimated."""
        return not bool(np.isnan(self.values).all())

    @cached_property
    def agreement(self) -> Agreement | None:
        """How far attribution is from the exact map; None without one of them."""
        if self.estimates is None or not self.exact:
            return None
        exact, found = self.effect, self.estimates
        off = np.abs(found - exact)
        pair, site, head, column = (int(n) for n in np.unravel_index(int(off.argmax()), off.shape))
        constant = exact.std() == 0 or found.std() == 0
        correlation = float("nan") if constant else float(np.corrcoef(exact.ravel(), found.ravel())[0, 1])
        cell = (
            pair,
            self.sites[site].name,
            None if self.heads is None else self.heads[head],
            self.tokens[pair][column],
        )
        return Agreement(correlation, float(off.mean()), float(off.max()), cell)

    def mean(self, what: What = "effect") -> Float[np.ndarray, "site head column"]:
        """Mean over the pairs of prompts."""
        return self._of(what).mean(0)

    def interval(
        self, what: What = "effect", level: float = 0.95
    ) -> tuple[Float[np.ndarray, "site head column"], Float[np.ndarray, "site head column"]]:
        """Ends of the t interval of the mean over pairs, `mean ± t·s/√n`; NaN for one pair.

        Args:
            what: `effect`, `normalised`, `value` or `attribution`.
            level: how often such an interval holds the mean of all pairs that might have been drawn.
        """
        return t_interval(self._of(what), level)

    def _of(self, what: str) -> Any:
        if what == "attribution":
            if self.estimates is None:
                raise DataError("there is no attribution here; sweep with attribution=True")
            return self.estimates
        known = {"effect": self.effect, "normalised": self.normalised, "value": self.values}
        if what not in known:
            raise DataError(f"what={what!r}: expected 'effect', 'normalised', 'value' or 'attribution'")
        return known[what]

    def to_frame(self) -> pd.DataFrame:
        """One line a cell and pair: where it is, its metric, its effect, and what attribution says."""
        import pandas as pd

        pair, site, head, column = (index.ravel() for index in np.indices(self.values.shape))
        frame = pd.DataFrame(
            {
                "pair": pair,
                "site": np.array([s.name for s in self.sites])[site],
                "block": pd.array([self.sites[number].block for number in site], dtype="Int64"),
                "head": pd.array(
                    [None if self.heads is None else self.heads[h] for h in head], dtype="Int64"
                ),
                "position": column,
                "column": np.array(self.columns)[column],
                "token": np.array(self.tokens, dtype=object)[pair, column],
                "value": self.values.ravel(),
                "effect": self.effect.ravel(),
                "normalised": self.normalised.ravel(),
            }
        )
        if self.estimates is not None:
            frame["attribution"] = self.estimates.ravel()
        return frame

    def summary(self, level: float = 0.95) -> pd.DataFrame:
        """One line a cell over all pairs: mean effect, the ends of its t interval, and n."""
        import pandas as pd

        what: What = "effect" if self.exact else "attribution"
        mean, (low, high) = self.mean(what), self.interval(what, level)
        site, head, column = (index.ravel() for index in np.indices(mean.shape))
        return pd.DataFrame(
            {
                "site": np.array([s.name for s in self.sites])[site],
                "block": pd.array([self.sites[number].block for number in site], dtype="Int64"),
                "head": pd.array(
                    [None if self.heads is None else self.heads[h] for h in head], dtype="Int64"
                ),
                "column": np.array(self.columns)[column],
                what: mean.ravel(),
                "low": low.ravel(),
                "high": high.ravel(),
                "n": self.pairs,
            }
        )

    def top(self, k: int = 10) -> pd.DataFrame:
        """The `k` cells with the largest mean effect of either sign, largest first; see `summary`."""
        if type(k) is not int or k < 1:
            raise DataError(f"k={k!r}: expected a whole number of 1 or more")
        frame = self.summary()
        what = "effect" if self.exact else "attribution"
        return frame.reindex(frame[what].abs().sort_values(ascending=False, kind="stable").index)[
            :k
        ].reset_index(drop=True)

    def plot(self, what: What | None = None) -> Figure:
        """A heat map of means over pairs: blocks × columns, or layers × heads; attribution stands beside it.

        Args:
            what: `effect`, `normalised`, `value` or `attribution`; the effect unless given.
        """
        from reftlab.sweeping.drawing import draw

        return draw(self, what)

    def __repr__(self) -> str:
        shape = " × ".join(
            [
                f"{len(self.sites)} sites",
                *([] if self.heads is None else [f"{len(self.heads)} heads"]),
                f"{len(self.columns)} columns",
            ]
        )
        parts = [f"{self.metric}", shape, f"{self.pairs} pair{'s' * (self.pairs != 1)}"]
        parts += [f"{count} {name}" for name, count in self.counts.items() if count]
        parts.append(f"{self.seconds:.1f} s")
        parts += [f"whole passes: {self.why[0]}"] if self.why else []
        error = self.agreement
        parts += [] if error is None else [f"attribution: {error}"]
        return f"SweepResult({'; '.join(parts)})"

    def _repr_html_(self) -> str:
        from reftlab.sweeping.drawing import inline

        table = self.top(10).to_html(index=False, float_format="{:.3g}".format, na_rep="–")
        return f"<div><p>{html.escape(repr(self))}</p>{inline(self.plot())}{table}</div>"


def t_interval(values: Any, level: float = 0.95) -> tuple[Any, Any]:
    """Ends of the t interval of the mean over the first axis; NaN for one value.

    Raises:
        DataError: the level is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise DataError(f"level={level!r}: expected a number between 0 and 1, such as 0.95")
    count, mean = len(values), values.mean(0)
    if count < 2:
        nothing = np.full_like(mean, np.nan)
        return nothing, nothing
    from scipy.stats import t  # type: ignore[import-untyped]

    half = t.ppf((1 + level) / 2, count - 1) * values.std(0, ddof=1) / np.sqrt(count)
    return mean - half, mean + half
