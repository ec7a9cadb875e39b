"""Runs in which edits write something else than they do: parts left out, scaled, or put in their place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reftlab.interventions import Intervention
from reftlab.runtime.replacing import told_apart

if TYPE_CHECKING:
    from reftlab.runtime import BoundModel

__all__ = ["Change", "Written", "altered", "nothing", "only_along", "scaled", "sharing", "without_directions"]


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

    def __init__(self, inner: Any, change: Change) -> None:
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
        changes: by the key of a bound edit, `BoundEdit.key`, what to add in place of what it adds. An
            edit's strength still multiplies that. Sites that share an intervention change apart; `sharing`
            has the keys of all of them.

    Raises:
        RunError: there is no such edit.

    >>> with altered(reft, {"emoji": scaled(0.5)}):          # doctest: +SKIP
    ...     logits = reft(**batch).logits
    """
    with contextlib.ExitStack() as stack:
        for key, module in stack.enter_context(told_apart(reft, changes)).items():
            made = _Altered(reft.interventions[module], changes[key])
            stack.enter_context(reft.replaced(module, made.eval()))
        yield reft


def sharing(reft: BoundModel, module: str) -> tuple[str, ...]:
    """Keys of the bound edits that have one intervention, by its key in `reft.interventions`."""
    return tuple(bound.key for bound in reft.edits if bound.module == module)


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
