"""The findings about directions and subspaces in plain words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reftlab.explaining.geometry.contexts import Contexts
    from reftlab.explaining.geometry.edit_angles import EditAngles

__all__ = ["of_angles", "of_contexts"]

_CHANCE = 0.05


def of_contexts(found: Contexts) -> str:
    """At which tokens the first read direction stands out, and whether it is special."""
    if found.missing is not None:
        return f"Not available: {found.missing}."
    first = found.directions[0]
    above, below = (abs(first.z(end[0].mean)) if end else 0.0 for end in (first.highest, first.lowest))
    end, which = (first.highest, "most") if above >= below else (first.lowest, "least")
    tokens = ", ".join(mean.text for mean in end[:3])
    special = [f"{one.measure} (p {one.p:.2g})" for one in first.against if one.p <= _CHANCE]
    beside = f"nothing in how it varies tells it from {found.draws} random directions"
    if special:
        more = "is more than that" if len(special) == 1 else "are more than those"
        beside = f"its {' and '.join(special)} {more} of {1 - _CHANCE:.0%} of {found.draws} random directions"
    return f"The first read direction of {found.edit} is found {which} at the tokens {tokens}; {beside}."


def of_angles(found: EditAngles) -> str:
    """How many angles random subspaces do not explain, and the smallest of these."""
    # An edit that overwrites what it reads has both of its own subspaces close by construction.
    lines = [line for line in found.lines if line.kind != "own"]
    close = sorted((line for line in lines if line.q <= _CHANCE), key=lambda line: line.angles.smallest)
    said = (
        f"Of {len(lines)} angles between the edits' subspaces and others at their sites, {len(close)} "
        f"{'is' if len(close) == 1 else 'are'} smaller than random subspaces explain (false discovery rate "
        f"{_CHANCE:.0%})"
    )
    if not close:
        return f"{said}."
    one = close[0]
    which = f"the {one.side} subspace of {one.edit} and {one.against}"
    return f"{said}; the smallest: {which}, {one.angles.smallest:.3g}°."
