"""Bound models out of bound models: their edits together, some of them, scaled, or renamed."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from torch import nn

from reftlab.errors import BindError
from reftlab.graph import InterventionGraph
from reftlab.runtime.build import gate_keys
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
            "of their own; bind or load both on the same model object to add them"
        )
    graph = a.graph + b.graph
    mine, theirs = dict(a.interventions.items()), dict(b.interventions.items())
    both = [name for name in mine if name in theirs and mine[name] is not theirs[name]]
    if both:
        raise BindError(
            f"both have an intervention {both[0]!r}, each its own; choose another word for share= in one of "
            "them"
        )
    left = a._disabled | b._disabled
    return _bound(a, graph, {**mine, **theirs}, _common(a.facts, b.facts), left, b.tokenizer)


def derived(
    bound: BoundModel, graph: InterventionGraph, names: Mapping[str, str] | None = None
) -> BoundModel:
    """A graph made from a bound model's own, with the interventions that it has there.

    Args:
        bound: the bound model.
        graph: the new graph.
        names: new names of edits by their old ones.
    """
    kept, names = dict(bound.interventions.items()), names or {}
    for old in bound.edits:
        new = names.get(old.edit.name, old.edit.name)
        for name in (old.module, *gate_keys(old)):
            if name != old.edit.share:
                kept[new + name.removeprefix(old.edit.name)] = bound.interventions[name]
    left = frozenset(names.get(name, name) for name in bound._disabled)
    return _bound(bound, graph, kept, dict(bound.facts), left)


def _bound(
    like: BoundModel,
    graph: InterventionGraph,
    built: Mapping[str, nn.Module],
    facts: dict[str, Any],
    off: frozenset[str],
    tokenizer: Any = None,
) -> BoundModel:
    tokenizer = tokenizer if like.tokenizer is None else like.tokenizer
    new = BoundModel(graph, like.model, tokenizer, example=like._example, built=built)
    new.facts = facts
    new._off = [(threading.get_ident(), off)] if off else []
    return new


def _common(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """How two bound models came about: what both trainings share, and each one's own under `parts`."""
    facts: dict[str, Any] = {"parts": [dict(a), dict(b)]}
    first, second = a.get("training", {}), b.get("training", {})
    both = {key: value for key, value in first.items() if key in second and second[key] == value}
    if first.get("train_model") or second.get("train_model"):
        both["train_model"] = True
    return facts | ({"training": both} if both else {})
