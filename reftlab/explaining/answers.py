"""The sections of an explanation: which answers there are, and what each of them says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reftlab.errors import DataError
from reftlab.explaining.section import Budget, Section, answered
from reftlab.explaining.subject import Subject
from reftlab.runtime.calls import continues_texts

__all__ = ["NAMES", "Plan", "answers"]

_CHANCE = 0.05


@dataclass(frozen=True)
class Plan:
    """How much work goes into the sections.

    Attributes:
        runs: about how many runs of the model on all examples one section may take.
        labels: a class for each example, or None.
        seed: of everything random.
        progress: whether to show progress bars.
        only: names of the sections wanted; None for all.
        first: key of the edit that matters most, or None where there is none.
    """

    runs: int
    labels: Any
    seed: int
    progress: bool
    only: frozenset[str] | None
    first: str | None


Work = Callable[[Subject, Plan, Section, float | None], Section]


def answers(subject: Subject, plan: Plan, budget: Budget) -> Iterator[Section]:
    """Each section in turn; those that cannot be had say why."""
    for empty, work in _SECTIONS:
        if plan.only is not None and empty.name not in plan.only:
            continue
        if not subject.reft.edits:
            yield replace(empty, missing="there are no edits")
            continue
        yield answered(empty, lambda e=empty, w=work: w(subject, plan, e, budget.left or None), budget)  # type: ignore[misc]


def _contexts(subject: Subject, plan: Plan, empty: Section, seconds: float | None) -> Section:
    from reftlab.explaining.geometry.driving import driving_contexts

    if plan.first is None:
        raise DataError("no edit was reached")
    found = driving_contexts(
        subject.reft, subject.rows, plan.first, top=5, sources=subject.sources, progress=False,
        seed=plan.seed, **subject.form,
    )  # fmt: skip
    if found.missing:
        return replace(empty, missing=found.missing)
    first = found.directions[0]
    tokens = ", ".join(mean.text for mean in first.highest[:3])
    says = f"The first read direction of {plan.first} is found most at the tokens {tokens}."
    return replace(empty, says=(says,), result=found, note=found.note)


def _faithfulness(subject: Subject, plan: Plan, empty: Section, seconds: float | None) -> Section:
    from reftlab.explaining.evidence.faithfulness import faithful

    claims = 12
    found = faithful(
        subject.reft, subject.behaviour, subject.recorded, draws=max(2, plan.runs // claims - 1),
        max_edits=2, budget=seconds, progress=plan.progress,
        seed=plan.seed,
    )  # fmt: skip
    if found.missing:
        return replace(empty, missing=found.missing)
    return replace(empty, says=(found.sentence,), result=found, note=found.note)


def _angles(subject: Subject, plan: Plan, empty: Section, seconds: float | None) -> Section:
    from reftlab.explaining.geometry.edit_angles import edit_angles

    found = edit_angles(
        subject.reft, subject.rows, plan.labels, draws=10 * plan.runs, sources=subject.sources,
        progress=False, seed=plan.seed, **subject.form,
    )  # fmt: skip
    close = [line for line in found.lines if line.q <= _CHANCE]
    says = (
        f"Of {len(found.lines)} angles between the edits' subspaces and others at their sites, {len(close)} "
        f"are smaller than random subspaces explain (false discovery rate {_CHANCE:.0%}).",
    )
    return replace(empty, says=says, result=found, note=found.note)


def _probes(subject: Subject, plan: Plan, empty: Section, seconds: float | None) -> Section:
    from reftlab.probing.change import probe_change

    if plan.labels is None:
        raise DataError("there are no labels= of the examples to probe for")
    found = probe_change(
        subject.reft, [row.prompt for row in subject.rows], plan.labels, seed=plan.seed,
        progress=plan.progress, **subject.form,
    )  # fmt: skip
    gained, lost = found.gained(), found.lost()
    says = (
        f"The labels become more decodable at {len(gained)} places because of the edits, less at {len(lost)}."
    )
    return replace(empty, says=(says,), result=found, note=found.note)


def _mediation(subject: Subject, plan: Plan, empty: Section, seconds: float | None) -> Section:
    from reftlab.explaining.causes.mediation import mediation

    found = mediation(
        subject.reft, subject.question, _spread(subject, plan), budget=seconds, progress=plan.progress,
        seed=plan.seed,
    )  # fmt: skip
    if not found.defined:
        return replace(empty, missing=f"the whole effect, {found.effect} {found.unit}, is not told from 0")
    return replace(empty, says=_through(found), result=found, note=found.note)


def _spread(subject: Subject, plan: Plan) -> str:
    """The blocks' outputs, or as many of them, evenly spread and with the last, as the plan has runs for."""
    from reftlab.address import parse_path, resolve

    count = len(resolve(parse_path("blocks[*].output"), subject.reft.model))
    longest = max(map(len, subject.question.prompts))
    step = max(1, math.ceil(2 * count * min(longest, 16) / (4 * plan.runs)))
    return "blocks[*].output" if step == 1 else f"blocks[{(count - 1) % step}::{step}].output"


