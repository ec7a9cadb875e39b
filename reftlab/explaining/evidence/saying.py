"""The finding of `faithfulness` in plain words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reftlab.explaining.evidence.faithfulness import Faithfulness, Headline

__all__ = ["sentence_of"]


def sentence_of(found: Faithfulness) -> str:
    """One or two sentences from the numbers."""
    if found.missing is not None:
        return f"Not available: {found.missing}."
    head, unit = found.headline, f" {found.unit}" if found.unit else ""
    examples = f"{found.examples} example{'s' * (found.examples != 1)}"
    if head is None:
        also = f" ({found.note}.)" if found.note else ""
        return (
            f"There is no effect to explain: over {examples} the edits change the mean {found.behaviour} by "
            f"{found.effect}{unit}, which cannot be told from no change.{also}"
        )
    kept = f"{_what(head)} keeps {head.share:.2f} of the edits' effect on the {found.behaviour}"
    if not head.reached:
        kept = f"No explanation keeps {head.enough:g} of the effect. The nearest: {_low(kept)}"
    said = f"{kept}{_against(head)}."
    if head.held_out:
        return f"{said} Chosen on {head.chosen_on} examples, measured on {head.reported_on} others."
    return f"{said} Chosen and measured on the same {examples}, which favours it."


def _what(head: Headline) -> str:
    several = head.k != 1
    return {
        "constant": "Always adding the mean change, whatever the input,",
        "steering": "A steering vector along the mean change, at one length,",
        "norm-matched steering": "A steering vector in proportion to the length of what it is added to",
        "directions": (
            f"What each edit writes along its {head.k} main directions"
            if several
            else "What each edit writes along its one main direction"
        ),
        "reading": (
            f"The mean change with {head.k} direction{'s' * several} that "
            f"{'follow' if several else 'follows'} the input"
        ),
        "linearised": "The linear form M h + c of each edit",
    }[head.what]


def _against(head: Headline) -> str:
    drawn = [value for value in head.controls if not math.isnan(value)]
    if not drawn:
        return ", with no random control beside it"
    what = {
        "constant": "a constant of the same length in a random direction",
        "length": "a random direction at the same length",
        "directions": f"{head.k} random direction{'s' * (head.k != 1)} of what they write in",
        "reading": f"{head.k} random direction{'s' * (head.k != 1)} that may follow the input",
    }[head.control]
    verb = "keep" if head.control in ("directions", "reading") and head.k != 1 else "keeps"
    middle = sum(drawn) / len(drawn)
    return f"; {what} {verb} {middle:.2f} ({min(drawn):.2f} to {max(drawn):.2f} over {len(drawn)} draws)"


def _low(text: str) -> str:
    return text[0].lower() + text[1:]
