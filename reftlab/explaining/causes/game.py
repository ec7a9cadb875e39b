"""Cooperative games, and what their players are worth: Shapley values, exact or from sampled orders."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import combinations
from math import factorial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from reftlab.explaining.budget import Budget
from reftlab.measuring import Estimate
from reftlab.training.settings import whole

__all__ = ["Coalitions", "Solution", "solved"]


class Coalitions:
    """A cooperative game: a number for each example by which of the parts act, each set measured once.

    Args:
        value: from the numbers of the parts that act to `(example,)`.
        labels: names of the parts.
        weights: `(example,)`, how much each example counts in a mean; equal unless given.
        name, unit: what is measured, and in what.
        by: what the parts are, in a word.
        known: values that need not be measured.
        tick: called after each measurement with a few words for a progress bar.

    Attributes:
        ran: how many sets of parts were measured.

    >>> glove = Coalitions(lambda s: torch.tensor([float({0, 1} <= s or {0, 2} <= s)]), ["left", "r1", "r2"])
    >>> glove({0, 2}), glove({0, 2}), glove.ran
    (tensor([1.], dtype=torch.float64), tensor([1.], dtype=torch.float64), 1)
    """

    def __init__(
        self,
        value: Callable[[frozenset[int]], Tensor],
        labels: Sequence[str],
        weights: Float[Tensor, " example"] | None = None,
        *,
        name: str = "value",
        unit: str = "",
        by: str = "part",
        known: Mapping[frozenset[int], Tensor] | None = None,
        tick: Callable[[str], None] = lambda what: None,
    ) -> None:
        self.labels, self.name, self.unit, self.by, self.tick = tuple(labels), name, unit, by, tick
        self.ran = 0
        self._value = value
        self._known = {players: found.double() for players, found in (known or {}).items()}
        self._weights = weights

    def __call__(self, chosen: Collection[int] = frozenset()) -> Float[Tensor, " example"]:
        """The value of a set of parts, float64; of none unless given."""
        players = frozenset(chosen)
        if players not in self._known:
            self._known[players] = self._value(players).double()
            self.ran += 1
            self.tick(f"{len(players)} of {len(self)} parts")
        return self._known[players]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def weights(self) -> Float[Tensor, " example"]:
        """How much each example counts in a mean, float64."""
        return torch.ones_like(self()) if self._weights is None else self._weights.double()

    @property
    def everything(self) -> frozenset[int]:
        """All parts."""
        return frozenset(range(len(self)))

    def mean(self, values: Float[Tensor, "*part example"]) -> Float[Tensor, "*part"]:
        """Weighted mean over the examples."""
        return (values * self.weights).sum(-1) / self.weights.sum()


class Solution(NamedTuple):
    """What the players of a game are worth.

    Attributes:
        values: Shapley values, `(player, example)`.
        sampling: mean values with intervals over the sampled orders; None where all sets were measured.
        interactions: interaction index of each two players, `(player, player, example)`, diagonal NaN; None
            where orders were sampled.
        permutations: how many orders were sampled.
        note: what was sampled, and why.
    """

    values: Float[Tensor, "player example"]
    sampling: tuple[Estimate, ...] | None
    interactions: Float[Tensor, "player player example"] | None
    permutations: int
    note: str


def solved(
    game: Coalitions,
    *,
    exact_up_to: int = 10,
    permutations: int = 100,
    budget: float | None = None,
    seed: int = 0,
) -> Solution:
    """Shapley values of a game; arguments as for `reftlab.shapley`."""
    exact_up_to, permutations = whole("exact_up_to", exact_up_to, 0), whole("permutations", permutations, 2)
    clock, count = Budget(budget), len(game)
    why = f"{count} parts, and exact values are for up to {exact_up_to}"
    if count <= exact_up_to:
        table = _table(game, clock)
        if table is not None:
            return Solution(_exact(table, count), None, _interactions(table, count), 0, "")
        why = f"no time for all {2**count:,} combinations in {budget:g} seconds"
    wanted = (permutations + 1) // 2
    pairs = _sampled(game, wanted, clock, seed)
    short = "" if len(pairs) == wanted else f", all that {budget:g} seconds allowed of {2 * wanted}"
    note = f"{2 * len(pairs)} random orders were sampled{short} ({why})"
    return Solution(pairs.mean(0), _over_orders(game, pairs), None, 2 * len(pairs), note)


def _table(game: Coalitions, clock: Budget) -> Float[Tensor, "coalition example"] | None:
    """The value of every set, numbered by its players' bits; None where the time does not suffice."""
    count = len(game)
    sets = [
        frozenset(player for player in range(count) if number >> player & 1) for number in range(2**count)
    ]
    # First those that sampled orders would need too, and by which the time for all can be told.
    order = sorted(sets, key=lambda players: min(len(players), count - len(players)))
    before = game.ran
    for done, players in enumerate(order):
        ran = game.ran - before
        ahead = clock.spent / ran * (len(order) - done) if ran else 0.0
        if not clock.allows(ahead if ran > count else 0.0):
            return None
        game(players)
    return torch.stack([game(players) for players in sets])


