"""Runs of a model in which something is erased at one site, and what is measured of them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn

from reftlab.address import Position
from reftlab.errors import BindError
from reftlab.graph import Edit, InterventionGraph
from reftlab.interventions import Scale
from reftlab.measuring import Behaviour, Estimate, behaviour_of, mean_of
from reftlab.probing.erasing import Eraser
from reftlab.probing.sites import ProbedSite
from reftlab.runtime import BoundModel
from reftlab.runtime.modes import evaluating
from reftlab.runtime.scan import example_inputs
from reftlab.sweeping.metric import Measured, Metric, References, as_metric

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reftlab.training import Example

__all__ = ["ErasedRuns", "with_place"]


@dataclass(frozen=True, eq=False)
class ErasedRuns:
    """A behaviour, measured again and again with something erased at one site.

    Attributes:
        reft: the model's edits, and after them at the site one that does nothing.
        key: name of the latter.
        width: of the vectors there.
        own: names of the model's own edits.
        parts: the behaviour of the examples of each fold, and the fold's number.
        order: where each example of all parts comes in the caller's order, `(example,)`.
        examples: numbers of the examples.
        groups: their groups.
        weights, before: of the behaviour, without erasure.
        bare: the behaviour without any edit; None for a model without edits.
    """

    reft: BoundModel
    key: str
    width: int
    own: tuple[str, ...]
    parts: tuple[tuple[Behaviour, int], ...]
    order: Int[np.ndarray, " example"]
    examples: Int[np.ndarray, " example"]
    groups: Int[np.ndarray, " example"]
    weights: Float[np.ndarray, " example"]
    before: Float[np.ndarray, " example"]
    bare: Float[np.ndarray, " example"] | None

    @classmethod
    def of_examples(
        cls,
        place: tuple[BoundModel, str, tuple[str, ...]],
        examples: Any,
        metric: Any,
        form: Mapping[str, Any],
    ) -> ErasedRuns:
        """One behaviour for all examples.

        Args:
            place: from `with_place`.
            examples, metric: as for `behaviour_of`.
            form: its further arguments.
        """
        behaviour = behaviour_of(place[0], examples, metric, **form)
        numbers = np.array(behaviour.examples)
        return cls._of(place, [(behaviour, 0)], numbers, np.arange(numbers.max() + 1))

    @classmethod
    def of_folds(
        cls,
        place: tuple[BoundModel, str, tuple[str, ...]],
        rows: list[Example],
        fold_of: Int[np.ndarray, " row"],
        groups: Int[np.ndarray, " row"],
        metric: Any,
        form: Mapping[str, Any],
    ) -> ErasedRuns:
        """A behaviour for the examples of each fold.

        Args:
            place, metric, form: as for `of_examples`.
            rows: all examples; where some have answers and there is no metric, these are measured.
            fold_of, groups: of each.
        """
        measure = None if metric is None else as_metric(metric)
        answered = measure is None and any(row.answer is not None for row in rows)
        parts, numbers = [], []
        for fold in range(int(fold_of.max()) + 1):
            own = np.flatnonzero(fold_of == fold).tolist()
            own = [number for number in own if not answered or rows[number].answer is not None]
            if own:
                wanted = None if measure is None else _Part(measure, tuple(own), len(rows))
                parts.append((behaviour_of(place[0], [rows[number] for number in own], wanted, **form), fold))
                numbers.append(np.array(own)[list(parts[-1][0].examples)])
        return cls._of(place, parts, np.concatenate(numbers), groups)

    @classmethod
    def _of(
        cls,
        place: tuple[BoundModel, str, tuple[str, ...]],
        parts: Sequence[tuple[Behaviour, int]],
        numbers: Int[np.ndarray, " example"],
        groups: Int[np.ndarray, " row"],
    ) -> ErasedRuns:
        reft, key, own = place
        order = np.argsort(numbers, kind="stable")
        weights, before, bare = (
            torch.cat([getattr(part, name) for part, _ in parts]).double().numpy()[order]
            for name in ("weights", "full", "bare")
        )
        width = next(edit.width for edit in reft.edits if edit.edit.name == key)
        return cls(
            reft, key, width, own, tuple(parts), order, numbers[order], groups[numbers[order]], weights,
            before, bare if own else None,
        )  # fmt: skip

    @property
    def name(self) -> str:
        """What is measured."""
        found = self.parts[0][0].name
        # Here the model "with all edits" is the one in which nothing is erased.
        return found.replace("from the edited model", "from that without erasure")

    @property
    def unit(self) -> str:
        return self.parts[0][0].unit

    def measure(self, by_fold: Sequence[Eraser], *, bare: bool = False) -> Float[np.ndarray, " example"]:
        """The behaviour with something erased.

        Args:
            by_fold: what erases for the examples of each fold.
            bare: whether to leave the model's own edits out.
        """
        found = []
        with evaluating(self.reft), torch.no_grad(), contextlib.ExitStack() as stack:
            if bare:
                stack.enter_context(self.reft.disabled(*self.own))
            for behaviour, fold in self.parts:
                edit = by_fold[fold].edit
                if edit is None:
                    found.append(behaviour.bare if bare else behaviour.full)
                    continue
                built = edit.build(self.width).to(self.reft.device)
                with self.reft.replaced(self.key, built.eval()):
                    found.append(behaviour())
        return np.asarray(torch.cat(found).double().numpy()[self.order])

    def mean(self, values: Float[np.ndarray, " example"]) -> float:
        """Weighted mean over the examples."""
        return float(values @ self.weights / self.weights.sum())

    def shift(self, values: Float[np.ndarray, " example"]) -> float:
        """Mean of the absolute value of each example's change."""
        return self.mean(np.abs(values - self.before))

    def estimate(self, values: Float[np.ndarray, " example"], level: float, seed: int) -> Estimate:
        """Weighted mean with its interval over resampled groups."""
        _, own = np.unique(self.groups, return_inverse=True)
        weights = np.bincount(own, self.weights)
        # A group counts as one value with the weight of its examples, so that groups are drawn whole.
        means = np.bincount(own, self.weights * values) / weights
        return mean_of(torch.from_numpy(means), torch.from_numpy(weights), level=level, seed=seed)


