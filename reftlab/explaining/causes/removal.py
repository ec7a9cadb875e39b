"""What becomes of the answers when an edit, or one direction of it, is taken away."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from reftlab.explaining.altering import Change, altered, nothing, sharing, without_directions

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from reftlab.explaining.geometry.directions import Directions
    from reftlab.measuring import Behaviour
    from reftlab.runtime import BoundModel

__all__ = ["Removal", "Removed", "removals"]

What = Literal["edit", "direction", "random"]


@dataclass(frozen=True)
class Removed:
    """One thing taken away.

    Attributes:
        edit: key of the edit.
        what: the whole `edit`, one `direction` of it, or, as a control, a `random` direction of the
            span of its write directions.
        label: label of the direction, or number of the random draw; empty for the whole edit.
        loss: mean negative log-likelihood of an answer token without it, in nats.
        change: `loss` minus the loss with everything in place, in nats.
        changes: the same for each example, in nats per answer token of that example.
    """

    edit: str
    what: What
    label: str
    loss: float
    change: float
    changes: tuple[float, ...]


@dataclass(frozen=True)
class Removal:
    """Loss on the answers with everything in place, and with one thing taken away at a time.

    Attributes:
        loss: mean negative log-likelihood of an answer token with all edits, in nats.
        bare_loss: the same without any edit.
        examples: number of examples with an answer.
        tokens: number of answer tokens.
        removed: everything that was taken away.
        detailed: keys of the edits whose directions were removed one by one; the whole edit was
            removed for all.
        missing: why there is nothing here, or None.
        note: what was left out, in words, or an empty text.
    """

    loss: float
    bare_loss: float
    examples: int
    tokens: int
    removed: tuple[Removed, ...]
    detailed: tuple[str, ...]
    missing: str | None = None
    note: str = ""

    @classmethod
    def unavailable(cls, why: str) -> Removal:
        return cls(float("nan"), float("nan"), 0, 0, (), (), why)

    def of(self, edit: str, what: What | None = None) -> tuple[Removed, ...]:
        """What was taken away from one edit."""
        return tuple(r for r in self.removed if r.edit == edit and what in (None, r.what))

    def to_frame(self) -> pd.DataFrame:
        """One line a removal: edit, what, label, loss, change."""
        import pandas as pd

        lines = [(r.edit, r.what, r.label, r.loss, r.change) for r in self.removed]
        return pd.DataFrame(lines, columns=["edit", "what", "label", "loss", "change"])

    def plot(self) -> Figure:
        from reftlab.plotting import message_figure, removal_figure

        if self.missing is not None:
            return message_figure("Answer loss without an edit", self.missing)
        return removal_figure(
            {r.edit: r.change for r in self.removed if r.what == "edit"},
            {key: [(r.label, r.change) for r in self.of(key, "direction")] for key in self.detailed},
            {key: [r.change for r in self.of(key, "random")] for key in self.detailed},
        )

    def _repr_html_(self) -> str:
        import html

        if self.missing is not None:
            return f"<p>{html.escape(self.missing)}</p>"
        return str(self.to_frame().to_html(index=False, float_format="{:.3g}".format))

    def __repr__(self) -> str:
        if self.missing is not None:
            return f"Removal(not available: {self.missing})"
        return (
            f"Removal(loss {self.loss:.3g} nats a token with all edits, {self.bare_loss:.3g} with none, "
            f"{len(self.removed)} removals)"
        )


def removals(
    reft: BoundModel,
    behaviour: Behaviour,
    directions: Mapping[str, Directions],
    *,
    max_edits: int = 6,
    draws: int = 3,
    seed: int = 0,
    tick: Callable[[str], None] = lambda what: None,
) -> Removal:
    """Take away each edit, then each direction of those edits that matter most.

    Args:
        reft: the bound model.
        behaviour: the answer loss.
        directions: directions of each edit, by key.
        max_edits: how many edits have their directions removed one by one: those whose removal as a
            whole raises the loss most.
        draws: how many random directions are removed from each of those as a control.
        seed: of the random directions.
        tick: called after each loss with a few words for a progress bar.
    """
    full = behaviour.full

    def removed(key: str, what: What, label: str, change: Change) -> Removed:
        with altered(reft, dict.fromkeys(sharing(reft, modules[key]), change)):
            loss = behaviour()
        tick(f"without {key} {label}".strip())
        mean = behaviour.mean(loss)
        return Removed(key, what, label, mean, mean - behaviour.mean(full), tuple((loss - full).tolist()))

    modules = {bound.key: bound.module for bound in reft.edits if bound.key in directions}
    keys, whole = list(modules), dict[str, Removed]()
    # An intervention that several places share is taken from all of them, so it is measured once.
    for key, module in modules.items():
        whole[module] = whole.get(module) or removed(key, "edit", "", nothing)
    found = [replace(whole[module], edit=key) for key, module in modules.items()]
    order = sorted(found, key=lambda r: r.change, reverse=True)
    detailed = tuple(r.edit for r in order[:max_edits])
    generator = torch.Generator().manual_seed(seed)
    for key in detailed:
        write = directions[key].write
        found += [
            removed(key, "direction", label, without_directions(write[k : k + 1]))
            for k, label in enumerate(directions[key].labels)
        ]
        for draw in range(1, draws + 1 if len(write) > 1 else 1):
            mixed = torch.randn(1, len(write), generator=generator) @ write
            found.append(removed(key, "random", str(draw), without_directions(mixed / mixed.norm())))
    note, left = "", len(keys) - len(detailed)
    if left:
        note = (
            f"directions were removed one by one for the {len(detailed)} edits whose removal as a whole "
            f"raises the loss most; for the other {left} only the whole edit was removed"
        )
    return Removal(
        behaviour.mean(full),
        behaviour.mean(behaviour.bare),
        len(behaviour.weights),
        int(behaviour.weights.sum()),
        tuple(found),
        detailed,
        None,
        note,
    )
