"""Asking a model: prompts in, replies out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from reftlab.errors import DataError
from reftlab.training.collate import Collator, moved
from reftlab.training.data import as_examples, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PromptForm", "prompt_form", "reply"]


class PromptForm(TypedDict):
    """How a prompt becomes the text that the model sees: arguments of `format_prompt` and `encode`."""

    chat: bool
    system: str | None


def reply(
    model: Any,
    prompts: str | Sequence[Any],
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
        prompts: one prompt or several; examples too, whose tasks, sources and positions then count.
        tokenizer: the tokenizer; a bound model's own unless given.
        chat: whether to use the tokenizer's chat template; by default if the model was trained with
            it, or has one and was never trained.
        system: system message, with the template only; by default that of the training.
        max_new_tokens: how many tokens a reply may have.
        **options: passed to `generate`; greedy decoding unless they say otherwise. For a bound model
            `tasks=`, `scale=` and the like are among them.

    Returns:
        One reply for each prompt, without special tokens.
    """
    tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise DataError("reply needs a tokenizer: bind with one, or give tokenizer=")
    examples = as_examples([prompts] if isinstance(prompts, str) else prompts)
    asked = [replace(example, answer=None) for example in examples]
    encoded = encode(tokenizer, asked, **prompt_form(model, tokenizer, chat, system))
    batch = moved(Collator.of(tokenizer, "left")(encoded), model)
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "position_ids")}
    options = {**inputs, "do_sample": False, "pad_token_id": tokenizer.pad_token_id, **options}
    with torch.no_grad():
        tokens = model.generate(max_new_tokens=max_new_tokens, **options)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return [str(text) for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def prompt_form(
    model: Any, tokenizer: PreTrainedTokenizerBase, chat: bool | None, system: str | None = None
) -> PromptForm:
    """How prompts are written where the caller does not say: as in the training, if there was one.

    Args:
        model: a bound model, which knows how it was trained, or any other.
        tokenizer: without a training its chat template is used where it has one.
        chat: whether to use the template, or None.
        system: the system message, or None for that of the training.
    """
    trained = getattr(model, "facts", {}).get("training", {})
    if chat is None:
        chat = bool(trained.get("chat", bool(getattr(tokenizer, "chat_template", None))))
    if system is None and chat:
        system = trained.get("system")
    return {"chat": chat, "system": system}
