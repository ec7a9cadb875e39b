"""The findings about causes in plain words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from reftlab.explaining.causes.mediated import ANSWER
from reftlab.plotting.wording import block_named, number

if TYPE_CHECKING:
    from reftlab.explaining.causes.dose import DoseResponse
    from reftlab.explaining.causes.mediated import Mediation
    from reftlab.explaining.causes.shapley import ShapleyValues
    from reftlab.explaining.causes.split import DirectEffect, DirectEffects

__all__ = ["of_direct", "of_dose", "of_mediation", "of_shapley"]

_MOST_EDITS, _MOST_TURNS = 3, 4


def of_mediation(found: Mediation) -> str:
    """Through which place most of the effect flows."""
    if not found.defined:
        return (
            f"The edits' effect on the {found.name}, {number(found.effect)} {found.unit}, is not told from "
            "0, so no place can have a share of it."
        )
    best = _largest(found, found.sufficiency)
    if best is None:
        return f"No place was measured. {found.note}".strip()
    said = (
        f"Put back into the run without edits, the edited vector at {best[0]}, alone brings about "
        f"{number(best[1], '.0%')} of the effect, more than any other."
    )
    needed = None if found.necessary is None else _largest(found, found.necessity)
    if needed is not None:
        said += (
            f" Taken out of the edited run, the one at {needed[0]}, costs most: "
            f"{number(needed[1], '.0%')} of the effect."
        )
    return said


def of_shapley(found: ShapleyValues) -> str:
    """Which part has the largest share of the effect."""
    values = [one.value for one in found.estimates]
    most = max(range(len(values)), key=lambda part: abs(values[part]))
    share = found.shares[most]
    told = "" if math.isnan(share) else f", {number(share, '.0%')} of the whole"
    return (
        f"Averaged over the orders in which the {len(values)} parts ({found.by}s) could come, "
        f"{found.labels[most]} has the largest part of the effect: {number(values[most], '+.2g')} of "
        f"{number(found.effect.value, '+.2g')} {found.unit}{told}."
    )


def of_dose(found: DoseResponse) -> str:
    """How the first curve goes, and where it is best."""
    curve = found.curves[0]
    scales = [number(scale, "g") for scale in (curve.scales[0], curve.scales[-1], curve.best)]
    unit = f" {found.unit}" if found.unit else ""
    began = f"From scale {scales[0]} to {scales[1]} of {curve.label}, the {found.name}"
    if not curve.course:
        return f"{began} does not change."
    verbs = ["rises" if change > 0 else "falls" for _, change in curve.course]
    sizes = [number(abs(change)) for _, change in curve.course]
    sizes[0] += unit
    if len(verbs) == 1:
        how = f"{verbs[0]} by {sizes[0]}"
    elif len(verbs) <= _MOST_TURNS:
        turns = [f" up to scale {number(scale, 'g')}" for scale, _ in curve.course[:-1]]
        steps = zip(verbs, [*turns, ""], sizes, strict=True)
        how = ", then ".join(f"{verb}{to} (by {size})" for verb, to, size in steps)
    else:
        highest, lowest = (number(scale, "g") for scale in curve.extremes)
        how = f"turns {len(verbs) - 1} times, is highest at scale {highest} and lowest at scale {lowest}"
    return f"{began} {how}; the effect is largest at scale {scales[2]}."


def of_direct(found: DirectEffects) -> str:
    """What of each edit's effect is direct."""
    if found.missing is not None:
        return f"Not available: {found.missing}."
    said = [_of_one(effect) for effect in found.effects[:_MOST_EDITS]]
    left = len(found.effects) - len(said)
    return " ".join([*said, *([f"The table has {left} edits more."] if left > 0 else [])])


def _of_one(effect: DirectEffect) -> str:
    if effect.missing is not None:
        return f"{effect.edit}: {effect.missing}."
    if effect.at_last == 0:
        return (
            f"{effect.edit} does not act at the last token of any prompt, so none of its effect on the next "
            "token is direct."
        )
    if math.isnan(effect.logit_share.value):
        return f"{effect.edit} does not change the logits after the prompt."
    share = number(effect.logit_share.value, ".0%")
    what = f"of what {effect.edit} changes in the logits after the prompt"
    if share == "0%":
        return f"Next to nothing {what} goes by the residual stream alone; later blocks make it."
    if effect.logit_share.value < 0:
        return (
            f"By the residual stream alone, {effect.edit} would change the logits after the prompt the other "
            f"way ({share} of its whole change, which later blocks make)."
        )
    if share == "100%":
        return f"100% {what} goes by the residual stream alone."
    later = "make the rest of it" if effect.logit_share.value < 1 else "take the surplus back"
    return f"{share} {what} goes by the residual stream alone; later blocks {later}."


def _largest(found: Mediation, shares: Float[np.ndarray, "site head column"]) -> tuple[str, float] | None:
    """The cell with the largest share, in words; None where none was measured."""
    if np.isnan(shares).all():
        return None
    site, head, column = np.unravel_index(int(np.nanargmax(shares)), shares.shape)
    part = "" if found.heads is None else f", head {found.heads[head]}"
    place = f"{block_named(found.sites[site].name)}{part}, {_token(found, found.columns[column])}"
    return place, float(shares[site, head, column])


def _token(found: Mediation, column: str) -> str:
    """A column of tokens in words."""
    if column == ANSWER:
        return "at the answer's tokens"
    return f"token {column!r}" if found.every_token else f"position {column!r}"
