"""Folders that pyreft and pyvene saved: `config.json` and one file for each intervention with numbers.

The files are named by the intervention's key, in the style of pyvene before 0.1.7
(`intkey_layer.15.comp.block_output.unit.pos.nunit.1#0.bin`) or since (`intkey_layer_15_comp_…`), and
hold a state dict. They are opened with `torch.load(weights_only=True)`, or as safetensors, so that
nothing in them runs; classes that `config.json` names are looked up here, never imported.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from reftlab.compat import interventions, reft_interventions
from reftlab.compat.bases import Intervention, TrainableIntervention
from reftlab.compat.builtin import BuiltIn, Wrapped, find, rotation
from reftlab.compat.config import IntervenableConfig, RepresentationConfig, key_of
from reftlab.errors import ArtifactError, ReftlabError

__all__ = [
    "downloaded",
    "is_foreign",
    "known_class",
    "load_model_part",
    "read_folder",
    "ready_name",
    "restored",
    "tensors_of",
]

_CONFIG = "config.json"


def is_foreign(folder: Path) -> bool:
    """Whether a folder looks like one of pyreft's or pyvene's."""
    theirs = (folder / _CONFIG).is_file() or any(folder.glob("intkey_*"))
    return theirs and not (folder / "graph.yaml").is_file()


def read_folder(folder: Path, act_fn: str | None = None) -> IntervenableConfig:
    """The configuration in a folder, its interventions with the numbers that were saved.

    Args:
        folder: where pyreft or pyvene saved it.
        act_fn: the activation of LoReFT and its relatives, which neither library saves.

    Raises:
        ArtifactError: the folder lacks a file, a file cannot be read, or it holds what is not known
            here; the message says which.
    """
    config = _config(folder)
    listed = config.get("representations")
    if not isinstance(listed, list) or not listed:
        raise ArtifactError(
            f"{folder / _CONFIG} has no representations, so pyreft or pyvene 0.1 did not write it; folders "
            "of transformers and PEFT are loaded with those"
        )
    kinds = config.get("intervention_types")
    kinds = kinds if isinstance(kinds, list) else [kinds] * len(listed)
    if len(kinds) != len(listed):
        raise ArtifactError(
            f"{folder / _CONFIG} has {len(listed)} representations and {len(kinds)} intervention_types"
        )
    seen: dict[str, int] = {}
    representations = []
    for place, (entry, kind) in enumerate(zip(listed, kinds, strict=True)):
        try:
            given = _representation(entry)
        except (TypeError, ReftlabError) as error:
            raise ArtifactError(f"{folder / _CONFIG}: representation {place}: {error}") from error
        keys = []
        for dotted in (False, True):
            proposal = key_of(given, dotted)
            seen[proposal] = seen.get(proposal, -1) + 1
            keys.append(f"{proposal}#{seen[proposal]}")
        tensors = _tensors(folder, keys)
        own = _intervention(folder, kind, given, tensors, keys[0], act_fn)
        _set_dimension(own, config.get("intervention_dimensions"), place)
        representations.append(
            given._replace(intervention=own, intervention_type=None, source_representation=None)
        )
    return IntervenableConfig(representations, mode=config.get("mode") or "parallel")


def known_class(name: str) -> type[Intervention] | None:
    """The class here of the name that pyreft or pyvene gives it."""
    for home in (interventions, reft_interventions):
        found = getattr(home, name, None) if name in home.__all__ else None
        if isinstance(found, type) and issubclass(found, Intervention):
            return found
    return None


def ready_name(own: Intervention) -> str:
    """The name by which `restored` finds a class: that of the ready-made one which it is or extends."""
    kinds = (kind for kind in type(own).__mro__ if kind is Wrapped or known_class(kind.__name__) is kind)
    return next(kinds, type(own)).__name__


def _config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    if not path.is_file():
        raise ArtifactError(
            f"there is no {_CONFIG} in {folder}, so it cannot say what it holds; the files of a checkpoint "
            "alone are loaded into a model that is there, reft_model.load_intervention(folder)"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: {error}; copy it again") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{path} is damaged: expected a mapping")
    return config


def _representation(entry: Any) -> RepresentationConfig:
    """A representation as it was written: a list of its fields in their order, or by name."""
    if isinstance(entry, list):
        return RepresentationConfig(*entry)
    known = RepresentationConfig._fields
    return RepresentationConfig(**{name: value for name, value in entry.items() if name in known})


def _tensors(folder: Path, keys: list[str]) -> dict[str, Tensor] | None:
    """The tensors of an intervention, or None where it has no file."""
    for key in keys:
        for suffix in (".bin", ".safetensors"):
            path = folder / f"intkey_{key}{suffix}"
            if path.is_file():
                return _opened(path)
    return None


def tensors_of(folder: Path, key: str, given: RepresentationConfig) -> dict[str, Tensor]:
    """The tensors that a folder has for one intervention.

    Raises:
        ArtifactError: it has none, or they cannot be read.
    """
    found = _tensors(folder, [key, f"{key_of(given, dotted=True)}#{key.rpartition('#')[2]}"])
    if found is None:
        raise _lacks(folder, key)
    return found


def _lacks(folder: Path, key: str) -> ArtifactError:
    return ArtifactError(f"{folder} lacks intkey_{key}.bin, the numbers of {key}; copy the whole folder")


def _opened(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(
            f"{path} cannot be read: {reason}. It is damaged, or holds more than tensors, which is never "
            "loaded; save it again with torch.save(intervention.state_dict(), ...)"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ArtifactError(f"{path} holds no state dict of tensors")
    return dict(state)


def _intervention(
    folder: Path,
    kind: Any,
    given: RepresentationConfig,
    tensors: dict[str, Tensor] | None,
    key: str,
    act_fn: str | None,
) -> Intervention:
    text = re.sub(r"^<class '|'>$", "", str(kind))
    home, _, name = text.rpartition(".")
    made = known_class(name) if home.split(".")[0] in ("pyreft", "pyvene", "reftlab") else None
    if made is None:
        raise ArtifactError(
            f"{folder / _CONFIG}: {key} is a {text}, which reftlab does not know and never imports; write it "
            "as a subclass of rl.Intervention, build the graph with that, and copy the tensors of its file "
            "into reft.interventions"
        )
    arguments: dict[str, Any] = {"subspace_partition": given.subspace_partition}
    if tensors is None:
        if issubclass(made, TrainableIntervention) or given.hidden_source_representation:
            raise _lacks(folder, key)
        return made(**arguments)
    if "source_representation" in tensors and not issubclass(made, TrainableIntervention):
        return made(**arguments, source_representation=tensors["source_representation"].float())
    arguments |= _sizes(tensors) | {"act_fn": act_fn}
    try:
        own = made(**{name: value for name, value in arguments.items() if value is not None})
        own.load_state_dict(tensors)
    except (RuntimeError, ReftlabError) as error:
        raise ArtifactError(f"{folder}: {key}: {error}") from error
    return own


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Width and rank, which `config.json` does not always tell, from the tensors."""
    columns = rotation(tensors)
    if columns is not None:
        return {"embed_dim": columns.shape[0], "low_rank_dimension": columns.shape[1]}
    rows = find(tensors, "proj_layer.weight", "autoencoder.encoder.0.weight")
    if rows is not None:
        return {"embed_dim": rows.shape[1], "low_rank_dimension": rows.shape[0]}
    encoder, mask = find(tensors, "W_enc"), find(tensors, "mask")
    if encoder is not None:
        return {"embed_dim": encoder.shape[0], "low_rank_dimension": encoder.shape[1]}
    return {} if mask is None else {"embed_dim": mask.shape[0]}


