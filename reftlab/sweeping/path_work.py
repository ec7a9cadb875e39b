"""What travels along direct paths between heads, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reftlab.address import portable_names
from reftlab.errors import RunError
from reftlab.runtime.cone import BlockStack
from reftlab.sweeping.engine import Engine
from reftlab.sweeping.metric import Measured, Metric, References
from reftlab.sweeping.passes import Passes, Patch, Recorded
from reftlab.sweeping.prompts import Column, Columns, Pair
from reftlab.sweeping.schedule import rows_at_once
from reftlab.sweeping.sites import SweptSite, swept_sites
from reftlab.sweeping.staircase import Staircase
from reftlab.sweeping.store import CellStore

if TYPE_CHECKING:
    from reftlab.runtime import BoundModel

__all__ = ["Head", "PathWork", "Places"]

Head = tuple[int, int]
"""A block's number and the number of a head in it."""


@dataclass(frozen=True, eq=False)
class Places:
    """The sites that paths lead through, one a block."""

    stream: tuple[SweptSite, ...]
    heads: tuple[SweptSite, ...]
    mlp: tuple[SweptSite, ...]
    output: tuple[SweptSite, ...]
    held: tuple[tuple[SweptSite, ...], ...]
    """For each block the inputs of its heads that keep their values."""

    @property
    def count(self) -> int:
        """How many heads a block has."""
        return len(self.heads[0].parts)

    @property
    def all(self) -> tuple[SweptSite, ...]:
        return (
            *self.stream,
            *self.heads,
            *self.mlp,
            *self.output,
            *(site for own in self.held for site in own),
        )

    @classmethod
    def of(cls, reft: BoundModel, inputs: str) -> Places:
        known = portable_names(reft.model)
        held = [] if inputs == "all" else [f"attn.{letter}" for letter in "qkv" if letter != inputs]
        for part in ("attn.heads", "mlp.output", *held):
            if f"blocks[*].{part}" not in known:
                raise RunError(
                    f"sweep_paths needs 'blocks[*].{part}', which {type(reft.model).__name__} does "
                    "not have by a portable name"
                )
        others = [swept_sites(reft, f"blocks[*].{part}") for part in held]
        return cls(
            swept_sites(reft, "blocks[*].input"),
            swept_sites(reft, "blocks[*].attn.heads", heads=True),
            swept_sites(reft, "blocks[*].mlp.output"),
            swept_sites(reft, "blocks[*].output"),
            tuple(zip(*others, strict=True)) if others else ((),) * len(_blocks(reft)),
        )


def _blocks(reft: BoundModel) -> tuple[Any, ...]:
    stack = BlockStack.of(reft.model)
    return () if stack is None else stack.blocks


@dataclass(frozen=True, eq=False)
class PathWork:
    """What is done with every pair of prompts."""

    engine: Engine
    places: Places
    direction: str
    order: Sequence[tuple[Head, Head]]
    columns: Columns
    metric: Metric
    tokenizer: Any
    batch_size: int | None
    store: CellStore | None
    advance: Callable[[int], object]

    def run(self, number: int, pair: Pair) -> tuple[dict[int, float], float, float]:
        """The metric of each path by number, and of the clean and the corrupted run."""
        done = {} if self.store is None else self.store.cells(number)
        kept = None if self.store is None else self.store.get(f"pair{number:05d}-runs")
        self.advance(len(done))
        if kept is not None and len(done) == len(self.order):
            return done, float(kept["clean"]), float(kept["corrupt"])
        assert pair.corrupt is not None
        denoising = self.direction == "denoise"
        row, other = (pair.corrupt, pair.clean) if denoising else (pair.clean, pair.corrupt)
        passes, base = self.engine.start(row, self.places.all)
        if not isinstance(passes, Staircase):
            raise RunError(f"sweep_paths: {self.engine.why[0]}")
        source = Passes(self.engine.reft, other, None).record(self.places.heads)
        clean, corrupt = (source, base) if denoising else (base, source)
        measured = self.metric.finite(number, self.tokenizer, References(clean.logits, corrupt.logits))
        runs = [float(measured(run.logits[None])[0]) for run in (clean, corrupt)]
        if self.store is not None:
            held = {"clean": runs[0], "corrupt": runs[1]}
            tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in held.items()}
            self.store.put(f"pair{number:05d}-runs", tensors)
        same = self.engine.unchanged(row, other)
        into, out_of = _tokens(self.columns.of_pairs[number], denoising, same)
        if into:
            paths = Paths(passes, base, source, self.places, into, out_of)
            self._compute(number, paths, done, measured)
            return done, runs[0], runs[1]
        # Nothing that any head could send differs between the two runs.
        missing, unchanged = [n for n in range(len(self.order)) if n not in done], runs[1 if denoising else 0]
        done.update(dict.fromkeys(missing, unchanged))
        if self.store is not None and missing:
            self.store.add_cells(number, missing, [unchanged] * len(missing))
        self.advance(len(missing))
        return done, runs[0], runs[1]

    def _compute(self, number: int, paths: Paths, done: dict[int, float], measured: Measured) -> None:
        """Run the paths that are not done, those into one block after those into another."""
        answers = self.metric.tokens(number, self.tokenizer)
        missing = [cell for cell in range(len(self.order)) if cell not in done]
        blocks = sorted({self.order[cell][1][0] for cell in missing})
        tokens = paths.passes.tokens - paths.start
        room = self.batch_size or rows_at_once(self.engine.reft.device.type, tokens)
        for block in blocks:
            cells = [cell for cell in missing if self.order[cell][1][0] == block]
            senders = list(dict.fromkeys(self.order[cell][0] for cell in cells))
            heard: dict[Head, Tensor] = {}
            for begin in range(0, len(senders), room):
                heard |= paths.heard(senders[begin : begin + room], block)
            for begin in range(0, len(cells), room):
                own = cells[begin : begin + room]
                rows = [[paths.result(heard[self.order[c][0]], self.order[c][1])] for c in own]
                logits = self.engine.logits(paths.passes, rows, paths.start, answers)
                if not self.engine.cone:
                    raise RunError(f"sweep_paths: {self.engine.why[0]}")
                values = measured(logits).double().cpu().tolist()
                done.update(zip(own, values, strict=True))
                if self.store is not None:
                    self.store.add_cells(number, own, values)
                self.advance(len(own))


