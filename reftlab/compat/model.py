"""`IntervenableModel`: pyvene's calls, each carried out by a bound model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from reftlab.compat.bases import Intervention, UsersOwn
from reftlab.compat.builtin import BuiltIn
from reftlab.compat.calls import Call, When, planned
from reftlab.compat.collect import Collector
from reftlab.compat.config import Entry, IntervenableConfig, entries_of
from reftlab.compat.face import Face
from reftlab.compat.foreign_files import (
    downloaded,
    is_foreign,
    load_model_part,
    read_folder,
    ready_name,
    restored,
    tensors_of,
)
from reftlab.compat.translate import Role, graph_of, usual_roles
from reftlab.errors import BindError, ConfigError, RunError
from reftlab.runtime import BoundModel, load
from reftlab.runtime.wrapped import device_of

__all__ = ["IntervenableModel", "IntervenableModelOutput"]

_Own = TypeVar("_Own", bound="IntervenableModel")


@dataclass
class IntervenableModelOutput:
    """What a call with `return_dict=True` returns; natively a call returns the model's own output.

    Attributes:
        original_outputs: the output without interventions, where it was asked for.
        intervened_outputs: the output with them.
        collected_activations: what `CollectIntervention`s saw, `(row, unit, width)` each, or None.
    """

    original_outputs: Any = None
    intervened_outputs: Any = None
    collected_activations: list[Tensor] | None = None


class IntervenableModel(Face):
    """A model with interventions; the native way is `rl.InterventionGraph(...).bind(model)`.

    The programs of pyvene 0.1 run, with these differences, where pyvene does what nobody meant:
    linked interventions (`intervention_link_key`) at several layers each edit their own layer's
    value, where pyvene hands the first one's result to the others; the interventions of a row act
    on its own tokens alone, so that padding changes nothing; `eval()` ends dropout in interventions
    too; all collected units are returned, not the first.

    Args:
        config: an `IntervenableConfig`, or representations for one.
        model: any module; its parameters are frozen, as by pyvene.
        tokenizer: for the native functions that take `reft`.
        example: inputs for the shape-only pass, for models whose inputs cannot be made up.
        use_fast: has no effect; locations may differ between rows at no cost.

    Attributes:
        config: the configuration.
        reft: the bound model that does the work, with positions `given` by each call.
        interventions: the interventions by pyvene's keys.
    """

    def __init__(
        self,
        config: Any,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        example: Any = None,
        use_fast: bool = False,
        as_adaptor: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if as_adaptor or kwargs:
            wrong = "as_adaptor" if as_adaptor else next(iter(kwargs))
            raise ConfigError(
                f"{type(self).__name__}({wrong}=...) is not supported; the native way to see more than "
                "the vectors is a subclass of rl.Intervention with a source"
            )
        self.config = config if isinstance(config, IntervenableConfig) else IntervenableConfig(config)
        self._entries = entries_of(self.config, model, example)
        if not self._entries:
            raise ConfigError("representations is empty; give at least one")
        roles = usual_roles(self._entries, self.mode)
        graph = graph_of(self._entries, roles)
        built = {
            entry.module: own.built
            for entry in self._entries
            if isinstance(own := entry.intervention, BuiltIn) and own.built is not None
        }
        self.reft = BoundModel(graph, model, tokenizer, example=example, built=built)
        self._check_widths()
        for bound in reversed(self.reft.edits):
            # Those that were made before the model are where they were made.
            place = device_of(model.get_submodule(bound.site.module), model)
            self.reft.interventions[bound.module].to(place)
        for entry in self._entries:
            if isinstance(entry.intervention, BuiltIn) and not entry.collects:
                entry.intervention.attach(self.reft.interventions[entry.module])  # type: ignore[arg-type]
        self._variants: dict[Any, BoundModel] = {}
        if not self._collects:
            self._variants[self._variant_key(self._entries, roles)] = self.reft
        self.full_intervention_outputs: list[Any] = []
        self.disable_model_gradients()

    @property
    def interventions(self) -> dict[str, Intervention]:
        """The interventions by pyvene's keys."""
        return {entry.key: entry.intervention for entry in self._entries}

    @property
    def representations(self) -> dict[str, Any]:
        return {entry.key: entry.representation for entry in self._entries}

    @property
    def sorted_keys(self) -> list[str]:
        return [entry.key for entry in self._entries]

    @property
    def mode(self) -> str:
        return self.config.mode

    def forward(
        self,
        base: Mapping[str, Any],
        sources: Any = None,
        unit_locations: Any = None,
        source_representations: Any = None,
        subspaces: Any = None,
        labels: Tensor | None = None,
        output_original_output: bool = False,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        intervention_additional_kwargs: Any = None,
    ) -> Any:
        """Run the model with its interventions; natively `reft(**base, sources=..., positions=...)`.

        Args:
            base: inputs of the base run.
            sources: inputs of each intervention's or group's source run, or one for all.
            unit_locations: where to act, `{"sources->base": (source, base)}`, columns of the batch as
                `[intervention][row][unit]` or a short form, see `reftlab.compat.locations`.
            source_representations: tensors in place of source runs, `(row, unit, width)` or
                `(width,)`, by key, in a list, or one for all.
            subspaces: directions, `[intervention][row][direction]` or a short form.
            labels: for the model's own loss.
            output_original_output: whether to run the model without interventions as well.
            return_dict: whether to return an `IntervenableModelOutput`.
            use_cache: handed to the model.

        Returns:
            `(original, intervened)`, the first None unless asked for; with a `CollectIntervention`
            `((original, collected), intervened)`.

        Raises:
            RunError, PositionError: what cannot be carried out.
        """
        if intervention_additional_kwargs:
            raise RunError(
                "intervention_additional_kwargs is not supported; the native way is an rl.Intervention that "
                "keeps such values as attributes"
            )
        call = planned(
            self._entries, self.mode, base, sources, unit_locations, source_representations, subspaces
        )
        original = self.model(**base) if output_original_output else None
        extra: dict[str, Any] = {} if labels is None else {"labels": labels}
        if use_cache is not None:
            extra["use_cache"] = use_cache
        options: dict[str, Any] = {}
        if labels is not None and "input_ids" in base:
            # pyvene's columns may lie in the answer too, so all of the row counts as its prompt.
            options["prompt"] = {k: base[k] for k in ("input_ids", "attention_mask") if k in base}
        intervened, collected = self._carried_out(call, {**base, **extra}, options, generate=False)
        if return_dict:
            return IntervenableModelOutput(original, intervened, collected if self._collects else None)
        return ((original, collected) if self._collects else original), intervened

    def generate(
        self,
        base: Mapping[str, Any],
        sources: Any = None,
        unit_locations: Any = None,
        source_representations: Any = None,
        intervene_on_prompt: bool = False,
        subspaces: Any = None,
        output_original_output: bool = False,
        intervention_additional_kwargs: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Generate with interventions; natively `reft.generate(**base, positions=...)`.

        Args:
            base, sources, unit_locations, source_representations, subspaces: as for `forward`; in
                a batch padded on the left, columns count from the padded beginning, as in pyvene.
            intervene_on_prompt: whether the units are tokens of the prompt; else the interventions
                act on every generated token, natively `phase="decode"`. Without `unit_locations` it
                is the prompt and every generated token, `phase="both"`.
            output_original_output: whether to generate without interventions as well.
            **kwargs: for the model's own `generate`.

        Returns:
            As `forward`, of what the model's `generate` returns.
        """
        if intervention_additional_kwargs:
            raise RunError("intervention_additional_kwargs is not supported; see forward")
        when: When = "prompt" if intervene_on_prompt else "decode"
        call = planned(
            self._entries, self.mode, base, sources, unit_locations, source_representations, subspaces, when
        )
        original = self.model.generate(**base, **kwargs) if output_original_output else None
        intervened, collected = self._carried_out(call, {**base, **kwargs}, {}, generate=True)
        return ((original, collected) if self._collects else original), intervened

    def _carried_out(
        self, call: Call, inputs: dict[str, Any], options: dict[str, Any], *, generate: bool
    ) -> tuple[Any, list[Tensor]]:
        """Run the bound model that a call comes to; its output, and what was collected."""
        bound = self._bound(call)
        run = bound.generate if generate else bound
        for name in ("positions", "subspace", "sources", "reads"):
            if getattr(call, name):
                options[name] = getattr(call, name)
        collector = Collector(call)
        self.full_intervention_outputs.clear()
        with contextlib.ExitStack() as stack:
            if self._collects:
                stack.enter_context(bound.watching(collector))
            stack.enter_context(self._prepared(call, bound))
            output = run(**inputs, **options)
        return output, collector.collected() if self._collects else []

    def _bound(self, call: Call) -> BoundModel:
        """The bound model for a call: one for each set of interventions, phases, heads and runs."""
        key = self._variant_key(call.entries, call.roles)
        if key in self._variants and not call.constants:
            return self._variants[key]
        graph = graph_of(call.entries, call.roles, call.constants, collecting=True)
        built = dict(self.reft.interventions.items())
        for entry in call.entries:
            if entry.name in call.constants:
                built.pop(entry.module, None)
        bound = BoundModel(graph, self.model, self.reft.tokenizer, example=self.reft._example, built=built)
        if not call.constants:
            self._variants[key] = bound
        return bound

    @staticmethod
    def _variant_key(entries: list[Entry], roles: list[Role]) -> tuple[Any, ...]:
        return tuple((entry.key, role) for entry, role in zip(entries, roles, strict=True))

    @contextlib.contextmanager
    def _prepared(self, call: Call, bound: BoundModel) -> Iterator[None]:
        """Tell users' own interventions what this call's vectors are, and keep what they return besides."""
        own = [(e, bound.interventions[e.module]) for e in call.entries if not e.collects]
        users = [(entry, module) for entry, module in own if isinstance(module, UsersOwn)]
        for entry, module in users:
            module.units, module.subspaces = call.units[entry.name], call.subspaces[entry.name]
            module.returned = []
        try:
            yield
        finally:
            for _, module in users:
                self.full_intervention_outputs += module.returned
                module.units, module.subspaces, module.returned = None, None, []

    @property
    def _collects(self) -> bool:
        return any(entry.collects for entry in self._entries)

    def _check_widths(self) -> None:
        for bound in self.reft.edits:
            entry = next(e for e in self._entries if e.name == bound.edit.name)
            width = entry.intervention.embed_dim
            if isinstance(entry.intervention, BuiltIn) and width is not None and int(width) != bound.width:
                raise BindError(
                    f"{entry.key}: embed_dim={int(width)}, and vectors at {bound.site} are {bound.width} "
                    "wide; give embed_dim= of the site, or leave it out"
                )

    # Saving and loading.

    @classmethod
    def load(
        cls: type[_Own],
        load_directory: str | Path,
        model: nn.Module,
        local_directory: str | None = None,
        from_huggingface_hub: bool = False,
        include_model: bool = False,
        act_fn: str | None = None,
    ) -> _Own:
        """Load saved interventions, by `save` here or by pyreft or pyvene; natively `rl.load(folder, model)`.

        Args:
            load_directory: a folder, or the name of a repository on the Hugging Face hub.
            model: the model that they were made for.
            local_directory: where to put a repository's files.
            from_huggingface_hub: whether `load_directory` names a repository.
            include_model: whether to load what pyvene saved of the model itself.
            act_fn: the activation of LoReFT and its relatives, which pyreft does not save; None for
                the identity.

        Raises:
            ArtifactError: what is missing, damaged, or not known here; nothing in a file ever runs.
        """
        folder = Path(load_directory).expanduser()
        if from_huggingface_hub or not folder.is_dir():
            folder = downloaded(str(load_directory), local_directory)
        if is_foreign(folder):
            if include_model:
                load_model_part(folder, model)
            return cls(read_folder(folder, act_fn), model)
        bound = load(folder, model)
        made = cls(restored(folder, bound.facts, bound), model)
        made.reft.facts.update(bound.facts)
        return made

    def save(
        self,
        save_directory: str | Path,
        save_to_hf_hub: bool = False,
        hf_repo_name: str = "my-awesome-model",
        include_model: bool = False,
    ) -> None:
        """Save the interventions; natively `reft.save(folder)`, whose format this is.

        `rl.load` reads it as well as `load` does. Nothing is pickled.

        Raises:
            RunError: `save_to_hf_hub`, or `include_model` where the model learns. A model that is frozen
                is what it was, and is not saved.
            GraphError: an intervention is code of your own.
        """
        if save_to_hf_hub:
            raise RunError(
                "save_to_hf_hub=True is not supported; save to a folder and upload that, "
                f"huggingface_hub.upload_folder(folder_path=..., repo_id={hf_repo_name!r})"
            )
        if include_model and any(p.requires_grad for p in self.model.parameters()):
            raise RunError(
                "include_model=True is not supported; save the model with its own save_pretrained, and "
                "load it before the interventions"
            )
        self.reft.facts["compat"] = json.loads(json.dumps(self._record()))
        self.reft.save(save_directory)

    def save_intervention(self, save_directory: str | Path, include_model: bool = False) -> None:
        """Save the interventions; natively `reft.save(folder)`. See `save`."""
        self.save(save_directory, include_model=include_model)

    def load_intervention(self, load_directory: str | Path, include_model: bool = False) -> None:
        """Take the numbers of saved interventions; natively `rl.load(folder, model)`.

        Args:
            load_directory: what `save` wrote here, or the files of pyreft or pyvene, of which only
                those of the interventions are needed.
            include_model: whether to load what pyvene saved of the model itself.

        Raises:
            ArtifactError: a file is missing, damaged, or of another intervention.
        """
        folder = Path(load_directory).expanduser()
        if (folder / "graph.yaml").is_file() or not folder.is_dir():
            saved = load(folder, self.model).interventions.state_dict()
            self.reft.interventions.load_state_dict(saved)
            return
        for entry in self._entries:
            if any(True for _ in entry.intervention.parameters()):
                entry.intervention.load_state_dict(tensors_of(folder, entry.key, entry.representation))
        if include_model:
            load_model_part(folder, self.model)

    def _record(self) -> dict[str, Any]:
        """What a folder needs besides the graph to make this object again."""
        fields = ("layer", "component", "unit", "max_number_of_units", "group_key", "intervention_link_key")
        entries = []
        for entry in self._entries:
            own, dimension = entry.intervention, entry.intervention.interchange_dim
            kept: dict[str, Any] = {name: getattr(entry.representation, name) for name in fields}
            kept |= {"name": entry.name, "intervention": ready_name(own)}
            kept |= {"subspace_partition": own.subspace_partition, "keep_last_dim": own.keep_last_dim}
            kept["is_source_constant"] = own.is_source_constant
            kept["interchange_dim"] = None if dimension is None else torch.as_tensor(dimension).tolist()
            entries.append(kept)
        return {"mode": self.mode, "representations": entries}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.reft!r})"
