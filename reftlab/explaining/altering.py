"""Runs in which edits write something else than they do: parts left out, scaled, or put in their place."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reftlab.interventions import Intervention

if TYPE_CHECKING:
    from reftlab.runtime import BoundModel

__all__ = ["Change", "Written", "altered", "altered_at", "nothing", "only_along", "scaled"]
__all__ += ["without_directions"]


class Written(NamedTuple):
    """What an edit is given and adds in one call, before its strength multiplies it.

    Attributes:
        base: the vectors before the edit, `(n, width)` float32.
        delta: what the edit adds to them, `(n, width)`.
        positions: number of each vector's token in its row; None where nobody says.
        rows: row of the batch of each vector; None where nobody says.
    """

    base: Float[Tensor, "n width"]
    delta: Float[Tensor, "n width"]
    positions: Int[Tensor, " n"] | None
    rows: Int[Tensor, " n"] | None


Change = Callable[[Written], Tensor]
"""What to add in place of `delta`, `(n, width)`."""


class _Altered(Intervention):
    """A built intervention that adds `change(written)` in place of what it adds."""

    takes_source = "optional"

    def __init__(self, inner: Intervention, change: Change) -> None:
        super().__init__()
        self.inner, self.change = inner, change
        self.averages_source = getattr(inner, "averages_source", False)  # type: ignore[misc]

    @property
    def directions(self) -> int | None:
        return getattr(self.inner, "directions", None)

    def edited(
        self, base: Float[Tensor, "n width"], source: Float[Tensor, "n width"] | None = None, **extra: Any
    ) -> Float[Tensor, "n width"]:
        own = isinstance(self.inner, Intervention)
        new: Tensor = self.inner.edited(base, source, **extra) if own else self.inner(base, source)
        written = Written(base, new - base, extra.get("positions"), extra.get("rows"))
        return base + self.change(written)


@contextlib.contextmanager
def altered(reft: BoundModel, changes: Mapping[str, Change]) -> Iterator[BoundModel]:
    """Let edits add something else inside a `with` block; afterwards they are as they were.

    Args:
        reft: the bound model.
        changes: by the key of an intervention in `reft.interventions`, what to add in place of what it
            adds. An edit's strength still multiplies that. Where several sites share an intervention, it
            changes at all of them; `BoundEdit.module` is the key of an edit's.

    Raises:
        RunError: there is no such intervention.

    >>> with altered(reft, {"emoji": scaled(0.5)}):          # doctest: +SKIP
    ...     logits = reft(**batch).logits
    """
    with contextlib.ExitStack() as stack:
        known: dict[str, Any] = dict(reft.interventions.items())
        for key, change in changes.items():
            # `replaced` says which interventions there are, where this is none of them.
            made = _Altered(known[key], change).eval() if key in known else torch.nn.Identity()
            stack.enter_context(reft.replaced(key, made))
        yield reft


@contextlib.contextmanager
def altered_at(reft: BoundModel, changes: Mapping[str, Change]) -> Iterator[BoundModel]:
    """As `altered`, by the keys of bound edits: sites that share an intervention change apart.

    Args:
        reft: the bound model.
        changes: by `BoundEdit.key`, what to add in place of what the edit adds.
    """
    users = Counter(bound.module for bound in reft.edits)
    own = {b.key: f"{b.key}(alone)" for b in reft.edits if b.key in changes and users[b.module] > 1}
    module_of = {bound.key: own.get(bound.key, bound.module) for bound in reft.edits}
    before = reft._bound_edits
    try:
        for bound in before:
            if bound.key in own:
                reft.interventions[own[bound.key]] = reft.interventions[bound.module]
        reft._bound_edits = tuple(replace(bound, module=module_of[bound.key]) for bound in before)
        with altered(reft, {module_of[key]: change for key, change in changes.items()}):
            yield reft
    finally:
        reft._bound_edits = before
        for name in own.values():
            reft.interventions.pop(name)


def nothing(written: Written) -> Float[Tensor, "n width"]:
    """Add nothing: the edit left out."""
    return torch.zeros_like(written.delta)


def scaled(factor: float) -> Change:
    """Add `factor` times what the edit adds."""
    return lambda written: factor * written.delta


def without_directions(out: Float[Tensor, "k width"]) -> Change:
    """Add what the edit adds but for its part along orthonormal directions."""

    def change(written: Written) -> Tensor:
        rows = out.to(written.delta)
        return written.delta - (written.delta @ rows.T) @ rows

    return change


def only_along(kept: Float[Tensor, "k width"]) -> Change:
    """Add only the part of what the edit adds that lies along orthonormal directions."""

    def change(written: Written) -> Tensor:
        rows = kept.to(written.delta)
        return (written.delta @ rows.T) @ rows

    return change