class Paths:
    """The changes that travel through one prompt's run.

    Args:
        passes: the prompt's patched runs.
        base: the run that is changed.
        source: the run that senders' results come from.
        places: the sites.
        into, out_of: the tokens at which senders are changed, in both runs.
    """

    def __init__(
        self,
        passes: Staircase,
        base: Recorded,
        source: Recorded,
        places: Places,
        into: Sequence[int],
        out_of: Sequence[int],
    ) -> None:
        self.passes, self.base, self.source, self.places = passes, base, source, places
        self._into, self._out_of = list(into), list(out_of)
        self.start = min(into)
        self._columns = torch.arange(self.start, passes.tokens)
        self._sent: dict[Head, Tensor] = {}

    def sent(self, senders: Sequence[Head]) -> list[Tensor]:
        """What each sender's change adds to the residual stream, `(token, width)` from `start` on.

        Its block runs with the sender's new result and the MLP's old one, so that whatever stands between
        a head and the stream, an output projection or a norm, does its part.
        """
        for block in sorted({block for block, _ in senders}):
            own = [sender for sender in senders if sender[0] == block and sender not in self._sent]
            if not own:
                continue
            rows = [[self._changed(sender), self._kept(self.places.mlp[block])] for sender in own]
            site = self.places.output[block]
            after = self.passes.read(rows, self.start, site)
            before = self.base.values[site.name][self.start :]
            self._sent |= dict(zip(own, after - before, strict=True))
        return [self._sent[sender] for sender in senders]

    def heard(self, senders: Sequence[Head], block: int) -> dict[Head, Tensor]:
        """What all heads of a block return when they hear a sender's change, `(token, head · d_head)`."""
        stream = self.places.stream[block]
        base = self.base.values[stream.name][self.start :]
        rows = []
        for change in self.sent(senders):
            changed = Patch(stream, self._columns, base + change)
            rows.append([changed, *(self._kept(site) for site in self.places.held[block])])
        found = self.passes.read(rows, self.start, self.places.heads[block])
        return dict(zip(senders, found, strict=True))

    def result(self, heard: Tensor, receiver: Head) -> Patch:
        """A receiver's new result."""
        block, head = receiver
        site = self.places.heads[block]
        features = site.parts[head]
        assert features is not None
        return Patch(site, self._columns, heard[:, features.to(heard.device)], features)

    def _changed(self, sender: Head) -> Patch:
        block, head = sender
        site = self.places.heads[block]
        features = site.parts[head]
        assert features is not None
        values = self.source.values[site.name][self._out_of]
        return Patch(site, torch.tensor(self._into), values[:, features.to(values.device)], features)

    def _kept(self, site: SweptSite) -> Patch:
        """A site's own values, so that it does not answer to the change."""
        features = site.parts[0]
        values = self.base.values[site.name][self.start :]
        if features is not None:
            values = values[:, features.to(values.device)]
        return Patch(site, self._columns, values, features)


def _tokens(columns: Sequence[Column], denoising: bool, same: int) -> tuple[list[int], list[int]]:
    """Tokens of the run that is changed, and of the other, but for those before which both are the same."""
    sides = [(c.corrupt, c.clean) if denoising else (c.clean, c.corrupt) for c in columns]
    both = [both for into, out_of in sides for both in zip(into, out_of, strict=True)]
    kept = [(one, other) for one, other in both if one != other or one >= same]
    return [one for one, _ in kept], [other for _, other in kept]
