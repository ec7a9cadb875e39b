"""One run: a forward pass, or all the passes of a generation, with its edits and reads."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reftlab.address import ATTENTION_SIDES
from reftlab.errors import InterventionError, RunError, UntouchedEditWarning
from reftlab.interventions import Intervention
from reftlab.runtime.attention import SoftmaxWatch, eager_attention
from reftlab.runtime.build import gate_keys
from reftlab.runtime.calls import Layouts
from reftlab.runtime.choose import Chooser, Chosen, Frame
from reftlab.runtime.hooks import OwnedHooks, StopForward
from reftlab.runtime.leaf import get_input, get_output, put_input, put_output
from reftlab.runtime.options import Options
from reftlab.runtime.places import BoundEdit, BoundRead
from reftlab.runtime.supply import Supply, aligned, row_means
from reftlab.runtime.window import Layout, Selection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Observer", "Run"]

Node = BoundEdit | BoundRead
Observer = Callable[[BoundEdit, Selection, Tensor, Tensor, Tensor | None], None]
"""Is shown, after each edit, the edit, one token for each vector, and `(n, width)` old, new and source."""


class Run:
    """The state of one run while it runs.

    Args:
        model: the bare model.
        edits: this run's edits, in the order of the graph.
        reads: this run's reads, which take values after the edits of their site.
        interventions: built interventions by `BoundEdit.module`, and gates by `gate_key`.
        layouts: where prompts stand, by stream; sites' tensors tell where a stream is missing.
        tokenizer: for positions that look at text.
        supplies: what other runs have read, or the call gives, by `BoundRead.label`.
        options: what this call says of its edits.
        stop_early: whether to end the pass once every read is taken.
        observers: who is shown what every edit does.
    """

    def __init__(
        self,
        model: nn.Module,
        edits: tuple[BoundEdit, ...],
        reads: tuple[BoundRead, ...],
        interventions: nn.ModuleDict,
        layouts: Layouts,
        tokenizer: PreTrainedTokenizerBase | None,
        supplies: Mapping[str, Supply],
        options: Options,
        stop_early: bool = False,
        observers: tuple[Observer, ...] = (),
    ) -> None:
        self.model, self.edits, self.reads = model, edits, reads
        self.interventions, self.options = interventions, options
        self.chooser = Chooser(model, layouts, tokenizer, options)
        self.supplies = dict(supplies)
        self.results: dict[str, Supply] = {}
        self.touched: dict[str, int] = {edit.key: 0 for edit in edits}
        self._visits: dict[int, int] = {}
        self._missing = {read.label for read in reads} if stop_early else set()
        self._stop_early = stop_early
        self._observers = observers
        self._watch = SoftmaxWatch()
        if self.chooser.rows is not None:
            options.check_rows(self.chooser.rows)

    @contextlib.contextmanager
    def hooks(self) -> Iterator[OwnedHooks]:
        """Put this run's hooks on the model around the call."""
        groups: dict[tuple[str, str], list[Node]] = {}
        for node in self._nodes():
            groups.setdefault((node.site.module, node.site.side), []).append(node)
        attended = list(dict.fromkeys(module for module, side in groups if side in ATTENTION_SIDES))
        with OwnedHooks(self.model) as owned, contextlib.ExitStack() as stack:
            if attended:
                stack.enter_context(eager_attention(self.model))
                stack.enter_context(self._watch)
            for name in attended:
                sides = [groups.get((name, side), []) for side in ("scores", "pattern")]
                self._attend(self.model.get_submodule(name), name, sides, owned)
            for (name, side), nodes in groups.items():
                target = self.model.get_submodule(name)
                if side == "output":
                    owned.on_output(target, self._on_output(nodes, owned))
                elif side == "input":
                    owned.on_input(target, self._on_input(nodes, owned))
            yield owned

    def _nodes(self) -> Iterator[Node]:
        """This run's nodes in the order in which they act where they share a site."""
        seen: set[str] = set()
        for edit in self.edits:
            # A read that an edit needs at its own site takes the value from right before that edit.
            for read in edit.reads:
                if read.run == edit.edit.run and read.label not in self.supplies and read.label not in seen:
                    seen.add(read.label)
                    yield read
            yield edit
        yield from self.reads

    def move(self, windows: Mapping[str, tuple[int, int, int]], decoder: Layout | None = None) -> None:
        """Say which columns the next forward pass covers; see `Chooser.move`."""
        self._visits.clear()
        self.chooser.move(windows, decoder)

    def _on_output(self, nodes: list[Node], owned: OwnedHooks) -> Any:
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

    def _on_input(self, nodes: list[Node], owned: OwnedHooks) -> Any:
        def act(module: nn.Module, args: Any, kwargs: Any) -> Any:
            for node in nodes:
                tensor = get_input(module, args, kwargs, node.site.leaf, str(node.site))
                new = self._visit(node, tensor, owned)
                if new is not None:
                    args, kwargs = put_input(module, args, kwargs, node.site.leaf, new, str(node.site))
            self._maybe_stop()
            return args, kwargs

        return act

    def _attend(self, module: nn.Module, name: str, sides: list[list[Node]], owned: OwnedHooks) -> None:
        """Watch the softmax of an attention module."""

        def changer(nodes: list[Node]) -> Callable[[Tensor], Tensor]:
            def change(tensor: Tensor) -> Tensor:
                for node in nodes:
                    new = self._visit(node, tensor, owned)
                    tensor = tensor if new is None else new
                return tensor

            return change

        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not owned.active:
                raise RunError(
                    f"{name}: attention scores and patterns cannot be edited under gradient checkpointing; "
                    "turn it off"
                )
            self._watch.begin(changer(sides[0]), changer(sides[1]))

        def end(module: nn.Module, args: Any, output: Any) -> None:
            self._watch.end(name)
            self._maybe_stop()

        owned.on_input(module, begin)
        owned.on_output(module, end)

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
                if not self._chooses_any(bound):
                    continue
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

    def check_generated(self) -> None:
        """Refuse a generation that left out an edit of the prompt."""
        for bound in self.edits:
            if bound.edit.phase != "decode" and not self.touched[bound.key] and self._chooses_any(bound):
                raise RunError(
                    f"edit {bound.key!r} touched no token: generation did not run {bound.site} on "
                    f"{self.chooser.position(bound)}"
                )

    def starts_before(self, node: BoundEdit, column: int) -> bool:
        """Whether an edit chooses a prompt token that stands before a column."""
        frame = self.chooser.frames.get(node.place.stream)
        return frame is not None and bool((self.chooser.selection(node, frame.layout).columns < column).any())

    def expects(self, node: BoundEdit) -> bool:
        """Whether this pass covers a token that the edit chooses."""
        frame = self.chooser.frames.get(node.place.stream)
        return frame is None or len(self.chooser.in_window(node, frame)) > 0

    def _chooses_any(self, node: BoundEdit) -> bool:
        """Whether the edit has a token in any row; positions given for a call may leave it none."""
        frame = self.chooser.frames.get(node.place.stream)
        return frame is None or len(self.chooser.selection(node, frame.layout)) > 0

    def _visit(self, node: Node, given: Tensor, owned: OwnedHooks) -> Tensor | None:
        """Carry out a node on its site's tensor; the new tensor, or None where nothing changes."""
        place, visits = node.place, self._visits.get(id(node), 0)
        if owned.active and visits and place.stream != "calls":
            raise RunError(
                f"{node.site} was reached more than once in one forward pass, and reftlab cannot say which "
                "time is meant; choose a module that runs once"
            )
        self._visits[id(node)] = visits + 1
        own = self.chooser.frames.get(place.stream)
        tensor = place.axes.arrange(given, own.rows if own is not None else given.shape[0])
        frame = self.chooser.frame_for(place, tensor, visits)
        chosen = self.chooser.in_window(node, frame)
        if isinstance(node, BoundRead):
            self._keep(
                node, _gathered(tensor, chosen, frame, place.features(tensor.shape[-1])), chosen, frame
            )
            return None
        if len(chosen) == 0:
            return None
        self.touched[node.key] += len(chosen)
        with torch.autocast(tensor.device.type, enabled=False), owned.paused():
            new = self._edit(node, tensor, chosen, frame)
        return None if new is None else owned.remember(place.axes.restore(new, given))

    def _edit(self, node: BoundEdit, tensor: Tensor, chosen: Chosen, frame: Frame) -> Tensor | None:
        """The site's tensor with the chosen vectors edited, or None where the edit acts on none."""
        counts = None
        if node.place.stream != "calls":
            whole = self.chooser.selection(node, frame.layout).counts(frame.layout.rows)
            counts = [count // chosen.joins for count in whole]
        source = self._source(node, chosen, counts, frame)
        acts, share = self._acting(node, chosen, counts, frame)
        if acts is not None:
            if not bool(acts.any()):
                return None
            chosen = chosen.where(acts)
            source = None if source is None else source[acts.to(source.device)]
            share = share if not isinstance(share, Tensor) else share[acts.to(share.device)]
        index = node.place.features(tensor.shape[-1])
        base = _gathered(tensor, chosen, frame, index)
        rows = chosen.vectors.rows // frame.group
        factor = self.options.factor(node.edit, rows)
        if isinstance(share, Tensor):
            factor = share[:, None] * (factor.to(share) if isinstance(factor, Tensor) else factor)
        new = self._changed(node, base, source, chosen.vectors, rows, factor)
        where = _where(chosen.tokens, frame, tensor)
        values = new.reshape(len(chosen), -1).to(tensor.dtype)
        if index is not None:
            values = tensor[where].index_copy(1, index.to(tensor.device), values)
        return tensor.index_put(where, values)

    def _changed(
        self,
        node: BoundEdit,
        given: Tensor,
        source: Tensor | None,
        tokens: Selection,
        rows: Tensor,
        factor: float | Tensor,
    ) -> Tensor:
        """The new vectors `(n, width)` for the vectors `given`."""
        base = given.float()
        built: Any = self.interventions[node.module]
        subspace = self.options.directions(node.edit, rows, getattr(built, "directions", None))
        source = None if source is None else source.to(base)
        if source is not None and source.shape != base.shape:
            raise RunError(
                f"edit {node.key!r}: its source's vectors are {tuple(source.shape)}, its own "
                f"{tuple(base.shape)}"
            )
        extra = {
            "subspace": None if subspace is None else subspace.to(base.device),
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
        _check_new(new, base, node)
        if isinstance(factor, Tensor) or factor != 1.0:
            new = base + (factor.to(base) if isinstance(factor, Tensor) else factor) * (new - base)
        for see in self._observers:
            see(node, tokens, base, new, source)
        return new

    def _acting(
        self, node: BoundEdit, chosen: Chosen, counts: list[int] | None, frame: Frame
    ) -> tuple[Tensor | None, Tensor | None]:
        """Which vectors the edit acts on, `(n,)` bool on the CPU, and the share of a soft condition."""
        acts = self.options.rows_of(node.edit, chosen.vectors.rows // frame.group)
        if node.edit.when is None:
            return acts, None
        vectors = {}
        for read, bound in node.when.items():
            supply = self._supply(node, bound)
            vectors[read] = aligned(supply, node, bound, chosen, counts, frame, per_row=True)
        gates = dict(
            zip(node.edit.when.gates, map(self.interventions.__getitem__, gate_keys(node)), strict=True)
        )
        mask = node.edit.when.mask(vectors, gates)
        if mask.dtype != torch.bool:
            return acts, mask
        mask = mask.cpu()
        return mask if acts is None else acts & mask, None

    def _source(
        self, node: BoundEdit, chosen: Chosen, counts: list[int] | None, frame: Frame
    ) -> Tensor | None:
        """The source's vectors that belong to the chosen tokens, `(n, width)`."""
        read = node.source
        if read is None:
            return None
        supply = self._supply(node, read)
        if getattr(self.interventions[node.module], "averages_source", False):
            rows = chosen.vectors.rows
            return row_means(supply, rows if supply.here else rows // frame.group)
        return aligned(supply, node, read, chosen, counts, frame, per_row=False)

    def _supply(self, node: BoundEdit, read: BoundRead) -> Supply:
        if read.label not in self.supplies:
            raise RunError(f"edit {node.key!r}: {read.site}, which it needs, was not reached before it")
        return self.supplies[read.label]

    def _keep(self, node: BoundRead, vectors: Tensor, chosen: Chosen, frame: Frame) -> None:
        """Note what a read has taken; one that this pass does not reach keeps what it had."""
        supply = Supply(vectors, chosen.vectors, frame.rows, here=True)
        before = self.results.get(node.label)
        if before is not None and not len(chosen) and not node.follows:
            return
        self.results[node.label] = self.supplies[node.label] = supply
        if before is not None and node.place.stream == "calls":
            self.results[node.label] = _together(before, supply)
        if node.place.stream != "calls" or not self._awaits_more(node, frame):
            self._missing.discard(node.label)

    def _awaits_more(self, node: BoundRead, frame: Frame) -> bool:
        """Whether later calls of a recurrent cell may still bring tokens that a read chooses."""
        position = self.chooser.position(node)
        return len(position.select_generated(frame.stop + 4096)) > len(position.select_generated(frame.stop))


def _together(before: Supply, after: Supply) -> Supply:
    """What was read in several calls of a recurrent cell."""
    assert before.tokens is not None
    assert after.tokens is not None
    tokens, order = Selection.joined([before.tokens, after.tokens]).ascending()
    vectors = torch.cat([before.vectors, after.vectors])[order.to(after.vectors.device)]
    return Supply(vectors, tokens, after.rows, here=True)


def _where(tokens: Selection, frame: Frame, tensor: Tensor) -> tuple[Tensor, ...]:
    rows = tokens.rows.to(tensor.device)
    if tensor.dim() == 2:
        return (rows,)
    return rows, (tokens.columns - frame.start).to(tensor.device)


def _gathered(tensor: Tensor, chosen: Chosen, frame: Frame, index: Tensor | None) -> Tensor:
    """The chosen vectors `(n, width)`, those that are joined one after the other in one."""
    whole = tensor[_where(chosen.tokens, frame, tensor)]
    part = whole if index is None else whole[:, index.to(whole.device)]
    return part if chosen.joins == 1 else part.reshape(len(part) // chosen.joins, -1)


def _check_new(new: Any, base: Tensor, node: BoundEdit) -> None:
    if not isinstance(new, Tensor) or new.shape != base.shape:
        shape = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise InterventionError(
            f"edit {node.key!r}: the intervention returned {shape} for vectors of shape {tuple(base.shape)}"
        )
    if not new.is_floating_point() or new.device != base.device:
        raise InterventionError(
            f"edit {node.key!r}: the intervention returned {new.dtype} on {new.device} for vectors of "
            f"{base.dtype} on {base.device}"
        )


def _warn(message: str) -> None:
    # Past this function, the check, the bound model's forward, and torch's two steps around it.
    warnings.warn(message, UntouchedEditWarning, stacklevel=6)
