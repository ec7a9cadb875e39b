"""Carrying out an edit on the tensor of its site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reftlab.errors import InterventionError, RunError
from reftlab.interventions import Intervention
from reftlab.runtime.build import gate_keys
from reftlab.runtime.choose import Chooser, Chosen, Frame
from reftlab.runtime.grouping import EditGroup, Share
from reftlab.runtime.options import Options
from reftlab.runtime.places import BoundEdit, BoundRead
from reftlab.runtime.supply import Supply, aligned, row_means
from reftlab.runtime.window import Selection

__all__ = ["Editor", "Observer", "gathered"]

Observer = Callable[[BoundEdit, Selection, Tensor, Tensor, Tensor | None], None]
"""Is shown, after each edit, the edit, one token for each vector, and `(n, width)` old, new and source."""


class Editor:
    """Gathers an edit's vectors, changes them, and puts them back.

    Args:
        interventions: built interventions by `BoundEdit.module`, and gates by `gate_keys`.
        chooser: which tokens, see `Chooser`.
        options: what this call says of its edits.
        supplies: what has been read so far, by `BoundRead.label`.
        observers: who is shown what every edit does.
    """

    def __init__(
        self,
        interventions: nn.ModuleDict,
        chooser: Chooser,
        options: Options,
        supplies: Mapping[str, Supply],
        observers: tuple[Observer, ...],
    ) -> None:
        self._interventions, self._chooser, self._options = interventions, chooser, options
        self._supplies, self._observers = supplies, observers

    def edit(self, node: BoundEdit, tensor: Tensor, chosen: Chosen, frame: Frame) -> Tensor | None:
        """The site's tensor with the chosen vectors edited, or None where the edit acts on none."""
        self._options.check_rows(frame.layout.rows, node.edit)
        counts = self._counts(node, chosen, frame) if node.reads else None
        source = self._source(node, chosen, counts, frame)
        acts, share = self._acting(node, chosen, counts, frame)
        if acts is not None:
            if not bool(acts.any()):
                return None
            chosen = chosen.where(acts)
            source = None if source is None else source[acts.to(source.device)]
        index = node.place.features(tensor.shape[-1])
        taken = gathered(tensor, chosen, frame, index)
        rows = chosen.vectors.rows // frame.group
        factor = self._options.factor(node.edit, rows)
        if isinstance(share, Tensor):
            factor = share[:, None] * (factor.to(share) if isinstance(factor, Tensor) else factor)
        built = self._interventions[node.module]
        subspace = self._options.directions(node.edit, rows, getattr(built, "directions", None))
        new = self._changed(node, built, taken.vectors, source, chosen.vectors, factor, subspace)
        return _put_back(tensor, taken, new.reshape(len(chosen), -1), index)

    def edit_group(self, group: EditGroup, tensor: Tensor, shares: tuple[Share, ...]) -> Tensor:
        """The site's tensor with each share's vectors edited."""
        index = group.place.features(tensor.shape[-1])
        for share in shares:
            taken = _taken(tensor, share.where, index)
            if len(share.members) > 1:
                new = self._changed_together(group, share, taken.vectors)
            else:
                node, built = group.edits[share.members[0]], group.built[share.members[0]]
                new = self._changed(
                    node, built, taken.vectors, None, share.tokens, share.factor, share.subspace
                )
            tensor = _put_back(tensor, taken, new, index)
        return tensor

    def _counts(self, node: BoundEdit, chosen: Chosen, frame: Frame) -> list[int] | None:
        """How many vectors the edit changes in each row, over all passes; None where that is not known."""
        if node.place.stream == "calls":
            return None
        whole = self._chooser.selection(node, frame.layout).counts(frame.layout.rows)
        return [count // chosen.joins for count in whole]

    def _changed(
        self,
        node: BoundEdit,
        built: Any,
        given: Tensor,
        source: Tensor | None,
        tokens: Selection,
        factor: float | Tensor,
        subspace: Tensor | None,
    ) -> Tensor:
        """The new vectors `(n, width)` for the vectors `given`."""
        base = given.float()
        source = None if source is None else source.to(base)
        if source is not None and source.shape != base.shape:
            raise RunError(
                f"edit {node.key!r}: its source's vectors are {tuple(source.shape)}, its own "
                f"{tuple(base.shape)}"
            )
        extra = {
            "subspace": subspace,
            "positions": tokens.numbers,
            "rows": tokens.rows,
        }
        try:
            new = (
                built.edited(base, source, **extra)
                if isinstance(built, Intervention)
                else built(base, source)
            )
        except Exception as error:
            error.add_note(f"in edit {node.key!r} at {node.site}")
            raise
        _check_new(new, base, f"edit {node.key!r}")
        new = _weighed(given, base, new, factor)
        for see in self._observers:
            see(node, tokens, base, new, source)
        return new

    def _changed_together(self, group: EditGroup, share: Share, given: Tensor) -> Tensor:
        """The new vectors `(n, width)` of several edits' own, by one product."""
        base = given.float()

        def by_member(values: Tensor) -> Tensor:
            if share.spread is not None:
                return values[share.spread]
            return values.reshape(len(share.members), -1, values.shape[1])

        subspace = None if share.subspace is None else by_member(share.subspace)
        try:
            first = group.built[share.members[0]]
            new = first.grouped(group.stack(share.members), by_member(base), subspace).flatten(0, 1)
        except Exception as error:
            error.add_note(f"in {group.name} at {group.site}")
            raise
        new = new if share.kept is None else new[share.kept]
        _check_new(new, base, group.name)
        return _weighed(given, base, new, share.factor)

    def _acting(
        self, node: BoundEdit, chosen: Chosen, counts: list[int] | None, frame: Frame
    ) -> tuple[Tensor | None, Tensor | None]:
        """Which vectors the edit acts on, `(n,)` bool on the CPU, and the share of a soft condition."""
        acts = self._options.rows_of(node.edit, chosen.vectors.rows // frame.group)
        if node.edit.when is None:
            return acts, None
        vectors = {}
        for read, bound in node.when.items():
            supply = self._supply(node, bound)
            found = aligned(supply, node, bound, chosen, counts, frame, per_row=True)
            # Rows of other tasks are not asked, so that a gate's penalty leaves them out.
            vectors[read] = found if acts is None else found[acts.to(found.device)]
        gates = dict(
            zip(node.edit.when.gates, map(self._interventions.__getitem__, gate_keys(node)), strict=True)
        )
        mask = node.edit.when.mask(vectors, gates)
        if mask.dtype != torch.bool:
            return acts, mask
        mask = mask.cpu()
        if acts is not None:
            mask = torch.zeros_like(acts).masked_scatter(acts, mask)
        return mask, None

    def _source(
        self, node: BoundEdit, chosen: Chosen, counts: list[int] | None, frame: Frame
    ) -> Tensor | None:
        """The source's vectors that belong to the chosen tokens, `(n, width)`."""
        read = node.source
        if read is None:
            return None
        supply = self._supply(node, read)
        if getattr(self._interventions[node.module], "averages_source", False):
            return row_means(supply, node, read, chosen, counts, frame)
        return aligned(supply, node, read, chosen, counts, frame, per_row=False)

    def _supply(self, node: BoundEdit, read: BoundRead) -> Supply:
        if read.label not in self._supplies:
            raise RunError(f"edit {node.key!r}: {read.site}, which it needs, was not reached before it")
        return self._supplies[read.label]


def _where(tokens: Selection, frame: Frame, tensor: Tensor) -> tuple[Tensor, ...]:
    rows = tokens.rows.to(tensor.device)
    if tensor.dim() == 2:
        return (rows,)
    return rows, (tokens.columns - frame.start).to(tensor.device)


class Gathered(NamedTuple):
    """What stands at chosen tokens of a site."""

    where: tuple[Tensor, ...]
    """The tokens' index into the site's tensor."""
    tokens: Tensor
    """`(token, site width)`, all features of each token."""
    vectors: Tensor
    """`(n, width)`, the features that are meant, those of joined tokens one after the other in one."""


def gathered(tensor: Tensor, chosen: Chosen, frame: Frame, index: Tensor | None) -> Gathered:
    """Take the chosen vectors out of a site's tensor."""
    return _taken(tensor, _where(chosen.tokens, frame, tensor), index, chosen.joins)


def _taken(tensor: Tensor, where: tuple[Tensor, ...], index: Tensor | None, joins: int = 1) -> Gathered:
    whole = tensor[where]
    part = whole if index is None else whole[:, index.to(whole.device)]
    if joins > 1:
        part = part.reshape(len(part) // joins, joins * part.shape[1])
    return Gathered(where, whole, part)


def _put_back(tensor: Tensor, taken: Gathered, new: Tensor, index: Tensor | None) -> Tensor:
    """The site's tensor with the new features `(token, width)` in the place of those that were taken."""
    values = new.to(tensor.dtype)
    if index is not None:
        values = taken.tokens.index_copy(1, index.to(tensor.device), values)
    return tensor.index_put(taken.where, values)


def _weighed(given: Tensor, base: Tensor, new: Tensor, factor: float | Tensor) -> Tensor:
    """The new vectors at an edit's strength, in the precision of those that were given."""
    if isinstance(factor, Tensor) or factor != 1.0:
        new = base + (factor.to(base) if isinstance(factor, Tensor) else factor) * (new - base)
    if given.dtype == torch.float64:
        # Worked out in float32 and added, so that what an edit leaves alone keeps all its digits.
        new = given + (new - base).double()
    return new


def _check_new(new: Any, base: Tensor, edit: str) -> None:
    if not isinstance(new, Tensor) or new.shape != base.shape:
        shape = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise InterventionError(
            f"{edit}: the intervention returned {shape} for vectors of shape {tuple(base.shape)}"
        )
    if not new.is_floating_point() or new.device != base.device:
        raise InterventionError(
            f"{edit}: the intervention returned {new.dtype} on {new.device} for vectors of "
            f"{base.dtype} on {base.device}"
        )
