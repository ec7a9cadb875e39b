"""How patched runs are computed: on their causal cones, or whole where those do not hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from reftlab.errors import ReftlabError, RunError
from reftlab.graph import BASE
from reftlab.runtime.cone import CANNOT_ENTER, BlockStack, PrefixAttention, reasons_against
from reftlab.sweeping.packed import Packed
from reftlab.sweeping.passes import Passes, Patch, Recorded
from reftlab.sweeping.prompts import Row
from reftlab.sweeping.schedule import Batch, Job, packed, schedule
from reftlab.sweeping.sites import SweptSite, entry_of, kind_of
from reftlab.sweeping.staircase import Staircase

if TYPE_CHECKING:
    from reftlab.runtime import BoundModel

__all__ = ["Engine"]


class Engine:
    """Chooses between the cone and whole passes, and checks the cone's first numbers.

    Args:
        reft: the bound model.
        sites: where patches are put.
        cone: whether the cone may be used.

    Attributes:
        why: why whole passes are run; empty where the cone holds.

    Raises:
        RunError: an edit of the bound model takes values from another run.
    """

    def __init__(self, reft: BoundModel, sites: Sequence[SweptSite], cone: bool = True) -> None:
        self.reft = reft
        reasons = _reasons(reft, sites) if cone else ["cone=False"]
        self.why = tuple(reasons)
        self.stack = None if reasons else BlockStack.of(reft.model)
        self._attention = PrefixAttention(reft.model, () if self.stack is None else self.stack.blocks)
        entries = [None if self.stack is None else entry_of(site.site, self.stack) for site in sites]
        self._between_blocks = not self._edited and all(entry is not None and entry[1] for entry in entries)
        self._checked: dict[tuple[Any, ...], Row] = {}

    @property
    def cone(self) -> bool:
        """Whether runs are computed on their cones."""
        return self.stack is not None

    def start(self, row: Row, sites: Sequence[SweptSite]) -> tuple[Passes, Recorded]:
        """The passes over a prompt, and the run of it as it is."""
        passes = Passes(self.reft, row, self.stack)
        try:
            recorded = passes.record(sites, states=self.cone)
        except CANNOT_ENTER as error:
            _refuse_others(error)
            if not self.cone:
                raise
            self._give_up(f"{type(self.reft.model).__name__} keeps no cache of its own blocks: {error!r}")
            return self.start(row, sites)
        if self.stack is not None:
            kind = Packed if self._between_blocks else Staircase
            passes = kind(self.reft, row, self.stack, recorded, self._attention)
        return passes, recorded

    def job(self, cell: int, rows: Sequence[Sequence[Patch]], passes: Passes) -> Job | None:
        """What a cell takes; None where nothing of it can reach the logits at the last token."""
        if self.stack is None:
            return Job(cell, 0, 0, len(rows))
        patches = [patch for row in rows for patch in row]
        columns = torch.cat([patch.columns for patch in patches]).tolist()
        entries = [_entry(patch.site, self.stack) for patch in patches]
        blocks = len(self.stack)
        ends = all(
            entry == blocks or (patch.site.local and entry == blocks - 1)
            for entry, patch in zip(entries, patches, strict=True)
        )
        if ends and max(columns) < passes.tokens - 1:
            return None
        return Job(cell, min(columns), min(entries), len(rows))

    def batches(self, jobs: Sequence[Job], passes: Passes, batch_size: int | None) -> list[Batch]:
        """The cells in groups that are computed together; first that which leaves most to the cone."""
        blocks = 1 if self.stack is None else len(self.stack)
        if isinstance(passes, Packed) and passes.packs:
            return packed(jobs, passes.tokens, self.reft.device.type, batch_size)
        found = schedule(jobs, passes.tokens, blocks, self.reft.device.type, batch_size)
        return sorted(found, key=lambda batch: (min(job.entry for job in batch.jobs), -batch.start))

    def unchanged(self, one: Row, other: Row | None) -> int:
        """Before which token two prompts' runs are the same, whatever rounding makes of it."""
        if not self.cone or self._edited or other is None or one.inputs.keys() != other.inputs.keys():
            return 0
        count = min(one.layouts["tokens"].width, other.layouts["tokens"].width)
        for key, value in one.inputs.items():
            if value.dim() != 2 or value.shape[1] != one.layouts["tokens"].width:
                return 0
            same = (value[0, :count] == other.inputs[key][0, :count]).long().cumprod(0)
            count = int(same.sum())
        return count

    def logits(
        self,
        passes: Passes,
        rows: Sequence[Sequence[Patch]],
        start: int,
        tokens: tuple[int, ...] | None = None,
    ) -> Float[Tensor, "row vocab"]:
        """Logits at the last token of patched runs, none of which is patched before token `start`.

        Args:
            passes: the prompt's passes.
            rows: the patches of each run.
            start: the first token that any of them changes.
            tokens: those whose logits are wanted; the others' may be 0. All unless given.
        """
        if not self.cone or not isinstance(passes, Staircase):
            return passes.plain(rows)
        chosen = self._unchecked(passes, rows, start)
        name = type(self.reft.model).__name__
        try:
            found = passes.logits(rows, start, tokens)
        except CANNOT_ENTER as error:
            _refuse_others(error)
            why = f"{name} cannot be entered in the middle: {error}"
        else:
            if not chosen:
                return found
            whole = passes.plain([rows[number] for number in chosen]).double()
            wanted = slice(None) if tokens is None else list(tokens)
            apart = float((found[chosen].double() - whole)[:, wanted].abs().max())
            bound = float(torch.finfo(found.dtype).eps ** 0.5 * max(1.0, float(whole.std())))
            if apart <= bound:
                return found
            why = (
                f"a cell on its cone differed from a whole pass by {apart:.2g} in its logits, more than "
                f"{bound:.2g}"
            )
        if self._attention.usable:
            # The model's attention may be none that can be run on the prefix as it stands.
            self._attention.usable = False
            # Later batches are made up in another way.
            self._checked.clear()
            return self.logits(passes, rows, start, tokens)
        self._give_up(why)
        return passes.plain(rows)

    def _give_up(self, why: str) -> None:
        """Run whole passes from now on."""
        self.why, self.stack = (why,), None

    def _unchecked(self, passes: Staircase, rows: Sequence[Sequence[Patch]], start: int) -> list[int]:
        """Rows to compare with whole passes: of each kind of site the first and the last to enter.

        The last of those that run through a block as well, where others enter behind the last block. It is
        done once for each kind of site and make-up of a batch, and again for each prompt where edits are in
        force, which may act at other tokens there.
        """
        assert self.stack is not None
        packs = isinstance(passes, Packed) and passes.packs
        firsts = {min(int(patch.columns.min()) for patch in row) for row in rows} if packs else ()
        form = packs, start > 0, start < passes.tokens - 1, len(firsts) > 1
        own: dict[tuple[Any, ...], list[int]] = {}
        for number, row in enumerate(rows):
            for patch in row:
                kind = kind_of(patch.site, self.stack)
                own.setdefault((kind, form, id(passes.row) if self._edited else None), []).append(number)
        chosen: set[int] = set()
        for key, numbers in own.items():
            if key not in self._checked:
                self._checked[key] = passes.row
                in_order = sorted(numbers, key=lambda number: passes.entry(rows[number]))
                within = [n for n in in_order if passes.entry(rows[n]) < len(self.stack)]
                chosen |= {in_order[0], *within[-1:], in_order[-1]}
        return sorted(chosen)

    @property
    def _edited(self) -> bool:
        return any(bound.edit.name not in self.reft._disabled for bound in self.reft.edits)


