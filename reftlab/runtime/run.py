"""One run: a forward pass, or all the passes of a generation, with its edits and reads."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reftlab.address import Position, head_name
from reftlab.errors import InterventionError, PositionError, RunError, UntouchedEditWarning
from reftlab.interventions import Intervention
from reftlab.runtime.bind import BoundEdit, BoundRead
from reftlab.runtime.hooks import OwnedHooks, StopForward
from reftlab.runtime.leaf import get_input, get_output, put_input, put_output
from reftlab.runtime.window import Layout, Selection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Run"]


@dataclass(frozen=True)
class _Frame:
    """What one pass covers: columns `[start, stop)` of `rows` rows, under a layout."""

    layout: Layout
    rows: int
    start: int
    stop: int

    @property
    def group(self) -> int:
        """How many rows of the batch stand for one row of the layout: its beams or sequences."""
        return self.rows // max(1, self.layout.rows)


class Run:
    """The state of one run while it runs.

    Args:
        model: the bare model.
        edits: this run's edits, in the order of the graph.
        reads: this run's reads, which take values after the edits of their site.
        interventions: built interventions by `BoundEdit.key`.
        layout: where prompts stand; None for models whose inputs have no token axis, whose sites'
            tensors then tell.
        tokenizer: for positions that look at text.
        vectors: vectors `(n, width)` that other runs have read, by `BoundRead.label`.
        stop_early: whether to end the pass once every read is taken.
    """

    def __init__(
        self,
        model: nn.Module,
        edits: tuple[BoundEdit, ...],
        reads: tuple[BoundRead, ...],
        interventions: nn.ModuleDict,
        layout: Layout | None,
        tokenizer: PreTrainedTokenizerBase | None,
        vectors: Mapping[str, tuple[Tensor, list[int]]],
        stop_early: bool = False,
    ) -> None:
        self.model, self.edits, self.reads = model, edits, reads
        self.interventions, self.tokenizer = interventions, tokenizer
        self.frame = None if layout is None else _Frame(layout, layout.rows, 0, layout.width)
        self.vectors = dict(vectors)
        self.results: dict[str, tuple[Tensor, Selection]] = {}
        self.touched: dict[str, int] = {edit.key: 0 for edit in edits}
        self._visited: set[int] = set()
        self._selections: dict[tuple[Position, str, int], Selection] = {}
        self._frames: dict[tuple[int, int], _Frame] = {}
        self._missing = {read.label for read in reads} if stop_early else set()
        self._stop_early = stop_early

    def hooks(self) -> OwnedHooks:
        """This run's hooks, put on the model; use as a context manager around the call."""
        owned = OwnedHooks(self.model)
        nodes: list[BoundEdit | BoundRead] = []
        for edit in self.edits:
            # A read that feeds an edit at its own site takes the value from right before that edit.
            if edit.source is not None and edit.source.run == edit.edit.run:
                nodes.append(edit.source)
            nodes.append(edit)
        nodes += self.reads
        groups: dict[Any, list[BoundEdit | BoundRead]] = {}
        for node in nodes:
            groups.setdefault((node.site.module, node.site.side), []).append(node)
        targets = {module: self.model.get_submodule(module) for module, _ in groups}
        for (module, side), group in groups.items():
            target = targets[module]
            if side == "output":
                owned.on_output(target, self._on_output(group, owned))
            else:
                owned.on_input(target, self._on_input(group, owned))
        return owned

    def move_window(self, rows: int, start: int, stop: int) -> None:
        """Say which columns the next forward pass covers, and how many rows its batch has."""
        self._visited.clear()
        if self.frame is not None:
            self.frame = _Frame(self.frame.layout, rows, start, stop)

    def _on_output(self, nodes: list[BoundEdit | BoundRead], owned: OwnedHooks) -> Any:
        def act(module: nn.Module, args: Any, output: Any) -> Any:
            changed = output
            for node in nodes:
                tensor = get_output(changed, node.site.leaf, str(node.site))
                new = self._visit(node, tensor, owned)
                if new is not None:
                    changed = put_output(changed, node.site.leaf, new, str(node.site))
            self._maybe_stop()
            return changed

        return act

    def _on_input(self, nodes: list[BoundEdit | BoundRead], owned: OwnedHooks) -> Any:
        def act(module: nn.Module, args: Any, kwargs: Any) -> Any:
            for node in nodes:
                tensor = get_input(module, args, kwargs, node.site.leaf, str(node.site))
                new = self._visit(node, tensor, owned)
                if new is not None:
                    args, kwargs = put_input(module, args, kwargs, node.site.leaf, new, str(node.site))
            self._maybe_stop()
            return args, kwargs

        return act

    def _maybe_stop(self) -> None:
        if self._stop_early and not self._missing:
            raise StopForward

    def check_touched(self, continues: bool, further: bool) -> None:
        """Say so where a pass left an edit out, other than a pass over a part that lacks its tokens.

        Args:
            continues: whether the pass covers a part of its sequence, or continues a cache.
            further: whether it continues a cache with several tokens that no `prompt=` accounts for.

        Raises:
            RunError: an edit of the prompt was not reached.
        """
        for bound in self.edits:
            reached = self.touched[bound.key] or (continues and not self.expects(bound))
            if not reached and bound.edit.phase != "decode":
                raise RunError(f"edit {bound.key!r} touched no token: {bound.site} did not run in this call")
            if not reached:
                _warn(
                    f"edit {bound.key!r} has phase 'decode' and this call has no generated tokens: it has no "
                    "labels and continues no cache"
                )
            elif further and bound.edit.phase == "prompt":
                _warn(
                    f"edit {bound.key!r} acts on the prompt, which ended with the cache's first call, so it "
                    "leaves these further tokens out; where they belong to the prompt, give all of it as "
                    "prompt="
                )

    def starts_before(self, node: BoundEdit, column: int) -> bool:
        """Whether an edit chooses a prompt token that stands before a column."""
        return self.frame is not None and bool(
            (self._selection(node, self.frame.layout).columns < column).any()
        )

    def expects(self, node: BoundEdit) -> bool:
        """Whether this pass covers a token that the edit chooses."""
        return self.frame is None or len(self._in_window(node, self.frame)[0]) > 0

    def _visit(self, node: BoundEdit | BoundRead, tensor: Tensor, owned: OwnedHooks) -> Tensor | None:
        """Carry out a node on its site's tensor; the new tensor, or None where nothing changes."""
        if owned.active and id(node) in self._visited:
            raise RunError(
                f"{node.site} was reached more than once in one forward pass, and reftlab cannot say which "
                "time is meant; choose a module that runs once"
            )
        self._visited.add(id(node))
        frame = self._frame_for(node, tensor)
        chosen, order = self._in_window(node, frame)
        rows, columns = chosen.rows.to(tensor.device), (chosen.columns - frame.start).to(tensor.device)
        where = (rows,) if tensor.dim() == 2 else (rows, columns)
        if isinstance(node, BoundRead):
            self._keep(node, tensor[where], chosen, frame)
            return None
        if len(chosen) == 0:
            return None
        self.touched[node.key] += len(chosen)
        with torch.autocast(tensor.device.type, enabled=False):
            source = None if node.source is None else self._source(node, chosen, order, frame)
            with owned.paused():
                new = self._edited(node, tensor[where], chosen, source)
            return owned.remember(tensor.index_put(where, new))

    def _edited(self, node: BoundEdit, whole: Tensor, chosen: Selection, source: Tensor | None) -> Tensor:
        """The new values `(n, site width)` for the chosen tokens' values `whole`."""
        index = None if node.index is None else node.index.to(whole.device)
        base = (whole if index is None else whole[:, index]).float()
        intervention = self.interventions[node.key]
        extra: dict[str, Tensor] = {}
        if isinstance(intervention, Intervention) and intervention.counts_positions:
            extra["positions"] = chosen.numbers
        try:
            new = intervention(base, None if source is None else source.to(base), **extra)
        except Exception as error:
            error.add_note(f"in edit {node.key!r} at {node.site}")
            raise
        if not isinstance(new, Tensor) or new.shape != base.shape:
            shape = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise InterventionError(
                f"edit {node.key!r}: the intervention returned {shape} for vectors of shape "
                f"{tuple(base.shape)}"
            )
        if not new.is_floating_point() or new.device != base.device:
            raise InterventionError(
                f"edit {node.key!r}: the intervention returned {new.dtype} on {new.device} for vectors of "
                f"{base.dtype} on {base.device}"
            )
        if node.edit.strength != 1.0:
            new = base + node.edit.strength * (new - base)
        new = new.to(whole.dtype)
        return new if index is None else whole.index_copy(1, index, new)

    def _source(self, node: BoundEdit, chosen: Selection, order: Tensor, frame: _Frame) -> Tensor:
        """The source's vectors that belong to the chosen tokens, `(n, width)`."""
        source = node.source
        assert source is not None
        if source.label not in self.vectors:
            raise RunError(f"edit {node.key!r}: its source {source.site} was not reached before it")
        vectors, counts = self.vectors[source.label]
        own = self._selection(node, frame.layout).counts(frame.layout.rows)
        if len(counts) != len(own):
            raise RunError(
                f"edit {node.key!r}: its source run {source.run!r} has {len(counts)} rows, this one "
                f"{len(own)}; give as many"
            )
        if getattr(self.interventions[node.key], "averages_source", False):
            return _row_means(vectors, counts)[chosen.rows.to(vectors.device) // frame.group]
        for row, (have, need) in enumerate(zip(counts, own, strict=True)):
            if have != need:
                raise RunError(
                    f"edit {node.key!r}: row {row} edits {need} tokens ({node.edit.positions}) and its "
                    f"source offers {have} ({source.positions} in run {source.run!r}); they must be as many"
                )
        return vectors[order.to(vectors.device)]

    def _keep(self, node: BoundRead, vectors: Tensor, chosen: Selection, frame: _Frame) -> None:
        if node.index is not None:
            vectors = vectors[:, node.index.to(vectors.device)]
        self.results[node.label] = (vectors, chosen)
        self.vectors[node.label] = (vectors, chosen.counts(frame.rows))
        self._missing.discard(node.label)

    def _in_window(self, node: BoundEdit | BoundRead, frame: _Frame) -> tuple[Selection, Tensor]:
        """A node's tokens in this pass, and their places in its selection over the whole layout."""
        chosen = self._selection(node, frame.layout)
        inside = (chosen.columns >= frame.start) & (chosen.columns < frame.stop)
        order = inside.nonzero()[:, 0]
        if len(order) < len(chosen):
            chosen = chosen.where(inside)
        if frame.group > 1:
            chosen, order = chosen.repeated(frame.group), order.repeat_interleave(frame.group)
        phase = node.edit.phase if isinstance(node, BoundEdit) else "prompt"
        if phase != "prompt" and frame.layout.open and frame.stop > frame.layout.width:
            assert isinstance(node, BoundEdit)
            grown = frame.layout.select_grown(node.edit.positions, frame.rows, frame.start, frame.stop)
            chosen = Selection.joined([chosen, grown])
        return chosen, order

    def _selection(self, node: BoundEdit | BoundRead, layout: Layout) -> Selection:
        """All the tokens of the layout that a node chooses."""
        positions = node.edit.positions if isinstance(node, BoundEdit) else node.positions
        phase = node.edit.phase if isinstance(node, BoundEdit) else "prompt"
        # Shared by all nodes of the same positions: thirty edits of the last token look it up once.
        key = (positions, phase, id(layout))
        if key not in self._selections:
            try:
                self._selections[key] = layout.select(positions, phase, self.tokenizer)
            except PositionError as error:
                who = f"edit {node.key!r}" if isinstance(node, BoundEdit) else f"read {node.label!r}"
                raise PositionError(f"{who}: {error}") from error
        return self._selections[key]

    def _frame_for(self, node: BoundEdit | BoundRead, tensor: Tensor) -> _Frame:
        """The pass as this site sees it; a site without a token axis has one token a row."""
        rows, tokens = tensor.shape[0], tensor.shape[1] if tensor.dim() == 3 else 1
        if self.frame is None or (tensor.dim() == 2 and rows == self.frame.rows):
            if (rows, tokens) not in self._frames:
                self._frames[rows, tokens] = _Frame(Layout.everything(rows, tokens), rows, 0, tokens)
            return self._frames[rows, tokens]
        covered = self.frame.stop - self.frame.start
        if tensor.dim() == 3 and tokens < covered and node.site.module == head_name(self.model):
            # Logits are often computed for the last tokens alone.
            return replace(self.frame, start=self.frame.stop - tokens)
        if tensor.dim() != 3 or tokens != covered or rows != self.frame.rows:
            raise RunError(
                f"{node.site} has shape {tuple(tensor.shape)}, and this call covers {covered} tokens of "
                f"{self.frame.rows} rows; reftlab acts where the first axes are (row, token)"
            )
        return self.frame


def _row_means(vectors: Tensor, counts: list[int]) -> Tensor:
    """The mean vector of each row, `(row, width)`, of vectors that stand row after row."""
    number = torch.tensor(counts, device=vectors.device)
    rows = torch.arange(len(counts), device=vectors.device).repeat_interleave(number)
    sums = vectors.float().new_zeros(len(counts), vectors.shape[1]).index_add(0, rows, vectors.float())
    return sums / number[:, None]


def _warn(message: str) -> None:
    # Past this function, the check, the bound model's forward, and torch's two steps around it.
    warnings.warn(message, UntouchedEditWarning, stacklevel=6)
