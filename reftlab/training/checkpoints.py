"""Checkpoints of a training: what learned, and the settings it was made with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from reftlab.errors import ArtifactError, DataError, GraphError
from reftlab.graph import InterventionGraph
from reftlab.runtime import BoundModel
from reftlab.training.data import Encoded

__all__ = [
    "COMPLETE",
    "digest",
    "graph_digest",
    "latest",
    "learning_in",
    "load_learned",
    "plain",
    "refuse_other_settings",
    "save_learned",
]

TENSORS, MODEL_TENSORS, COMPLETE = "interventions.safetensors", "model.safetensors", "reftlab.json"
_NEEDED = (TENSORS, "optimizer.pt", "scheduler.pt", "trainer_state.json")


def save_learned(reft: BoundModel, folder: Path) -> None:
    """Write the interventions' parameters and buffers, and those of the model's parameters that learn."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / TENSORS, reft.interventions.state_dict())
    if learned := learning_in(reft.model):
        _write(folder / MODEL_TENSORS, learned)


def _write(file: Path, state: Mapping[str, Tensor]) -> None:
    # Copied, since one intervention may stand there under several names.
    plain_state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    safetensors.torch.save_file(plain_state, file, metadata={"format": "pt"})


def load_learned(reft: BoundModel, folder: Path) -> None:
    """Read what `save_learned` wrote.

    Raises:
        ArtifactError: a file is missing or damaged, or holds the tensors of another graph or model.
    """
    learned = learning_in(reft.model)
    reft.interventions.load_state_dict(_matching(folder / TENSORS, reft.interventions.state_dict()))
    if learned:
        with torch.no_grad():
            for name, tensor in _matching(folder / MODEL_TENSORS, learned).items():
                learned[name].copy_(tensor)


def learning_in(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own parameters that require gradients, which during a training are those that learn."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _matching(file: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in a file, which must have the names and shapes of `own`."""
    try:
        state = safetensors.torch.load_file(file)
    except (safetensors.SafetensorError, OSError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}; remove {file.parent} and resume") from error
    differ = sorted(own.keys() ^ state.keys()) or [n for n, t in state.items() if t.shape != own[n].shape]
    if differ:
        raise ArtifactError(
            f"{file.parent} was made by another graph or model: {differ[0]!r} differs; train in another "
            "folder"
        )
    return state


def latest(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end, or None."""
    whole = [
        path.parent
        for path in folder.glob(f"checkpoint-*/{COMPLETE}")
        if path.parent.name.removeprefix("checkpoint-").isdigit()
        and all((path.parent / name).is_file() for name in _NEEDED)
    ]
    return max(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def refuse_other_settings(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to resume a training that was begun with other settings.

    Raises:
        DataError: a setting differs; the message names it and both values.
    """
    try:
        before = dict(json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{checkpoint / COMPLETE} is damaged; remove {checkpoint} and resume") from error
    now = json.loads(json.dumps(settings))
    for name in (*now, *before):
        value = now.get(name)
        if before.get(name) != value:
            raise DataError(
                f"resume=True: {checkpoint} was trained with {name}={before.get(name)!r}, and now it is "
                f"{value!r}; use the same, or another folder"
            )


def graph_digest(graph: InterventionGraph) -> str:
    """A short hash of a graph with every number in it; of its text where it holds code."""
    try:
        text = json.dumps(graph.to_dict())
    except GraphError:
        text = repr(graph)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def plain(value: Any) -> Any:
    """A setting as JSON can hold it; anything unusual by its text."""
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def digest(encoded: Sequence[Encoded]) -> str:
    """A short hash of encoded examples, which says whether they are the same."""
    text = json.dumps([asdict(example) for example in encoded])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