def _through(found: Any) -> tuple[str, ...]:
    import numpy as np

    shares = found.sufficiency[:, 0]
    best = np.unravel_index(np.nanargmax(shares), shares.shape)
    lines = [
        f"Put back into the run without edits, the edited vector at {found.sites[best[0]].name}, token "
        f"{found.columns[best[1]]!r}, alone brings about {shares[best]:.0%} of the effect, more than any other."
    ]
    if found.necessity is not None:
        needed = found.necessity[:, 0]
        most = np.unravel_index(np.nanargmax(needed), needed.shape)
        lines.append(
            f"Taken out of the edited run, the one at {found.sites[most[0]].name}, token "
            f"{found.columns[most[1]]!r}, costs most: {needed[most]:.0%} of the effect."
        )
    return tuple(lines)


def _shapley(subject: Subject, plan: Plan, empty: Section, seconds: float | None) -> Section:
    from reftlab.explaining.causes.parts import game_of, parts_of
    from reftlab.explaining.causes.shapley import shapley_values

    by = _players(subject)
    parts = parts_of(subject.reft, subject.recorded, by)
    if len(parts) < 2:
        raise DataError("there is one part, which has the whole effect")
    game = game_of(subject.reft, subject.behaviour, parts)
    found = shapley_values(
        game, exact_up_to=int(math.log2(plan.runs)), permutations=max(2, plan.runs // len(parts)),
        budget=seconds, seed=plan.seed,
    )  # fmt: skip
    frame = found.to_frame()
    most = frame.loc[frame["shapley"].abs().idxmax()]
    share = "" if math.isnan(most["share"]) else f", {most['share']:.0%} of the whole"
    says = (
        f"Averaged over the orders in which the {len(parts)} parts ({by}s) could come, {most['part']} has the "
        f"largest part of the effect: {most['shapley']:+.2g} of {found.effect.value:+.2g} {found.unit}{share}.",
    )
    return replace(empty, says=says, result=found, note=found.note)


def _players(subject: Subject) -> Any:
    names = {bound.edit.name for bound in subject.reft.edits}
    if len(names) > 1:
        return "edit"
    return "layer" if len(subject.reft.edits) > 1 else "dimension"


def _dose(subject: Subject, plan: Plan, empty: Section, seconds: float | None) -> Section:
    from reftlab.explaining.causes.dose import dosed

    names = {bound.edit.name for bound in subject.reft.edits}
    each = None if len(names) <= max(1, plan.runs // 25) else []
    found = dosed(subject.reft, subject.behaviour, edits=each, budget=seconds, seed=plan.seed)
    curve = found.curves[0]
    says = (
        f"From scale {curve.scales[0]:g} to {curve.scales[-1]:g} of {curve.label}, the {found.name} is "
        f"{'neither rising nor falling throughout' if curve.shape == 'neither' else curve.shape}; the effect is "
        f"largest at scale {curve.best:g}.",
    )
    return replace(empty, says=says, result=found, note=found.note)


def _direct(subject: Subject, plan: Plan, empty: Section, seconds: float | None) -> Section:
    from reftlab.explaining.causes.direct import direct_effect

    found = direct_effect(
        subject.reft, subject.rows, subject.metric, sources=subject.sources, progress=plan.progress,
        seed=plan.seed, **subject.form,
    )  # fmt: skip
    if found.missing:
        return replace(empty, missing=found.missing)
    says = []
    for effect in found.effects:
        if effect.missing:
            says.append(f"{effect.edit}: {effect.missing}.")
        elif effect.at_last == 0:
            says.append(
                f"{effect.edit} does not act at the last token of any prompt, so none of its effect on the next "
                "token is direct."
            )
        else:
            says.append(
                f"{effect.logit_share.value:.0%} of what {effect.edit} changes in the logits after the prompt "
                "goes by the residual stream alone; later blocks make the rest of it."
            )
    return replace(empty, says=tuple(says[:3]), result=found)


def _composition(subject: Subject, plan: Plan, empty: Section, seconds: float | None) -> Section:
    from reftlab.explaining.composition.composition import composition

    if len({bound.edit.name for bound in subject.reft.edits}) < 2:
        raise DataError("there is one edit")
    found = composition(
        subject.reft, subject.rows, subject.metric, max_pairs=max(1, plan.runs // 8), budget=seconds,
        sources=subject.sources, progress=plan.progress, seed=plan.seed, **subject.form,
    )  # fmt: skip
    return replace(empty, says=(found.sentence,), result=found, note=found.note)


def _texts_only(work: Work) -> Work:
    def checked(subject: Subject, plan: Plan, empty: Section, seconds: float | None) -> Section:
        if not continues_texts(subject.reft.model) and subject.metric is None:
            raise DataError(
                f"{type(subject.reft.model).__name__} does not continue texts, so there is nothing to measure "
                "without a metric="
            )
        return work(subject, plan, empty, seconds)

    return checked


_SECTIONS: Sequence[tuple[Section, Work]] = (
    (
        Section(
            "faithfulness",
            "evidence",
            "Put the explanation in the edits' place",
            how="Every explanation says what the edits add: their mean, their strongest directions, a linear "
            "map. It is fitted on some examples, added in the edits' place on others, and the share of the "
            "effect that is left is measured: 1 is all of it, 0 none. Grey are random explanations of the "
            "same form, which an explanation must beat to say anything.",
        ),
        _texts_only(_faithfulness),
    ),
    (
        Section(
            "contexts",
            "what",
            "What drives the read directions",
            how="The vector at every token of the examples is compared with each read direction of the edit "
            "that matters most. Any direction has a token at which it is largest; random directions on the "
            "same vectors say whether this one is special.",
        ),
        _contexts,
    ),
    (
        Section(
            "angles",
            "evidence",
            "Which known directions the edits lie near",
            how="Principal angles between the subspaces that the edits read and write and other subspaces of "
            "the same site, each beside random subspaces of the same sizes.",
        ),
        _angles,
    ),
    (
        Section(
            "probes",
            "evidence",
            "What can be decoded before and after",
            how="The same probes, with the same folds, on the vectors of runs without and with the edits.",
        ),
        _probes,
    ),
    (
        Section(
            "mediation",
            "where",
            "Through which blocks and tokens the effect flows",
            how="Sufficiency: the run without edits, with one vector of the edited run put in; the share of "
            "the effect that comes about. Necessity: the edited run, with one vector of the run without put "
            "in; the share that is lost. Neither adds up over places, since later ones carry what earlier "
            "ones do.",
        ),
        _texts_only(_mediation),
    ),
    (
        Section(
            "shapley",
            "amount",
            "Each part's share of the effect",
            how="The Shapley value of a part is what it changes when it joins those before it, averaged over "
            "all orders. Parts that do the same work share it; the values of all parts sum to the whole "
            "effect.",
        ),
        _texts_only(_shapley),
    ),
    (
        Section(
            "dose",
            "amount",
            "Stronger and weaker",
            how="All that the edits add is multiplied by a scale: 0 is without them, 1 as they are.",
        ),
        _texts_only(_dose),
    ),
    (
        Section(
            "direct",
            "amount",
            "Direct effect and what later blocks make of it",
            how="Direct is what is left of an edit's effect on the logits after the prompt when the output of "
            "every attention and MLP is held at what it is without the edit.",
        ),
        _texts_only(_direct),
    ),
    (
        Section(
            "composition",
            "amount",
            "The edits together",
            how="Each edit acts alone, every two together in both orders, and all together. Where effects "
            "add up, observed minus expected is 0.",
        ),
        _texts_only(_composition),
    ),
)
NAMES = tuple(section.name for section, _ in _SECTIONS)
"""Names of the sections."""
