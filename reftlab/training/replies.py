"""Asking a model: prompts in, replies out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from reftlab.errors import DataError
from reftlab.training.collate import Collator
from reftlab.training.data import Example, as_examples, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["reply"]


def reply(
    model: Any,
    prompts: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    chat: bool | None = None,
    system: str | None = None,
    max_new_tokens: int = 64,
    **options: Any,
) -> list[str]:
    """Ask a model and return the texts of its replies, all prompts in one left-padded batch.

    Args:
        model: a bound model, or a Hugging Face model together with its tokenizer.
        prompts: one prompt or several.
        tokenizer: the tokenizer; a bound model's own unless given.
        chat: whether to use the tokenizer's chat template; by default if the model was trained with
            it, or has one and was never trained.
        system: system message, with the template only.
        max_new_tokens: how many tokens a reply may have.
        **options: passed to `generate`; greedy decoding unless they say otherwise.

    Returns:
        One reply for each prompt, without special tokens.
    """
    tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise DataError("reply needs a tokenizer: bind with one, or give tokenizer=")
    examples = [Example(e.prompt) for e in as_examples([prompts] if isinstance(prompts, str) else prompts)]
    encoded = encode(tokenizer, examples, chat=uses_chat(model, tokenizer, chat), system=system)
    batch = Collator.of(tokenizer, "left")(encoded)
    inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
    options = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id, **options}
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return [str(text) for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def uses_chat(model: Any, tokenizer: PreTrainedTokenizerBase, chat: bool | None) -> bool:
    """Whether prompts go through the chat template when the caller does not say."""
    if chat is not None:
        return chat
    trained = getattr(model, "facts", {}).get("training", {})
    return bool(trained.get("chat", bool(getattr(tokenizer, "chat_template", None))))
