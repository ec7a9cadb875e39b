"""`explain`: what every edit of a bound model reads, writes and causes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from reftlab.errors import DataError
from reftlab.explaining.causes.removal import Removal, removals
from reftlab.explaining.evidence.replies import ReplyTable, ask
from reftlab.explaining.explanation import EditExplanation, Explanation
from reftlab.explaining.geometry.directions import Directions, find_directions
from reftlab.explaining.geometry.record import record
from reftlab.explaining.geometry.tokens import Lens, token_effects
from reftlab.explaining.geometry.vectors import EditVectors, common_axes, sizes_of
from reftlab.measuring import behaviour_of
from reftlab.measuring.inputs import accepted, batches
from reftlab.runtime import BoundModel
from reftlab.runtime.calls import continues_texts
from reftlab.runtime.modes import evaluating
from reftlab.training.data import Encoded, Example, as_examples, encode
from reftlab.training.replies import PromptForm, prompt_form

if TYPE_CHECKING:
    from reftlab.runtime.places import BoundEdit

__all__ = ["explain"]


def explain(
    reft: BoundModel,
    examples: Any,
    *,
    chat: bool | None = None,
    system: str | None = None,
    unseen: Any = None,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    top: int = 8,
    max_edits: int = 6,
    draws: int = 3,
    max_new_tokens: int = 32,
    progress: bool = True,
    seed: int = 0,
) -> Explanation:
    """Find out what each edit of a bound model reads, writes and causes.

    Args:
        reft: a bound model with its tokenizer; it is left as it was.
        examples: (prompt, answer) pairs, or anything that `rl.train` takes; prompts without answers
            leave the section on the answer loss out.
        chat: whether to use the chat template; as for `rl.reply`.
        system: system message, with the template only.
        unseen: further prompts to ask, such as ones the edits were not trained on.
        sources: inputs of each source run for all examples, as for `reft(...)`; not needed where the
            examples have their own.
        top: how many promoted and suppressed tokens to keep for each direction.
        max_edits: for how many edits to measure the answer loss without each of their directions.
        draws: how many random directions to remove from each of those, as a control.
        max_new_tokens: longest reply, in tokens; 0 asks for no replies.
        progress: whether to show a progress bar.
        seed: of the random control directions.

    Returns:
        An `Explanation`; `.save("report.html")` writes it as a report.

    Raises:
        DataError: the examples cannot be used, or there is no tokenizer.

    >>> rl.explain(reft, [("What is the sea like?", "🌊🐠🐚")]).save("report.html")  # doctest: +SKIP
    """
    _check(reft, top=top, max_edits=max_edits, draws=draws, max_new_tokens=max_new_tokens)
    rows = as_examples(examples)
    others = as_examples(unseen) if unseen is not None else []
    if any(row.task is not None for row in (*rows, *others)):
        raise DataError(
            "explain looks at one set of edits; take one task's with reft.select(...), without tasks in the "
            "examples"
        )
    if sources and rows[0].sources:
        raise DataError("sources= says what the examples' own sources say already; leave one of them out")
    assert reft.tokenizer is not None
    form = prompt_form(reft, reft.tokenizer, chat, system)
    # A model that does not continue texts would take an answer for a part of the prompt.
    kept = rows if continues_texts(reft.model) else [replace(row, answer=None) for row in rows]
    encoded = encode(reft.tokenizer, kept, **form)
    subject = _Subject(reft, rows, encoded, accepted(reft.model), sources, form)
    with evaluating(reft), torch.no_grad(), tqdm(disable=not progress, desc="explain") as bar:

        def tick(what: str) -> None:
            bar.set_postfix_str(what, refresh=False)
            bar.update()

        recorded = record(reft, batches(reft, encoded, sources), subject.accepts)
        tick("vectors")
        edits = tuple(
            _explained(reft, bound, recorded.vectors[bound.key], recorded.lens, recorded.centres, top)
            for bound in reft.edits
            if bound.key in recorded.vectors
        )
        directions = {one.edit: one.directions for one in edits}
        ranks = sorted((len(one) for one in directions.values()), reverse=True)[:max_edits]
        bar.total = 2 + len(reft.edits) + sum(rank + draws * (rank > 1) for rank in ranks)
        removal = _removal(subject, directions, max_edits=max_edits, draws=draws, seed=seed, tick=tick)
        replies = ReplyTable((), 0, "no replies were asked for (max_new_tokens=0)")
        if max_new_tokens:
            replies = ask(reft, rows, others, sources=sources, max_new_tokens=max_new_tokens, **form)
        tick("replies")
        bar.total = bar.n
    name = getattr(getattr(reft.model, "config", None), "_name_or_path", "") or type(reft.model).__name__
    facts = dict(reft.facts)
    return Explanation(
        str(name), reft.plan(), facts, tuple(rows), form["chat"], edits, removal, replies, seed
    )


@dataclass(frozen=True, eq=False)
class _Subject:
    """What is explained: the bound model, and its examples as texts and as numbers."""

    reft: BoundModel
    rows: list[Example]
    encoded: list[Encoded]
    accepts: frozenset[str]
    sources: Mapping[str, Mapping[str, Any]] | None
    form: PromptForm


def _check(reft: Any, **counts: Any) -> None:
    if not isinstance(reft, BoundModel):
        raise DataError(
            f"explain takes a bound model, graph.bind(model, tokenizer), not {type(reft).__name__}"
        )
    if reft.tokenizer is None:
        raise DataError("explain needs a tokenizer: bind with one, graph.bind(model, tokenizer)")
    for name, value in counts.items():
        low = 1 if name == "top" else 0
        if type(value) is not int or value < low:
            raise DataError(f"{name}={value!r}: expected a whole number of {low} or more")


def _explained(
    reft: BoundModel,
    bound: BoundEdit,
    vectors: EditVectors,
    lens: Lens,
    centres: Mapping[str, Tensor],
    top: int,
) -> EditExplanation:
    built, edit = reft.interventions[bound.module], bound.edit
    directions = find_directions(built, edit.strength, vectors, edit.subspace)
    caveat = ""
    if (bound.site.module, bound.site.side) not in lens.stream:
        caveat = f"{bound.site} is not the residual stream itself; its vectors are read as if added to it"
    numbers = [int(part) for part in bound.site.module.split(".") if part.isdigit()]
    return EditExplanation(
        edit=bound.key,
        site=str(bound.site),
        block=numbers[0] if numbers else None,
        positions=str(edit.positions) + ("" if edit.phase == "prompt" else f", phase {edit.phase}"),
        phase=edit.phase,
        does=edit.intervention.describe() + (f" at strength {edit.strength:g}" if edit.strength != 1 else ""),
        formula=getattr(built, "formula", ""),
        vectors=vectors,
        directions=directions,
        tokens=token_effects(
            lens, reft.tokenizer, directions, centres.get(bound.key), top=top, caveat=caveat
        ),
        sizes=sizes_of(vectors),
        axes=common_axes(vectors),
    )


def _removal(
    subject: _Subject,
    directions: Mapping[str, Directions],
    *,
    max_edits: int,
    draws: int,
    seed: int,
    tick: Callable[[str], None],
) -> Removal:
    reft, rows, sources = subject.reft, subject.rows, subject.sources
    answered = sum(row.answer is not None for row in rows)
    if not continues_texts(reft.model):
        return Removal.unavailable(
            f"{type(reft.model).__name__} does not continue texts, so it gives no answers"
        )
    if not answered:
        return Removal.unavailable("the examples have no answers, so there is no loss to compare")
    if sources and answered < len(rows):
        return Removal.unavailable(
            "some examples have no answers, and the source inputs belong to all of them"
        )
    behaviour = behaviour_of(reft, rows, sources=sources, **subject.form)
    return removals(reft, behaviour, directions, max_edits=max_edits, draws=draws, seed=seed, tick=tick)
