"""Dose-response: a behaviour against the strength of the edits."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reftlab.errors import DataError, did_you_mean
from reftlab.explaining.altering import altered, scaled
from reftlab.explaining.budget import Budget
from reftlab.explaining.progress import ticking
from reftlab.explaining.subject import Subject
from reftlab.measuring import ROUNDING, Behaviour, Estimate, change_of, mean_of
from reftlab.runtime.modes import evaluating

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from reftlab.runtime import BoundModel
    from reftlab.sweeping.metric import Metric

__all__ = ["DoseCurve", "DoseResponse", "dose_response", "dosed"]

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
TOGETHER = "all edits"

Shape = Literal["rising", "falling", "flat", "neither"]
_SAID = {"rising": "rising", "falling": "falling", "flat": "flat", "neither": "rising and falling"}


@dataclass(frozen=True, eq=False)
class DoseCurve:
    """A behaviour at several scales of one edit, or of all of them.

    Attributes:
        edit: name of the edit whose scale varies, the others staying at 1; None where all vary together.
        scales: factors of what the edit adds, ascending: 0 without it, 1 as it is.
        values: the behaviour, `(scale, example)`.
        weights: `(example,)`, how much each example counts in a mean.
        seed: of the bootstrap.
    """

    edit: str | None
    scales: tuple[float, ...]
    values: Float[Tensor, "scale example"]
    weights: Float[Tensor, " example"]
    seed: int

    @property
    def label(self) -> str:
        """The edit's name, or `all edits`."""
        return TOGETHER if self.edit is None else self.edit

    @property
    def means(self) -> tuple[Estimate, ...]:
        """Mean behaviour at each scale, with a bootstrap interval over the examples."""
        return tuple(mean_of(values, self.weights, seed=self.seed) for values in self.values)

    @property
    def effect(self) -> Estimate:
        """Mean at scale 1 minus mean at scale 0."""
        runs = torch.stack([self._at(1.0), self._at(0.0)])
        return change_of(runs[0] - runs[1], self.weights, runs, seed=self.seed)

    @property
    def shape(self) -> Shape:
        """Whether the mean rises or falls from every measured scale to the next."""
        means, rounding = self._means()
        steps = np.diff(means)
        up, down = bool((steps > rounding).any()), bool((steps < -rounding).any())
        if up and down:
            return "neither"
        return "rising" if up else "falling" if down else "flat"

    @property
    def course(self) -> tuple[tuple[float, float], ...]:
        """Where the mean turns: the last scale of each rise or fall, and the change over it, in order.

        Steps that rounding alone can make end no rise or fall; there is nothing where all are of that kind.
        """
        means, rounding = self._means()
        turns: list[tuple[float, float]] = []
        for scale, step in zip(self.scales[1:], np.diff(means).tolist(), strict=True):
            if abs(step) <= rounding:
                continue
            if turns and turns[-1][1] * step > 0:
                turns[-1] = scale, turns[-1][1] + step
            else:
                turns.append((scale, step))
        return tuple(turns)

    @property
    def extremes(self) -> tuple[float, float]:
        """The measured scales at which the mean is highest and lowest."""
        means, _ = self._means()
        return self.scales[int(means.argmax())], self.scales[int(means.argmin())]

    @property
    def best(self) -> float:
        """The measured scale at which the mean is farthest in the direction in which scale 1 moves it.

        Of scales that are as good the one nearest to 1; 1 where scale 1 moves nothing.
        """
        means, rounding = self._means()
        moved = means[self.scales.index(1.0)] - means[self.scales.index(0.0)]
        gains = np.sign(moved) * means if abs(moved) > rounding else 0 * means
        good = np.flatnonzero(gains >= gains.max() - rounding)
        return min((self.scales[place] for place in good), key=lambda scale: abs(scale - 1.0))

    def slope(self, scale: float) -> Estimate:
        """Change of the mean for a unit of scale, at one of the scales.

        Of second order in the distance to the nearest scales: their difference quotient on both sides, or of
        the two on one side at an end; `numpy.gradient` says how. Its interval is over the examples.

        Raises:
            DataError: not one of the scales, or fewer than three of them.
        """
        if scale not in self.scales or len(self.scales) < 3:
            raise DataError(f"slope({scale!r}): expected one of three or more scales, {list(self.scales)}")
        slopes = np.gradient(self.values.double().numpy(), self.scales, axis=0, edge_order=2)
        finest = float(np.diff(self.scales).min())
        slope = torch.from_numpy(slopes[self.scales.index(scale)])
        # Two of the runs, the largest ones at most, are apart by their difference over a step of scale.
        runs = self.values.abs().amax(0).expand(2, -1) / finest
        return change_of(slope, self.weights, runs, seed=self.seed)

    def _at(self, scale: float) -> Tensor:
        return self.values[self.scales.index(scale)]

    def _means(self) -> tuple[np.ndarray, float]:
        """Mean at each scale, and how far two of them are apart by rounding alone."""
        values, weights = self.values.double(), self.weights.double()
        means = ((values * weights).sum(1) / weights.sum()).numpy()
        return means, 2 * ROUNDING * float(np.abs(means).max())

    def __repr__(self) -> str:
        first, *_, final = self.scales
        how = f"{_SAID[self.shape]}, best at {self.best:g}"
        return f"DoseCurve({self.label!r} at scales {first:g} to {final:g}: {how})"


