"""From a site path to the modules of a real model."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from reftlab.address.alias import ALIASES, translate
from reftlab.address.path import Child, Entries, Side, SitePath, Step
from reftlab.errors import AddressError, did_you_mean

__all__ = ["Site", "resolve"]


@dataclass(frozen=True)
class Site:
    """One place in one model.

    Attributes:
        module: dotted name of the module, as `model.named_modules()` spells it.
        side: `input`, `output`, `scores` or `pattern`.
        leaf: which value of the side, see `SitePath.leaf`.
        label: what the path's slices and globs stood for here, such as `4` or `3,q_proj`; empty
            for a path that names one module.
        part: `q`, `k` or `v` where the last axis holds all three and one of them is meant.
    """

    module: str
    side: Side
    leaf: tuple[str | int, ...] = ()
    label: str = ""
    part: str = ""

    def __str__(self) -> str:
        leaf = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in self.leaf)
        part = f" ({self.part})" if self.part else ""
        return f"{self.module}.{self.side}".removeprefix(".") + leaf + part


@dataclass(frozen=True)
class _Place:
    module: nn.Module
    name: str = ""
    label: tuple[str, ...] = ()

    def child(self, name: str, label: str | None = None) -> _Place:
        module = self.module.get_submodule(name)
        labels = self.label if label is None else (*self.label, label)
        return _Place(module, f"{self.name}.{name}".removeprefix("."), labels)

    @property
    def children(self) -> list[str]:
        return [name for name, _ in self.module.named_children()]


def resolve(path: SitePath, model: nn.Module) -> list[Site]:
    """Find every place in `model` that a path names, in the order in which it names them.

    Raises:
        AddressError: a step does not exist, and the message names the nearest things that do; or
            one place is named twice.
    """
    raw = translate(path, model)
    if raw.side is None:
        raise AddressError(f"site path {str(path)!r} ends at a module; add '.output' or '.input'")
    places = [_Place(model)]
    for step in raw.steps:
        found = [inner for place in places for inner in _follow(place, step)]
        if not found:
            _fail(path, places, step)
        places = found
    names = [place.name for place in places]
    for name in names:
        if names.count(name) > 1:
            raise AddressError(f"site path {str(path)!r} names {name} twice")
    return [Site(place.name, raw.side, raw.leaf, ",".join(place.label), raw.part) for place in places]


def _follow(place: _Place, step: Step) -> list[_Place]:
    if isinstance(step, Child):
        if not set("*?") & set(step.name):
            return [place.child(step.name)] if step.name in place.children else []
        return [place.child(n, n) for n in place.children if fnmatchcase(n, step.name)]
    count = _entries(place)
    if isinstance(step, Entries):
        if not all(-count <= n < count for n in step.numbers):
            return []
        several = len(step.numbers) > 1
        numbers = [n % count for n in step.numbers]
        return [place.child(str(n), str(n) if several else None) for n in numbers]
    numbers = list(range(count))[slice(step.start, step.stop, step.step)]
    return [place.child(str(n), str(n)) for n in numbers]


def _entries(place: _Place) -> int:
    """How many entries the module has as a list: children named 0, 1, 2, …"""
    names = set(place.children)
    count = 0
    while str(count) in names:
        count += 1
    return count


def _fail(path: SitePath, places: list[_Place], step: Step) -> None:
    where = places[0].name or "the model itself"
    count = _entries(places[0])
    names = places[0].children
    if not isinstance(step, Child):
        if count:
            raise AddressError(
                f"site path {str(path)!r}: {where} has {count} entries, numbered 0 to {count - 1} "
                f"or -{count} to -1; {str(step)!r} is outside"
            )
        raise AddressError(
            f"site path {str(path)!r}: {where} ({type(places[0].module).__name__}) is not a list "
            f"of modules, so {str(step)!r} cannot be taken from it; it has {_listed(names)}"
        )
    hint = did_you_mean(step.name, [*names, *(ALIASES if not places[0].name else ())])
    raise AddressError(
        f"site path {str(path)!r}: {where} ({type(places[0].module).__name__}) has no module "
        f"{step.name!r}; it has {_listed(names, count)}.{hint}"
    )


def _listed(names: list[str], entries: int = 0) -> str:
    named = [name for name in names if not name.isdigit()]
    parts = [f"entries [0] to [{entries - 1}]"] if entries else []
    parts += named[:12] + (["…"] if len(named) > 12 else [])
    return ", ".join(parts) if parts else "no modules inside"
