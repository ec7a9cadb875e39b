"""`RepresentationConfig`, `IntervenableConfig` and what they come to: one entry for each intervention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from reftlab.address import parse_path, resolve
from reftlab.compat.bases import (
    Intervention,
    LocalistRepresentationIntervention,
)
from reftlab.compat.builtin import BuiltIn, as_intervention
from reftlab.compat.components import Place, site_of
from reftlab.compat.interventions import CollectIntervention, SkipIntervention, VanillaIntervention
from reftlab.errors import ConfigError, did_you_mean
from reftlab.graph import Read
from reftlab.runtime.bind import bind_reads

__all__ = ["Entry", "IntervenableConfig", "RepresentationConfig", "entries_of", "key_of"]

_UNITS = ("pos", "h", "h.pos", "t")


class RepresentationConfig(NamedTuple):
    """Where one intervention acts; natively `rl.Edit(name, at=..., positions=..., intervention=...)`.

    Attributes:
        layer: number of the block.
        component: a name such as `block_output`, or a path with its side, `model.layers[15].output`.
        unit: what `unit_locations` count: `pos` tokens, `h` heads, `h.pos` both, `t` time steps.
        max_number_of_units: how many of them make one vector, for interventions with a basis.
        low_rank_dimension: number of directions, where the intervention has some.
        intervention_type: class of the intervention.
        intervention: the intervention itself, or a function of (base, source).
        subspace_partition: what the numbers in `subspaces=` stand for.
        group_key: interventions of one group take one source.
        intervention_link_key: those with one key are one intervention; natively `share=`.
        source_representation: a vector in place of a source; natively `rl.Add(vector)` and the like.
        latent_dim: number of an autoencoder's features.
    """

    layer: Any = 0
    component: str = "block_output"
    unit: str = "pos"
    max_number_of_units: int = 1
    low_rank_dimension: int | None = None
    intervention_type: Any = None
    intervention: Any = None
    subspace_partition: Any = None
    group_key: Any = None
    intervention_link_key: Any = None
    moe_key: Any = None
    source_representation: Any = None
    hidden_source_representation: Any = None
    latent_dim: int | None = None


class IntervenableConfig:
    """All interventions of a model; natively `rl.InterventionGraph(...)`.

    Args:
        representations: one `RepresentationConfig`, a dict or a list of such arguments, or several.
        intervention_types: class of the interventions, one or one each, where the representations
            name none.
        mode: `parallel`, where every source goes into the base, or `serial`, where each goes into the
            next; natively `rl.Edit(..., run="source_1", source=rl.Read(run="source_0"))`.
        sorted_keys, model_type, intervention_dimensions, intervention_constant_sources: have no effect.
        **kwargs: further names, as of a transformers configuration; have no effect.

    Raises:
        ConfigError: what cannot be read; the message quotes it.
    """

    def __init__(
        self,
        representations: Any = None,
        intervention_types: Any = VanillaIntervention,
        mode: str = "parallel",
        sorted_keys: Any = None,
        model_type: Any = None,
        intervention_dimensions: Any = None,
        intervention_constant_sources: Any = None,
        **kwargs: Any,
    ) -> None:
        own = ("representations", "intervention_types", "mode", "sorted_keys", "model_type")
        for name in kwargs:
            if hint := did_you_mean(name, own):
                raise ConfigError(f"{name}={kwargs[name]!r}: IntervenableConfig has no such argument.{hint}")
        if mode not in ("parallel", "serial"):
            raise ConfigError(f"mode={mode!r}: expected 'parallel' or 'serial'")
        given = RepresentationConfig() if representations is None else representations
        single = isinstance(given, RepresentationConfig) or not isinstance(given, list | tuple)
        self.representations = [_representation(entry) for entry in ([given] if single else given)]
        types = intervention_types
        named = [r.intervention_type is not None or r.intervention is not None for r in self.representations]
        if isinstance(types, list | tuple) and len(types) != len(self.representations):
            raise ConfigError(
                f"intervention_types has {len(types)} entries and there are {len(self.representations)} "
                "representations; give one, or one each"
            )
        if any(named) and not all(named):
            raise ConfigError(
                f"representation {named.index(False)} names no intervention and others do; give each its "
                "intervention= or intervention_type="
            )
        self.intervention_types, self.mode, self.model_type = types, mode, model_type
        self.sorted_keys = sorted_keys
        self.kwargs = kwargs

    def add_intervention(self, representations: Any) -> None:
        """Add representations that name their interventions; natively `graph + graph`."""
        more = IntervenableConfig(representations)
        if any(r.intervention_type is None and r.intervention is None for r in more.representations):
            raise ConfigError("add_intervention: intervention_type= or intervention= is missing")
        self.representations += more.representations

    def kind(self, place: int) -> Any:
        """What representation number `place` says its intervention is: an object, a class or a function."""
        entry = self.representations[place]
        if entry.intervention is not None:
            return entry.intervention
        types = self.intervention_types
        return entry.intervention_type or (types[place] if isinstance(types, list | tuple) else types)

    def __repr__(self) -> str:
        lines = "".join(f"    {entry},\n" for entry in self.representations)
        return f"{type(self).__name__}(mode={self.mode!r}, representations=[\n{lines}])"


@dataclass(frozen=True, eq=False)
class Entry:
    """One representation with its intervention.

    Attributes:
        key: the name that pyvene gives it, `layer_15_comp_block_output_unit_pos_nunit_1#0`.
        name: name of its edit in the graph.
        group: number of its source.
        place: its site.
        representation: as given.
        intervention: its intervention.
    """

    key: str
    name: str
    group: int
    place: Place
    representation: RepresentationConfig
    intervention: Intervention

    @property
    def unit(self) -> str:
        return self.representation.unit

    @property
    def share(self) -> str | None:
        """The word for what several entries share."""
        link = self.representation.intervention_link_key
        return None if link is None else _word(f"link_{link}")

    @property
    def module(self) -> str:
        """Name of its intervention in `BoundModel.interventions`."""
        return self.share or self.name

    @property
    def joins(self) -> int:
        """How many tokens' vectors make one vector."""
        own = self.intervention
        apart = own.keep_last_dim or isinstance(own, LocalistRepresentationIntervention)
        if apart or self.unit != "pos" or self.collects or not isinstance(own, BuiltIn):
            return 1
        return int(self.representation.max_number_of_units)

    @property
    def collects(self) -> bool:
        return isinstance(self.intervention, CollectIntervention)

    @property
    def skips(self) -> bool:
        return isinstance(self.intervention, SkipIntervention)

    @property
    def constant(self) -> bool:
        """Whether it takes no source."""
        return self.intervention.is_source_constant

    @property
    def acts_alone(self) -> bool:
        """Whether it acts in a call that gives it no source."""
        return not isinstance(self.intervention, BuiltIn) or self.intervention.acts_alone

    @property
    def users_own(self) -> bool:
        return not isinstance(self.intervention, BuiltIn)


