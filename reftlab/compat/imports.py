"""What pyreft and pyvene saved, as a bound model of the native kind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from reftlab.address import parse_position
from reftlab.compat.model import IntervenableModel
from reftlab.compat.translate import graph_of, usual_role
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

    From there on it is one like any other: `reft.generate`, `rl.explain(reft, ...)`, `reft + other`,
    `reft.save(folder)`.

    Args:
        folder: where pyreft or pyvene saved it, or the name of a repository on the hub.
        model: the base model that it was made for.
        tokenizer: as for `InterventionGraph.bind`.
        positions: the tokens that the edits act on, such as `"last"` or `"first(5)+last(5)"`; neither
            library saves them. Left out, every call gives them.
        act_fn: the activation of LoReFT and its relatives, which neither library saves.

    Raises:
        ArtifactError: what is missing, damaged, or not known here.

    >>> reft = load_artifact("emoji/", model, tokenizer, positions="last")    # doctest: +SKIP
    """
    loaded = IntervenableModel.load(folder, model, act_fn=act_fn)
    entries = loaded._entries
    groups = max(entry.group for entry in entries) + 1 if loaded.mode == "serial" else 0
    roles = [usual_role(entry, groups) for entry in entries]
    if positions != "given":
        roles = [replace(role, positions=str(parse_position(positions))) for role in roles]
    built = dict(loaded.reft.interventions.items())
    return BoundModel(graph_of(entries, roles), model, tokenizer, built=built)
