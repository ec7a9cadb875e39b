"""A graph bound to a model: an ordinary module whose forward pass carries the edits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reftlab.errors import BindError, RunError, did_you_mean
from reftlab.graph import BASE, InterventionGraph, Read
from reftlab.interventions import Intervention
from reftlab.runtime.bind import BoundEdit, BoundRead, Interventions, bind_nodes, bind_reads
from reftlab.runtime.calls import Calls, past_length
from reftlab.runtime.hooks import StopForward, turn_of
from reftlab.runtime.reading import Reading, ReadValues
from reftlab.runtime.run import Run
from reftlab.runtime.window import Layout, Selection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reftlab.runtime.plan import Plan

__all__ = ["BoundModel"]

Vectors = dict[str, tuple[Tensor, list[int]]]


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
    ) -> None:
        super().__init__()
        if isinstance(model, BoundModel):
            raise BindError("the model is bound already; add the graphs, (a + b).bind(model)")
        if isinstance(tokenizer, str):
            raise BindError(f"tokenizer={tokenizer!r}: expected a tokenizer, such as rl.load_model returns")
        if not isinstance(model, nn.Module):
            raise BindError(f"a graph is bound to a torch module, not to {model!r}")
        self.graph, self.model, self.tokenizer = graph, model, tokenizer
        self._example = example
        self._bound_edits, self._bound_reads = bind_nodes(graph, model, example)
        self.interventions = Interventions({bound.key: self._built(bound) for bound in self._bound_edits})
        self.training = self.interventions.training = model.training
        self.facts: dict[str, Any] = {}
        self._disabled: frozenset[str] = frozenset()
        self._calls = Calls(model)
        self._ad_hoc: dict[tuple[Read, ...], tuple[BoundRead, ...]] = {}

    @property
    def edits(self) -> tuple[BoundEdit, ...]:
        return tuple(sorted(self._bound_edits, key=lambda bound: bound.order))

    @property
    def config(self) -> Any:
        """The model's own configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        return _device(self.model)

    def forward(
        self,
        *args: Any,
        sources: Mapping[str, Mapping[str, Any]] | None = None,
        prompt: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model with its edits.

        Args:
            *args, **kwargs: as for the model's own `forward`.
            sources: inputs of each source run, by its name.
            prompt: the tokenizer's output for the whole prompt, where this call covers only a part
                of it: a chunk, or a step that continues a cache made elsewhere.

        Returns:
            What the model returns.

        Raises:
            RunError: a source is missing or does not match, or the call's tokens cannot be placed.
            PositionError: a row does not have an edit's position.
        """
        if not self._active_edits() and not sources:
            return self.model(*args, **kwargs)
        vectors = self._run_sources(sources)
        named = self._calls.named(args, kwargs)
        layout = self._calls.layout(named, prompt)
        run = self._run(BASE, layout, vectors)
        past = past_length(named)
        continues = prompt is not None or past > 0
        output = self._call(run, self.model, args, kwargs)
        self._calls.remember(output, layout, continues)
        window = self._calls.window(args, kwargs)
        further = past > 0 and prompt is None and window is not None and window[2] - window[1] > 1
        run.check_touched(continues, further)
        return output

    def generate(
        self, *args: Any, sources: Mapping[str, Mapping[str, Any]] | None = None, **kwargs: Any
    ) -> Any:
        """Generate with the model's own `generate` and its edits.

        Edits of phase `prompt` act on the prompt's tokens, those of phase `decode` on the tokens
        that are generated, with or without a cache, for every beam and every returned sequence.

        Args:
            *args, **kwargs: as for the model's own `generate`.
            sources: inputs of each source run, by its name.

        Returns:
            What the model's `generate` returns.
        """
        if not hasattr(self.model, "generate"):
            raise RunError(f"{type(self.model).__name__} has no generate")
        if not self._active_edits() and not sources:
            return self.model.generate(*args, **kwargs)
        vectors = self._run_sources(sources)
        named = dict(kwargs) if not args else {"input_ids": args[0], **kwargs}
        if "inputs" in named:
            named["input_ids"] = named.pop("inputs")
        if named.get("guidance_scale", 1) not in (None, 1):
            raise RunError(
                f"guidance_scale={named['guidance_scale']}: classifier-free guidance runs the model on a "
                "second prompt, of which the edits know nothing; leave it out"
            )
        if named.get("attention_mask") is None and isinstance(named.get("input_ids"), Tensor):
            named["attention_mask"] = self._calls.mask_of(named)
        # A compiled decoding step would be traced once and keep the edits of its first token.
        kwargs.setdefault("disable_compile", True)
        layout = Layout.of(named, causal=False, open=True)
        if layout is None:
            raise RunError("generate needs input_ids or inputs_embeds, (row, token)")
        run, past = self._run(BASE, layout, vectors), past_length(named)
        for bound in () if self._calls.knows_cache(named) else run.edits:
            if run.starts_before(bound, past):
                raise RunError(
                    f"edit {bound.key!r} acts on tokens that past_key_values hold already, and this bound "
                    "model did not make them; generate without past_key_values"
                )
        with torch.no_grad():
            output = self._call(run, self.model.generate, args, kwargs)
        for bound in run.edits:
            if past == 0 and bound.edit.phase != "decode" and not run.touched[bound.key]:
                raise RunError(
                    f"edit {bound.key!r} touched no token: generation did not run {bound.site} on "
                    f"{bound.edit.positions}"
                )
        return output

    def read(
        self,
        *reads: str | Read,
        positions: Any = None,
        sources: Mapping[str, Mapping[str, Any]] | None = None,
        prompt: Mapping[str, Any] | None = None,
        grad: bool = False,
        **inputs: Any,
    ) -> Reading:
        """Read vectors, with the edits in force, and stop the forward pass after the last site needed.

        Args:
            *reads: sites such as `"blocks[5].output"`, `"blocks[5].output @ last"`, or `Read`
                objects; without any, the graph's own reads, those in source runs included.
            positions: positions for those that name none.
            sources, prompt: as for `forward`.
            grad: whether the vectors carry gradients.
            **inputs: the model's inputs.

        Returns:
            Named tensors `(row, token, width)` in the model's dtype.

        >>> reft.read("blocks[5].output @ last", **batch)          # doctest: +SKIP
        Reading('blocks[5].output @ last': (8, 1, 576))
        """
        wanted = self._bound(reads, positions)
        if not wanted:
            raise RunError(
                "nothing to read: name sites, as in reft.read('blocks[5].output @ last', **inputs)"
            )
        layout = self._calls.layout(inputs, prompt)
        there, here = [[r for r in wanted if (r.run == BASE) is base] for base in (False, True)]
        results: dict[str, tuple[Tensor, Selection]] = {}
        vectors = self._run_sources(sources, tuple(there), results)
        if here:
            with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
                run = self._run(BASE, layout, vectors, tuple(here), stop_early=True)
                self._call(run, self.model, (), inputs)
            results.update(run.results)
        missing = [read.label for read in wanted if read.label not in results]
        if missing:
            raise RunError(f"{missing[0]!r} was not reached in this forward pass")
        rows = layout.rows if layout is not None else max(int(s.rows.max()) + 1 for _, s in results.values())
        return Reading({read.label: ReadValues.of(*results[read.label]) for read in wanted}, rows)

    @contextlib.contextmanager
    def disabled(self, *names: str) -> Iterator[BoundModel]:
        """Leave out the named edits, or all of them, inside a `with` block."""
        known = [edit.name for edit in self.graph.edits]
        for name in names:
            if name not in known:
                raise RunError(f"there is no edit {name!r}; there is {known}.{did_you_mean(name, known)}")
        before = self._disabled
        self._disabled = before | frozenset(names or known)
        try:
            yield self
        finally:
            self._disabled = before

    @contextlib.contextmanager
    def replaced(self, key: str, intervention: nn.Module) -> Iterator[BoundModel]:
        """Put another intervention in the place of one inside a `with` block."""
        if key not in self.interventions:
            known = list(self.interventions)
            raise RunError(f"there is no intervention {key!r}; there is {known}.{did_you_mean(key, known)}")
        before = self.interventions[key]
        self.interventions[key] = intervention
        try:
            yield self
        finally:
            self.interventions[key] = before

    def plan(self) -> Plan:
        """What this object does in a forward pass, in words and as a table."""
        from reftlab.runtime.plan import plan_of

        return plan_of(self)

    def save(self, folder: str | Path) -> Path:
        """Save graph, interventions and a model card; see `reftlab.runtime.saving`."""
        from reftlab.runtime.saving import save

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

    def _built(self, bound: BoundEdit) -> Intervention:
        try:
            built = bound.edit.intervention.build(bound.width)
        except ValueError as error:
            raise type(error)(f"edit {bound.key!r} at {bound.site}: {error}") from error
        return built.to(_device(self.model.get_submodule(bound.site.module), self.model)).train(
            self.model.training
        )

    def _active_edits(self) -> tuple[BoundEdit, ...]:
        return tuple(b for b in self._bound_edits if b.edit.name not in self._disabled)

    def _bound(self, reads: tuple[str | Read, ...], positions: Any) -> tuple[BoundRead, ...]:
        if not reads:
            return self._bound_reads
        nodes = tuple(dict.fromkeys(_placed(read, positions) for read in reads))
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
        layout: Layout | None,
        vectors: Vectors,
        reads: tuple[BoundRead, ...] = (),
        stop_early: bool = False,
    ) -> Run:
        edits = tuple(bound for bound in self._active_edits() if bound.edit.run == name)
        return Run(self.model, edits, reads, self.interventions, layout, self.tokenizer, vectors, stop_early)

    def _run_sources(
        self,
        sources: Mapping[str, Mapping[str, Any]] | None,
        wanted: tuple[BoundRead, ...] = (),
        results: dict[str, tuple[Tensor, Selection]] | None = None,
    ) -> Vectors:
        """Run every source that an active edit or a wanted read needs.

        Returns:
            The vectors read there for edits; those of `wanted` are put in `results`.
        """
        given = dict(sources) if isinstance(sources, Mapping) else {}
        if sources is not None and not isinstance(sources, Mapping):
            raise RunError(
                f"sources={sources!r}: expected inputs by name, sources={{'corrupt': tokenizer(...)}}"
            )
        for name, inputs in given.items():
            if not isinstance(inputs, Mapping):
                raise RunError(
                    f"sources={{{name!r}: …}}: expected the inputs of a forward pass by name, as a tokenizer "
                    f"returns them, not {type(inputs).__name__}"
                )
            if name not in self.graph.sources:
                raise RunError(
                    f"sources has {name!r}, which the graph does not declare; it has "
                    f"{list(self.graph.sources)}.{did_you_mean(name, self.graph.sources)}"
                )
        vectors: Vectors = {}
        active = self._active_edits()
        for name in self.graph.run_order[:-1]:
            feeding = tuple(b.source for b in active if b.source is not None and b.source.run == name)
            reads = (*feeding, *(read for read in wanted if read.run == name))
            if not reads:
                continue
            if name not in given:
                users = [f"edit {b.edit.name!r}" for b in active if b.source in feeding]
                users += [f"read {read.label!r}" for read in wanted if read.run == name]
                raise RunError(
                    f"{users[0]} reads from run {name!r}, and no inputs were given for it; call with "
                    f"sources={{{name!r}: tokenizer(...)}}"
                )
            inputs = dict(given[name])
            with torch.no_grad():
                run = self._run(name, self._calls.layout(inputs), vectors, reads, stop_early=True)
                self._call(run, self.model, (), inputs)
            labels = [read.label for read in feeding]
            vectors.update({label: run.vectors[label] for label in labels if label in run.vectors})
            if results is not None:
                results.update({k: v for k, v in run.results.items() if k not in labels})
        return vectors

    def _call(self, run: Run, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        built_ones = (self.interventions[bound.key] for bound in run.edits)
        prepared = [built for built in built_ones if isinstance(built, Intervention)]
        with turn_of(self.model), run.hooks() as hooks:
            hooks.on_input(self.model, self._window_mover(run), first=True)
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

    def _window_mover(self, run: Run) -> Any:
        """A hook that tells the run, before each pass of the model, which columns it covers."""

        def act(module: nn.Module, args: Any, kwargs: Any) -> None:
            window = self._calls.window(args, kwargs)
            if window is not None:
                run.move_window(*window)

        return act


def _placed(read: str | Read, positions: Any) -> Read:
    """A read as an object, at the shared positions where it names none."""
    node = Read(read) if isinstance(read, str) else read
    return node if node.positions is not None or positions is None else node.with_positions(positions)


def _device(*modules: nn.Module) -> torch.device:
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            return tensor.device
    return torch.device("cpu")