@dataclass(frozen=True, eq=False)
class DoseResponse:
    """A behaviour against the strength of the edits.

    Attributes:
        name, unit: the behaviour, and its unit.
        curves: all edits together first, where that was asked for, then each edit.
        note: what was left out, in words, or an empty text.
    """

    name: str
    unit: str
    curves: tuple[DoseCurve, ...]
    note: str = ""

    def __getitem__(self, edit: str | None) -> DoseCurve:
        """The curve of one edit, or of all together for None."""
        for curve in self.curves:
            if curve.edit == edit:
                return curve
        raise KeyError(f"there is no curve of {edit!r}; there is {[curve.edit for curve in self.curves]}")

    @property
    def sentence(self) -> str:
        """The finding in plain words."""
        from reftlab.explaining.causes.saying import of_dose

        return of_dose(self)

    def to_frame(self) -> pd.DataFrame:
        """One line a curve and scale, in `unit`: edit, scale, mean, low, high."""
        import pandas as pd

        lines = [
            (curve.label, scale, mean.value, mean.low, mean.high)
            for curve in self.curves
            for scale, mean in zip(curve.scales, curve.means, strict=True)
        ]
        return pd.DataFrame(lines, columns=["edit", "scale", "mean", "low", "high"])

    def summary_frame(self) -> pd.DataFrame:
        """One line a curve: edit, effect (scale 1 minus 0), shape, best, slope_at_0, slope_at_1."""
        import pandas as pd

        def slope(curve: DoseCurve, scale: float) -> float:
            return curve.slope(scale).value if len(curve.scales) > 2 else float("nan")

        lines = [
            (curve.label, curve.effect.value, curve.shape, curve.best, slope(curve, 0.0), slope(curve, 1.0))
            for curve in self.curves
        ]
        return pd.DataFrame(lines, columns=["edit", "effect", "shape", "best", "slope_at_0", "slope_at_1"])

    def plot(self) -> Figure:
        """The behaviour against the scale: means with their intervals, and single examples behind them."""
        from reftlab.plotting.dose import dose_figure

        curves = [
            (
                curve.label,
                curve.scales,
                [(m.value, m.low, m.high) for m in curve.means],
                curve.values.T.tolist(),
            )
            for curve in self.curves
        ]
        return dose_figure(curves, self.name, self.unit, self.note)

    def _repr_html_(self) -> str:
        tables = (
            frame.to_html(index=False, float_format="{:.3g}".format)
            for frame in (self.summary_frame(), self.to_frame())
        )
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        return f"<p>{html.escape(repr(self))}</p>{''.join(tables)}{note}"

    def __repr__(self) -> str:
        each = "; ".join(
            f"{curve.label} {_SAID[curve.shape]}, best at {curve.best:g}" for curve in self.curves
        )
        return f"DoseResponse({self.name} in {self.unit}: {each})"


