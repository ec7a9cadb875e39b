"""One pass over the examples that keeps what every edit is given and makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reftlab.explaining.geometry.tokens import Lens
from reftlab.explaining.geometry.vectors import EditVectors
from reftlab.graph import BASE
from reftlab.runtime.calls import continues_texts
from reftlab.runtime.leaf import get_input
from reftlab.runtime.window import Layout, Selection

if TYPE_CHECKING:
    from reftlab.runtime import BoundModel
    from reftlab.runtime.places import BoundEdit

__all__ = ["Recorded", "Recording", "record"]


class Recording:
    """What every edit was given and made, over several calls; `see` is a `runtime.editing.Observer`."""

    def __init__(self) -> None:
        self.first_row = 0
        self._parts: dict[str, list[tuple[Any, ...]]] = {}

    def see(
        self, bound: BoundEdit, tokens: Selection, base: Tensor, new: Tensor, source: Tensor | None
    ) -> None:
        old, made = base.detach().float().cpu(), new.detach().float().cpu()
        kept = None if source is None else source.detach().float().cpu()
        rows = tokens.rows + (self.first_row if bound.edit.run == BASE else 0)
        self._parts.setdefault(bound.key, []).append((old, made, kept, rows, tokens.numbers))

    def vectors(self, bound: BoundEdit) -> EditVectors | None:
        """Everything that was seen at one edit; None where it never acted."""
        parts = self._parts.get(bound.key)
        if not parts:
            return None
        base, new, source, rows, positions = (_joined(column) for column in zip(*parts, strict=True))
        mean = None if source is None else source.mean(0)
        return EditVectors(bound.key, base, new - base, mean, rows, positions)


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
    batches: Sequence[Mapping[str, Any]],
    accepts: frozenset[str],
) -> Recorded:
    """Run every batch once and keep what passes each edit, and what enters the final norm.

    Args:
        reft: the bound model.
        batches: the examples.
        accepts: which entries of a batch the bound model's forward takes.
    """
    lens = Lens(reft.model)
    stream: dict[tuple[int, int], Tensor] = {}
    recording = Recording()
    with reft.watching(recording.see):
        for batch in batches:
            inputs: dict[str, Any] = {k: v for k, v in batch.items() if k in accepts}
            if lens.missing is None or stream:
                entering = _read_stream(reft, lens, inputs)
                first = recording.first_row
                stream.update({(row + first, number): vector for (row, number), vector in entering.items()})
            else:
                reft(**inputs)
            recording.first_row += len(batch["input_ids"])
    vectors, centres = {}, {}
    for bound in reft.edits:
        seen = recording.vectors(bound)
        if seen is None:
            continue
        vectors[bound.key] = seen
        tokens = zip(seen.rows.tolist(), seen.positions.tolist(), strict=True)
        own = [stream[token] for token in tokens if token in stream]
        if own and bound.edit.run == BASE:
            centres[bound.key] = torch.stack(own).mean(0)
    return Recorded(lens, vectors, centres)


def _read_stream(reft: BoundModel, lens: Lens, inputs: Mapping[str, Any]) -> dict[tuple[int, int], Tensor]:
    """What enters the final norm, by row and token number; checks the lens on the last tokens."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.append(get_input(module, args, kwargs, (), "final_norm.input").detach().float().cpu())

    with lens.watching(keep):
        logits = reft(**inputs).logits
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