def _refuse_others(error: Exception) -> None:
    """Raise an error again that says nothing of the model's form."""
    if isinstance(error, ReftlabError | torch.OutOfMemoryError):
        raise error


def _entry(site: SweptSite, stack: BlockStack) -> int:
    found = entry_of(site.site, stack)
    assert found is not None
    return found[0]


def _reasons(reft: BoundModel, sites: Sequence[SweptSite]) -> list[str]:
    """Why runs cannot be computed on their cones; empty where they can."""
    reasons = list(reasons_against(reft.model, training=False))
    stack = BlockStack.of(reft.model)
    if reasons or stack is None:
        return reasons or [f"the chain of blocks of {type(reft.model).__name__} is not known"]
    reasons += [
        f"{site.name} is not in the chain of blocks" for site in sites if entry_of(site.site, stack) is None
    ][:1]
    inputs = {(path, "input") for path in stack.paths}
    for bound in reft.edits:
        if bound.edit.name in reft._disabled:
            continue
        if (bound.site.module, bound.site.side) in inputs:
            reasons.append(f"edit {bound.key!r} acts at a block's input, after the place where rows enter")
        if bound.site.module == stack.head:
            reasons.append(
                f"edit {bound.key!r} acts at the head, which more rows reach than the call begins with"
            )
        if "(row" in bound.place.axes.given:
            reasons.append(f"edit {bound.key!r} acts where rows and tokens share an axis")
        if bound.positions.joins > 1:
            reasons.append(f"edit {bound.key!r} joins tokens, and a cone may hold only some of them")
        if bound.reads:
            reasons.append(f"edit {bound.key!r} looks at values that rows which enter later never pass")
    return reasons


def check_edits(reft: BoundModel) -> None:
    """Refuse a bound model whose edits need runs of their own.

    Raises:
        RunError: an active edit takes values from another run.
    """
    for bound in reft.edits:
        if bound.edit.name in reft._disabled:
            continue
        other = [read.run for read in bound.reads if read.run != BASE]
        if other or bound.edit.run != BASE:
            raise RunError(
                f"sweep: edit {bound.key!r} takes values from run {(other or [bound.edit.run])[0]!r}, "
                "which a sweep has no inputs for; leave it out with reft.select(...)"
            )
