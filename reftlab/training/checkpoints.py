"""Checkpoints of a training: the interventions, and the settings they were made with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import nn

from reftlab.errors import ArtifactError, DataError, GraphError
from reftlab.graph import InterventionGraph
from reftlab.training.data import Encoded

__all__ = [
    "COMPLETE",
    "digest",
    "graph_digest",
    "latest",
    "load_interventions",
    "plain",
    "refuse_other_settings",
    "save_interventions",
]

_NEEDED = ("interventions.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")
TENSORS, COMPLETE = "interventions.safetensors", "reftlab.json"


def save_interventions(interventions: nn.Module, folder: Path) -> None:
    """Write the interventions' parameters and buffers, and nothing of the model."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in interventions.state_dict().items()}
    safetensors.torch.save_file(state, folder / TENSORS, metadata={"format": "pt"})


def load_interventions(interventions: nn.Module, folder: Path) -> None:
    """Read what `save_interventions` wrote.

    Raises:
        ArtifactError: the file is damaged, or holds the interventions of another graph.
    """
    try:
        state = safetensors.torch.load_file(folder / TENSORS)
    except (safetensors.SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{folder / TENSORS} cannot be read: {error}; remove {folder} and resume"
        ) from error
    own = interventions.state_dict()
    differ = sorted(own.keys() ^ state.keys()) or [n for n, t in state.items() if t.shape != own[n].shape]
    if differ:
        raise ArtifactError(
            f"{folder} was made by another graph: {differ[0]!r} differs; train in another folder"
        )
    interventions.load_state_dict(state)


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
    for name, value in json.loads(json.dumps(settings)).items():
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