def with_place(
    model: BoundModel | nn.Module,
    site: ProbedSite,
    positions: Position,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[BoundModel, str, tuple[str, ...]]:
    """A model with an edit at a site that does nothing, its name, and the names of the edits before it.

    Args:
        model: the model, with its own edits or none.
        site: where.
        positions: at which tokens.
        tokenizer: where the model has none.
    """
    bound = model if isinstance(model, BoundModel) else InterventionGraph().bind(model, tokenizer)
    if not isinstance(model, BoundModel):
        bound = InterventionGraph().bind(model, tokenizer, example=_example(bound))
    tokenizer = bound.tokenizer if tokenizer is None else tokenizer
    taken = {*bound.interventions, *(node.name for node in bound.graph if node.name)}
    key = next(name for name in ("erasure", *(f"erasure {n}" for n in range(1, 10_000))) if name not in taken)
    # Times 1 is exact in every dtype.
    read = site.read
    assert read is not None
    assert read.at is not None
    edit = Edit(
        key, at=read.at, positions=positions, intervention=Scale(1.0), heads=read.heads,
        features=read.features,
    )  # fmt: skip
    added = InterventionGraph(edit).bind(bound.model, tokenizer, example=_example(bound))
    own = tuple(node.name for node in bound.graph.edits)
    return bound + added, key, own


def _example(bound: BoundModel) -> Any:
    """Inputs for a shape-only pass: rows of tokens for models whose inputs nobody knows."""
    try:
        example_inputs(bound.model, bound._example)
    except BindError:
        return {"input_ids": torch.zeros(2, 11, dtype=torch.long)}
    return bound._example


@dataclass(frozen=True)
class _Part(Metric):
    """A metric of some of the examples that it was made for."""

    whole: Metric
    numbers: tuple[int, ...]
    examples: int

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.whole.name

    @property
    def unit(self) -> str:  # type: ignore[override]
        return self.whole.unit

    def check(self, pairs: int, tokenizer: PreTrainedTokenizerBase | None) -> None:
        del pairs
        self.whole.check(self.examples, tokenizer)

    def for_pair(
        self, pair: int, tokenizer: PreTrainedTokenizerBase | None, references: References
    ) -> Measured:
        return self.whole.for_pair(self.numbers[pair], tokenizer, references)

    def key(self) -> str:
        return f"{self.whole.key()} of {self.numbers!r}"
