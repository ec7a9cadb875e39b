"""The findings about directions and subspaces in plain words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reftlab.explaining.geometry.contexts import Contexts
    from reftlab.explaining.geometry.edit_angles import EditAngles

__all__ = ["of_angles", "of_contexts"]

_CHANCE = 0.05
_MORE = {
    "variance": "the vectors differ more along it",
    "kurtosis": "a few tokens carry more of it",
    "largest": "its farthest token stands out more",
}


def of_contexts(found: Contexts) -> str:
    """At which tokens the first read direction stands out, and whether it is special."""
    if found.missing is not None:
        return f"Not available: {found.missing}."
    first = found.directions[0]
    above, below = (abs(first.z(end[0].mean)) if end else 0.0 for end in (first.highest, first.lowest))
    end, which = (first.highest, "most") if above >= below else (first.lowest, "least")
    tokens = ", ".join(mean.text for mean in end[:3])
    special = [f"{_MORE[one.measure]} (p {one.p:.2g})" for one in first.against if one.p <= _CHANCE]
    beside = f"Nothing in how it varies tells it from {found.draws} random directions"
    if special:
        several = f"{', '.join(special[:-1])} and {special[-1]}" if len(special) > 1 else special[0]
        beside = f"Beside {found.draws} random directions, {several}"
    return f"The first read direction of {found.edit} is found {which} at the tokens {tokens}. {beside}."


def of_angles(found: EditAngles) -> str:
    """How many angles random subspaces do not explain, and the smallest of these."""
    # An edit that overwrites what it reads has both of its own subspaces close by construction.
    lines = [line for line in found.lines if line.kind != "own"]
    own = len(found.lines) - len(lines)
    close = sorted((line for line in lines if line.q <= _CHANCE), key=lambda line: line.angles.smallest)
    which = f"Of {len(lines)} comparisons of the edits' subspaces with others at their sites"
    if own:
        which = (
            f"Of {len(found.lines)} comparisons of subspaces, {own} {'is' if own == 1 else 'are'} of an "
            "edit's own two, which lie close where it overwrites what it reads. Of the other "
            f"{len(lines)}, with other subspaces at the edits' sites"
        )
    said = (
        f"{which}, {len(close)} {'has' if len(close) == 1 else 'have'} a smaller angle than random subspaces "
        f"explain (false discovery rate {_CHANCE:.0%})"
    )
    if not close:
        return f"{said}."
    one = close[0]
    pair = f"the {one.side} subspace of {one.edit} and {one.against}"
    return f"{said}; the smallest: {pair}, {one.angles.smallest:.3g}°."
