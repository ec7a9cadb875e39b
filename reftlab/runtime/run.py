"""One run: a forward pass, or all the passes of a generation, with its edits and reads."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reftlab.address import ATTENTION_SIDES, head_name
from reftlab.errors import RunError, UntouchedEditWarning
from reftlab.runtime.attention import SoftmaxWatch, attending
from reftlab.runtime.calls import Calls, Layouts, Window
from reftlab.runtime.choose import Chooser, Chosen, Frame
from reftlab.runtime.editing import Editor, Observer, gathered
from reftlab.runtime.grouping import Acting, EditGroup, Grouping
from reftlab.runtime.hooks import OnInput, OnOutput, OwnedHooks, StopForward
from reftlab.runtime.leaf import get_input, get_output, put_input, put_output
from reftlab.runtime.options import Options
from reftlab.runtime.places import BoundEdit, BoundRead
from reftlab.runtime.supply import Supply
from reftlab.runtime.window import Layout, Selection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Run"]

Node = BoundEdit | BoundRead


class Run:
    """The state of one run while it runs.

    Args:
        model: the bare model.
        edits: this run's edits, in the order of the graph.
        reads: this run's reads, which take values after the edits of their site.
        interventions: built interventions by `BoundEdit.module`, and gates by `gate_keys`.
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
        self.chooser = Chooser(model, layouts, tokenizer, options)
        self.supplies = dict(supplies)
        self._editor = Editor(interventions, self.chooser, options, self.supplies, observers)
        self._grouping = Grouping(interventions, self.chooser, options, apart=bool(observers))
        self.results: dict[str, Supply] = {}
        self.touched: dict[str, int] = {edit.key: 0 for edit in edits}
        self._continues = False
        self._past_prompt: frozenset[str] = frozenset()
        self._empty: set[str] = set()
        self._visits: dict[int, int] = {}
        self._missing = {read.label for read in reads} if stop_early else set()
        self._stop_early = stop_early
        self._watch = SoftmaxWatch()

    @contextlib.contextmanager
    def hooks(self) -> Iterator[OwnedHooks]:
        """Put this run's hooks on the model around the call."""
        groups: dict[tuple[str, str], list[Node]] = {}
        for node in self._nodes():
            groups.setdefault((node.site.module, node.site.side), []).append(node)
        attended = list(dict.fromkeys(module for module, side in groups if side in ATTENTION_SIDES))
        with OwnedHooks(self.model) as owned, contextlib.ExitStack() as stack:
            if attended:
                stack.enter_context(attending(self.model, self._watch))
            for name in attended:
                sides = [groups.get((name, side), []) for side in ("scores", "pattern")]
                self._attend(self.model.get_submodule(name), name, sides, owned)
            for (name, side), nodes in groups.items():
                target = self.model.get_submodule(name)
                if side == "output":
                    owned.on_output(target, self._on_output(self._grouping.grouped(nodes), owned))
                elif side == "input":
                    owned.on_input(target, self._on_input(self._grouping.grouped(nodes), owned))
            yield owned

    def _nodes(self) -> Iterator[Node]:
        """This run's nodes in the order in which they act where they share a site."""
        later: list[Node] = []
        for edit in self.edits:
            for read in edit.reads:
                if read.run != edit.edit.run or read.label in self.supplies:
                    continue
                # At the edit's own site a read takes the value from right before that edit, at any other
                # site what all edits there have made.
                if (read.site.module, read.site.side) == (edit.site.module, edit.site.side):
                    yield read
                else:
                    later.append(read)
            yield edit
        yield from later
        yield from self.reads

    def move(self, windows: Mapping[str, tuple[int, int, int]], decoder: Layout | None = None) -> None:
        """Say which columns the next forward pass covers; see `Chooser.move`."""
        self._visits.clear()
        starts = [start for _, start, _ in windows.values()]
        self._continues = bool(starts) and max(starts) > 0
        self.chooser.move(windows, decoder)
        self._grouping.clear()
        frames = self.chooser.frames.items()
        self._past_prompt = frozenset(name for name, frame in frames if frame.start >= frame.layout.width)

    def around(self, calls: Calls) -> tuple[OnInput, OnOutput]:
        """Hooks that say before each pass which columns it covers, and note in `calls` where it ended."""
        covered: tuple[dict[str, Any], dict[str, Window]] = {}, {}

        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal covered
            named = calls.named(args, kwargs)
            covered = named, calls.windows(named)
            self.move(covered[1], None if "decoder" in self.chooser.frames else calls.decoder_prompt(named))

        def end(module: nn.Module, args: Any, output: Any) -> None:
            calls.passed(*covered)

        return begin, end

    def _on_output(self, nodes: list[Acting], owned: OwnedHooks) -> Any:
        steps = [(node, node.site.leaf, str(node.site)) for node in nodes]

        def act(module: nn.Module, args: Any, output: Any) -> Any:
            changed = output
            for node, leaf, name in steps:
                if self._is_over(node):
                    continue
                new = self._visit(node, get_output(changed, leaf, name), owned)
                if new is not None:
                    changed = put_output(changed, leaf, new, name)
            self._maybe_stop()
            return changed

        return act

    def _on_input(self, nodes: list[Acting], owned: OwnedHooks) -> Any:
        steps = [(node, node.site.leaf, str(node.site)) for node in nodes]

        def act(module: nn.Module, args: Any, kwargs: Any) -> Any:
            for node, leaf, name in steps:
                if self._is_over(node):
                    continue
                new = self._visit(node, get_input(module, args, kwargs, leaf, name), owned)
                if new is not None:
                    args, kwargs = put_input(module, args, kwargs, leaf, new, name)
            self._maybe_stop()
            return args, kwargs

        return act

    def _is_over(self, node: Acting) -> bool:
        """Whether this pass covers generated tokens alone, and the edits act on the prompt's."""
        return isinstance(node, EditGroup) and node.skips(self._past_prompt)

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
            # Positions that a call gives may leave an edit of a site's own tokens none.
            reached = (
                self.touched[bound.key] or bound.key in self._empty or (continues and not self.expects(bound))
            )
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

    def check_kept(self, kept: Any) -> None:
        """Refuse an edit of logits of which the call keeps only some, chosen by number."""
        head = head_name(self.model) if isinstance(kept, Tensor) else None
        for bound in self.edits:
            if head is not None and bound.site.module == head:
                raise RunError(
                    f"edit {bound.key!r} acts on logits, and logits_to_keep={kept.tolist()} leaves out some "
                    "of them by number; give a number of last tokens, or leave it out"
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

    def _visit(self, node: Acting, given: Tensor, owned: OwnedHooks) -> Tensor | None:
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
        new: Tensor | None
        if isinstance(node, EditGroup):
            division = self._grouping.division(node, frame, tensor)
            for edit, count in zip(node.edits, division.counts, strict=True):
                self._note(edit, count)
            if not division.shares:
                return None
            with _by_itself(tensor), owned.paused():
                new = self._editor.edit_group(node, tensor, division.shares)
            return owned.remember(place.axes.restore(new, given))
        chosen = self.chooser.in_window(node, frame)
        if isinstance(node, BoundRead):
            taken = gathered(tensor, chosen, frame, place.features(tensor.shape[-1]))
            self._keep(node, taken.vectors, chosen, frame)
            return None
        self._note(node, len(chosen))
        if len(chosen) == 0:
            return None
        with _by_itself(tensor), owned.paused():
            new = self._editor.edit(node, tensor, chosen, frame)
        return None if new is None else owned.remember(place.axes.restore(new, given))

    def _note(self, edit: BoundEdit, count: int) -> None:
        """Note how many tokens of this pass an edit chooses."""
        self.touched[edit.key] += count
        if count == 0 and edit.place.stream == "own":
            self._empty.add(edit.key)

    def _keep(self, node: BoundRead, vectors: Tensor, chosen: Chosen, frame: Frame) -> None:
        """Note what a read has taken; one that this pass does not reach keeps what it had."""
        layout = frame.layout if node.place.site_width is None else None
        supply = Supply(vectors, chosen.vectors, frame.rows, here=True, layout=layout)
        before = self.results.get(node.label)
        if before is not None and not node.follows and self._continues:
            # Chunks of one prompt, or steps of one generation: what was read before stays.
            supply = _together(before, supply) if len(chosen) else before
        self.results[node.label] = self.supplies[node.label] = supply
        if before is not None and node.place.stream == "calls":
            self.results[node.label] = _together(before, supply)
        # Later calls of a recurrent cell may always bring further time steps.
        if node.place.stream != "calls":
            self._missing.discard(node.label)


def _together(before: Supply, after: Supply) -> Supply:
    """What was read in chunks of a prompt, steps of a generation, or calls of a recurrent cell."""
    assert before.tokens is not None
    assert after.tokens is not None
    tokens, order = Selection.joined([before.tokens, after.tokens]).ascending()
    vectors = torch.cat([before.vectors, after.vectors])[order.to(after.vectors.device)]
    return Supply(vectors, tokens, after.rows, here=True)


def _by_itself(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Leave autocast outside of what an edit computes."""
    kind = tensor.device.type
    return (
        torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()
    )


def _warn(message: str) -> None:
    # Past this function, the check, the bound model's forward, and torch's two steps around it.
    warnings.warn(message, UntouchedEditWarning, stacklevel=6)
