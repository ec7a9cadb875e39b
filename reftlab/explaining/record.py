"""One pass over the examples that keeps what every edit is given and makes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftlab.explaining.tokens import Lens
from reftlab.explaining.vectors import EditVectors
from reftlab.graph import BASE
from reftlab.interventions import Intervention
from reftlab.runtime.calls import continues_texts
from reftlab.runtime.leaf import get_input
from reftlab.runtime.window import Layout

if TYPE_CHECKING:
    from reftlab.runtime import BoundModel
    from reftlab.runtime.bind import BoundEdit

__all__ = ["Recorded", "record"]


class _Recorder(Intervention):
    """Stands in the place of a built intervention, does what it does, and keeps what passes.

    It also runs what was not made for it: edits that count positions and plain modules.
    """

    takes_source = "optional"

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.counts_positions = bool(getattr(inner, "counts_positions", False))  # type: ignore[misc]
        self.seen: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(
        self, base: Float[Tensor, "n width"], source: Float[Tensor, "n width"] | None = None, **extra: Any
    ) -> Float[Tensor, "n width"]:
        new: Tensor = self.inner(base, source, **extra)
        kept = None if source is None else source.detach().float().cpu()
        self.seen.append((base.detach().float().cpu(), new.detach().float().cpu(), kept))
        return new


class Recording:
    """The recorders of all edits; `take` after each forward call, `vectors` when all are done."""

    def __init__(self, reft: BoundModel, recorders: dict[str, _Recorder]) -> None:
        self.reft, self.recorders = reft, recorders
        self._parts: dict[str, list[tuple[Any, ...]]] = {key: [] for key in recorders}

    def take(self, inputs: Mapping[str, Any], sources: Mapping[str, Any] | None, first_row: int) -> None:
        """Note which example and token each vector seen in the last call belongs to."""
        for bound in self.reft.edits:
            seen = self.recorders[bound.key].seen
            if not seen:
                continue
            base, new, source = (_joined(column) for column in zip(*seen, strict=True))
            seen.clear()
            run_inputs = inputs if bound.edit.run == BASE else (sources or {})[bound.edit.run]
            rows, positions = _places(self.reft, bound, run_inputs, len(base))
            self._parts[bound.key].append((base, new, source, rows + first_row, positions))

    def vectors(self, bound: BoundEdit) -> EditVectors | None:
        """Everything that was seen at one edit; None where it was never reached."""
        parts = self._parts[bound.key]
        if not parts:
            return None
        base, new, source, rows, positions = (_joined(column) for column in zip(*parts, strict=True))
        mean = None if source is None else source.mean(0)
        return EditVectors(bound.key, base, bound.edit.strength * (new - base), mean, rows, positions)


@contextlib.contextmanager
def recording(reft: BoundModel) -> Iterator[Recording]:
    """Put a recorder in the place of every edit inside a `with` block."""
    with contextlib.ExitStack() as stack:
        recorders = {}
        for bound in reft.edits:
            recorders[bound.key] = _Recorder(reft.interventions[bound.module]).eval()
            stack.enter_context(reft.replaced(bound.module, recorders[bound.key]))
        yield Recording(reft, recorders)


@dataclass(frozen=True, eq=False)
class Recorded:
    """What one pass over the examples gave.

    Attributes:
        lens: the model's readout, checked against its own logits.
        vectors: of each edit that was reached, by key.
        centres: mean of what enters the final norm at each edit's tokens, `(width,)`, by key.
    """

    lens: Lens
    vectors: dict[str, EditVectors]
    centres: dict[str, Tensor]


def record(
    reft: BoundModel,
    batches: Sequence[Mapping[str, Tensor]],
    accepts: frozenset[str],
    sources: Mapping[str, Mapping[str, Any]] | None = None,
) -> Recorded:
    """Run every batch once and keep what passes each edit, and what enters the final norm.

    Args:
        reft: the bound model.
        batches: the examples.
        accepts: which entries of a batch the model's forward takes.
        sources: inputs of the source runs.
    """
    lens = Lens(reft.model)
    stream: dict[tuple[int, int], Tensor] = {}
    with recording(reft) as recorders:
        first = 0
        for batch in batches:
            inputs: dict[str, Any] = {k: v for k, v in batch.items() if k in accepts}
            if lens.missing is None or stream:
                entering = _read_stream(reft, lens, inputs, sources)
                stream.update({(row + first, number): vector for (row, number), vector in entering.items()})
            else:
                reft(**inputs, sources=sources)
            recorders.take(inputs, sources, first)
            first += len(batch["input_ids"])
    vectors, centres = {}, {}
    for bound in reft.edits:
        seen = recorders.vectors(bound)
        if seen is None:
            continue
        vectors[bound.key] = seen
        tokens = zip(seen.rows.tolist(), seen.positions.tolist(), strict=True)
        own = [stream[token] for token in tokens if token in stream]
        if own and bound.edit.run == BASE:
            centres[bound.key] = torch.stack(own).mean(0)
    return Recorded(lens, vectors, centres)


def _read_stream(
    reft: BoundModel, lens: Lens, inputs: Mapping[str, Any], sources: Any
) -> dict[tuple[int, int], Tensor]:
    """What enters the final norm, by row and token number; checks the lens on the last tokens."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.append(get_input(module, args, kwargs, (), "final_norm.input").detach().float().cpu())

    with lens.watching(keep):
        logits = reft(**inputs, sources=sources).logits
    layout = Layout.of(inputs, causal=continues_texts(reft.model))
    if layout is None or len(seen) != 1:
        lens.missing = (
            "the final norm does not run once for all tokens, so a direction cannot be read as tokens"
        )
        return {}
    entering, ends, own = {}, [], []
    for row, columns in enumerate(
        torch.cat(pair) for pair in zip(layout.prompts, layout.answers, strict=True)
    ):
        entering.update(
            {(row, number): seen[0][row, column] for number, column in enumerate(columns.tolist())}
        )
        ends.append(seen[0][row, columns[-1]])
        own.append(logits[row, columns[-1]].float().cpu())
    lens.check(torch.stack(ends), torch.stack(own))
    return entering


def _joined(parts: tuple[Tensor | None, ...]) -> Any:
    return None if parts[0] is None else torch.cat([part for part in parts if part is not None])


def _places(
    reft: BoundModel, bound: BoundEdit, inputs: Mapping[str, Any], count: int
) -> tuple[Tensor, Tensor]:
    """Row and token number of each of `count` vectors."""
    layout = Layout.of(inputs, causal=continues_texts(reft.model))
    if layout is not None:
        chosen = layout.select(bound.edit.positions, bound.edit.phase, reft.tokenizer)
        if len(chosen) == count:
            return chosen.rows, chosen.numbers
    # A site without a token axis has one vector a row.
    return torch.arange(count), torch.zeros(count, dtype=torch.long)