def _exact(table: Float[Tensor, "coalition example"], count: int) -> Float[Tensor, "player example"]:
    """`φ_i = Σ_S |S|! (n − |S| − 1)! / n! (v(S ∪ i) − v(S))` over the sets S without i."""
    numbers = torch.arange(len(table))
    size = sum((numbers >> player & 1 for player in range(count)), torch.zeros_like(numbers))
    weight = torch.tensor(
        [factorial(s) * factorial(count - s - 1) / factorial(count) for s in range(count)], dtype=table.dtype
    )
    found = []
    for player in range(count):
        without = numbers[(numbers >> player & 1) == 0]
        found.append(weight[size[without]] @ (table[without | 1 << player] - table[without]))
    return torch.stack(found)


def _interactions(
    table: Float[Tensor, "coalition example"], count: int
) -> Float[Tensor, "player player example"]:
    """The interaction index of each two players.

    `I_ij = Σ_S |S|! (n − |S| − 2)! / (n − 1)! (v(S ∪ ij) − v(S ∪ i) − v(S ∪ j) + v(S))` over all sets S
    without both.
    """
    numbers = torch.arange(len(table))
    size = sum((numbers >> player & 1 for player in range(count)), torch.zeros_like(numbers))
    found = torch.full((count, count, table.shape[1]), float("nan"), dtype=table.dtype)
    for i, j in combinations(range(count), 2):
        both = 1 << i | 1 << j
        out = numbers[(numbers & both) == 0]
        weight = torch.tensor(
            [factorial(s) * factorial(count - s - 2) / factorial(count - 1) for s in size[out].tolist()],
            dtype=table.dtype,
        )
        joint = table[out | both] - table[out | 1 << i] - table[out | 1 << j] + table[out]
        found[i, j] = found[j, i] = weight @ joint
    return found


def _sampled(game: Coalitions, wanted: int, clock: Budget, seed: int) -> Float[Tensor, "pair player example"]:
    """Mean change by each player over a random order and its reverse, for as many pairs as there is time."""
    generator, pairs = torch.Generator().manual_seed(seed), list[Tensor]()
    while len(pairs) < wanted:
        order = torch.randperm(len(game), generator=generator).tolist()
        changes = torch.zeros(2, len(game), len(game()), dtype=torch.float64)
        for way, players in enumerate((order, order[::-1])):
            for place, player in enumerate(players):
                if pairs and clock.used_up:
                    return torch.stack(pairs)
                changes[way, player] = game(players[: place + 1]) - game(players[:place])
        pairs.append(changes.mean(0))
    return torch.stack(pairs)


def _over_orders(game: Coalitions, pairs: Float[Tensor, "pair player example"]) -> tuple[Estimate, ...]:
    """Mean values with Student's intervals; the two orders of a pair depend on each other, pairs do not."""
    from scipy.stats import t  # type: ignore[import-untyped]

    means, count = game.mean(pairs), len(pairs)
    if count < 2:
        return tuple(Estimate(value, float("nan"), float("nan")) for value in means[0].tolist())
    reach = float(t.ppf(0.975, count - 1)) * means.std(0) / count**0.5
    ends = zip(means.mean(0).tolist(), reach.tolist(), strict=True)
    return tuple(Estimate(value, value - half, value + half) for value, half in ends)
