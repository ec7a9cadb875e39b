"""What of a batch is computed, what is kept, and what is left out: in words, as a table and as a figure."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reftlab.errors import RunError
from reftlab.plotting import cone_figure
from reftlab.runtime.cone.value import Cone, cone_of
from reftlab.runtime.cone.work import Work, work_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from reftlab.runtime.model import BoundModel

__all__ = ["ConePlan", "cone_plan"]

_SAID = 4
"""Of more edits than this, the first ones and the last are named."""


@dataclass(frozen=True)
class ConePlan:
    """The plan of one batch.

    Attributes:
        cone: what must run.
        work: how many multiplications that is, plainly and on the cone.
        tokens: for each row its real tokens as text, or their numbers where there is no tokenizer.
    """

    cone: Cone
    work: Work
    tokens: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        cone = self.cone
        lines = [f"causal cone of {_count(cone.rows, 'row')}, {_count(sum(cone.lengths), 'token')}:"]
        said = [f"  {_reach(reach, cone)}" for reach in cone.reaches]
        lines += said if len(said) <= _SAID else [*said[:2], f"  … {len(said) - 3} more …", said[-1]]
        if cone.why:
            return "\n".join([*lines, "  everything runs:", *(f"  - {reason}" for reason in cone.why)])
        inside = _range([(a, b) for a, b in zip(cone.starts, cone.stops, strict=True)])
        above = _blocks(cone.first_block, cone.blocks) or "no block"
        lines.append(
            f"  computed: {above} at {inside}, and logits where labels are: {cone.share:.1%} of all cells"
        )
        kept = []
        if any(cone.starts) and cone.first_block < cone.blocks:
            kept.append(f"keys and values of {_range([(0, start) for start in cone.starts])} in {above}")
        if cone.first_block:
            kept.append(f"what leaves block {cone.first_block - 1} at {inside}")
        lines.append(f"  cached:   {'; '.join(kept)}")
        lines.append("  skipped:  everything else")
        lines.append(
            f"  work:     {self.work.share:.1%} of a plain training step's multiplications, "
            f"{self.work.first_share:.1%} at the first visit"
        )
        return "\n".join(lines)

    __repr__ = __str__

    def to_frame(self) -> pd.DataFrame:
        """One line for each row: how many (block, token) cells are computed, cached and skipped."""
        import pandas as pd

        cone = self.cone
        above = cone.blocks - cone.first_block
        lines = []
        for row, (start, stop, length) in enumerate(zip(cone.starts, cone.stops, cone.lengths, strict=True)):
            computed, cached = above * (stop - start), above * start
            lines.append(
                {
                    "row": row,
                    "tokens": length,
                    "first_token": start,
                    "stop_token": stop,
                    "first_block": cone.first_block,
                    "computed": computed,
                    "cached": cached,
                    "skipped": cone.blocks * length - computed - cached,
                }
            )
        return pd.DataFrame(lines)

    def plot(self, row: int = 0) -> Figure:
        """Blocks × tokens of one row: computed, cached, skipped, and where each edit acts.

        Raises:
            RunError: there is no such row, or the model's blocks are not known.
        """
        cone = self.cone
        if type(row) is not int or not 0 <= row < cone.rows:
            raise RunError(f"row={row!r}: the batch has rows 0 to {cone.rows - 1}")
        if not cone.blocks:
            raise RunError(f"there is no figure of blocks that are not known: {'; '.join(cone.why)}")
        edits = [(r.name, r.block, start) for r in cone.reaches if (start := r.starts[row]) is not None]
        work = f"{cone.share:.1%} of the batch's cells, {self.work.share:.1%} of a plain step's work"
        return cone_figure(
            self.tokens[row],
            cone.blocks,
            cone.first_block,
            cone.starts[row],
            cone.stops[row],
            edits,
            f"row {row}: {f'everything runs: {cone.why[0]}' if cone.why else work}",
        )

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def cone_plan(
    bound: BoundModel, batch: Mapping[str, Any], *, training: bool = True, train_model: bool = False
) -> ConePlan:
    """Work out the plan of a batch; arguments and errors as for `cone_of`."""
    cone = cone_of(bound, batch, training=training, train_model=train_model)
    mask, given = batch.get("attention_mask"), batch.get("input_ids")
    tokens = [tuple(str(number) for number in range(length)) for length in cone.lengths]
    tokenizer: Any = bound.tokenizer
    for row, ids in enumerate([] if given is None or tokenizer is None else given.tolist()):
        real = ids if mask is None else [i for i, here in zip(ids, mask[row].tolist(), strict=True) if here]
        # Letters such as emojis are spread over several tokens, which are no text of their own.
        tokens[row] = tuple(str(tokenizer.decode([i])).replace("\ufffd", "·") for i in real)
    return ConePlan(cone, work_of(bound.model, cone), tuple(tokens))


def _reach(reach: Any, cone: Cone) -> str:
    starts = [start for start in reach.starts if start is not None]
    if not starts:
        return f"{reach.name} acts in no row"
    since = f"{min(starts)}" if len(set(starts)) == 1 else f"{min(starts)} to {max(starts)} (by row)"
    return (
        f"{reach.name} can change {_blocks(reach.block, cone.blocks) or 'the logits'} from token {since} on"
    )


def _blocks(first: int, count: int) -> str:
    """The blocks from one on, or an empty text where there is none."""
    if first >= count:
        return ""
    return f"block {first}" if first == count - 1 else f"blocks {first} to {count - 1}"


def _range(spans: list[tuple[int, int]]) -> str:
    """The tokens of all rows, `tokens 3 to 9`, or how many they are where rows differ."""
    if len(set(spans)) == 1:
        start, stop = spans[0]
        return f"token {start}" if stop == start + 1 else f"tokens {start} to {stop - 1}"
    counts = sorted(stop - start for start, stop in spans)
    return (
        f"{counts[0]} to {counts[-1]} tokens a row"
        if counts[0] != counts[-1]
        else f"{counts[0]} tokens a row"
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"
