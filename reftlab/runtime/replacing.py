"""Interventions that stand in for others for a while, and bound edits that share one told apart."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from reftlab.errors import RunError, did_you_mean

if TYPE_CHECKING:
    from reftlab.runtime.model import BoundModel

__all__ = ["replaced", "told_apart"]


@contextlib.contextmanager
def replaced(reft: BoundModel, key: str, intervention: nn.Module) -> Iterator[BoundModel]:
    """Put another intervention in the place of one inside a `with` block.

    Args:
        reft: the bound model.
        key: of the one in `reft.interventions`; where several sites share it, it changes at all of them.
        intervention: what takes its place.

    Raises:
        RunError: there is no such intervention.
    """
    if key not in reft.interventions:
        known = list(reft.interventions)
        raise RunError(f"there is no intervention {key!r}; there is {known}.{did_you_mean(key, known)}")
    before = reft.interventions[key]
    reft.interventions[key] = intervention
    try:
        yield reft
    finally:
        reft.interventions[key] = before


@contextlib.contextmanager
def told_apart(reft: BoundModel, keys: Collection[str]) -> Iterator[Mapping[str, str]]:
    """Let bound edits that share an intervention have it under a name each inside a `with` block.

    Args:
        reft: the bound model.
        keys: of its bound edits, see `BoundEdit.key`.

    Yields:
        By key, the name of the edit's intervention in `reft.interventions`, which is that of no other edit.

    Raises:
        RunError: there is no such edit.
    """
    before = reft._bound_edits
    known = [bound.key for bound in before]
    for key in keys:
        if key not in known:
            raise RunError(f"there is no edit {key!r}; there is {known}.{did_you_mean(key, known)}")
    users = Counter(bound.module for bound in before)
    own = {b.key: f"{b.key}(alone)" for b in before if b.key in keys and users[b.module] > 1}
    try:
        for bound in before:
            if bound.key in own:
                reft.interventions[own[bound.key]] = reft.interventions[bound.module]
        reft._bound_edits = tuple(replace(b, module=own.get(b.key, b.module)) for b in before)
        yield {bound.key: bound.module for bound in reft._bound_edits if bound.key in keys}
    finally:
        reft._bound_edits = before
        for name in own.values():
            reft.interventions.pop(name)
