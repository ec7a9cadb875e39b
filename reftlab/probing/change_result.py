"""What `probe_change` returns."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from reftlab.errors import DataError
from reftlab.plotting.wording import block_named, number
from reftlab.probing.sites import ProbedSite

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Changed", "ProbeChange"]

Values = Float[np.ndarray, "concept site column"]
Ends = Float[np.ndarray, "concept site column end"]


class Changed(NamedTuple):
    """One cell in which a concept is more, or less, decodable because of the edits.

    Attributes:
        concept, site, position: which.
        base, edited: score of probes trained and tested on the base run, and on the edited run.
        difference, low, high: edited minus base, and the ends of its interval.
        p_value: adjusted for all cells and concepts.
    """

    concept: str
    site: str
    position: str
    base: float
    edited: float
    difference: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True, eq=False)
class ProbeChange:
    """How well probes tell concepts from the vectors of the base run and of the edited run.

    All scores are of pooled out-of-fold predictions, the folds being the same for all. NaN stands where a
    site has no vectors at a position.

    Attributes:
        concepts: names of the concepts, the first axis.
        sites: the sites, the second axis.
        columns: the positions, the third axis.
        metrics: name of each concept's score: `balanced_accuracy` or `r2`.
        chance: each concept's score without information, `(concept,)`.
        base, edited: probes trained and tested on the one run, and on the other.
        transfer: probes trained on the base run, tested on the edited run.
        base_ends, edited_ends, transfer_ends: their bootstrap intervals over groups.
        difference: edited minus base, in the score's unit.
        difference_ends: its interval, the two runs being resampled together. It takes the trained
            probes as they are, and so is somewhat too narrow; the p-values refit them.
        transfer_difference_ends: the interval of transfer minus base.
        p_values: of no difference between base and edited, adjusted for all cells and concepts; NaN
            without swaps.
        level: of the intervals.
        folds, swaps, groups: number of folds, of swaps, and of groups of examples.
        edits: keys of the edits.
        estimator: what was fitted.
    """

    concepts: tuple[str, ...]
    sites: tuple[ProbedSite, ...]
    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    chance: Float[np.ndarray, " concept"]
    base: Values
    edited: Values
    transfer: Values
    base_ends: Ends
    edited_ends: Ends
    transfer_ends: Ends
    difference: Values
    difference_ends: Ends
    transfer_difference_ends: Ends
    p_values: Values
    level: float
    folds: int
    swaps: int
    groups: int
    edits: tuple[str, ...]
    estimator: str

    @property
    def transfer_difference(self) -> Values:
        """Transfer minus base: below 0 where the old direction no longer reads the concept."""
        return self.transfer - self.base

    def significant(self, level: float = 0.05) -> Bool[np.ndarray, "concept site column"]:
        """In which cells decodability differs, with a chance of at most `level` of any false one among all.

        Raises:
            DataError: a level that the swaps cannot reach.
        """
        least = 1 / (1 + self.swaps)
        if not self.swaps or isinstance(level, bool) or not least <= level < 1:
            raise DataError(
                f"level={level!r}: with {self.swaps} swaps p-values go down to {least:.3g}; give a level "
                "from there to 1, or more permutations="
            )
        return np.asarray(np.nan_to_num(self.p_values, nan=1.0) <= level)

    def gained(self, level: float = 0.05) -> tuple[Changed, ...]:
        """Where a concept is more decodable in the edited run, the largest difference first."""
        return self._changed(level, 1.0)

    def lost(self, level: float = 0.05) -> tuple[Changed, ...]:
        """Where a concept is less decodable in the edited run, the largest difference first."""
        return self._changed(level, -1.0)

    def _changed(self, level: float, sign: float) -> tuple[Changed, ...]:
        places = np.argwhere(self.significant(level) & (self.difference * sign > 0))
        found = []
        for c, s, p in places:
            low, high = self.difference_ends[c, s, p].tolist()
            base, edited, difference, p_value = (
                float(values[c, s, p]) for values in (self.base, self.edited, self.difference, self.p_values)
            )
            where = self.concepts[c], self.sites[s].name, self.columns[p]
            found.append(Changed(*where, base, edited, difference, low, high, p_value))
        return tuple(sorted(found, key=lambda one: -abs(one.difference)))

    @property
    def sentence(self) -> str:
        """Where concepts are more or less decodable because of the edits, in plain words.

        Raises:
            DataError: there were too few swaps to tell.
        """
        cells = int(np.isfinite(self.p_values).sum())
        many = f"{cells} place{'s' * (cells != 1)} probed"
        parts = [
            f"{word} decodable at {len(found)}, most at {block_named(found[0].site)} "
            f"({found[0].concept}, {number(found[0].base, '.2f')} to {number(found[0].edited, '.2f')})"
            for word, found in (("more", self.gained()), ("less", self.lost()))
            if found
        ]
        if not parts:
            return f"At none of {many} do the edits make labels more or less decodable (adjusted p ≤ 0.05)."
        return f"Of {many}, the edits make labels {' and '.join(parts)} (adjusted p ≤ 0.05)."

    def to_frame(self) -> pd.DataFrame:
        """One line a concept and cell: the three scores with intervals, the difference and its p-value."""
        import pandas as pd

        concept, site, column = (index.ravel() for index in np.indices(self.base.shape))
        frame: dict[str, Any] = {
            "concept": np.array(self.concepts, dtype=object)[concept],
            "site": np.array([one.name for one in self.sites], dtype=object)[site],
            "block": pd.array([self.sites[number].block for number in site], dtype="Int64"),
            "position": np.array(self.columns, dtype=object)[column],
            "metric": np.array(self.metrics, dtype=object)[concept],
            "chance": self.chance[concept],
        }
        for name in ("base", "edited", "transfer", "difference"):
            frame[name] = getattr(self, name).ravel()
            frame[f"{name}_low"], frame[f"{name}_high"] = getattr(self, f"{name}_ends").reshape(-1, 2).T
        frame["p_value"] = self.p_values.ravel()
        return pd.DataFrame(frame)

    def plot(self) -> Figure:
        """For each concept lines over the sites; for several positions heat maps of the difference."""
        from reftlab.plotting.probe_change import ChangePanel, probe_change_figure
        from reftlab.plotting.sweep import HeatMap, sweep_figure

        blocks = [site.block for site in self.sites]
        by_block = None not in blocks and len(set(blocks)) == len(blocks)
        rows = [str(block) for block in blocks] if by_block else [site.name for site in self.sites]
        axis = "block" if by_block else "site"
        edits = f"the edit{'s' * (len(self.edits) > 1)} {', '.join(self.edits)}"
        found = self.significant() if self.swaps >= 19 else np.zeros(self.base.shape, dtype=bool)
        if len(self.columns) > 1:
            maps = [
                HeatMap(concept, values, rows, self.columns, axis, "position")
                for concept, values in zip(self.concepts, self.difference, strict=True)
            ]
            scale = f"edited − base, {self.metrics[0].replace('_', ' ')}"
            return sweep_figure(maps, f"Decodability with {edits} minus without", scale)
        panels = [
            ChangePanel(
                concept,
                self.metrics[number].replace("_", " ").replace("r2", "R²"),
                self.base[number, :, 0],
                self.edited[number, :, 0],
                self.transfer[number, :, 0],
                self.base_ends[number, :, 0],
                self.edited_ends[number, :, 0],
                self.transfer_ends[number, :, 0],
                float(self.chance[number]),
                found[number, :, 0],
            )
            for number, concept in enumerate(self.concepts)
        ]
        return probe_change_figure(panels, rows, axis, f"Probes without and with {edits}", self.level)

    def __repr__(self) -> str:
        parts = [
            f"{len(self.concepts)} concept{'s' * (len(self.concepts) != 1)}, "
            f"{len(self.sites)} site{'s' * (len(self.sites) != 1)} × "
            f"{len(self.columns)} position{'s' * (len(self.columns) != 1)}, {self.groups} groups"
        ]
        if self.swaps >= 19:
            gained, lost = self.gained(), self.lost()
            parts.append(f"{len(gained)} cells gained, {len(lost)} lost at 0.05")
            parts += [
                f"most: {one.concept} {one.difference:+.3f} at {one.site}" for one in (gained + lost)[:1]
            ]
        return f"ProbeChange({'; '.join(parts)})"

    def _repr_html_(self) -> str:
        from reftlab.sweeping.drawing import inline

        frame = self.to_frame()
        order = frame["difference"].abs().sort_values(ascending=False, kind="stable").index
        table = frame.reindex(order)[:10].to_html(index=False, float_format="{:.3g}".format, na_rep="–")
        return f"<div><p>{html.escape(repr(self))}</p>{inline(self.plot())}{table}</div>"
