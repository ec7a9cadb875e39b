"""What could be wrong with an explanation: what was left out, and what its numbers cannot say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reftlab.plotting.wording import true_minus

if TYPE_CHECKING:
    from reftlab.explaining.explanation import Explanation

__all__ = ["doubts_of"]

_FEW = 20
_DRAWS = 10


def doubts_of(explanation: Explanation) -> tuple[str, ...]:
    """Sentences for the reader who doubts, from what was found and what was not."""
    found, count = [], len(explanation.examples)
    if count < _FEW:
        found.append(
            f"There {'is' if count == 1 else 'are'} {count} example{'s' * (count != 1)}. Intervals come from "
            "resampling them, and so few say little of others."
        )
    found.append(
        "All numbers are of these examples. What the edits were trained on is not known here: if it is "
        "these, give examples that they have not seen."
    )
    behaviour = explanation.behaviour
    if explanation.edits and behaviour is not None and behaviour.share(behaviour.full).value != 1.0:
        found.append(
            f"The whole effect on the {behaviour.name} is {behaviour.effect} {behaviour.unit}; its interval "
            "holds 0, so there is no share of it to speak of."
        )
    unread = {one.edit: one.tokens.missing for one in explanation.edits if one.tokens.missing}
    if unread:
        whose = "" if len(unread) == len(explanation.edits) else f" of {', '.join(unread)}"
        found.append(f"Directions{whose} were not read by the logit lens: {next(iter(unread.values()))}.")
    found += _weak_lenses(explanation)
    asked = [section for section in explanation.sections if section.applies]
    found += [f"{section.title}: {section.missing}." for section in asked if section.missing]
    found += [f"{section.title}: {section.note}" for section in asked if section.note and not section.missing]
    found += _controls(explanation)
    if explanation.removal.note:
        found.append(f"Taking one thing away: {explanation.removal.note}.")
    found.append(
        "Directions of an edit are one choice of basis: where their gains are close, mixtures of them would "
        "be as right."
    )
    idle = [f"{s.title.lower()} ({s.missing})" for s in explanation.sections if not s.applies]
    if idle:
        found.append(f"Not asked, since it does not apply: {'; '.join(idle)}.")
    return tuple(map(true_minus, found))


def _weak_lenses(explanation: Explanation) -> list[str]:
    """Where a lens fitted to data explains little of what it was not fitted on."""
    weak = {
        one.edit: lens.caveat for one in explanation.edits if (lens := one.tokens.data_lens) and lens.caveat
    }
    if not weak:
        return []
    first = next(iter(weak))
    more = f", and so at {len(weak) - 1} other edits" if len(weak) > 1 else ""
    return [f"The data lens at {first}: {weak[first]}{more}."]


def _controls(explanation: Explanation) -> list[str]:
    """Where so few random controls were drawn that one of them says little."""
    few = []
    for section in explanation.sections:
        drawn = [int(draws) for draws in section.to_frame().get("draws", ()) if draws > 0]
        if drawn and min(drawn) < _DRAWS:
            few.append(f"{section.title} ({min(drawn)})")
    if not few:
        return []
    return [
        f"Few random controls were drawn, so that their range is rough: {', '.join(few)}; more with runs=."
    ]