def _set_dimension(own: Intervention, dimensions: Any, place: int) -> None:
    """Confine an intervention to its first directions where it was saved so."""
    saved = dimensions[place] if isinstance(dimensions, list) and place < len(dimensions) else None
    if saved is None:
        return
    if own.embed_dim is None or isinstance(saved, list) or saved != int(own.embed_dim):
        own.set_interchange_dim(saved)


def restored(folder: Path, facts: Mapping[str, Any], bound: Any) -> IntervenableConfig:
    """The configuration of a folder that `IntervenableModel.save` wrote, with its interventions.

    Raises:
        ArtifactError: the folder was not written by it.
    """
    record = facts.get("compat")
    if not isinstance(record, Mapping) or not isinstance(record.get("representations"), list):
        raise ArtifactError(f"{folder} was saved by reft.save(); load it with rl.load(folder, model)")
    edits = {edit.name: edit for edit in bound.graph.edits}
    representations = []
    for entry in record["representations"]:
        kind, name = known_class(entry["intervention"]), entry["name"]
        if entry["intervention"] == Wrapped.__name__:
            kind = Wrapped
        if kind is None:
            raise ArtifactError(
                f"{folder}: {entry['intervention']!r} is no intervention of pyreft's or pyvene's"
            )
        if name in edits:
            module = edits[name].share or name
            own = revived(kind, edits[name].intervention, bound.interventions[module], entry)
        else:
            own = kind()
        kept = {k: v for k, v in entry.items() if k in RepresentationConfig._fields}
        representations.append(RepresentationConfig(**{**kept, "intervention": own}))
    return IntervenableConfig(representations, mode=record["mode"])


def revived(
    kind: type[Intervention], description: Any, built: nn.Module, entry: Mapping[str, Any]
) -> Intervention:
    """An intervention around a native one that was trained before."""
    own = kind.__new__(kind)
    Intervention.__init__(
        own,
        embed_dim=built.width,
        keep_last_dim=entry["keep_last_dim"],
        subspace_partition=None,
    )
    own.subspace_partition = entry["subspace_partition"]
    own.is_source_constant = entry["is_source_constant"]
    assert isinstance(own, BuiltIn)
    own.described, own.built = description, None
    if entry["interchange_dim"] is not None:
        own.set_interchange_dim(entry["interchange_dim"])
    own.built = built  # type: ignore[assignment]
    return own


def load_model_part(folder: Path, model: nn.Module) -> None:
    """Load what pyvene saved of the model itself, `pytorch_model.bin`, into it.

    Raises:
        ArtifactError: there is no such file, it cannot be read, or the model has no such tensor.
    """
    path = folder / "pytorch_model.bin"
    if not path.is_file():
        raise ArtifactError(f"include_model=True, and {folder} holds no {path.name}; leave it out")
    unknown = model.load_state_dict(_opened(path), strict=False).unexpected_keys
    if unknown:
        raise ArtifactError(f"{path} has {unknown[0]!r}, which this {type(model).__name__} lacks")


def downloaded(name: str, where: str | None) -> Path:
    """The folder of a repository on the Hugging Face hub.

    Raises:
        ArtifactError: the hub does not give it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id=name, local_dir=where))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArtifactError(
            f"{name!r} is no folder here, and the Hugging Face hub does not give it: {reason}"
        ) from error
