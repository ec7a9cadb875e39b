"""What pyreft and pyvene saved, as a bound model of the native kind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from reftlab.address import parse_position
from reftlab.compat.builtin import BuiltIn
from reftlab.compat.config import Entry
from reftlab.compat.model import IntervenableModel
from reftlab.compat.translate import graph_of, usual_roles
from reftlab.errors import PositionError
from reftlab.runtime import BoundModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_artifact"]


def load_artifact(
    folder: str | Path,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    positions: Any = "given",
    act_fn: str | None = None,
) -> BoundModel:
    """Read a folder that pyreft or pyvene saved as a native bound model.

    With `positions` it is one like any other from there on: `reft.generate`, `rl.explain(reft, ...)`,
    `reft + other`, `reft.save(folder)`. The model stays as it is, also in what of it learns.

    Args:
        folder: where pyreft or pyvene saved it, or the name of a repository on the hub.
        model: the base model that it was made for.
        tokenizer: as for `InterventionGraph.bind`.
        positions: the tokens that the edits act on, such as `"last"` or `"first(5)+last(5)"`; neither
            library saves them. Left out, every call gives them.
        act_fn: the activation of LoReFT and its relatives, which neither library saves.

    Raises:
        ArtifactError: what is missing, damaged, or not known here.
        PositionError: `positions` that join other numbers of tokens than an intervention takes.

    >>> reft = load_artifact("emoji/", model, tokenizer, positions="last")    # doctest: +SKIP
    """
    with _unchanged(model):
        loaded = IntervenableModel.load(folder, model, act_fn=act_fn)
    entries = loaded._entries
    roles = usual_roles(entries, loaded.mode)
    if positions != "given":
        position = parse_position(positions)
        for entry in entries:
            if position.joins != entry.joins:
                many = entry.joins > 1
                takes = f"{entry.joins} tokens joined" if many else "single tokens"
                example = f"joined(last({entry.joins}))" if many else "last"
                raise PositionError(
                    f"positions={positions!r}: {entry.key} takes {takes}; expected positions such as "
                    f"{example!r}"
                )
        roles = [replace(role, positions=str(position)) for role in roles]
    graph = graph_of(entries, [replace(r, subspace=_first(e)) for e, r in zip(entries, roles, strict=True)])
    built = {name: own.train(model.training) for name, own in loaded.reft.interventions.items()}
    bound = BoundModel(graph, model, tokenizer, built=built)
    bound.facts.update({name: fact for name, fact in loaded.reft.facts.items() if name != "compat"})
    return bound


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Leave what of a model learns and what is in training mode as it was before a `with` block."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


def _first(entry: Entry) -> tuple[int, ...] | None:
    """The directions that an intervention was saved as confined to, or None for all."""
    own = entry.intervention
    confined = own.confined() if isinstance(own, BuiltIn) and not entry.collects else None
    return None if confined is None else tuple(confined)
