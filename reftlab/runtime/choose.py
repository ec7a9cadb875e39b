"""Which tokens a node chooses in the pass that is running."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reftlab.address import Position, head_name
from reftlab.errors import PositionError, RunError
from reftlab.graph import Phase
from reftlab.runtime.axes import Stream
from reftlab.runtime.options import Options
from reftlab.runtime.places import BoundEdit, BoundRead, Place
from reftlab.runtime.window import Layout, Selection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Chooser", "Chosen", "Frame"]


@dataclass(frozen=True)
class Frame:
    """What one pass covers: columns `[start, stop)` of `rows` rows, under a layout."""

    layout: Layout
    rows: int
    start: int
    stop: int

    @property
    def group(self) -> int:
        """How many rows of the batch stand for one row of the layout: its beams or sequences."""
        return max(1, self.rows // max(1, self.layout.rows))


@dataclass(frozen=True)
class Chosen:
    """A node's tokens in this pass.

    Attributes:
        tokens: the tokens, row after row, ascending in each row.
        ranks: each token's place among those that the node chooses in its row, also those that
            other passes cover, `(n,)` int64.
        joins: how many tokens' vectors make one vector together.
    """

    tokens: Selection
    ranks: Tensor
    joins: int = 1

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def vectors(self) -> Selection:
        """One token for each vector: the first of those that are joined."""
        return self.tokens if self.joins == 1 else self.tokens.where(slice(None, None, self.joins))

    @property
    def vector_ranks(self) -> Tensor:
        return self.ranks[:: self.joins] // self.joins

    def where(self, mask: Tensor) -> Chosen:
        """Only the vectors in `mask`, `(n / joins,)`."""
        tokens = mask.repeat_interleave(self.joins)
        return Chosen(self.tokens.where(tokens), self.ranks[tokens], self.joins)


class Chooser:
    """Keeps what the passes of one run cover, and finds each node's tokens there.

    Args:
        model: the bare model.
        layouts: where prompts stand, by stream; without one, sites' own tensors tell.
        tokenizer: for positions that look at text.
        options: positions that this call gives in place of the edits' own.
    """

    def __init__(
        self,
        model: nn.Module,
        layouts: Mapping[Stream, Layout],
        tokenizer: PreTrainedTokenizerBase | None,
        options: Options,
    ) -> None:
        self._model, self._tokenizer, self._options = model, tokenizer, options
        self.frames = {name: Frame(layout, layout.rows, 0, layout.width) for name, layout in layouts.items()}
        self._selections: dict[tuple[Position, Phase, int], tuple[Selection, Layout]] = {}
        self._everything: dict[tuple[int, int], Frame] = {}
        self._chosen: dict[tuple[Position, Phase, int, int, int, int], Chosen] = {}

    @property
    def rows(self) -> int | None:
        """Rows of the prompts, or None where the call's inputs do not tell."""
        return next((frame.layout.rows for frame in self.frames.values()), None)

    def move(self, windows: Mapping[Stream, tuple[int, int, int]], decoder: Layout | None = None) -> None:
        """Say which columns the next pass covers, and how many rows its batch has."""
        if decoder is not None and "decoder" not in self.frames and "decoder" in windows:
            group = max(1, decoder.rows // (self.rows or decoder.rows))
            firsts = range(0, decoder.rows, group)
            decoder = replace(
                decoder,
                prompts=tuple(decoder.prompts[row] for row in firsts),
                answers=tuple(decoder.answers[row] for row in firsts),
                ids=None if decoder.ids is None else decoder.ids[::group],
            )
            self.frames["decoder"] = Frame(decoder, decoder.rows, 0, decoder.width)
        self._chosen.clear()
        for stream, (rows, start, stop) in windows.items():
            if stream in self.frames:
                self.frames[stream] = Frame(self.frames[stream].layout, rows, start, stop)

    def frame_for(self, place: Place, tensor: Tensor, visits: int) -> Frame:
        """The pass as a site sees it, whose tensor is (row, token, feature) or (row, feature).

        Args:
            place: the site.
            tensor: its tensor in standard form.
            visits: how often the site was reached before in this pass.
        """
        rows, tokens = tensor.shape[0], tensor.shape[1] if tensor.dim() == 3 else 1
        if place.stream == "calls":
            nothing = (torch.empty(0, dtype=torch.long),) * rows
            return Frame(Layout(0, nothing, nothing, None, True), rows, visits, visits + 1)
        frame = self.frames.get(place.stream)
        if frame is None:
            if (rows, tokens) not in self._everything:
                layout = Layout.everything(rows, tokens)
                self._everything[rows, tokens] = Frame(layout, rows, 0, tokens)
            return self._everything[rows, tokens]
        covered = frame.stop - frame.start
        if tokens < covered and place.site.module == head_name(self._model):
            # Logits are often computed for the last tokens alone.
            return replace(frame, start=frame.stop - tokens)
        if tokens == covered and rows % max(1, frame.rows) == 0:
            # A decoder looks at its encoder's tokens once for each beam.
            return frame if rows == frame.rows else replace(frame, rows=rows)
        if tokens != covered or rows != frame.rows:
            raise RunError(
                f"{place.site} has shape {tuple(tensor.shape)}, and this call covers {covered} tokens of "
                f"{frame.rows} rows; reftlab acts where the first axes are (row, token)"
            )
        return frame

    def in_window(self, node: BoundEdit | BoundRead, frame: Frame) -> Chosen:
        """A node's tokens in this pass."""
        position, phase = self.position(node), node.phase
        if node.place.stream == "calls":
            # The calls of a recurrent cell come one by one, as generated tokens do.
            grown = frame.layout.select_grown(position, frame.rows, frame.start, frame.stop)
            before = len(position.select_generated(frame.start))
            return Chosen(grown, torch.full_like(grown.rows, before), position.joins)
        # Shared by all nodes of the same positions: thirty edits of the last token look it up once.
        key = (position, phase, id(frame.layout), frame.rows, frame.start, frame.stop)
        if key not in self._chosen:
            self._chosen[key] = self._find(node, position, phase, frame)
        return self._chosen[key]

    def _find(self, node: BoundEdit | BoundRead, position: Position, phase: Phase, frame: Frame) -> Chosen:
        tokens = self.selection(node, frame.layout)
        inside = (tokens.columns >= frame.start) & (tokens.columns < frame.stop)
        counts = torch.tensor([0, *tokens.counts(frame.layout.rows)])
        ranks = torch.arange(len(tokens)) - counts.cumsum(0)[tokens.rows]
        if not bool(inside.all()):
            tokens, ranks = tokens.where(inside), ranks[inside]
        grows = phase != "prompt" and frame.layout.open and frame.stop > frame.layout.width
        if frame.group > 1:
            tokens, ranks = tokens.repeated(frame.group), ranks.repeat_interleave(frame.group)
        if grows:
            grown = frame.layout.select_grown(position, frame.rows, frame.start, frame.stop)
            tokens, ranks = Selection.joined([tokens, grown]), torch.cat([ranks, grown.numbers])
        if frame.group > 1 or grows:
            tokens, ascending = tokens.ascending()
            ranks = ranks[ascending]
        chosen = Chosen(tokens, ranks, position.joins)
        _check_whole(node, position, chosen)
        return chosen

    def selection(self, node: BoundEdit | BoundRead, layout: Layout) -> Selection:
        """All the tokens of the layout that a node chooses."""
        position, phase = self.position(node), node.phase
        key = (position, phase, id(layout))
        if key not in self._selections:
            try:
                self._selections[key] = (layout.select(position, phase, self._tokenizer), layout)
            except PositionError as error:
                raise PositionError(f"{_named(node)}: {error}") from error
        return self._selections[key][0]

    def position(self, node: BoundEdit | BoundRead) -> Position:
        """A node's positions in this call."""
        given = self._options.positions
        if node.owner in given:
            return given[node.owner]
        edit = node.owner.removesuffix(".source")
        # A source without positions of its own goes where its edit goes.
        return given[edit] if edit in given and node.follows else node.positions


def _check_whole(node: BoundEdit | BoundRead, position: Position, chosen: Chosen) -> None:
    """Refuse a pass that covers only some of the tokens that are joined."""
    if position.joins > 1 and bool((torch.bincount(chosen.tokens.rows) % position.joins).any()):
        raise RunError(
            f"{_named(node)}: {str(position)!r} joins {position.joins} tokens, and this call covers "
            "only some of them; run the prompt in one piece"
        )


def _named(node: BoundEdit | BoundRead) -> str:
    return f"edit {node.key!r}" if isinstance(node, BoundEdit) else f"read {node.label!r}"
