"""Reading sparse autoencoders from files in the format of SAELens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from reftlab.errors import ArtifactError
from reftlab.interventions.autoencoder import SparseAutoencoder

__all__ = ["load_sae"]

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"

# What changes the mathematics, and the values under which it is `SparseAutoencoder`'s.
_SAME: dict[str, tuple[Any, ...]] = {
    "architecture": ("standard", "jumprelu"),
    "activation_fn": ("relu",),
    "activation_fn_str": ("relu",),
    "normalize_activations": ("none", "None", None, False),
    "finetuning_scaling_factor": (False, None),
    "reshape_activations": ("none", "hook_z", None),
}
_NAMES = {
    "W_enc": "encoder",
    "b_enc": "encoder_bias",
    "W_dec": "decoder",
    "b_dec": "decoder_bias",
    "threshold": "threshold",
}


def load_sae(path: str | Path) -> SparseAutoencoder:
    """Read a sparse autoencoder that SAELens saved: standard (ReLU) or JumpReLU.

    The format is that of `SAE.save_model` in SAELens (github.com/decoderesearch/SAELens, versions 3
    to 6): `cfg.json` beside `sae_weights.safetensors` with W_enc `(width, m)`, b_enc `(m,)`, W_dec
    `(m, width)`, b_dec `(width,)` and, for JumpReLU, threshold `(m,)`. Nothing in the files is run.
    Autoencoders of attention heads before the output projection (`hook_z`) take the heads side by side.

    Args:
        path: the folder, or the file of weights with `cfg.json` beside it.

    Returns:
        A description for `SAEEdit`, or to be used as an intervention itself, in float32.

    Raises:
        ArtifactError: files that are missing or damaged, or an autoencoder whose mathematics is
            another one, such as TopK or gated.

    >>> sae = load_sae("gemma-scope/layer_12/width_16k")  # doctest: +SKIP
    """
    given = Path(path).expanduser()
    weights = given / WEIGHTS if given.is_dir() else given
    config = weights.parent / CONFIG
    for file in (weights, config):
        if not file.is_file():
            raise ArtifactError(
                f"{str(path)!r}: there is no file {file}; SAELens saves {CONFIG} and {WEIGHTS}"
            )
    settings = _settings(config)
    tensors = _tensors(weights)
    jumps = settings.get("architecture", "standard") == "jumprelu"
    wanted = [name for name in _NAMES if jumps or name != "threshold"]
    missing, more = [n for n in wanted if n not in tensors], sorted(set(tensors) - set(wanted))
    if missing or more:
        wrong = f"lacks {missing[0]!r}" if missing else f"has {more[0]!r}"
        kind = "JumpReLU" if jumps else "standard"
        raise ArtifactError(f"{weights} {wrong}; a {kind} autoencoder has {', '.join(wanted)}")
    center = settings.get("apply_b_dec_to_input", True)
    if type(center) is not bool:
        raise ArtifactError(f"{config}: apply_b_dec_to_input={center!r}: expected true or false")
    try:
        return SparseAutoencoder(**{_NAMES[name]: tensors[name] for name in wanted}, center=center)
    except ValueError as error:
        raise ArtifactError(f"{weights}: {error}") from error


def _settings(file: Path) -> Mapping[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file} is not JSON: {error}") from error
    if not isinstance(settings, Mapping):
        raise ArtifactError(f"{file} holds no settings by name")
    for name, allowed in _SAME.items():
        if name in settings and settings[name] not in allowed:
            shown = ", ".join(dict.fromkeys(repr(value) for value in allowed if value))
            raise ArtifactError(
                f"{file}: {name}={settings[name]!r} is not supported; "
                + (f"supported is {shown}" if shown else "it must be off")
            )
    return settings


def _tensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{file} is not a safetensors file that can be read: {error}") from error
    # Older training checkpoints of JumpReLU hold the logarithm.
    if "log_threshold" in tensors and "threshold" not in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").float().exp()
    # For a time a factor was saved that no autoencoder used.
    if "scaling_factor" in tensors and bool((tensors["scaling_factor"] == 1).all()):
        del tensors["scaling_factor"]
    return tensors
