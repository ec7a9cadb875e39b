"""The finding of `composition` in plain words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reftlab.plotting.wording import number

if TYPE_CHECKING:
    from reftlab.explaining.composition.composition import Composition, PairEffect

__all__ = ["sentence_of"]


def sentence_of(found: Composition) -> str:
    """A few sentences from the numbers."""
    unit = f" {found.unit}" if found.unit else ""
    names = [one.name for one in found.alone]
    who = " and ".join(names) if len(names) == 2 else f"all {len(names)}"
    said = [
        f"Together, {who} change the mean {found.behaviour} by {number(found.together.effect)}{unit}; each "
        f"alone, summed, by {number(found.together.expected.value)}: {_apart(found.together.interaction)}."
    ]
    if len(names) > 2:
        said += _most(found, unit)
    said += _order(found, unit)
    if found.collisions:
        first = found.collisions[0]
        along = f", towards {' '.join(first.promoted[:3])}" if first.promoted else ""
        said.append(
            f"{first.a} and {first.b} write along one direction{along}: {number(first.mean[0], '+.3g')} and "
            f"{number(first.mean[1], '+.3g')}, which {_verb(first.kind)}."
        )
    return " ".join(said)


def _apart(interaction: object) -> str:
    from reftlab.measuring import Estimate

    assert isinstance(interaction, Estimate)
    if interaction.value == 0:
        return "the effects add up"
    if not interaction.excludes(0.0):
        return f"the difference, {number(interaction)}, cannot be told from 0"
    return f"they interact, by {number(interaction)}"


def _most(found: Composition, unit: str) -> list[str]:
    told = [one for one in found.pairs if one.interaction.excludes(0.0)]
    if not told:
        return [f"None of {len(found.pairs)} pairs interacts so that it can be told from 0."]
    most = max(told, key=lambda one: abs(one.interaction.value))
    return [
        f"{len(told)} of {len(found.pairs)} pairs interact, {most.a} and {most.b} most: by "
        f"{number(most.interaction)}{unit}."
    ]


def _order(found: Composition, unit: str) -> list[str]:
    asked: list[PairEffect] = [one for one in found.pairs if one.order is not None]
    if not asked:
        return []
    told = [one for one in asked if one.order is not None and one.order.excludes(0.0)]
    if not told:
        return ["Where two share a site, their order makes no difference that can be told from 0."]
    most = max(told, key=lambda one: abs(one.order.value) if one.order is not None else 0.0)
    changed = f"{number(most.order)}{unit}"
    return [f"The order of {most.a} and {most.b} matters: the other one changes it by {changed}."]


def _verb(kind: str) -> str:
    return {"adds up": "adds up", "cancels": "cancels"}.get(kind, "adds up or cancels by the input")
