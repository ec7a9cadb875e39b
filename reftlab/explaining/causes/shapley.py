"""Shapley values: how much of the edits' whole effect each of their parts accounts for."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from reftlab.errors import DataError
from reftlab.explaining.causes.game import Coalitions, solved
from reftlab.explaining.causes.parts import By, game_of, taken_apart
from reftlab.explaining.progress import ticking
from reftlab.explaining.subject import Subject
from reftlab.measuring import Estimate, change_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from reftlab.runtime import BoundModel
    from reftlab.sweeping.metric import Metric

__all__ = ["ShapleyValues", "shapley", "shapley_values"]


@dataclass(frozen=True, eq=False)
class ShapleyValues:
    """Each part's share of what all parts do together, averaged over the orders in which they could come.

    The values of all parts sum to the whole effect, `full − none`, for each example.

    Attributes:
        by: what counts as one part, see `parts_of`.
        labels: names of the parts.
        name, unit: the behaviour, and its unit.
        weights: `(example,)`, how much each example counts in a mean.
        full, none: the behaviour with all parts and with none of them, `(example,)`.
        values: Shapley values of each example, `(part, example)`, in `unit`.
        last: what each part changes when it comes last, so what leaving it out undoes: with all parts minus
            with all but it, `(part, example)`.
        sampling: where orders were sampled, the mean values with intervals from the sampled orders alone,
            for these examples; None where the values are exact.
        interactions: where the values are exact, the Shapley interaction index of each two parts,
            `(part, part, example)`: above 0 where they add up to more together than apart, below where they
            do the same work; the diagonal is NaN.
        coalitions: how many sets of parts were measured for it.
        permutations: how many orders were sampled; 0 where the values are exact.
        seed: of the sampled orders and of the resamples.
        note: what was sampled, in words, or an empty text.
    """

    by: str
    labels: tuple[str, ...]
    name: str
    unit: str
    weights: Float[Tensor, " example"]
    full: Float[Tensor, " example"]
    none: Float[Tensor, " example"]
    values: Float[Tensor, "part example"]
    last: Float[Tensor, "part example"]
    sampling: tuple[Estimate, ...] | None
    interactions: Float[Tensor, "part part example"] | None
    coalitions: int
    permutations: int
    seed: int
    note: str = ""

    @property
    def exact(self) -> bool:
        """Whether all combinations were measured."""
        return self.sampling is None

    @property
    def estimates(self) -> tuple[Estimate, ...]:
        """Mean Shapley value of each part, in `unit`, with a bootstrap interval over the examples."""
        return tuple(map(self._estimate, self.values))

    @property
    def left_out(self) -> tuple[Estimate, ...]:
        """Mean of `last`, with a bootstrap interval over the examples."""
        return tuple(map(self._estimate, self.last))

    @property
    def effect(self) -> Estimate:
        """The whole effect of all parts: with all minus with none, in `unit`."""
        return self._estimate(self.full - self.none)

    def interaction(self, a: str, b: str) -> Estimate:
        """Mean interaction index of two parts, by label, with a bootstrap interval over the examples."""
        if self.interactions is None:
            raise DataError(f"interactions are known for exact values alone, and these are not: {self.note}")
        return self._estimate(self.interactions[self.labels.index(a), self.labels.index(b)])

    def _estimate(self, values: Tensor) -> Estimate:
        return change_of(values, self.weights, torch.stack([self.full, self.none]), seed=self.seed)

    @property
    def shares(self) -> tuple[float, ...]:
        """Each part's share of the whole effect; NaN where that is not told from 0."""
        whole = self.effect
        told = whole.value != 0 and (len(self.weights) < 2 or whole.excludes(0.0))
        return tuple(one.value / whole.value if told else float("nan") for one in self.estimates)

    @property
    def sentence(self) -> str:
        """The finding in plain words."""
        from reftlab.explaining.causes.saying import of_shapley

        return of_shapley(self)

    def to_frame(self) -> pd.DataFrame:
        """One line a part, in `unit`.

        Columns: part, shapley, low, high (over the examples), sampling_low, sampling_high (over the sampled
        orders; NaN where exact), left_out (the part's change when it comes last), difference (shapley −
        left_out, what it shares with others), share (of the whole effect; NaN where that is not told from 0).
        """
        import pandas as pd

        found, last, nan = self.estimates, self.left_out, float("nan")
        sampled = self.sampling or (Estimate(nan, nan, nan),) * len(found)
        return pd.DataFrame(
            {
                "part": list(self.labels),
                "shapley": [one.value for one in found],
                "low": [one.low for one in found],
                "high": [one.high for one in found],
                "sampling_low": [one.low for one in sampled],
                "sampling_high": [one.high for one in sampled],
                "left_out": [one.value for one in last],
                "difference": [one.value - other.value for one, other in zip(found, last, strict=True)],
                "share": list(self.shares),
            }
        )

    def interaction_frame(self) -> pd.DataFrame:
        """One line a pair of parts: a, b, interaction, low, high; empty where values are sampled."""
        import pandas as pd

        pairs = combinations(self.labels, 2) if self.interactions is not None else ()
        lines = [(a, b, e.value, e.low, e.high) for a, b in pairs for e in (self.interaction(a, b),)]
        return pd.DataFrame(lines, columns=["a", "b", "interaction", "low", "high"])

    def plot(self) -> Figure:
        """A bar a part with its interval over the examples, and a mark for what leaving it out undoes."""
        from reftlab.plotting.shapley import shapley_figure

        frame = self.to_frame()
        return shapley_figure(
            self.labels,
            frame[["shapley", "low", "high"]].to_numpy(),
            frame[["sampling_low", "sampling_high"]].to_numpy() if self.sampling else None,
            frame["left_out"].to_numpy(),
            by=self.by, whole=self.effect.value, name=self.name, unit=self.unit, note=self.note,
        )  # fmt: skip

    def _repr_html_(self) -> str:
        table = self.to_frame().to_html(index=False, float_format="{:.3g}".format, na_rep="–")
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        return f"<p>{html.escape(repr(self))}</p>{table}{note}"

    def __repr__(self) -> str:
        each = ", ".join(
            f"{label} {e.value:+.3g}" for label, e in zip(self.labels, self.estimates, strict=True)
        )
        kind = "exact" if self.exact else f"{self.permutations} orders sampled"
        return (
            f"ShapleyValues({self.name} in {self.unit}, {kind}, {self.coalitions} coalitions: {each}; "
            f"sum {self.effect.value:+.3g})"
        )


