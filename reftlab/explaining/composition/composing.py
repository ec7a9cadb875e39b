"""Runs with one, two and all edits, in both orders: the work of `composition`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from reftlab.errors import BindError, GraphError
from reftlab.explaining.composition.collisions import find_collisions, shares_place
from reftlab.explaining.composition.composition import Alone, Composition, PairEffect, Together
from reftlab.explaining.composition.interference import interference
from reftlab.explaining.evidence.subject import above_rounding, recorded_on
from reftlab.measuring import Behaviour, Estimate, behaviour_of, mean_of, share_kept
from reftlab.measuring.inputs import accepted
from reftlab.runtime.calls import continues_texts
from reftlab.runtime.modes import evaluating
from reftlab.sweeping.metric import Measured, Metric, References
from reftlab.training.collate import Collator, moved
from reftlab.training.data import Example, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reftlab.runtime import BoundModel
    from reftlab.training.replies import PromptForm

__all__ = ["Bench", "Subject", "composed"]

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


@dataclass(eq=False)
class Subject:
    """A bound model on its examples, and how any other is measured on the same."""

    reft: BoundModel
    rows: list[Example]
    behaviour: Behaviour
    metric: Any
    form: PromptForm
    sources: Mapping[str, Mapping[str, Any]] | None
    known: dict[frozenset[str], Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        reft: BoundModel,
        rows: list[Example],
        metric: Any,
        form: PromptForm,
        sources: Mapping[str, Mapping[str, Any]] | None,
    ) -> Subject:
        """Choose what is measured, as `behaviour_of` does; `form` is said for models made of parts too."""
        answered = continues_texts(reft.model) and any(row.answer is not None for row in rows)
        measured = _FromEdited() if metric is None and not answered else metric
        behaviour = behaviour_of(reft, rows, measured, sources=sources, **form)
        return cls(reft, rows, behaviour, measured, form, sources)

    def with_only(self, names: tuple[str, ...]) -> Tensor:
        """The behaviour with these edits alone, `(example,)`."""
        key = frozenset(names)
        if key not in self.known:
            with _only(self.reft, names):
                self.known[key] = self.behaviour()
        return self.known[key]

    def reversed(self, first: tuple[str, ...], second: tuple[str, ...]) -> Tensor:
        """The behaviour where `second` acts before `first` at the sites that they share."""
        other = self.reft.select(*second) + self.reft.select(*first)
        return behaviour_of(other, self.rows, self.metric, sources=self.sources, **self.form).full


def _only(reft: BoundModel, names: tuple[str, ...]) -> Any:
    off = [edit.name for edit in reft.graph.edits if edit.name not in names]
    # Without names `disabled` leaves all out.
    return reft.disabled(*off) if off else evaluating(reft)


@dataclass(eq=False)
class Bench:
    """Everything that pairs are measured with."""

    subject: Subject
    units: Units
    logits: Callable[[tuple[str, ...]], Tensor]
    batch: dict[str, Any]
    seed: int
    notes: list[str]

    def change(self, *units: str) -> Tensor:
        """The change that these units make together, `(example,)`."""
        names = tuple(name for unit in units for name in self.units[unit])
        return self.subject.with_only(names) - self.subject.behaviour.bare

    def estimate(self, values: Tensor) -> Estimate:
        return mean_of(values, self.subject.behaviour.weights, seed=self.seed)

    def together(self, *units: str) -> Together:
        """What some units do together."""
        alone = torch.stack([self.change(unit) for unit in units])
        both, bare = self.change(*units), self.subject.behaviour.bare
        size = both.abs() + alone.abs().sum(0) + (len(units) + 1) * bare.abs()
        apart = above_rounding(both - alone.sum(0), size, self.subject.reft)
        return Together(self.estimate(both), self.estimate(alone.sum(0)), self.estimate(apart))

    def pair(self, a: str, b: str) -> PairEffect:
        """What two units do together, and in the other order."""
        found, subject = self.together(a, b), self.subject
        turned = order = commutator = None
        first = self._first(a, b)
        if first is not None:
            commutator = self._commutator(a, b)
            last = b if first == a else a
            try:
                other = subject.reversed(self.units[first], self.units[last])
            except (BindError, GraphError) as error:
                self.notes.append(f"{a} and {b} cannot be taken apart, so not in the other order: {error}")
            else:
                bare, both = subject.behaviour.bare, self.change(a, b)
                apart = other - bare - both
                apart = above_rounding(apart, other.abs() + both.abs() + bare.abs(), subject.reft)
                turned, order = self.estimate(other - bare), self.estimate(apart)
        return PairEffect(
            found.effect, found.expected, found.interaction, a, b, turned, order, commutator,
            self._on_logits(a, b),
        )  # fmt: skip

    def _first(self, a: str, b: str) -> str | None:
        """Which of two acts first at the first site that they share; None where they share none."""
        bound = self.subject.reft.edits
        for number, x in enumerate(bound):
            for one, other in ((a, b), (b, a)):
                later = (y for y in bound[number + 1 :] if y.edit.name in self.units[other])
                if x.edit.name in self.units[one] and any(shares_place(x, y) for y in later):
                    return one
        return None

    def _commutator(self, a: str, b: str) -> float | None:
        first, second = self.units[a], self.units[b]
        both = self.subject.reft.select(*first, *second)
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


def composed(
    subject: Subject, units: Units, *, max_pairs: int, budget: float, progress: bool, seed: int
) -> Composition:
    """Measure units alone, in pairs and all together; see `composition` for the arguments."""
    reft, behaviour, started = subject.reft, subject.behaviour, time.monotonic()
    notes: list[str] = []
    with evaluating(reft), tqdm(disable=not progress, desc="composition", total=len(units)) as bar:
        bench = Bench(subject, units, _logits(subject, units, notes), _batch(subject, notes), seed, notes)
        alone = []
        for name in units:
            alone.append(Alone(name, bench.estimate(bench.change(name))))
            bar.update()
        chosen = _chosen(list(units), alone, max_pairs, notes)
        bar.total = len(units) + len(chosen)
        pairs: list[PairEffect] = []
        for number, (a, b) in enumerate(chosen):
            if number and time.monotonic() - started > budget:
                notes.append(f"the budget of {budget:g} s was used up after {number} of {len(chosen)} pairs")
                break
            pairs.append(bench.pair(a, b))
            bar.update()
        recorded = recorded_on(
            reft, subject.rows, answers=behaviour.unit == "nats per answer token",
            sources=subject.sources, **subject.form,
        )  # fmt: skip
        measured = [(units[one.a], units[one.b]) for one in pairs]
        collisions = find_collisions(reft, recorded, measured)
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
    asked = [replace(row, answer=None) for row in rows]
    behaviour = behaviour_of(reft, asked, keeper, sources=subject.sources, **subject.form)
    known: dict[frozenset[str], Tensor] = {}

    def logits(names: tuple[str, ...]) -> Tensor:
        key = frozenset(names)
        if key not in known:
            with _only(reft, names):
                behaviour()
            found = torch.stack([keeper.found[number] for number in range(len(asked))])
            if len(names) > max(map(len, units.values())):
                return found  # two together are asked for once
            known[key] = found
        return known[key]

    return logits


def _batch(subject: Subject, notes: list[str]) -> dict[str, Any]:
    """Prompts as one batch of the model's inputs, padded on the left."""
    reft, rows = subject.reft, subject.rows
    assert reft.tokenizer is not None
    if len(rows) > _PROMPTS and not subject.sources:
        rows = rows[:_PROMPTS]
        notes.append(f"commutators were measured on the first {_PROMPTS} examples")
    asked = [replace(row, answer=None) for row in rows]
    batch = moved(Collator.of(reft.tokenizer, "left")(encode(reft.tokenizer, asked, **subject.form)), reft)
    taken = accepted(reft.model) - {"labels", "positions"}
    found = {name: value for name, value in batch.items() if name in taken}
    return found | ({"sources": subject.sources} if subject.sources else {})
