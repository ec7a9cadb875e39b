"""A graph bound to a model: an ordinary module whose forward pass carries the edits."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from reftlab.errors import BindError, RunError, did_you_mean
from reftlab.graph import BASE, InterventionGraph, Read
from reftlab.runtime.bind import bind_nodes, bind_reads
from reftlab.runtime.build import Interventions, built_for, forget_pass, gate_keys
from reftlab.runtime.calls import Calls, Layouts
from reftlab.runtime.editing import Observer
from reftlab.runtime.folding import Folds, check_unfolded
from reftlab.runtime.hooks import StopForward, turn_of
from reftlab.runtime.options import Options
from reftlab.runtime.places import BoundEdit, BoundRead
from reftlab.runtime.reading import Reading, ReadValues, placed
from reftlab.runtime.replacing import replaced
from reftlab.runtime.run import Run
from reftlab.runtime.sources import Sources
from reftlab.runtime.supply import Supply
from reftlab.runtime.wrapped import device_of, eagerly, entrances

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reftlab.runtime.plan import Plan

__all__ = ["BoundModel"]


class BoundModel(nn.Module):
    """A model together with a graph of edits and reads.

    `forward` and `generate` take and return what the model's own do. The model itself is not
    changed: it carries hooks only while a call of this object runs, and it is a submodule, so that
    `.to`, `.train()`, `.eval()` and `state_dict` cover it. `rl.train` freezes it while it trains; in a
    loop of your own give the optimiser `reft.interventions.parameters()` alone.

    Args:
        graph: what to read and edit.
        model: any module; it is shared, not copied.
        tokenizer: for positions that look at text, and for what is built on top.
        example: inputs for the shape-only pass, for models whose inputs reftlab cannot make up.
        built: interventions to take in place of new ones, by their names in `interventions`.

    Attributes:
        graph: the graph.
        model: the bare model.
        interventions: the built interventions, by name; their parameters are float32.
        edits: where each edit acts, in the order of execution.
        facts: how this object came about (training settings and the like), saved with it.

    Raises:
        AddressError: a site that the model does not have.
        BindError: a site or a source that does not fit.
    """

    model: Any

    def __init__(
        self,
        graph: InterventionGraph,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        example: Any = None,
        built: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(model, BoundModel):
            raise BindError(
                "the model is bound already; bind to its model and add, reft + graph.bind(reft.model)"
            )
        if isinstance(tokenizer, str):
            raise BindError(f"tokenizer={tokenizer!r}: expected a tokenizer, such as rl.load_model returns")
        if not isinstance(model, nn.Module):
            raise BindError(f"a graph is bound to a torch module, not to {model!r}")
        self.graph, self.model, self.tokenizer = graph, model, tokenizer
        self._example = example
        self._bound_edits, self._bound_reads = bind_nodes(graph, model, example)
        self.interventions = Interventions(built_for(self._bound_edits, model, built or {}))
        self.training = self.interventions.training = model.training
        self.facts: dict[str, Any] = {}
        self._off: list[tuple[int, frozenset[str]]] = []
        self._observers: tuple[Observer, ...] = ()
        self._folds = Folds()
        check_unfolded(model, self.interventions.values())
        self._calls = Calls(model)
        self._ad_hoc: dict[tuple[Read, ...], tuple[BoundRead, ...]] = {}

    @property
    def edits(self) -> tuple[BoundEdit, ...]:
        """Every edit at its place, in the order in which they act."""
        return tuple(sorted(self._bound_edits, key=lambda bound: bound.order))

    @property
    def config(self) -> Any:
        """The model's own configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model wants its inputs."""
        return device_of(self.model)

    def forward(
        self,
        *args: Any,
        sources: Mapping[str, Mapping[str, Any]] | None = None,
        reads: Mapping[str, Any] | None = None,
        tasks: str | Sequence[str | None] | None = None,
        subspace: Any = None,
        scale: Mapping[str, Any] | None = None,
        select: str | Sequence[str] | None = None,
        positions: Mapping[str, Any] | None = None,
        prompt: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model with its edits.

        Args:
            *args, **kwargs: as for the model's own `forward`.
            sources: inputs of each source run, by its name; one row stands for all rows.
            reads: tensors in place of what edits would read in source runs, `(row, token, width)`,
                `(n, width)` or `(width,)`, by the name of the edit, of its read, or of a run from
                which only one read is taken.
            tasks: which tasks' edits act in each row, `["emoji", None, "formal+emoji"]`, or one
                text for all rows; every edit acts everywhere unless given.
            subspace: directions of the bases in which edits act, `[0, 2]`; one list a row,
                `[[0], None, [1, 2]]`; or either by edit, `{"emoji": [0]}`.
            scale: factor of each edit's strength by its name, one number or one a row.
            select: the edits that act, by name; all unless given. Edits of a source run of which none is
                named stay with the edits that read it.
            positions: tokens in place of an edit's own, by its name (or `name.source` for its
                source): `{"emoji": [[3], [4, 5]]}` for each row its own, `{"emoji": "last"}`.
            prompt: the tokenizer's output for the whole prompt, where this call covers only a part
                of it: a chunk, or a step that continues a cache made elsewhere.

        Returns:
            What the model returns.

        Raises:
            RunError: a source is missing or does not match, an option names what there is not, or
                the call's tokens cannot be placed.
            PositionError: a row does not have an edit's position.
        """
        options = Options.of(self.graph, tasks, subspace, scale, select, positions)
        active = self._active_edits(options)
        named = self._calls.named(args, kwargs)
        if not active and not sources and not reads:
            options.check_tasks(self._calls.rows(named))
            return self.model(*args, **kwargs)
        for intervention in self.interventions.values():
            forget_pass(intervention)
        supplies = Sources(self, options, named, sources, reads, partial=prompt is not None).supplies()
        layouts = self._calls.layouts(named, prompt)
        run = self._run(BASE, layouts, supplies, options)
        run.check_kept(named.get("logits_to_keep"))
        past = self._calls.past(named)
        continues = prompt is not None or past > 0
        output = self._call(run, self.model, args, kwargs)
        self._calls.remember(output, layouts, continues)
        further = past > 0 and prompt is None and self._calls.tokens(named) > 1
        run.check_touched(continues, further)
        return output

    def generate(
        self,
        *args: Any,
        sources: Mapping[str, Mapping[str, Any]] | None = None,
        reads: Mapping[str, Any] | None = None,
        tasks: str | Sequence[str | None] | None = None,
        subspace: Any = None,
        scale: Mapping[str, Any] | None = None,
        select: str | Sequence[str] | None = None,
        positions: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate with the model's own `generate` and its edits.

        Edits of phase `prompt` act on the prompt's tokens, those of phase `decode` on the tokens
        that are generated, with or without a cache, for every beam and every returned sequence.

        Args:
            *args, **kwargs: as for the model's own `generate`.
            sources, reads, tasks, subspace, scale, select, positions: as for `forward`; rows are
                those of the prompts, however many sequences each of them gets.

        Returns:
            What the model's `generate` returns.
        """
        from reftlab.runtime.generation import generate

        options = Options.of(self.graph, tasks, subspace, scale, select, positions)
        return generate(self, options, sources, reads, args, kwargs)

    def read(
        self,
        *reads: str | Read,
        positions: Any = None,
        sources: Mapping[str, Mapping[str, Any]] | None = None,
        tasks: str | Sequence[str | None] | None = None,
        subspace: Any = None,
        scale: Mapping[str, Any] | None = None,
        select: str | Sequence[str] | None = None,
        prompt: Mapping[str, Any] | None = None,
        grad: bool = False,
        **inputs: Any,
    ) -> Reading:
        """Read vectors, with the edits in force, and stop the forward pass after the last site needed.

        Args:
            *reads: sites such as `"blocks[5].output"`, `"blocks[5].output @ last"`, or `Read`
                objects; without any, the graph's own reads, those in source runs included.
            positions: positions for those that name none.
            sources, tasks, subspace, scale, select, prompt: as for `forward`.
            grad: whether the vectors carry gradients.
            **inputs: the model's inputs.

        Returns:
            Named tensors `(row, token, width)` in the model's dtype; attention scores and patterns
            are `(row, head, token, key)`.

        >>> reft.read("blocks[5].output @ last", **batch)          # doctest: +SKIP
        Reading('blocks[5].output @ last': (8, 1, 576))
        """
        wanted = self._bound(reads, positions)
        if not wanted:
            raise RunError(
                "nothing to read: name sites, as in reft.read('blocks[5].output @ last', **inputs)"
            )
        options = Options.of(self.graph, tasks, subspace, scale, select)
        self._folds.check(self, options, wanted)
        layouts = self._calls.layouts(inputs, prompt)
        there, here = [tuple(r for r in wanted if (r.run == BASE) is base) for base in (False, True)]
        runs = Sources(self, options, inputs, sources, None, there)
        supplies, results = runs.supplies(), runs.results
        if here:
            with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
                run = self._run(BASE, layouts, supplies, options, here, stop_early=True)
                self._call(run, self.model, (), inputs)
            results.update(run.results)
        missing = [read.label for read in wanted if read.label not in results]
        if missing:
            raise RunError(f"{missing[0]!r} was not reached in this forward pass")
        rows = max(results[read.label].rows for read in wanted)
        return Reading(
            {read.label: ReadValues.of(results[read.label], read.place.keys_of) for read in wanted}, rows
        )

    @contextlib.contextmanager
    def disabled(self, *names: str) -> Iterator[BoundModel]:
        """Leave out the named edits, or all of them, inside a `with` block."""
        known = [edit.name for edit in self.graph.edits]
        for name in names:
            if name not in known:
                raise RunError(f"there is no edit {name!r}; there is {known}.{did_you_mean(name, known)}")
        entry = (threading.get_ident(), frozenset(names or known))
        self._off.append(entry)
        try:
            yield self
        finally:
            self._off.remove(entry)

    @contextlib.contextmanager
    def watching(self, see: Observer) -> Iterator[BoundModel]:
        """Show `see` what every edit does inside a `with` block; see `reftlab.runtime.editing.Observer`."""
        before = self._observers
        self._observers = (*before, see)
        try:
            yield self
        finally:
            self._observers = before

    def replaced(self, key: str, intervention: nn.Module) -> contextlib.AbstractContextManager[BoundModel]:
        """Put another intervention in the place of one inside a `with` block."""
        return replaced(self, key, intervention)

    def __add__(self, other: BoundModel) -> BoundModel:
        """Both models' edits in one; those of the left one act first where they share a site.

        The new object shares the trained interventions with the two that it is made of. An edit of
        the same name in both is an error; `rename` one of them.
        """
        from reftlab.runtime.compose import added

        if isinstance(other, InterventionGraph):
            raise BindError("this graph is not bound; bind it first, reft + graph.bind(reft.model)")
        return added(self._unfolded(), other._unfolded()) if isinstance(other, BoundModel) else NotImplemented

    def select(self, *names: str) -> BoundModel:
        """Only the named edits and reads, with the interventions that they have here."""
        from reftlab.runtime.compose import derived

        return derived(self._unfolded(), self.graph.select(*names))

    def scale(self, name: str, factor: float) -> BoundModel:
        """The same edits with one edit's strength multiplied by `factor`."""
        from reftlab.runtime.compose import derived

        return derived(self._unfolded(), self.graph.scale(name, factor))

    def rename(self, names: Mapping[str, str]) -> BoundModel:
        """The same edits with nodes renamed, `{"old": "new"}`."""
        from reftlab.runtime.compose import derived

        return derived(self._unfolded(), self.graph.rename(names), names)

    def plan(
        self, batch: Mapping[str, Any] | None = None, *, training: bool = True, train_model: bool = False
    ) -> Plan:
        """What this object does in a forward pass, in words and as a table.

        Args:
            batch: inputs as `forward` takes them, such as the tokenizer's output or `rl.training_batch`;
                with them the plan says which part of the pass the edits can change, see `Plan.cone`.
            training: whether the pass is one of a training, in which the model's own dropout acts.
            train_model: as for `rl.train`.
        """
        from reftlab.runtime.plan import plan_of

        return plan_of(self, batch, training=training, train_model=train_model)

    def fold(self, *names: str) -> BoundModel:
        """Put the named edits, or all, into the model's weights, where they cost nothing.

        An edit folds if it is an affine map of all tokens (`positions="all"`, `phase="both"` in a model
        that writes texts) of what an `nn.Linear` or `Conv1D` makes, as at `blocks[i].mlp.output` and
        `blocks[i].attn.output`. The numbers are those of the edit up to rounding, but for padding, which
        is then edited too. While folded they act in every call of the model, also in those of others, and
        stand in its `state_dict()`, with a bias where there was none; `save` writes the edits as before.

        Args:
            *names: edits; all of the graph unless given.

        Returns:
            This object.

        Raises:
            RunError: an edit cannot be folded; the message names it and says why. Nothing is changed then.
        """
        self._folds.fold(self, names)
        return self

    def unfold(self) -> BoundModel:
        """Give the model its own weights back, bit for bit."""
        self._folds.unfold()
        return self

    @contextlib.contextmanager
    def folded(self, *names: str) -> Iterator[BoundModel]:
        """Fold the named edits, or all, inside a `with` block; see `fold`."""
        with self._folds.within(self, names):
            yield self

    def save(self, folder: str | Path) -> Path:
        """Save graph, interventions and a model card; see `reftlab.runtime.saving`."""
        from reftlab.runtime.saving import save

        with self._folds.taken_out():
            return save(self, folder)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Turn gradient checkpointing on in the model."""
        self.model.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Turn gradient checkpointing off in the model."""
        self.model.gradient_checkpointing_disable()

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Turn gradient checkpointing on in the model, under its newer name in transformers."""
        self.model.activation_checkpointing_enable(*args, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        """Turn gradient checkpointing off in the model, under its newer name in transformers."""
        self.model.activation_checkpointing_disable()

    def extra_repr(self) -> str:
        return ", ".join(f"{bound.key} at {bound.site}" for bound in self.edits)

    def _repr_html_(self) -> str:
        return self.plan()._repr_html_()

    def _unfolded(self) -> BoundModel:
        self._folds.check_none()
        return self

    @property
    def _disabled(self) -> frozenset[str]:
        """The edits that `disabled` blocks of this thread leave out."""
        here = threading.get_ident()
        return frozenset(name for thread, names in self._off for name in names if thread == here)

    def _active_edits(self, options: Options) -> tuple[BoundEdit, ...]:
        self._folds.check(self, options)
        off = self._disabled.union(self._folds.names)
        return tuple(b for b in self._bound_edits if b.edit.name not in off and options.acts(b.edit))

    def _bound(self, reads: tuple[str | Read, ...], positions: Any) -> tuple[BoundRead, ...]:
        if not reads:
            return self._bound_reads
        nodes = tuple(dict.fromkeys(placed(read, positions) for read in reads))
        labels = [node.label for node in nodes]
        for node in nodes:
            if node.run != BASE:
                raise RunError(f"{node!r}: only the base run is read here; put it in the graph instead")
            if labels.count(node.label) > 1:
                raise RunError(
                    f"several reads are called {node.label!r}; give them names, Read(..., name='a')"
                )
        if nodes not in self._ad_hoc:
            self._ad_hoc[nodes] = bind_reads(list(nodes), self.model, self._example)
        return self._ad_hoc[nodes]

    def _run(
        self,
        name: str,
        layouts: Layouts,
        supplies: Mapping[str, Supply],
        options: Options,
        reads: tuple[BoundRead, ...] = (),
        stop_early: bool = False,
    ) -> Run:
        edits = tuple(bound for bound in self._active_edits(options) if bound.edit.run == name)
        if name == BASE and layouts:
            options.check_rows(next(iter(layouts.values())).rows)
        return Run(
            self.model, edits, reads, self.interventions, layouts, self.tokenizer, supplies, options,
            stop_early, self._observers,
        )  # fmt: skip

    def _call(self, run: Run, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mine = [name for bound in run.edits for name in (bound.module, *gate_keys(bound))]
        modules: list[Any] = [self.interventions[name] for name in dict.fromkeys(mine)]
        prepared = [module for module in modules if hasattr(module, "prepare")]
        with turn_of(self.model), eagerly(self.model), run.hooks() as hooks:
            for module in entrances(self.model):
                begin, end = run.around(self._calls)
                hooks.on_input(module, begin, first=True)
                hooks.on_output(module, end)
            try:
                for built in prepared:
                    built.prepare()
                output = call(*args, **kwargs)
                hooks.hold(output)
            except StopForward:
                output = None
            finally:
                for built in prepared:
                    built.finish()
            return output
