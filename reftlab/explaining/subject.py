"""What is explained: a bound model on examples, with what several answers need worked out once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from reftlab.errors import DataError, did_you_mean
from reftlab.explaining.geometry.directions import Directions, directions_of
from reftlab.explaining.geometry.record import Recorded, record
from reftlab.explaining.geometry.sites import Seen, see_sites
from reftlab.measuring import Behaviour, Question, checked_examples, measured_on, question_of
from reftlab.measuring.inputs import accepted, batches
from reftlab.runtime.calls import continues_texts
from reftlab.runtime.modes import evaluating
from reftlab.training.collate import Collator, moved
from reftlab.training.data import Example, encode

if TYPE_CHECKING:
    from reftlab.runtime import BoundModel
    from reftlab.runtime.places import BoundEdit
    from reftlab.training.replies import PromptForm

__all__ = ["Subject", "asked"]


@dataclass(frozen=True, eq=False)
class Subject:
    """A bound model and examples, prepared when they are first needed.

    Attributes:
        who: the function that asks, for messages.
        reft: the bound model, which has a tokenizer.
        rows: the examples.
        form: how prompts are written.
        metric: what to measure, as for `reftlab.measuring.behaviour_of`.
        sources: inputs of each source run for all examples.
    """

    who: str
    reft: BoundModel
    rows: tuple[Example, ...]
    form: PromptForm
    metric: Any
    sources: Mapping[str, Mapping[str, Any]] | None

    @classmethod
    def of(
        cls,
        who: str,
        reft: Any,
        examples: Any,
        metric: Any = None,
        *,
        chat: bool | None = None,
        system: str | None = None,
        sources: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Subject:
        """Check what a public function is given.

        Raises:
            DataError: no bound model, no tokenizer, or examples that cannot be used.
        """
        rows, form = checked_examples(who, reft, examples, chat, system, sources)
        return cls(who, reft, tuple(rows), form, metric, sources)

    def edit(self, key: Any = None) -> BoundEdit:
        """One of its bound edits, by key; not needed where there is one.

        Raises:
            DataError: there is none of that key.
        """
        known = {bound.key: bound for bound in self.reft.edits}
        if key is None and len(known) == 1:
            (key,) = known
        if not isinstance(key, str) or key not in known:
            near = did_you_mean(key, list(known)) if isinstance(key, str) else ""
            raise DataError(f"edit={key!r}: expected the key of one of the edits, {list(known)}.{near}")
        return known[key]

    @cached_property
    def question(self) -> Question:
        """What is asked of its runs."""
        return question_of(self.reft, self.rows, self.metric, sources=self.sources, who=self.who, **self.form)

    @cached_property
    def behaviour(self) -> Behaviour:
        """What is measured of its runs."""
        return measured_on(self.reft, self.question)

    @cached_property
    def texts(self) -> list[dict[str, Any]]:
        """Prompts and answers as the model takes them."""
        # A model that does not continue texts would take an answer for a part of the prompt.
        return self._batches(self.rows if continues_texts(self.reft.model) else _unanswered(self.rows))

    @cached_property
    def batches(self) -> list[dict[str, Any]]:
        """As `texts`, without answers where a metric asks for the next token."""
        return self.texts if self.metric is None else self._batches(_unanswered(self.rows))

    @cached_property
    def accepts(self) -> frozenset[str]:
        """Which entries of a batch the bound model's forward takes."""
        return accepted(self.reft.model)

    @cached_property
    def recorded(self) -> Recorded:
        """What its edits are given and make, by the number of the example."""
        with evaluating(self.reft), torch.no_grad():
            return record(self.reft, self.batches, self.accepts)

    @cached_property
    def directions(self) -> dict[str, Directions]:
        """The directions of each edit that was reached, by key."""
        with evaluating(self.reft):
            return directions_of(self.reft, self.recorded.vectors)

    @cached_property
    def seen(self) -> Seen:
        """What stands at its edits' sites at every token of `texts`."""
        with evaluating(self.reft), torch.no_grad():
            return see_sites(self.reft, self.texts, self.accepts)

    def _batches(self, rows: Sequence[Example]) -> list[dict[str, Any]]:
        assert self.reft.tokenizer is not None
        return batches(self.reft, encode(self.reft.tokenizer, rows, **self.form), self.sources)


def asked(
    reft: BoundModel,
    rows: Sequence[Example],
    form: PromptForm,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The prompts of examples as one batch of a bound model's inputs, padded on the left.

    Args:
        reft: a bound model with its tokenizer.
        rows: the examples.
        form: how prompts are written.
        sources: inputs of each source run for all of them.
    """
    assert reft.tokenizer is not None
    encoded = encode(reft.tokenizer, _unanswered(rows), **form)
    batch = moved(Collator.of(reft.tokenizer, "left")(encoded), reft)
    taken = accepted(reft.model) - {"labels", "positions"}
    found = {name: value for name, value in batch.items() if name in taken}
    return found | ({"sources": sources} if sources else {})


def _unanswered(rows: Sequence[Example]) -> list[Example]:
    return [replace(row, answer=None) for row in rows]
