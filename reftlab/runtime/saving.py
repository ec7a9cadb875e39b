"""Saving a bound model's graph and interventions, and binding them to the model again."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from reftlab.errors import AddressError, ArtifactError, BindError, InterventionError
from reftlab.runtime.model import BoundModel
from reftlab.runtime.wrapped import entrances, value_of
from reftlab.store import Artifact, model_card, read_artifact, write_artifact

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load", "save", "signature_of"]

_SAMPLED_TENSORS, _SAMPLED_NUMBERS = 16, 64


def save(bound: BoundModel, folder: str | Path) -> Path:
    """Save a bound model's edits; the model's own weights are not saved.

    Args:
        bound: what to save.
        folder: where; an artifact that is there is replaced, and stays whole until the new one is.

    Returns:
        The folder.

    Raises:
        ArtifactError: the folder holds other things than an artifact.
        GraphError: an intervention holds code (`Function`).
    """
    if not isinstance(folder, str | Path) or not str(folder).strip() or "\0" in str(folder):
        raise ArtifactError(f"save({folder!r}): expected the path of a folder")
    if bound.facts.get("training", {}).get("train_model"):
        warnings.warn(
            "the edits were trained together with parameters of the model itself, and an artifact holds the "
            "edits alone; save the model's too, reft.model.save_pretrained(folder), and give rl.load the "
            "model with them",
            UserWarning,
            stacklevel=3,
        )
    facts = {"base_model": signature_of(bound.model), **bound.facts}
    parameters = sum(p.numel() for p in bound.interventions.parameters())
    card = model_card(bound.graph, facts, parameters)
    return write_artifact(folder, bound.graph, bound.interventions.state_dict(), facts, card)


def load(
    folder: str | Path,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    example: Any = None,
) -> BoundModel:
    """Bind a saved artifact to its model.

    Args:
        folder: where `save` wrote it.
        model: the base model that it was made for.
        tokenizer: as for `InterventionGraph.bind`.
        example: as for `InterventionGraph.bind`.

    Raises:
        ArtifactError: missing, damaged, foreign, newer, or made for another model; the message says
            which. A model of the same shape with other weights is a warning.
    """
    artifact = read_artifact(folder)
    _check_model(artifact, model)
    made_for = artifact.facts.get("base_model", {})
    try:
        bound = BoundModel(artifact.graph, model, tokenizer, example=example)
    except (AddressError, BindError, InterventionError) as error:
        raise ArtifactError(
            f"{artifact.folder} was made for {_named(made_for)} and does not fit this "
            f"{type(model).__name__}: {error}"
        ) from error
    _load_state(bound, artifact)
    bound.facts = {k: v for k, v in artifact.facts.items() if k not in ("format", "base_model")}
    return bound


def _load_state(bound: BoundModel, artifact: Artifact) -> None:
    own = bound.interventions.state_dict()
    missing, extra = sorted(own.keys() - artifact.state.keys()), sorted(artifact.state.keys() - own.keys())
    if missing or extra:
        raise ArtifactError(
            f"{artifact.folder}: graph and tensors do not belong together; "
            f"missing {missing or 'nothing'}, left over {extra or 'nothing'}"
        )
    for name, tensor in artifact.state.items():
        if tensor.shape != own[name].shape:
            raise ArtifactError(
                f"{artifact.folder}: {name} has shape {tuple(tensor.shape)}, and this "
                f"{type(bound.model).__name__} needs {tuple(own[name].shape)}; it was made for "
                f"{_named(artifact.facts.get('base_model', {}))}"
            )
    bound.interventions.load_state_dict(artifact.state)


def signature_of(model: nn.Module) -> dict[str, Any]:
    """What identifies a model: its shape by its configuration, its weights by a sample of them."""
    model = entrances(model)[-1]
    config = getattr(model, "config", None)
    name = getattr(model, "reftlab_name", None) or getattr(config, "_name_or_path", None)
    signature: dict[str, Any] = {"name": name or type(model).__name__, "class": type(model).__name__}
    for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        value = getattr(config, key, None)
        if isinstance(value, str | int):
            signature[key] = value
    parameter = next(model.parameters(), None)
    if parameter is not None:
        signature["dtype"] = str(parameter.dtype).removeprefix("torch.")
    if config is None:
        signature["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    signature["fingerprint"] = _fingerprint(model)
    return signature


def _fingerprint(model: nn.Module) -> str:
    """A hash of numbers sampled from the weights, the same for float32 and bfloat16 copies."""
    names = sorted(name for name, _ in model.named_parameters())
    step = max(1, len(names) // _SAMPLED_TENSORS)
    digest = hashlib.sha256()
    for name in names[::step]:
        values = value_of(model, name).flatten()
        digest.update(name.encode())
        if not values.is_floating_point():
            # Weights that bitsandbytes has packed, and packs anew when the model first runs.
            digest.update(str(values.dtype).encode())
            continue
        sample = values[:: max(1, len(values) // _SAMPLED_NUMBERS)][:_SAMPLED_NUMBERS]
        digest.update(sample.float().bfloat16().cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_model(artifact: Artifact, model: nn.Module) -> None:
    made_for, here = artifact.facts.get("base_model", {}), signature_of(model)
    shape = ("model_type", "hidden_size", "num_hidden_layers", "parameters")
    differ = [key for key in shape if made_for.get(key) != here.get(key)]
    if differ:
        details = ", ".join(f"{key} {made_for.get(key)} there and {here.get(key)} here" for key in differ)
        raise ArtifactError(
            f"{artifact.folder} was made for {_named(made_for)}, and this model is {_named(here)}: "
            f"{details}; load the model that it was made for"
        )
    if made_for.get("fingerprint") != here["fingerprint"]:
        together = artifact.facts.get("training", {}).get("train_model")
        why = (
            "; parameters of its own were trained together with the edits, so load those first"
            if together
            else ""
        )
        warnings.warn(
            f"{artifact.folder} was made for {_named(made_for)}, and this model has its shape but other "
            f"weights, so the edits may not do what they did there{why}",
            UserWarning,
            stacklevel=3,
        )


def _named(signature: dict[str, Any]) -> str:
    return f"{signature.get('name', 'an unnamed model')} ({signature.get('class', 'unknown class')})"
