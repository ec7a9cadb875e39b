"""Numbers with intervals, by the bootstrap over examples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftlab.errors import DataError

__all__ = ["ROUNDING", "Estimate", "change_of", "expanded", "mean_of", "precision_of", "rounding_in"]
__all__ += ["share_kept"]

_ROUNDINGS, _ROUNDINGS_HALF = 16, 2
ROUNDING = _ROUNDINGS * 2.0**-23
"""What float32 may change in sums and differences of runs, relative to the sum of their sizes."""


@dataclass(frozen=True)
class Estimate:
    """A number, and the interval that a bootstrap over examples gives it.

    Attributes:
        value: the number; NaN where it is not defined.
        low, high: ends of the interval; NaN for fewer than two examples.
        level: how often such intervals hold the truth, 0.95 for 95%.
    """

    value: float
    low: float
    high: float
    level: float = 0.95

    def __format__(self, form: str) -> str:
        form = form or ".3g"
        if math.isnan(self.value):
            return "not defined"
        shown = f"{self.value:{form}}"
        return shown if math.isnan(self.low) else f"{shown} [{self.low:{form}}, {self.high:{form}}]"

    def __str__(self) -> str:
        return format(self, "")

    def excludes(self, value: float) -> bool:
        """Whether the interval leaves a value out; False where there is no interval."""
        return self.low > value or self.high < value


def mean_of(
    values: Float[Tensor, " example"],
    weights: Float[Tensor, " example"] | None = None,
    *,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Weighted mean over examples with its bootstrap interval, the percentile one expanded for few examples.

    Args:
        values: `(example,)`.
        weights: `(example,)`, such as the number of answer tokens of each; equal unless given.
        draws: resamples of the examples.
        level: of the interval.
        seed: of the resamples.
    """
    columns = _columns(values, weights)
    return _bootstrap(_mean, columns, draws, level, seed)


def change_of(
    values: Float[Tensor, " example"],
    weights: Float[Tensor, " example"],
    measured: Float[Tensor, "run example"],
    *,
    step: float = ROUNDING,
    seed: int = 0,
) -> Estimate:
    """Weighted mean of differences between runs, with a bootstrap interval over the examples.

    Differences that rounding alone may make count as 0: a part that nothing can see changes every example
    by the same few last digits, and a bootstrap would take that for an effect.

    Args:
        values: `(example,)`, differences.
        weights: `(example,)`.
        measured: the values of the runs that they are made of, which say how large rounding is.
        step: what rounding may change, relative to these; `rounding_in` says it of a model.
        seed: of the bootstrap.
    """
    room = step * float(measured.abs().sum(0).max())
    return mean_of(torch.where(values.abs() <= room, 0.0, values), weights, seed=seed)


def precision_of(model: nn.Module) -> torch.dtype:
    """The dtype of a model's first floating-point parameter; float32 where it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def rounding_in(model: nn.Module) -> float:
    """What rounding may change in sums and differences of a model's runs, relative to their sizes' sum.

    16 units of float32's or float64's last place, and 2 of half precision's: in bfloat16 the answer losses
    of SmolLM2-135M differ by up to 1.25 of them between batch sizes and kinds of attention.
    """
    dtype = precision_of(model)
    return (_ROUNDINGS_HALF if dtype.itemsize < 4 else _ROUNDINGS) * torch.finfo(dtype).eps


def share_kept(
    values: Float[Tensor, " example"],
    bare: Float[Tensor, " example"],
    full: Float[Tensor, " example"],
    weights: Float[Tensor, " example"] | None = None,
    *,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Which share of an effect is left: `(mean values − mean bare) / (mean full − mean bare)`.

    1 where the behaviour is that of all edits, 0 where it is that of none, below 0 where it is worse
    than without; the sign of the behaviour does not matter. Where the whole effect's own interval holds
    0 there is nothing to have a share of, and the value is NaN. Where few examples carry the effect, some
    resamples hold none of these; they have no share, and the interval is of the others.

    Args:
        values: the behaviour to judge, `(example,)`.
        bare, full: the same without any edit and with all, on the same examples.
        weights, draws, level, seed: as for `mean_of`; whole examples are resampled, so the three stay
            paired.
    """
    effect = mean_of(full - bare, weights, draws=draws, level=level, seed=seed)
    if effect.value == 0 or (len(full) > 1 and not effect.excludes(0.0)):
        return Estimate(math.nan, math.nan, math.nan, level)
    value, whole = _columns(values - bare, weights), _columns(full - bare, weights)
    return _bootstrap(_ratio, (value[0], whole[0], value[1]), draws, level, seed)


def _mean(values: Any, weights: Any, axis: int = -1) -> Any:
    return (values * weights).sum(axis) / weights.sum(axis)


def _ratio(values: Any, whole: Any, weights: Any, axis: int = -1) -> Any:
    effect = (whole * weights).sum(axis)
    # Plus 0, so that no share is minus 0.
    return (values * weights).sum(axis) / np.where(effect == 0, math.nan, effect) + 0.0


def _columns(values: Tensor, weights: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    numbers = values.detach().double().cpu().numpy()
    if weights is not None and weights.shape != values.shape:
        raise DataError(f"weights={tuple(weights.shape)}: expected one for each of {len(values)} examples")
    return numbers, np.ones_like(numbers) if weights is None else weights.double().cpu().numpy()


def expanded(level: float, count: int) -> float:
    """The level at which percentile intervals of `count` examples hold the truth as often as `level`.

    Resamples of few examples vary too little, by √((n − 1) / n), and know nothing of how well so few can
    tell their own spread. Hesterberg, "What Teachers Should Know About the Bootstrap" (2015), section 3.3:
    the expanded percentile interval, as long as a t interval where values are normal.

    >>> round(expanded(0.95, 8), 3), round(expanded(0.95, 1000), 3)
    (0.989, 0.95)
    """
    from scipy.stats import norm, t  # type: ignore[import-untyped]

    tail = norm.cdf(math.sqrt(count / (count - 1)) * t.ppf((1 - level) / 2, count - 1))
    return 1 - 2 * float(tail)


def _bootstrap(
    statistic: Any, columns: tuple[np.ndarray, ...], draws: int, level: float, seed: int
) -> Estimate:
    value, count = float(statistic(*columns)), len(columns[0])
    if count < 2:
        return Estimate(value, math.nan, math.nan, level)
    wider = expanded(level, count)
    rows = np.random.default_rng(seed).integers(0, count, (draws, count))
    found = statistic(*(column[rows] for column in columns))
    low, high = np.nanquantile(found, [(1 - wider) / 2, (1 + wider) / 2])
    return Estimate(value, float(low), float(high), level)
