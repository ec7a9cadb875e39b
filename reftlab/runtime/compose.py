"""Bound models out of bound models: their edits together, some of them, scaled, or renamed."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from reftlab.errors import BindError
from reftlab.graph import InterventionGraph
from reftlab.runtime.model import BoundModel

__all__ = ["added", "derived"]


def added(a: BoundModel, b: BoundModel) -> BoundModel:
    """Both models' edits over their one base model, with the interventions that they have there.

    Raises:
        BindError: they are bound to different models, or two interventions have one name.
        GraphError: two nodes have one name.
    """
    if a.model is not b.model:
        raise BindError(
            f"these are bound to two models, {type(a.model).__name__} and {type(b.model).__name__} objects "
            "of their "
            "own; bind or load both on the same model object to add them"
        )
    graph = a.graph + b.graph
    mine, theirs = dict(a.interventions.items()), dict(b.interventions.items())
    both = [name for name in mine if name in theirs and mine[name] is not theirs[name]]
    if both:
        raise BindError(
            f"both have an intervention {both[0]!r}, each its own; choose another word for share= in one of "
            "them"
        )
    return _bound(a, graph, {**mine, **theirs})


def derived(
    bound: BoundModel, graph: InterventionGraph, names: Mapping[str, str] | None = None
) -> BoundModel:
    """A graph made from a bound model's own, with the interventions that it has there.

    Args:
        bound: the bound model.
        graph: the new graph.
        names: new names of edits by their old ones.
    """
    kept = dict(bound.interventions.items())
    for old in bound.edits:
        new = (names or {}).get(old.edit.name)
        if new is None or old.edit.share is not None:
            continue
        for name in [n for n in kept if n == old.module or n.startswith(f"{old.module}(gate")]:
            kept[new + name.removeprefix(old.edit.name)] = bound.interventions[name]
    return _bound(bound, graph, kept)


def _bound(like: BoundModel, graph: InterventionGraph, built: Mapping[str, nn.Module]) -> BoundModel:
    new = BoundModel(graph, like.model, like.tokenizer, example=like._example, built=built)
    new._disabled = frozenset(name for name in like._disabled if name in {edit.name for edit in graph.edits})
    new._calls = like._calls
    return new