def shapley(
    reft: BoundModel,
    examples: Any,
    by: By = "edit",
    *,
    of: str | Sequence[str] | None = None,
    metric: Metric | Callable[[Tensor], Tensor] | None = None,
    exact_up_to: int = 10,
    permutations: int = 100,
    budget: float | None = None,
    chat: bool | None = None,
    system: str | None = None,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    progress: bool = True,
    seed: int = 0,
) -> ShapleyValues:
    """Share the edits' effect on a behaviour out among their parts by Shapley values.

    A part's value is what it changes when it joins those before it, averaged over all orders:
    `φ_i = Σ_S |S|! (n − |S| − 1)! / n! (v(S ∪ i) − v(S))` over all sets S of other parts, where v(S) is the
    behaviour when only the parts in S act. Two parts that do the same work share it equally, where leaving
    one out alone would find that neither matters.

    Args:
        reft: a bound model with its tokenizer.
        examples: (prompt, answer) pairs, or anything that `rl.train` takes.
        by, of, metric: as for `leave_one_out`.
        exact_up_to: up to so many parts, all `2ⁿ` combinations are measured.
        permutations: for more parts, how many random orders to sample, half of them the other half
            reversed; an odd number counts as the next even one.
        budget: seconds after which no further combination is begun; None for no limit. Where there is no
            time for all combinations, orders are sampled, at least one and its reverse.
        chat, system, sources, progress: as for `leave_one_out`.
        seed: of the sampled orders and of the bootstrap.

    Returns:
        Values for each example and their means, with intervals over the examples, and over the sampled
        orders where values are sampled.

    Raises:
        DataError: examples or arguments that cannot be used.

    Source: Shapley, "A value for n-person games" (1953); sampling: Castro, Gómez and Tejada, "Polynomial
    calculation of the Shapley value based on sampling" (2009), with reversed orders as in Mitchell et al.,
    "Sampling permutations for Shapley value estimation" (2022); interaction index: Grabisch and Roubens,
    "An axiomatic approach to the concept of interaction among players in cooperative games" (1999).

    >>> rl.shapley(reft, pairs, by="layer").to_frame()                       # doctest: +SKIP
    """
    subject = Subject.of("shapley", reft, examples, metric, chat=chat, system=system, sources=sources)
    parts = taken_apart(subject, by, of)
    with ticking("shapley", "sets", progress) as tick:
        game = game_of(reft, subject.behaviour, parts, tick)
        return shapley_values(
            game, exact_up_to=exact_up_to, permutations=permutations, budget=budget, seed=seed
        )


def shapley_values(
    game: Coalitions,
    *,
    exact_up_to: int = 10,
    permutations: int = 100,
    budget: float | None = None,
    seed: int = 0,
) -> ShapleyValues:
    """As `shapley`, of any game.

    Args:
        game: from `game_of`, or of one's own making; what it has measured before is not measured again.
        exact_up_to, permutations, budget, seed: as for `shapley`.

    >>> glove = Coalitions(lambda s: torch.tensor([float({0, 1} <= s or {0, 2} <= s)]), ["left", "r1", "r2"])
    >>> [round(one.value, 4) for one in shapley_values(glove).estimates]
    [0.6667, 0.1667, 0.1667]
    """
    before = game.ran
    found = solved(game, exact_up_to=exact_up_to, permutations=permutations, budget=budget, seed=seed)
    everyone = game.everything
    last = torch.stack([game(everyone) - game(everyone - {player}) for player in range(len(game))])
    return ShapleyValues(
        game.by, game.labels, game.name, game.unit, game.weights, game(everyone), game(), found.values, last,
        found.sampling, found.interactions, game.ran - before, found.permutations, seed, found.note,
    )  # fmt: skip
