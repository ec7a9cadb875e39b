"""The findings about causes in plain words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from reftlab.explaining.causes.dose import DoseResponse
    from reftlab.explaining.causes.mediated import Mediation
    from reftlab.explaining.causes.shapley import ShapleyValues
    from reftlab.explaining.causes.split import DirectEffect, DirectEffects

__all__ = ["of_direct", "of_dose", "of_mediation", "of_shapley"]

_MOST_EDITS = 3


def of_mediation(found: Mediation) -> str:
    """Through which place most of the effect flows."""
    if not found.defined:
        return (
            f"The edits' effect on the {found.name}, {found.effect} {found.unit}, is not told from 0, so no "
            "place can have a share of it."
        )
    best = _largest(found, found.sufficiency)
    if best is None:
        return f"No place was measured. {found.note}".strip()
    said = (
        f"Put back into the run without edits, the edited vector at {best[0]} alone brings about "
        f"{best[1]:.0%} of the effect, more than any other."
    )
    needed = None if found.necessary is None else _largest(found, found.necessity)
    if needed is not None:
        said += (
            f" Taken out of the edited run, the one at {needed[0]} costs most: {needed[1]:.0%} of the effect."
        )
    return said


def of_shapley(found: ShapleyValues) -> str:
    """Which part has the largest share of the effect."""
    values = [one.value for one in found.estimates]
    most = max(range(len(values)), key=lambda part: abs(values[part]))
    share = found.shares[most]
    told = "" if math.isnan(share) else f", {share:.0%} of the whole"
    return (
        f"Averaged over the orders in which the {len(values)} parts ({found.by}s) could come, "
        f"{found.labels[most]} has the largest part of the effect: {values[most]:+.2g} of "
        f"{found.effect.value:+.2g} {found.unit}{told}."
    )


def of_dose(found: DoseResponse) -> str:
    """How the first curve goes, and where it is best."""
    curve = found.curves[0]
    shape = "neither rising nor falling throughout" if curve.shape == "neither" else curve.shape
    return (
        f"From scale {curve.scales[0]:g} to {curve.scales[-1]:g} of {curve.label}, the {found.name} is "
        f"{shape}; the effect is largest at scale {curve.best:g}."
    )


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
    return (
        f"{effect.logit_share.value:.0%} of what {effect.edit} changes in the logits after the prompt goes "
        "by the residual stream alone; later blocks make the rest of it."
    )


def _largest(found: Mediation, shares: Float[np.ndarray, "site head column"]) -> tuple[str, float] | None:
    """The cell with the largest share, in words; None where none was measured."""
    if np.isnan(shares).all():
        return None
    site, head, column = np.unravel_index(int(np.nanargmax(shares)), shares.shape)
    part = "" if found.heads is None else f", head {found.heads[head]}"
    return (
        f"{found.sites[site].name}{part}, token {found.columns[column]!r}",
        float(shares[site, head, column]),
    )
