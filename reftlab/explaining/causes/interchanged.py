"""What interchange accuracy returns."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Bool
from torch import Tensor

from reftlab.measuring import Estimate, mean_of
from reftlab.sweeping.drawing import inline

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["DirectionRemoved", "InterchangeAccuracy", "wilson"]


@dataclass(frozen=True, eq=False)
class DirectionRemoved:
    """Interchange without one direction of a learned basis.

    Attributes:
        edit: name of the edit.
        direction: number of the direction.
        accuracy: of the interchange along the others.
        change: of the accuracy, that of all directions taken away; below 0 where the direction is needed.
    """

    edit: str
    direction: int
    accuracy: Estimate
    change: Estimate


@dataclass(frozen=True, eq=False)
class InterchangeAccuracy:
    """Share of examples that interchange answers as the counterfactual does, beside its controls.

    Attributes:
        match: what counts as right.
        right: `(example,)`, whether each is with the learned swap.
        whole: `(example,)`, with whole vectors swapped at the same places.
        none: `(example,)`, without any swap.
        random: `(draw, example)`, with the learned swap in randomly rotated coordinates: as many directions,
            swapped as far, in a random subspace.
        ranks: by edit how many directions are swapped, the sum of the swap's amounts; a fraction where a
            mask is soft.
        removed: accuracy without one direction at a time.
        note: what was left out, in words, or an empty text.
        seed: of the random subspaces and the bootstrap.
    """

    match: str
    right: Bool[Tensor, " example"]
    whole: Bool[Tensor, " example"]
    none: Bool[Tensor, " example"]
    random: Bool[Tensor, "draw example"]
    ranks: Mapping[str, float]
    removed: tuple[DirectionRemoved, ...]
    note: str
    seed: int

    @property
    def accuracy(self) -> Estimate:
        """Interchange accuracy, with its Wilson interval."""
        return wilson(self.right)

    @property
    def whole_accuracy(self) -> Estimate:
        """Accuracy of swapping whole vectors, with its Wilson interval."""
        return wilson(self.whole)

    @property
    def accuracy_without_swap(self) -> Estimate:
        """Accuracy without a swap, with its Wilson interval."""
        return wilson(self.none)

    @property
    def random_accuracy(self) -> Estimate:
        """Mean accuracy over the random subspaces; the interval is a bootstrap's, over examples."""
        return mean_of(self.random.float().mean(0), seed=self.seed)

    @property
    def advantage(self) -> Estimate:
        """Accuracy minus that of random subspaces, on the same examples; the bootstrap's interval."""
        return mean_of(self.right.float() - self.random.float().mean(0), seed=self.seed)

    @property
    def sentence(self) -> str:
        """The finding in plain words."""
        rank = sum(self.ranks.values())
        count = f"{rank:.3g} direction{'s' * (round(rank, 2) != 1)}"
        said = (
            f"Swapping {count} from the source run gives the counterfactual answer for "
            f"{self.accuracy.value:.0%} of {len(self.right)} examples; whole vectors "
            f"{self.whole_accuracy.value:.0%}, no swap {self.accuracy_without_swap.value:.0%}"
        )
        same = bool((self.random == self.right).all()) and bool((self.whole == self.right).all())
        if same:
            return f"{said}. Every random subspace as large, and whole vectors, give just the same answers."
        random = f"random subspaces as large {self.random_accuracy.value:.0%} ({len(self.random)} draws)"
        beyond = "It does more than these" if self.advantage.low > 0 else "It is not told from these"
        return f"{said}, {random}. {beyond}."

    def _lines(self) -> list[tuple[str, Estimate]]:
        return [
            ("learned subspace", self.accuracy),
            (f"random subspaces ({len(self.random)})", self.random_accuracy),
            ("whole vectors", self.whole_accuracy),
            ("no swap", self.accuracy_without_swap),
        ]

    def to_frame(self) -> pd.DataFrame:
        """One line a way of swapping: its accuracy, the ends of its interval, and the number of examples."""
        import pandas as pd

        lines: list[tuple[Any, ...]] = [
            (name, "", None, found.value, found.low, found.high, len(self.right))
            for name, found in self._lines()
        ]
        lines += [
            ("without a direction", one.edit, one.direction,
             one.accuracy.value, one.accuracy.low, one.accuracy.high, len(self.right))
            for one in self.removed
        ]  # fmt: skip
        columns = ["swapped", "edit", "direction", "accuracy", "low", "high", "n"]
        return pd.DataFrame(lines, columns=columns).astype({"direction": "Int64"})

    def plot(self) -> Figure:
        """Accuracy of each way of swapping, and without each direction."""
        from reftlab.plotting.interchange import interchange_figure

        several = len({one.edit for one in self.removed}) > 1
        return interchange_figure(
            [(name, (e.value, e.low, e.high)) for name, e in self._lines()],
            [
                (f"{one.edit} {one.direction}" if several else str(one.direction),
                 (one.accuracy.value, one.accuracy.low, one.accuracy.high))
                for one in self.removed
            ],
            self.match,
            len(self.right),
        )  # fmt: skip

    def __repr__(self) -> str:
        note = f"; {self.note}" if self.note else ""
        return (
            f"InterchangeAccuracy({self.accuracy:.2f} of {len(self.right)} examples; random subspaces "
            f"{self.random_accuracy:.2f}, whole vectors {self.whole_accuracy:.2f}, no swap "
            f"{self.accuracy_without_swap:.2f}{note})"
        )

    def _repr_html_(self) -> str:
        table = self.to_frame().to_html(index=False, float_format="{:.3g}".format, na_rep="–")
        return f"<div><p>{html.escape(repr(self))}</p>{inline(self.plot())}{table}</div>"


def wilson(right: Bool[Tensor, " example"], level: float = 0.95) -> Estimate:
    """Share of the examples that are right, with its Wilson interval."""
    from scipy.stats import binomtest  # type: ignore[import-untyped]

    found = binomtest(int(right.sum()), len(right)).proportion_ci(level, method="wilson")
    return Estimate(float(right.float().mean()), float(found.low), float(found.high), level)