def entries_of(config: IntervenableConfig, model: nn.Module, example: Any = None) -> list[Entry]:
    """Every representation with its site and intervention.

    Raises:
        ConfigError, AddressError, InterventionError: a representation that cannot be used.
    """
    for given in config.representations:
        _check(given)
    places = [site_of(given.component, given.layer, model) for given in config.representations]
    kinds = [config.kind(number) for number in range(len(places))]
    users = [place for place, kind in zip(places, kinds, strict=True) if _is_users(kind)]
    widths = _widths(users, model, example)
    entries: list[Entry] = []
    linked: dict[Any, Intervention] = {}
    seen: dict[str, int] = {}
    groups = _groups(config)
    for given, group, place, kind in zip(config.representations, groups, places, kinds, strict=True):
        proposal = key_of(given)
        seen[proposal] = seen.get(proposal, -1) + 1
        key = f"{proposal}#{seen[proposal]}"
        link = given.intervention_link_key
        own = linked.get(link) if link is not None else None
        if own is None:
            metadata = {k: v for k, v in given._asdict().items() if not k.startswith("intervention_type")}
            metadata["embed_dim"] = widths[place] * given.max_number_of_units if _is_users(kind) else None
            own = as_intervention(kind, metadata)
        if link is not None:
            linked[link] = own
        name = _word(key)
        while name in {entry.name for entry in entries}:
            name += "_"
        entries.append(Entry(key, name, group, place, given, own))
    return entries


def key_of(given: RepresentationConfig, dotted: bool = False) -> str:
    """The key that pyvene gives a representation, without its number; `dotted` in the style before 0.1.7."""
    layer = "" if "." in given.component else f"layer.{given.layer}."
    key = f"{layer}comp.{given.component}.unit.{given.unit}.nunit.{given.max_number_of_units}"
    return key if dotted else key.replace(".", "_")


def _check(given: RepresentationConfig) -> None:
    if given.moe_key is not None:
        raise ConfigError(
            f"moe_key={given.moe_key!r} is not supported; the native way is a path to the expert, such "
            "as rl.Edit(..., at='model.layers[3].mlp.experts[0].output')"
        )
    if given.unit not in _UNITS:
        raise ConfigError(f"unit={given.unit!r}: expected one of {', '.join(_UNITS)}")


def _is_users(kind: Any) -> bool:
    """Whether it is a class of the user's own, which is made with the width of its site."""
    return isinstance(kind, type) and not issubclass(kind, BuiltIn)


def _widths(places: Sequence[Place], model: nn.Module, example: Any) -> dict[Place, int]:
    """Length of the vectors at each place, from one shape-only pass."""
    different = list(dict.fromkeys(places))
    if not different:
        return {}
    reads = [Read(place.at, heads=0 if place.heads else None) for place in different]
    bound = iter(bind_reads(reads, model, example))
    widths = {}
    for place in different:
        first, *_ = [next(bound) for _ in resolve(parse_path(place.at), model)]
        widths[place] = first.width
    return widths


def _representation(given: Any) -> RepresentationConfig:
    if isinstance(given, RepresentationConfig):
        return given
    if isinstance(given, list | tuple) and len(given) <= len(RepresentationConfig._fields):
        return RepresentationConfig(*given)
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"representations has {given!r}: expected a RepresentationConfig, or a dict or list of its "
            "arguments"
        )
    for name in given:
        if name not in RepresentationConfig._fields:
            known = RepresentationConfig._fields
            hint = did_you_mean(str(name), known)
            raise ConfigError(f"a representation has no {name!r}; it has {', '.join(known)}.{hint}")
    return RepresentationConfig(**given)


def _groups(config: IntervenableConfig) -> list[int]:
    """The number of each representation's source: its own, or that of its group."""
    keys = [entry.group_key for entry in config.representations]
    if all(key is None for key in keys):
        return list(range(len(keys)))
    if any(key is None for key in keys):
        raise ConfigError("group_key is given for some representations; give it for all or none")
    order = sorted(set(keys))
    if keys != sorted(keys):
        raise ConfigError(f"group_key must ascend over the representations, not {keys}")
    return [order.index(key) for key in keys]


def _word(text: str) -> str:
    """The text as the name of a node: letters, digits, `_`."""
    return "".join(c if c.isascii() and (c.isalnum() or c == "_") else "_" for c in text).strip("_")
