"""What could be wrong with an explanation: what was left out, and what its numbers cannot say."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reftlab.explaining.explanation import Explanation

__all__ = ["doubts_of"]

_FEW = 20


def doubts_of(explanation: Explanation) -> tuple[str, ...]:
    """Sentences for the reader who doubts, from what was found and what was not."""
    found, count = [], len(explanation.examples)
    if count < _FEW:
        found.append(
            f"There are {count} examples. Intervals come from resampling them, and so few say little of "
            "others."
        )
    found.append("All numbers are of these examples, which may be the ones that the edits were trained on.")
    behaviour = explanation.behaviour
    if behaviour is not None and behaviour.share(behaviour.full).value != 1.0:
        found.append(
            f"The whole effect on the {behaviour.name} is {behaviour.effect} {behaviour.unit}; its interval "
            "holds 0, so there is no share of it to speak of."
        )
    lens = next((one.tokens.missing for one in explanation.edits if one.tokens.missing), None)
    if lens:
        found.append(f"Directions were not read as tokens: {lens}.")
    parts = [*explanation.sections]
    found += [f"{section.title}: {section.missing}." for section in parts if section.missing]
    found += [f"{section.title}: {section.note}" for section in parts if section.note and not section.missing]
    if explanation.removal.note:
        found.append(f"Taking one thing away: {explanation.removal.note}.")
    found.append(
        "Directions of an edit are one choice of basis: where their gains are close, mixtures of them would "
        "be as right."
    )
    return tuple(found)
