"""`explain`: what every edit of a bound model reads, writes and causes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from reftlab.errors import DataError, did_you_mean
from reftlab.explaining.answers import NAMES, Plan, answers
from reftlab.explaining.budget import Budget
from reftlab.explaining.causes.removal import Removal, removals
from reftlab.explaining.evidence.replies import ReplyTable, ask
from reftlab.explaining.explanation import EditExplanation, Explanation
from reftlab.explaining.geometry.edit_tokens import effects_of, lenses_for
from reftlab.explaining.geometry.lens import DataLens
from reftlab.explaining.geometry.record import Recorded
from reftlab.explaining.geometry.vectors import common_axes, sizes_of
from reftlab.explaining.section import QUESTIONS
from reftlab.explaining.subject import Subject
from reftlab.runtime import BoundModel
from reftlab.runtime.calls import continues_texts
from reftlab.runtime.modes import evaluating
from reftlab.training.data import as_examples
from reftlab.training.settings import whole

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
    metric: Any = None,
    labels: Any = None,
    lens: DataLens | Sequence[DataLens] | str | None = None,
    runs: int = 50,
    budget: float | None = None,
    only: str | Sequence[str] | None = None,
    top: int = 8,
    max_edits: int = 6,
    draws: int = 5,
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
        metric: what to measure of the next token, such as `rl.logit_diff(" yes", " no")`; without it the
            loss on the answers, or where there are none the divergence from the edited model.
        labels: a class for each example, to probe for and to compare directions with.
        lens: what `rl.fit_lens` gave for an edit's site, or a list of these, or `"fit"` to fit one on these
            examples wherever an edit acts; the tokens that it reads off each direction stand beside those
            of the logit lens.
        runs: about how many runs of the model on all examples each section may take; more runs sample more.
        budget: seconds; sections that are reached later are cut short or left out, and say so. None for no
            limit.
        only: names of the sections wanted, besides what is told of each edit; all unless given, none for
            `[]`. They are `faithfulness`, `contexts`, `angles`, `probes`, `interchange`, `mediation`,
            `shapley`, `dose`, `direct` and `composition`.
        top: how many promoted and suppressed tokens to keep for each direction.
        max_edits: for how many edits to measure the answer loss without each of their directions.
        draws: how many random directions to remove from each of those, as a control.
        max_new_tokens: longest reply, in tokens; 0 asks for no replies.
        progress: whether to show a progress bar.
        seed: of the random control directions.

    Returns:
        An `Explanation`; `.save("report.html")` writes it as a report.

    Raises:
        DataError: the examples or another argument cannot be used, or there is no tokenizer.

    >>> rl.explain(reft, [("What is the sea like?", "🌊🐠🐚")]).save("report.html")  # doctest: +SKIP
    """
    _check(top=top, max_edits=max_edits, draws=draws, max_new_tokens=max_new_tokens, runs=runs)
    subject = Subject.of("explain", reft, examples, metric, chat=chat, system=system, sources=sources)
    others = as_examples(unseen) if unseen is not None else []
    if any(row.task is not None for row in others):
        raise DataError(
            "unseen has tasks; explain looks at one set of edits, so take one task's with reft.select(...)"
        )
    wanted, clock = _wanted(only), Budget(budget)
    with evaluating(reft), torch.no_grad(), tqdm(disable=not progress, desc="explain") as bar:

        def tick(what: str) -> None:
            bar.set_postfix_str(what, refresh=False)
            bar.update()

        lenses = lenses_for(subject, lens, reft.edits, seed=seed)
        if isinstance(lens, str):
            tick("lens")
        recorded = subject.recorded
        tick("vectors")
        edits = tuple(
            _explained(subject, bound, recorded, lenses.get(bound.key), top)
            for bound in reft.edits
            if bound.key in recorded.vectors
        )
        ranks = sorted(map(len, subject.directions.values()), reverse=True)[:max_edits]
        sections = len(NAMES if wanted is None else wanted)
        bar.total = bar.n + 1 + sections + len(reft.edits) + sum(rank + draws * (rank > 1) for rank in ranks)
        removal = _removal(subject, max_edits=max_edits, draws=draws, seed=seed, tick=tick)
        replies = ReplyTable((), 0, "no replies were asked for (max_new_tokens=0)")
        if max_new_tokens:
            replies = ask(
                reft, subject.rows, others, sources=sources, max_new_tokens=max_new_tokens, **subject.form
            )
        tick("replies")
        plan = Plan(runs, labels, seed, False, wanted, _first(edits, removal))
        found = []
        for section in answers(subject, plan, clock):
            found.append(section)
            tick(section.name)
        bar.total = bar.n
    order = list(QUESTIONS)
    found.sort(key=lambda section: order.index(section.question))
    measured = subject.behaviour if removal.missing is None or metric is not None else None
    name = getattr(getattr(reft.model, "config", None), "_name_or_path", "") or type(reft.model).__name__
    return Explanation(
        str(name), reft.plan(), dict(reft.facts), subject.rows, subject.form["chat"], edits, removal, replies,
        seed, measured, tuple(found),
    )  # fmt: skip


def _check(**counts: Any) -> None:
    for name, value in counts.items():
        whole(name, value, {"top": 1, "runs": 8}.get(name, 0))


def _wanted(only: Any) -> frozenset[str] | None:
    if only is None:
        return None
    names = [only] if isinstance(only, str) else list(only)
    for name in names:
        if name not in NAMES:
            raise DataError(
                f"only={name!r}: there is no such section; there is {list(NAMES)}.{did_you_mean(name, NAMES)}"
            )
    return frozenset(names)


def _first(edits: tuple[EditExplanation, ...], removal: Removal) -> str | None:
    """The edit that matters most: by the loss without it, or by its size."""
    if not edits:
        return None
    costs = {one.edit: one.change for one in removal.removed if one.what == "edit"}
    return max(edits, key=lambda one: costs.get(one.edit, one.sizes.median if not costs else 0.0)).edit


def _explained(
    subject: Subject, bound: BoundEdit, recorded: Recorded, lens: DataLens | None, top: int
) -> EditExplanation:
    edit, vectors = bound.edit, recorded.vectors[bound.key]
    built = subject.reft.interventions[bound.module]
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
        directions=subject.directions[bound.key],
        tokens=effects_of(subject, bound, lens, top=top),
        sizes=sizes_of(vectors),
        axes=common_axes(vectors),
    )


def _removal(
    subject: Subject, *, max_edits: int, draws: int, seed: int, tick: Callable[[str], None]
) -> Removal:
    reft, rows, sources = subject.reft, subject.rows, subject.sources
    answered = sum(row.answer is not None for row in rows)
    if subject.metric is not None:
        return Removal.unavailable("a metric= of the next token was measured in place of the loss on answers")
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
    return removals(
        reft, subject.behaviour, subject.directions, max_edits=max_edits, draws=draws, seed=seed, tick=tick
    )
