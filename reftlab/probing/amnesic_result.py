"""What amnesic probing returns."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from reftlab.errors import DataError, did_you_mean
from reftlab.measuring import Estimate
from reftlab.probing.checks import check_level

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Amnesic", "Erasure"]


@dataclass(frozen=True, eq=False)
class Erasure:
    """The concept erased at one site and position by one method.

    Attributes:
        site: the path.
        block: number of the block that it is in, or None.
        position: at which tokens.
        method: `leace` or `inlp`.
        ranks: how many directions the eraser of each fold removes.
        values: the behaviour of each example, `(example,)`.
        change: mean of `values` minus the behaviour without erasure, in its unit.
        shift: mean of the absolute value of each example's change, the statistic of the p-values:
            it counts also where examples change in opposite directions.
        random_shifts: the same for random subspaces of the same rank, `(draw,)`.
        shuffled_shifts: the same for erasers fitted on shuffled labels, `(draw,)`; empty for INLP.
        probe_before, probe_after: what a new probe finds of the concept in vectors that the eraser was not
            fitted on, before and after the erasure.
        effect: what the model's own edits change with the concept erased; None for a model without edits.
        random_effects: the same with random subspaces erased, `(draw,)`.
        p_random, p_shuffled: share of the draws, this one counted among them, whose shift is as large;
            `p_shuffled` is NaN for INLP.
        p_effect: share of the random draws that change the edits' effect as much; NaN without edits.
        p_adjusted: as `p_value`, but for all erasures of the result together.
    """

    site: str
    block: int | None
    position: str
    method: str
    ranks: tuple[int, ...]
    values: Float[np.ndarray, " example"]
    change: Estimate
    shift: Estimate
    random_shifts: Float[np.ndarray, " draw"]
    shuffled_shifts: Float[np.ndarray, " shuffle"]
    probe_before: Estimate
    probe_after: Estimate
    effect: Estimate | None
    random_effects: Float[np.ndarray, " own"]
    p_random: float
    p_shuffled: float
    p_effect: float
    p_adjusted: float

    @property
    def rank(self) -> int:
        """How many directions are removed, the most of all folds."""
        return max(self.ranks)

    @property
    def p_value(self) -> float:
        """The larger of its own two p-values: an effect is to exceed both controls."""
        return float(np.nanmax([self.p_random, self.p_shuffled]))

    def __repr__(self) -> str:
        probe = f"probe {self.probe_before.value:.3g} → {self.probe_after.value:.3g}"
        return (
            f"Erasure({self.method} at {self.site} @ {self.position}: rank {self.rank}, change "
            f"{self.change}, p {self.p_value:.3g} ({self.p_adjusted:.3g} among all), {probe})"
        )


@dataclass(frozen=True, eq=False)
class Amnesic:
    """What becomes of a behaviour when a concept is erased, site by site and position by position.

    Attributes:
        name, unit: what is measured of the behaviour.
        examples: numbers of the examples that it is measured on, in the caller's data.
        weights: how much each counts in a mean, `(example,)`: its answer tokens, or 1.
        before: the behaviour without erasure, `(example,)`.
        effect: what the model's own edits change without erasure; None for a model without edits.
        erasures: one for each site, position and method.
        score: name of the probes' score.
        chance: what it is without information.
        draws: how many controls of each kind there are.
        folds: in how many parts the data were split to fit erasers on others than those looked at.
        held_out: whether the behaviour is measured on other examples than its eraser was fitted on.
        fitted: how many examples the erasers and probes were fitted on, all parts together.
    """

    name: str
    unit: str
    examples: Int[np.ndarray, " example"]
    weights: Float[np.ndarray, " example"]
    before: Float[np.ndarray, " example"]
    effect: Estimate | None
    erasures: tuple[Erasure, ...]
    score: str
    chance: float
    draws: int
    folds: int
    held_out: bool
    fitted: int

    @property
    def note(self) -> str:
        """What was sampled, and what the numbers do not say."""
        said = [
            "Each example was measured with erasers fitted on the other parts of the data."
            if self.held_out
            else "The erasers were fitted on all of data and measured on the examples given apart."
        ]
        if self.held_out and len(self.examples) < self.fitted:
            said.append(f"Of {self.fitted} examples the {len(self.examples)} with an answer were measured.")
        said.append(
            f"p-values come from {self.draws} draws of each control, are no smaller than "
            f"{1 / (1 + self.draws):.2g}; p_random and p_shuffled are each erasure's own, and p_adjusted "
            f"holds for all {len(self.erasures)} together."
        )
        left = [self._named(e) for e in self.erasures if e.probe_after.low > self.chance]
        if left:
            said.append(
                "New probes still find the concept in vectors that the eraser was not fitted on, so it was "
                f"not wholly erased: {', '.join(left)}."
            )
        empty = [self._named(e) for e in self.erasures if 0 in e.ranks]
        if empty:
            said.append(f"Nothing was found to remove in some or all parts: {', '.join(empty)}.")
        return " ".join(said)

    def of(self, site: str | None = None, method: str | None = None, position: str | None = None) -> Erasure:
        """The erasure at one site and position by one method; what there is only one of may be left out.

        Raises:
            DataError: there is none, or there are several.
        """
        found = [
            e
            for e in self.erasures
            if site in (None, e.site) and method in (None, e.method) and position in (None, e.position)
        ]
        if len(found) == 1:
            return found[0]
        known = [self._named(e) for e in self.erasures]
        hint = did_you_mean(str(site), {e.site for e in self.erasures}) if site else ""
        asked = f"{site!r}, {method!r}" + (f", {position!r}" if position is not None else "")
        raise DataError(f"of({asked}) names {len(found)} erasures; there is {', '.join(known)}.{hint}")

    def significant(self, level: float = 0.05) -> tuple[Erasure, ...]:
        """The erasures that shift the behaviour more than both controls, by `p_adjusted`.

        Args:
            level: how often any one without effect may be among them.

        Raises:
            DataError: so few draws that no p-value can be as small.
        """
        check_level(level, 0.05)
        if level < 1 / (1 + self.draws):
            raise DataError(
                f"level={level!r}: with draws={self.draws} no p-value is below {1 / (1 + self.draws):.3g}; "
                f"give draws={int(np.ceil(1 / level)) - 1} or more"
            )
        return tuple(e for e in self.erasures if e.p_adjusted <= level)

    def to_frame(self) -> pd.DataFrame:
        """One line an erasure: the behaviour before and after, its change and controls, and the probe."""
        import pandas as pd

        return pd.DataFrame([self._line(e) for e in self.erasures])

    def _line(self, e: Erasure) -> dict[str, object]:
        weights = self.weights / self.weights.sum()
        line: dict[str, object] = {
            "site": e.site,
            "block": e.block,
            "position": e.position,
            "method": e.method,
            "rank": e.rank,
            "before": float(self.before @ weights),
            "after": float(e.values @ weights),
            "change": e.change.value,
            "change_low": e.change.low,
            "change_high": e.change.high,
            "shift": e.shift.value,
            "random_shift": float(e.random_shifts.mean()),
            "shuffled_shift": float(e.shuffled_shifts.mean()) if len(e.shuffled_shifts) else float("nan"),
            "p_random": e.p_random,
            "p_shuffled": e.p_shuffled,
            "p_adjusted": e.p_adjusted,
            "probe_before": e.probe_before.value,
            "probe_after": e.probe_after.value,
            "probe_after_low": e.probe_after.low,
            "probe_after_high": e.probe_after.high,
        }
        if self.effect is not None and e.effect is not None:
            line |= {
                "effect_before": self.effect.value,
                "effect_after": e.effect.value,
                "effect_low": e.effect.low,
                "effect_high": e.effect.high,
                "effect_random": float(e.random_effects.mean()),
                "p_effect": e.p_effect,
            }
        return line

    def plot(self) -> Figure:
        """How far each erasure shifts the behaviour beside its controls, and what a probe finds after it."""
        from reftlab.plotting.amnesic import AmnesicPoint, amnesic_figure

        several = len({e.position for e in self.erasures}) > 1
        points = [
            AmnesicPoint(
                (e.site if e.block is None else str(e.block)) + f" @ {e.position}" * several,
                e.method,
                (e.shift.value, e.shift.low, e.shift.high),
                tuple(e.random_shifts.tolist()),
                tuple(e.shuffled_shifts.tolist()),
                (e.probe_before.value, e.probe_before.low, e.probe_before.high),
                (e.probe_after.value, e.probe_after.low, e.probe_after.high),
            )
            for e in self._shown()
        ]
        by_block = all(e.block is not None for e in self._shown())
        return amnesic_figure(
            points,
            self.name,
            self.unit,
            self.score.replace("_", " "),
            self.chance,
            ("block" if by_block else "site") + " and position" * several,
        )

    def _named(self, e: Erasure) -> str:
        """What an erasure is called, by position too where there are several."""
        several = len({one.position for one in self.erasures}) > 1
        return f"{e.method} at {e.site}" + f" @ {e.position}" * several

    def _shown(self) -> tuple[Erasure, ...]:
        """The erasures, without block numbers where these do not tell sites apart."""
        from dataclasses import replace

        sites = {e.site: e.block for e in self.erasures}
        if None not in sites.values() and len(set(sites.values())) == len(sites):
            return self.erasures
        return tuple(replace(e, block=None) for e in self.erasures)

    def __repr__(self) -> str:
        shown = "; ".join(map(repr, self.erasures[:4])) + ("; …" if len(self.erasures) > 4 else "")
        return f"Amnesic({self.name} of {len(self.examples)} examples; {shown})"

    def _repr_html_(self) -> str:
        from reftlab.sweeping.drawing import inline

        table = self.to_frame().to_html(index=False, float_format="{:.3g}".format, na_rep="–")
        head = f"{self.name}, {len(self.examples)} examples, {self.draws} draws of each control. {self.note}"
        return f"<div><p>{html.escape(head)}</p>{inline(self.plot())}{table}</div>"