def dose_response(
    reft: BoundModel,
    examples: Any,
    scales: Sequence[float] = SCALES,
    *,
    edits: str | Sequence[str] | None = None,
    together: bool = True,
    metric: Metric | Callable[[Tensor], Tensor] | None = None,
    budget: float | None = None,
    chat: bool | None = None,
    system: str | None = None,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    progress: bool = True,
    seed: int = 0,
) -> DoseResponse:
    """Measure a behaviour at several strengths of the edits.

    Args:
        reft: a bound model with its tokenizer.
        examples: (prompt, answer) pairs, or anything that `rl.train` takes.
        scales: factors of what the edits add, besides their own strength; 0 and 1 are always measured.
        edits: names of the edits to vary one at a time, the others staying at 1; each of them unless given,
            and none for `[]`.
        together: whether to vary all edits of the graph together as well. For a single edit that is the
            same, and there is one curve.
        metric: what to measure of the logits after the prompt; as for `leave_one_out`.
        budget: seconds after which no further scale is begun; None for no limit. 0 and 1 are measured
            first, then scales the farthest from those that were.
        chat, system, sources, progress: as for `leave_one_out`.
        seed: of the bootstrap.

    Returns:
        A curve with bootstrap intervals over the examples for each edit and for all together.

    Raises:
        DataError: scales, examples or arguments that cannot be used.

    >>> rl.dose_response(reft, pairs).plot()                                 # doctest: +SKIP
    """
    wanted = _checked_scales(scales)
    subject = Subject.of("dose_response", reft, examples, metric, chat=chat, system=system, sources=sources)
    with ticking("dose response", "doses", progress) as tick:
        return dosed(
            reft, subject.behaviour, wanted, edits=edits, together=together, budget=budget, seed=seed,
            tick=tick,
        )  # fmt: skip


def dosed(
    reft: BoundModel,
    behaviour: Behaviour,
    scales: Sequence[float] = SCALES,
    *,
    edits: str | Sequence[str] | None = None,
    together: bool = True,
    budget: float | None = None,
    seed: int = 0,
    tick: Callable[[str], None] = lambda what: None,
) -> DoseResponse:
    """As `dose_response`, of a behaviour that is at hand.

    Args:
        reft: the bound model.
        behaviour: what to measure.
        scales, edits, together, budget, seed: as for `dose_response`.
        tick: called after each measurement with a few words for a progress bar.
    """
    wanted, clock = _checked_scales(scales), Budget(budget)
    names = _names(reft, edits, together)
    every = tuple(dict.fromkeys(bound.edit.name for bound in reft.edits))
    found = {name: {1.0: behaviour.full} for name in names}
    for name in names:
        if name is None or every == (name,):
            found[name][0.0] = behaviour.bare
    left = 0
    for scale in _by_distance(wanted):
        for name in names:
            if scale in found[name]:
                continue
            if scale != 0.0 and clock.used_up:
                left += 1
                continue
            found[name][scale] = _measured(reft, behaviour, every if name is None else (name,), scale)
            tick(f"{TOGETHER if name is None else name} × {scale:g}")
    note = (
        f"the budget of {budget:g} seconds ran out before {left} of the doses were measured" if left else ""
    )
    curves = (
        DoseCurve(name, tuple(sorted(at)), torch.stack([at[s] for s in sorted(at)]), behaviour.weights, seed)
        for name, at in found.items()
    )
    return DoseResponse(behaviour.name, behaviour.unit, tuple(curves), note)


def _measured(reft: BoundModel, behaviour: Behaviour, names: Sequence[str], scale: float) -> Tensor:
    changes = {bound.key: scaled(scale) for bound in reft.edits if bound.edit.name in names}
    with evaluating(reft), torch.no_grad(), altered(reft, changes):
        return behaviour()


def _names(reft: BoundModel, edits: str | Sequence[str] | None, together: bool) -> list[str | None]:
    """Whose scales vary: None for all edits together, and names."""
    known = list(dict.fromkeys(bound.edit.name for bound in reft.edits))
    if not known:
        raise DataError("this graph has no edits, so there is nothing to scale")
    names = known if edits is None else [edits] if isinstance(edits, str) else list(dict.fromkeys(edits))
    for name in names:
        if name not in known:
            raise DataError(
                f"edits={name!r}: there is no such edit; there is {known}.{did_you_mean(name, known)}"
            )
    if not names and not together:
        raise DataError("edits=[] and together=False leave nothing to scale")
    alone = len(known) == 1 and bool(names)
    return [*([None] if together and not alone else []), *names]


def _checked_scales(scales: Any) -> tuple[float, ...]:
    """The scales with 0 and 1, ascending, each once."""
    given = [scales] if isinstance(scales, str | bytes) or not hasattr(scales, "__iter__") else list(scales)
    for scale in given:
        if isinstance(scale, bool | str | bytes) or not isinstance(scale, int | float) or not isfinite(scale):
            raise DataError(f"scales: {scale!r} is no finite number; expected factors such as (0, 0.5, 1, 2)")
    return tuple(sorted({0.0, 1.0, *map(float, given)}))


def _by_distance(scales: Sequence[float]) -> list[float]:
    """0 and 1, then always the scale that is the farthest from all before it."""
    order = [0.0, 1.0]
    while left := [scale for scale in scales if scale not in order]:
        order.append(max(left, key=lambda scale: min(abs(scale - other) for other in order)))
    return order
