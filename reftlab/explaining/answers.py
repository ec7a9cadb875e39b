"""The sections of an explanation: which answers there are, and what each of them says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from reftlab.errors import DataError, ReftlabError
from reftlab.explaining.budget import Budget
from reftlab.explaining.causes.given import whole_place
from reftlab.explaining.section import NotApplicable, Section, answered
from reftlab.explaining.subject import Subject
from reftlab.graph import BASE
from reftlab.runtime import BoundModel
from reftlab.runtime.calls import continues_texts
from reftlab.sweeping.sites import swept_sites

__all__ = ["NAMES", "Plan", "answers"]

_DRAWS, _MOST_DRAWS = 5, 20
"""Fewest and most draws of a random control."""


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


_Any = TypeVar("_Any")
Work = Callable[[Subject, Plan, Section, float | None], Section]


def answers(subject: Subject, plan: Plan, budget: Budget) -> Iterator[Section]:
    """Each section in turn; those that cannot be had say why."""
    for empty, work in _SECTIONS:
        if plan.only is not None and empty.name not in plan.only:
            continue
        if not subject.reft.edits:
            yield replace(empty, missing="there are no edits", applies=False)
            continue
        yield answered(empty, lambda e=empty, w=work: w(subject, plan, e, budget.left), budget)  # type: ignore[misc]


def _contexts(subject: Subject, plan: Plan, empty: Section, seconds: float | None) -> Section:
    from reftlab.explaining.geometry.driving import driven

    if plan.first is None:
        raise DataError("no edit was reached")
    found = driven(subject, plan.first, subject.seen, top=5, seed=plan.seed)
    return _told(empty, found)


def _faithfulness(subject: Subject, plan: Plan, empty: Section, seconds: float | None) -> Section:
    from reftlab.explaining.evidence.faithfulness import faithful

    found = faithful(
        subject.reft, subject.behaviour, subject.recorded, draws=_DRAWS, max_edits=2, runs=plan.runs,
        budget=seconds, progress=plan.progress, seed=plan.seed,
    )  # fmt: skip
    return _told(empty, found)


def _angles(subject: Subject, plan: Plan, empty: Section, seconds: float | None) -> Section:
    from reftlab.explaining.geometry.edit_angles import angles_among

    found = angles_among(subject, subject.seen, plan.labels, draws=10 * plan.runs, seed=plan.seed)
    return _told(empty, found)


def _probes(subject: Subject, plan: Plan, empty: Section, seconds: float | None) -> Section:
    from reftlab.probing.change import probe_change

    if plan.labels is None:
        raise NotApplicable("there are no labels= of the examples to probe for")
    found = probe_change(
        subject.reft, [row.prompt for row in subject.rows], plan.labels, seed=plan.seed,
        progress=plan.progress, **subject.form,
    )  # fmt: skip
    return _told(empty, found)


def _mediation(subject: Subject, plan: Plan, empty: Section, seconds: float | None) -> Section:
    from reftlab.explaining.causes.mediation import mediation

    found = mediation(
        subject.reft, subject.question, _spread(subject, plan), budget=seconds, progress=plan.progress,
        seed=plan.seed,
    )  # fmt: skip
    if not found.defined:
        return replace(empty, missing=f"the whole effect, {found.effect} {found.unit}, is not told from 0")
    return _told(empty, found)


def _spread(subject: Subject, plan: Plan) -> list[str]:
    """The edits' own sites, the last block, and others between, as many as the plan has runs for."""
    from reftlab.address import parse_path, resolve

    reft = subject.reft
    blocks = [str(site) for site in resolve(parse_path("blocks[*].output"), reft.model)]
    longest, count = max(map(len, subject.question.prompts)), len(blocks)
    most = max(3, 2 * plan.runs // min(longest, 16))
    own, others = set[int](), dict[str, str]()
    for bound in (bound for bound in reft.edits if bound.edit.run == BASE):
        if str(bound.site) in blocks:
            own.add(blocks.index(str(bound.site)))
        elif _can_be_patched(reft, whole_place(bound.site)):
            others[whole_place(bound.site)] = str(bound.edit.at)
    chosen = {count - 1, *_thinned(sorted(own), most - 1)}
    rest = [block for block in range(count) if block not in chosen]
    chosen |= set(_thinned(rest, most - len(chosen)))
    paths = ["blocks[*].output" if len(chosen) == count else f"blocks[{_listed(chosen)}].output"]
    kept = _thinned(list(others), max(3, most - len(chosen)))
    others = {place: others[place] for place in kept}
    for at in dict.fromkeys(others.values()):
        # One path for all of an edit's sites, where it names no others.
        wanted = [place for place, path in others.items() if path == at]
        named = [str(site) for site in resolve(parse_path(at), reft.model)]
        paths += [at] if sorted(named) == sorted(wanted) else wanted
    return paths


def _thinned(numbers: Sequence[_Any], most: int) -> list[_Any]:
    """At most so many of them, evenly spread, the first and the last among them."""
    if most < 2 or len(numbers) <= most:
        return list(numbers[: max(most, 0)])
    return [numbers[round(place * (len(numbers) - 1) / (most - 1))] for place in range(most)]


def _can_be_patched(reft: BoundModel, path: str) -> bool:
    try:
        swept_sites(reft, path)
    except ReftlabError:
        return False
    return True


def _listed(numbers: set[int]) -> str:
    return ",".join(map(str, sorted(numbers)))


def _interchange(subject: Subject, plan: Plan, empty: Section, seconds: float | None) -> Section:
    from reftlab.explaining.causes.interchange import interchanged, swaps_in

    if not swaps_in(subject.reft):
        raise NotApplicable("no edit takes its values from a source run")
    draws = min(_MOST_DRAWS, max(_DRAWS, plan.runs // 5))
    found = interchanged(
        replace(subject, metric=None), draws=draws, detailed=max(0, plan.runs - draws - 3), budget=seconds,
        progress=plan.progress, seed=plan.seed,
    )  # fmt: skip
    return _told(empty, found)


def _shapley(subject: Subject, plan: Plan, empty: Section, seconds: float | None) -> Section:
    from reftlab.explaining.causes.parts import banded, game_of, parts_of
    from reftlab.explaining.causes.shapley import shapley_values

    by, most = _players(subject), int(math.log2(plan.runs))
    single = parts_of(subject.reft, subject.recorded, by)
    if len(single) < 2:
        raise NotApplicable("there is one part, which has the whole effect")
    # A few sampled orders of many parts say next to nothing; all combinations of a few bands are exact.
    parts = single if by == "dimension" else banded(single, most)
    game = game_of(subject.reft, subject.behaviour, parts)
    found = shapley_values(
        game, exact_up_to=most, permutations=max(2, plan.runs // len(parts)), budget=seconds, seed=plan.seed
    )
    joined = (
        f"The {len(single)} {by}s were joined into {len(parts)} neighbouring groups, of which all "
        f"combinations were measured; rl.shapley(by={by!r}) takes them one by one."
    )
    told = _told(empty, found)
    return told if len(parts) == len(single) else replace(told, note=f"{joined} {told.note}".strip())


def _players(subject: Subject) -> Any:
    names = {bound.edit.name for bound in subject.reft.edits}
    if len(names) > 1:
        return "edit"
    return "layer" if len(subject.reft.edits) > 1 else "dimension"


def _dose(subject: Subject, plan: Plan, empty: Section, seconds: float | None) -> Section:
    from reftlab.explaining.causes.dose import dosed

    names = {bound.edit.name for bound in subject.reft.edits}
    each: list[str] | None = None if len(names) <= max(1, plan.runs // 25) else []
    found = dosed(subject.reft, subject.behaviour, edits=each, budget=seconds, seed=plan.seed)
    return _told(empty, found)


def _direct(subject: Subject, plan: Plan, empty: Section, seconds: float | None) -> Section:
    from reftlab.explaining.causes.direct import at_next_token, direct_effects

    question = at_next_token(subject).question
    return _told(empty, direct_effects(subject.reft, question, progress=plan.progress, seed=plan.seed))


def _composition(subject: Subject, plan: Plan, empty: Section, seconds: float | None) -> Section:
    from reftlab.explaining.composition.composing import composed

    found = composed(
        subject, max_pairs=max(1, plan.runs // 8), budget=seconds, progress=plan.progress, seed=plan.seed
    )
    return _told(empty, found)


def _told(empty: Section, found: Any) -> Section:
    """A section that quotes its result, or says why there is none."""
    missing, note = getattr(found, "missing", None), getattr(found, "note", "")
    if isinstance(missing, str):
        return replace(empty, missing=missing)
    return replace(empty, says=(found.sentence,), result=found, note=note)


def _several_edits(work: Work) -> Work:
    def checked(subject: Subject, plan: Plan, empty: Section, seconds: float | None) -> Section:
        if len({bound.edit.name for bound in subject.reft.edits}) < 2:
            raise NotApplicable("there is one edit")
        return work(subject, plan, empty, seconds)

    return checked


def _texts_only(work: Work) -> Work:
    def checked(subject: Subject, plan: Plan, empty: Section, seconds: float | None) -> Section:
        if not continues_texts(subject.reft.model) and subject.metric is None:
            raise DataError(
                f"{type(subject.reft.model).__name__} does not continue texts, so there is nothing to "
                "measure without a metric="
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
            "interchange",
            "evidence",
            "Whether what the edits swap carries the answer",
            how="Each answer is the one that should come out once the edits have taken their values from the "
            "source run. What they swap is compared with random subspaces of as many directions, with whole "
            "vectors, and with no swap.",
        ),
        _interchange,
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
            how="Direct is what is left of an edit's effect on the logits after the prompt when the output "
            "of every attention and MLP is held at what it is without the edit.",
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
        _several_edits(_texts_only(_composition)),
    ),
)
NAMES = tuple(section.name for section, _ in _SECTIONS)
"""Names of the sections."""
