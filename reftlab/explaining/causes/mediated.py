"""What mediation returns."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor

from reftlab.errors import DataError
from reftlab.measuring import Estimate, mean_of, share_kept
from reftlab.sweeping.drawing import inline
from reftlab.sweeping.result import SiteLabel
from reftlab.training.settings import whole

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["ANSWER", "Mediation"]

ANSWER = "answer"
"""The column of the answer's tokens that the model is given."""

Kind = Literal["sufficiency", "necessity"]


@dataclass(frozen=True, eq=False)
class Mediation:
    """Which share of the edits' effect flows through each site and token.

    Shares are of means over examples, 1 for the whole effect: `sufficiency` is `(mean of the run without
    edits, with a cell's vectors from the edited run − mean without) / (mean with all edits − mean
    without)`; `necessity` is `(mean with all edits − mean of that run with a cell's vectors from the run
    without) / (the same)`. Neither adds up to 1 over cells: cells that follow one another carry the same
    effect, and cells side by side may replace each other. Where the interval of the whole effect holds 0
    there is nothing to have a share of, and all shares are NaN.

    Attributes:
        name: what was measured.
        unit: of its numbers.
        sites: the sites, in the order of the maps' first axis.
        heads: numbers of the heads, or None where whole vectors were patched.
        columns: label of each column of tokens.
        every_token: whether each token of the prompts is a column.
        examples: numbers of the examples in the caller's data.
        weights: `(example,)`, how much each counts in a mean.
        bare, full: `(example,)`, measured without any edit and with all.
        sufficient: `(site, head, column, example)`, measured without edits and a cell's vectors from the
            edited run; NaN where it was not run for want of time.
        necessary: the same with all edits and a cell's vectors from the run without; None where that was
            not asked for.
        counts: how many cells of all examples were computed, and how many were not, by the reason.
        why: why whole passes were run in place of causal cones; empty where cones were.
        note: what was left out, in words, or an empty text.
        seed: of the bootstrap.
        seconds: wall-clock time.
    """

    name: str
    unit: str
    sites: tuple[SiteLabel, ...]
    heads: tuple[int, ...] | None
    columns: tuple[str, ...]
    every_token: bool
    examples: tuple[int, ...]
    weights: Float[Tensor, " example"]
    bare: Float[Tensor, " example"]
    full: Float[Tensor, " example"]
    sufficient: Float[np.ndarray, "site head column example"]
    necessary: Float[np.ndarray, "site head column example"] | None
    counts: Mapping[str, int]
    why: tuple[str, ...]
    note: str
    seed: int
    seconds: float

    @property
    def effect(self) -> Estimate:
        """The whole effect: mean with all edits minus mean with none, in `unit`."""
        return mean_of(self.full - self.bare, self.weights, seed=self.seed)

    @cached_property
    def defined(self) -> bool:
        """Whether there is an effect to have a share of."""
        return not np.isnan(share_kept(self.full, self.bare, self.full, self.weights, seed=self.seed).value)

    @cached_property
    def sufficiency(self) -> Float[np.ndarray, "site head column"]:
        """Share of the effect that comes about through each cell alone."""
        return self._shares("sufficiency")

    @cached_property
    def necessity(self) -> Float[np.ndarray, "site head column"]:
        """Share of the effect that is lost without each cell."""
        return self._shares("necessity")

    def interval(
        self, kind: Kind = "sufficiency", *, draws: int = 2000, level: float = 0.95
    ) -> tuple[Float[np.ndarray, "site head column"], Float[np.ndarray, "site head column"]]:
        """Ends of the percentile bootstrap intervals of all shares, over examples; NaN for one example.

        Args:
            kind: `sufficiency` or `necessity`.
            draws: resamples of the examples, the same for all cells.
            level: of each interval by itself.
        """
        changes, effect, weights = self._changes(kind), self._effects, self.weights.double().numpy()
        if len(effect) < 2 or not self.defined:
            nothing = np.full(changes.shape[:-1], np.nan)
            return nothing, nothing
        rng = np.random.default_rng(self.seed)
        # How often each example is drawn, times its weight: one product then serves every cell.
        drawn = rng.multinomial(len(effect), np.full(len(effect), 1 / len(effect)), size=draws) * weights
        shares = changes @ drawn.T / (drawn @ effect)
        low, high = np.quantile(shares, [(1 - level) / 2, (1 + level) / 2], axis=-1)
        return low, high

    @property
    def _effects(self) -> Float[np.ndarray, " example"]:
        return np.asarray((self.full.double() - self.bare.double()).numpy())

    def _changes(self, kind: str) -> Float[np.ndarray, "site head column example"]:
        if kind == "sufficiency":
            return np.asarray(self.sufficient - self.bare.double().numpy())
        if kind != "necessity":
            raise DataError(f"kind={kind!r}: expected 'sufficiency' or 'necessity'")
        if self.necessary is None:
            raise DataError("necessity was not measured; call mediate with necessity=True")
        return np.asarray(self.full.double().numpy() - self.necessary)

    def _shares(self, kind: str) -> Float[np.ndarray, "site head column"]:
        changes, weights = self._changes(kind), self.weights.double().numpy()
        if not self.defined:
            return np.full(changes.shape[:-1], np.nan)
        # 0 is added so that no share is shown as −0.
        return np.asarray((changes * weights).sum(-1) / (self._effects * weights).sum() + 0.0)

    @property
    def sentence(self) -> str:
        """The finding in plain words."""
        from reftlab.explaining.causes.saying import of_mediation

        return of_mediation(self)

    def to_frame(self) -> pd.DataFrame:
        """One line a cell: site, block, head, column, and each share with the ends of its interval."""
        import pandas as pd

        site, head, column = (index.ravel() for index in np.indices(self.sufficient.shape[:-1]))
        lines = {
            "site": np.array([s.name for s in self.sites])[site],
            "block": pd.array([self.sites[number].block for number in site], dtype="Int64"),
            "head": pd.array([None if self.heads is None else self.heads[h] for h in head], dtype="Int64"),
            "position": column,
            "column": np.array(self.columns)[column],
        }
        kinds: tuple[Kind, ...] = ("sufficiency",) if self.necessary is None else ("sufficiency", "necessity")
        for kind in kinds:
            low, high = self.interval(kind)
            lines[kind] = self._shares(kind).ravel()
            lines[f"{kind}_low"], lines[f"{kind}_high"] = low.ravel(), high.ravel()
        return pd.DataFrame(lines)

    def top(self, k: int = 10, kind: Kind = "sufficiency") -> pd.DataFrame:
        """The `k` cells with the largest share of either sign, largest first."""
        whole("k", k, 1)
        self._changes(kind)
        frame = self.to_frame()
        order = frame[kind].abs().sort_values(ascending=False, kind="stable").index
        return frame.reindex(order)[:k].reset_index(drop=True)

    def plot(self) -> Figure:
        """Heat maps of both shares: blocks × tokens, or layers × heads."""
        from reftlab.plotting.mediation import mediation_figure

        shares = {"Sufficiency: what comes about through this cell alone": self.sufficiency}
        if self.necessary is not None:
            shares["Necessity: what is lost without this cell"] = self.necessity
        count = len(self.examples)
        title = (
            f"Effect of the edits on the {self.name}: {self.effect} {self.unit}; "
            f"{count} example{'s' * (count != 1)}"
        )
        return mediation_figure(
            shares, [site.path for site in self.sites], self._rows(), self.heads, self.columns, title,
            self.every_token, "" if self.defined else "the interval of the whole effect holds 0",
        )  # fmt: skip

    def _rows(self) -> list[str]:
        """Blocks where each site of a path has its own, and names otherwise."""
        blocks = [(site.path, site.block) for site in self.sites]
        alone = len(set(blocks)) == len(blocks) and all(block is not None for _, block in blocks)
        return [str(site.block) if alone else site.name for site in self.sites]

    def __repr__(self) -> str:
        heads = "" if self.heads is None else f" × {len(self.heads)} heads"
        parts = [
            f"{self.name}: effect {self.effect} {self.unit}",
            f"{len(self.sites)} sites{heads} × {len(self.columns)} columns, {len(self.examples)} examples",
            *(f"{count} {name}" for name, count in self.counts.items()),
            f"{self.seconds:.1f} s",
            *([f"whole passes: {self.why[0]}"] if self.why else []),
            *([self.note] if self.note else []),
        ]
        return f"Mediation({'; '.join(parts)})"

    def _repr_html_(self) -> str:
        table = self.top(10).to_html(index=False, float_format="{:.3g}".format, na_rep="–")
        return f"<div><p>{html.escape(repr(self))}</p>{inline(self.plot())}{table}</div>"
