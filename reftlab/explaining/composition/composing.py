"""Runs with one, two and all edits, in both orders: the work of `composition`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from reftlab.errors import BindError, GraphError
from reftlab.explaining.budget import Budget
from reftlab.explaining.composition.collisions import find_collisions
from reftlab.explaining.composition.composition import Alone, Composition, PairEffect, Together, units_of
from reftlab.explaining.composition.interference import interference
from reftlab.explaining.subject import Subject, asked
from reftlab.measuring import Estimate, behaviour_of, change_of, mean_of, rounding_in, share_kept
from reftlab.runtime.modes import evaluating
from reftlab.sweeping.metric import Measured, Metric, References
from reftlab.training.settings import whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reftlab.runtime import BoundModel

__all__ = ["Bench", "Others", "composed"]

_MOST_LOGITS = 50_000_000
"""Numbers of logits that are held at once."""
_PROMPTS = 64
"""Prompts that commutators are measured on."""

Units = Mapping[str, tuple[str, ...]]


class _FromEdited(Metric):
    """KL(edited ‖ run) of the next token, of the first model that is measured with it, for all later ones."""

    name, unit = "divergence of the next token from the edited model", "nats"

    def __init__(self) -> None:
        self.wanted: dict[int, Tensor] = {}

    def for_pair(
        self, pair: int, tokenizer: PreTrainedTokenizerBase | None, references: References
    ) -> Measured:
        wanted = self.wanted.setdefault(pair, references.clean.float().log_softmax(-1))
        return lambda logits: (wanted.exp() * (wanted - logits.float().log_softmax(-1))).sum(-1)

    def key(self) -> str:
        return "divergence from edited"


class _KeptLogits(Metric):
    """Keeps the logits of every example; the number it gives means nothing."""

    name, unit = "logits", "logits"

    def __init__(self) -> None:
        self.found: dict[int, Tensor] = {}

    def for_pair(
        self, pair: int, tokenizer: PreTrainedTokenizerBase | None, references: References
    ) -> Measured:
        def measured(logits: Tensor) -> Tensor:
            self.found[pair] = logits[0].float().clone()
            return torch.zeros(len(logits))

        return measured

    def key(self) -> str:
        return "kept logits"


class Others:
    """The behaviour of a subject with other edits: some of its own alone, or in another order.

    Args:
        subject: what is explained.

    Attributes:
        subject: the same, with a metric that serves for all of these.
        behaviour: that of the subject itself.
    """

    def __init__(self, subject: Subject) -> None:
        if subject.metric is None and not subject.question.answered:
            # The divergence is from one model, whichever is measured.
            subject = replace(subject, metric=_FromEdited())
        self.subject, self.behaviour = subject, subject.behaviour
        self._known: dict[frozenset[str], Tensor] = {}

    def with_only(self, names: tuple[str, ...]) -> Tensor:
        """The behaviour with these edits alone, `(example,)`."""
        key = frozenset(names)
        if key not in self._known:
            with _only(self.subject.reft, names):
                self._known[key] = self.behaviour()
        return self._known[key]

    def reversed(self, first: tuple[str, ...], second: tuple[str, ...]) -> Tensor:
        """The behaviour where `second` acts before `first` at the sites that they share."""
        reft = self.subject.reft
        return replace(self.subject, reft=reft.select(*second) + reft.select(*first)).behaviour.full


def _only(reft: BoundModel, names: tuple[str, ...]) -> Any:
    off = [edit.name for edit in reft.graph.edits if edit.name not in names]
    # Without names `disabled` leaves all out.
    return reft.disabled(*off) if off else evaluating(reft)


@dataclass(eq=False)
class Bench:
    """Everything that pairs are measured with."""

    others: Others
    units: Units
    logits: Callable[[tuple[str, ...]], Tensor]
    batch: dict[str, Any]
    seed: int
    notes: list[str]

    def change(self, *units: str) -> Tensor:
        """The change that these units make together, `(example,)`."""
        names = tuple(name for unit in units for name in self.units[unit])
        return self.others.with_only(names) - self.others.behaviour.bare

    def estimate(self, values: Tensor) -> Estimate:
        return mean_of(values, self.others.behaviour.weights, seed=self.seed)

    def difference(self, values: Tensor, *runs: Tensor) -> Estimate:
        """As `estimate`, of what sums and differences of runs leave."""
        weights, step = self.others.behaviour.weights, rounding_in(self.others.subject.reft.model)
        return change_of(values, weights, torch.stack(runs), step=step, seed=self.seed)

    def together(self, *units: str) -> Together:
        """What some units do together."""
        alone = torch.stack([self.change(unit) for unit in units])
        both, bare = self.change(*units), self.others.behaviour.bare
        apart = self.difference(both - alone.sum(0), both, *alone, *[bare] * (len(units) + 1))
        return Together(self.estimate(both), self.estimate(alone.sum(0)), apart)

    def pair(self, a: str, b: str) -> PairEffect:
        """What two units do together, and in the other order."""
        found, others = self.together(a, b), self.others
        turned = order = commutator = None
        first = self._first(a, b)
        if first is not None:
            commutator = self._commutator(a, b)
            last = b if first == a else a
            try:
                other = others.reversed(self.units[first], self.units[last])
            except (BindError, GraphError) as error:
                self.notes.append(f"{a} and {b} cannot be taken apart, so not in the other order: {error}")
            else:
                bare, both = others.behaviour.bare, self.change(a, b)
                turned = self.estimate(other - bare)
                order = self.difference(other - bare - both, other, bare, both)
        return PairEffect(
            found.effect, found.expected, found.interaction, a, b, turned, order, commutator,
            self._on_logits(a, b),
        )  # fmt: skip

    def _first(self, a: str, b: str) -> str | None:
        """Which of two acts first at the first site that they share; None where they share none."""
        bound = self.others.subject.reft.edits
        for number, x in enumerate(bound):
            for one, other in ((a, b), (b, a)):
                later = (y for y in bound[number + 1 :] if y.edit.name in self.units[other])
                if x.edit.name in self.units[one] and any(map(x.shares_place, later)):
                    return one
        return None

    def _commutator(self, a: str, b: str) -> float | None:
        first, second = self.units[a], self.units[b]
        both = self.others.subject.reft.select(*first, *second)
        held = []
        for pair in interference(both, self.batch).pairs:
            # A task's part of an edit is named `edit (task)`.
            names = [
                next((n for n in (*first, *second) if unit == n or unit.startswith(f"{n} (")), unit)
                for unit in (pair.a, pair.b)
            ]
            if (names[0] in first) != (names[1] in first):
                held += [place.commutator for place in pair.places if place.commutator is not None]
        return max(held, default=None)

    def _on_logits(self, a: str, b: str) -> Estimate | None:
        first, second = self.units[a], self.units[b]
        none, one, other, both = (self.logits(names) for names in ((), first, second, (*first, *second)))
        if not all(len(part) for part in (none, one, other, both)):
            return None
        apart = (both - one - other + none).norm(dim=1)
        size = (one - none).norm(dim=1) + (other - none).norm(dim=1)
        return share_kept(apart, torch.zeros_like(size), size, seed=self.seed)


@torch.no_grad()
def composed(
    subject: Subject,
    groups: Mapping[str, Sequence[str]] | None = None,
    *,
    max_pairs: int = 15,
    budget: float | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Composition:
    """`composition` of what is prepared already; see there."""
    whole("max_pairs", max_pairs, 1)
    clock, units, reft, notes = Budget(budget), units_of(subject.reft, groups), subject.reft, list[str]()
    others = Others(subject)
    with evaluating(reft), tqdm(disable=not progress, desc="composition", total=len(units)) as bar:
        behaviour = others.behaviour
        bench = Bench(others, units, _logits(subject, units, notes), _batch(subject, notes), seed, notes)
        alone = []
        for name in units:
            alone.append(Alone(name, bench.estimate(bench.change(name))))
            bar.update()
        chosen = _chosen(list(units), alone, max_pairs, notes)
        bar.total = len(units) + len(chosen)
        pairs: list[PairEffect] = []
        for number, (a, b) in enumerate(chosen):
            if number and clock.used_up:
                notes.append(f"the budget of {budget:g} s was used up after {number} of {len(chosen)} pairs")
                break
            pairs.append(bench.pair(a, b))
            bar.update()
        measured = [(units[one.a], units[one.b]) for one in pairs]
        collisions = find_collisions(reft, subject.recorded, measured)
        bar.total = bar.n
    return Composition(
        behaviour.name, behaviour.unit, len(behaviour.full), tuple(alone), tuple(pairs),
        bench.together(*units), collisions, "; ".join(notes),
    )  # fmt: skip


def _chosen(names: list[str], alone: list[Alone], max_pairs: int, notes: list[str]) -> list[tuple[str, str]]:
    pairs = list(combinations(names, 2))
    if len(pairs) <= max_pairs:
        return pairs
    size = {one.name: abs(one.effect.value) for one in alone}
    most = sorted(pairs, key=lambda pair: size[pair[0]] * size[pair[1]], reverse=True)[:max_pairs]
    notes.append(f"of {len(pairs)} pairs the {max_pairs} were measured whose edits do most alone (max_pairs)")
    return [pair for pair in pairs if pair in most]


def _logits(subject: Subject, units: Units, notes: list[str]) -> Callable[[tuple[str, ...]], Tensor]:
    """A function that gives the logits after each prompt with some edits alone, `(example, vocab)`."""
    reft, keeper, rows = subject.reft, _KeptLogits(), subject.rows
    config = getattr(reft.model, "config", None)
    vocabulary = int(getattr(config, "vocab_size", None) or 1)
    most = max(8, _MOST_LOGITS // (vocabulary * (2 * len(units) + 2)))
    if len(rows) > most and not subject.sources:
        rows = rows[:most]
        notes.append(f"logits were compared on the first {most} examples")
    behaviour = behaviour_of(reft, rows, keeper, sources=subject.sources, **subject.form)
    known: dict[frozenset[str], Tensor] = {}

    def logits(names: tuple[str, ...]) -> Tensor:
        key = frozenset(names)
        if key not in known:
            with _only(reft, names):
                behaviour()
            found = torch.stack([keeper.found[number] for number in range(len(rows))])
            if len(names) > max(map(len, units.values())):
                return found  # two together are asked for once
            known[key] = found
        return known[key]

    return logits


def _batch(subject: Subject, notes: list[str]) -> dict[str, Any]:
    """Some of the prompts as one batch."""
    rows = subject.rows
    if len(rows) > _PROMPTS and not subject.sources:
        rows = rows[:_PROMPTS]
        notes.append(f"commutators were measured on the first {_PROMPTS} examples")
    return asked(subject.reft, rows, subject.form, subject.sources)
