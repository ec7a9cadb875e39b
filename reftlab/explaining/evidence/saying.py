"""The finding of `faithfulness` in plain words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from reftlab.plotting.wording import number

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
            f"{number(found.effect)}{unit}, which cannot be told from no change.{also}"
        )
    kept = f"{_what(head)} keeps {_with_interval(head)} of the edits' effect on the {found.behaviour}"
    if not head.reached:
        where = " on the examples it was chosen on" if head.held_out else ""
        kept = (
            f"None of the explanations that were tried keeps {head.enough:g} of the effect{where}. The "
            f"nearest: {_low(kept)}"
        )
    said = f"{kept}{_against(head)}."
    if head.held_out:
        said += f" Chosen on {head.chosen_on} examples, measured on {head.reported_on} others."
    else:
        said += f" Chosen and measured on the same {examples}, which favours it."
    return said + _by_position(found)


def _what(head: Headline) -> str:
    several = head.k != 1
    return {
        "constant": "Always adding the mean change, whatever the input,",
        "mean per position": "Always adding each token's own mean change, whatever the input,",
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
        "per position": "constants of the same lengths in random directions",
        "length": "a random direction at the same length",
        "directions": f"{head.k} random direction{'s' * (head.k != 1)} of what they write in",
        "reading": f"{head.k} random direction{'s' * (head.k != 1)} that may follow the input",
    }[head.control]
    several = head.control in ("directions", "reading") and head.k != 1
    verb = "keep" if several or head.control == "per position" else "keeps"
    middle, low, high = map(_share, (sum(drawn) / len(drawn), min(drawn), max(drawn)))
    return f"; {what} {verb} {middle} ({low} to {high} over {len(drawn)} draws)"


def _with_interval(head: Headline) -> str:
    share, low, high = map(_share, (head.share.value, head.share.low, head.share.high))
    return share if math.isnan(head.share.low) else f"{share} [{low}, {high}]"


def _share(value: float) -> str:
    """A share with two decimals, or three where two would make it the whole that it is not."""
    return number(value, ".3f" if 0.995 <= value < 0.9995 else ".2f")


def _by_position(found: Faithfulness) -> str:
    """A word on edits that add another constant at each of their tokens; empty where that is not told."""
    assert found.headline is not None
    enough = found.headline.enough
    own, one = (next(iter(found.of(what=what)), None) for what in ("mean per position", "constant"))
    if own is None or one is None or not enough <= own.share.value <= 2 - enough:
        return ""
    if one.share.high >= own.share.low:
        return ""
    return (
        f" A mean change for each position keeps {_share(own.share.value)} and one for all of them "
        f"{_share(one.share.value)}: what the edits add depends on which token it is, hardly on the input."
    )


def _low(text: str) -> str:
    return text[0].lower() + text[1:]
