"""The source runs of one call: what they are given, and what edits read in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from reftlab.errors import RunError, did_you_mean
from reftlab.graph import BASE, Source
from reftlab.runtime.options import Options
from reftlab.runtime.places import BoundEdit, BoundRead
from reftlab.runtime.supply import Supply, given

if TYPE_CHECKING:
    from reftlab.runtime.model import BoundModel

__all__ = ["Sources"]


class Sources:
    """Runs every source that an active edit or a wanted read needs.

    Args:
        bound: the bound model.
        options: what the call says of its edits.
        named: the base run's arguments by name, for sources that run on the same inputs.
        inputs: inputs by source.
        reads: tensors in place of reads.
        wanted: reads of source runs that the caller wants, which are put in `results`.
        generating: whether the base run is a generation, in which padded tokens are numbered by the mask.
        partial: whether the base run covers only a part of its prompt.

    Raises:
        RunError: a name that the graph does not have, or a source without inputs.
    """

    def __init__(
        self,
        bound: BoundModel,
        options: Options,
        named: Mapping[str, Any],
        inputs: Mapping[str, Mapping[str, Any]] | None,
        reads: Mapping[str, Any] | None,
        wanted: tuple[BoundRead, ...] = (),
        generating: bool = False,
        partial: bool = False,
    ) -> None:
        self.bound, self.options, self.named, self.wanted = bound, options, named, wanted
        self._generating, self._partial = generating, partial
        self.results: dict[str, Supply] = {}
        self._nodes = {node.name: node for node in bound.graph if isinstance(node, Source)}
        self._edits = bound._active_edits(options)
        self._inputs = {} if inputs is None else _checked(inputs, bound)
        self._given: dict[str, Supply] = {}
        for name, value in ({} if reads is None else _mapping(reads)).items():
            self._given.update(dict.fromkeys(self._labels(name), given(value, f"reads[{name!r}]")))

    def supplies(self) -> dict[str, Supply]:
        """What the base run's edits are given, by the label of the read."""
        supplies, needed = dict(self._given), self._needed()
        for name in self.bound.graph.run_order:
            feeding = tuple(
                read for bound in self._edits if bound.edit.run in needed - {name} for read in bound.reads
                if read.run == name and read.label not in supplies
            )  # fmt: skip
            asked = tuple(read for read in self.wanted if read.run == name)
            if name == BASE or not (feeding or asked):
                continue
            inputs = self._inputs_of(name, feeding, asked)
            if self._generating:
                inputs = self.bound._calls.numbered(inputs)
            with torch.set_grad_enabled(self._nodes[name].grad and torch.is_grad_enabled()):
                layouts = self.bound._calls.layouts(inputs)
                run = self.bound._run(
                    name, layouts, supplies, self.options, (*feeding, *asked), stop_early=True
                )
                self.bound._call(run, self.bound.model, (), inputs)
            for read in (*feeding, *asked):
                if read.label in run.results:
                    found = run.results[read.label]
                    taken = replace(found, here=False)
                    (self.results if read in asked else supplies)[read.label] = taken
        return supplies

    def _needed(self) -> set[str]:
        """The runs that this call comes to: base, what the caller reads, and what edits in those read."""
        needed = {BASE, *(read.run for read in self.wanted)}
        for run in reversed(self.bound.graph.run_order):
            feeding = [read for b in self._edits if b.edit.run == run in needed for read in b.reads]
            needed |= {read.run for read in feeding if read.label not in self._given}
        return needed

    def _inputs_of(
        self, name: str, feeding: tuple[BoundRead, ...], asked: tuple[BoundRead, ...]
    ) -> dict[str, Any]:
        """The inputs of a source: its own, or those of the run whose inputs it shares."""
        seen, run = [name], name
        while run not in self._inputs:
            shared = self._nodes[run].inputs if run != BASE else None
            if run == BASE and (self._partial or self.bound._calls.past(self.named)):
                raise RunError(
                    f"run {name!r} takes the inputs of the base run, and this call covers a part "
                    f"of them alone; give it its own, sources={{{name!r}: tokenizer(...)}}"
                )
            if run == BASE:
                return self.bound._calls.forward_inputs(self.named)
            if shared is None or shared in seen:
                users = [f"edit {b.edit.name!r}" for b in self._edits if set(b.reads) & set(feeding)]
                users += [f"read {read.label!r}" for read in asked]
                raise RunError(
                    f"{users[0]} reads from run {name!r}, and no inputs were given for it; call with "
                    f"sources={{{run!r}: tokenizer(...)}}"
                )
            run = shared
            seen.append(run)
        return dict(self._inputs[run])

    def _labels(self, name: str) -> list[str]:
        """The reads that a key of `reads=` stands for."""
        fed: list[tuple[BoundEdit, BoundRead, str | None]] = [
            (b, b.source, b.edit.source.name)
            for b in self._edits
            if b.source is not None and b.edit.source is not None
        ]
        fed += [
            (b, bound, node.name)
            for b in self._edits
            for node, bound in b.when.items()
            if bound.run != b.edit.run
        ]
        for matches in (
            [read for bound, read, _ in fed if read is bound.source and name in (bound.key, bound.edit.name)],
            [read for _, read, called in fed if called == name],
        ):
            if matches:
                return [read.label for read in matches]
        of_run = [read for _, read, _ in fed if read.run == name]
        if len(of_run) == 1:
            return [of_run[0].label]
        if of_run:
            users = ", ".join(repr(bound.key) for bound, read, _ in fed if read.run == name)
            raise RunError(
                f"reads[{name!r}]: {len(of_run)} edits read from that run, {users}; give the tensor under "
                "the edit's name"
            )
        known = [bound.edit.name for bound, *_ in fed] + list(self._nodes)
        raise RunError(
            f"reads has {name!r}, which is no edit with a source, no read and no run; there is "
            f"{known}.{did_you_mean(str(name), known)}"
        )


def _checked(inputs: Any, bound: BoundModel) -> dict[str, Mapping[str, Any]]:
    if not isinstance(inputs, Mapping):
        raise RunError(f"sources={inputs!r}: expected inputs by name, sources={{'corrupt': tokenizer(...)}}")
    for name, value in inputs.items():
        if not isinstance(value, Mapping):
            raise RunError(
                f"sources={{{name!r}: …}}: expected the inputs of a forward pass by name, as a tokenizer "
                f"returns them, not {type(value).__name__}"
            )
        if name not in bound.graph.sources:
            raise RunError(
                f"sources has {name!r}, which the graph does not declare; it has "
                f"{list(bound.graph.sources)}.{did_you_mean(name, bound.graph.sources)}"
            )
    return dict(inputs)


def _mapping(reads: Any) -> Mapping[str, Any]:
    if not isinstance(reads, Mapping):
        raise RunError(f"reads={reads!r}: expected tensors by name, reads={{'corrupt': tensor}}")
    return reads
