"""Examples: (prompt, answer) pairs as token ids and labels, plain or through a chat template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reftlab.errors import DataError
from reftlab.runtime.window import IGNORED_LABEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoded", "Example", "as_examples", "encode", "format_prompt"]


@dataclass(frozen=True)
class Example:
    """A prompt and the answer wanted; the answer is None where only the prompt matters.

    Attributes:
        prompt: what the model is asked.
        answer: what it should say.
        task: the tasks whose edits act on it, such as `emoji` or `formal+emoji`; None for all edits.
    """

    prompt: str
    answer: str | None = None
    task: str | None = None


@dataclass(frozen=True)
class Encoded:
    """One example as numbers.

    Attributes:
        input_ids: token ids of prompt and answer.
        labels: the same, with -100 on the prompt, so that the loss counts the answer only.
        task: the example's task.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    task: str | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


def as_examples(data: Any) -> list[Example]:
    """Read examples from whatever users have.

    Args:
        data: an iterable of `Example`, of prompts, of (prompt, answer) pairs, or of mappings with
            `prompt` and perhaps `answer` and `task`; a `datasets.Dataset` and a list of its rows are
            such. Where one example has a task, all need one.

    Raises:
        DataError: an entry is none of these; the message names it by number.
    """
    if hasattr(data, "to_dict") and hasattr(data, "columns") and not isinstance(data, Mapping):
        data = data.to_dict("records")  # a pandas frame
    if isinstance(data, str | Mapping) or not isinstance(data, Iterable):
        raise DataError(
            "examples must be a list, such as [('What is the sea like?', '🌊🐠🐚')], "
            f"not {type(data).__name__}"
        )
    examples = [_example(entry, number) for number, entry in enumerate(data)]
    if not examples:
        raise DataError("there are no examples")
    without = [number for number, example in enumerate(examples) if example.task is None]
    if without and len(without) < len(examples):
        raise DataError(
            f"example {without[0]}, {examples[without[0]].prompt!r}, has no task and others have; give each "
            "one a task, or none"
        )
    return examples


def format_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool, system: str | None = None
) -> str:
    """The text that the model sees before it answers.

    Args:
        tokenizer: the model's tokenizer.
        prompt: what the user says.
        chat: whether to put it into the tokenizer's chat template.
        system: system message, with `chat` only; the template's own where there is none.

    Raises:
        DataError: `chat` and the tokenizer has no template, or `system` without `chat`.
    """
    if not chat:
        if system is not None:
            raise DataError("a system message needs chat=True")
        return prompt
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("chat=True, and this tokenizer has no chat template; use chat=False")
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def encode(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    chat: bool = False,
    system: str | None = None,
    max_length: int | None = None,
) -> list[Encoded]:
    """Turn examples into token ids and labels.

    Prompt and answer are tokenised apart and joined, so that the prompt has the very tokens that it
    has when the model is asked; the answer ends with the tokenizer's end-of-text token.

    Args:
        tokenizer: the model's tokenizer.
        examples: what to encode.
        chat, system: see `format_prompt`.
        max_length: refuse longer examples, in tokens.

    Raises:
        DataError: an empty prompt or answer, or an example that is too long; named by number.
    """
    encoded = []
    for number, example in enumerate(examples):
        text = format_prompt(tokenizer, example.prompt, chat=chat, system=system)
        prompt = prompt_ids(tokenizer, text, chat=chat)
        answer: list[int] = []
        if example.answer is not None:
            answer = list(tokenizer(example.answer, add_special_tokens=False)["input_ids"])
            if not answer:
                raise DataError(f"example {number}: the answer {example.answer!r} has no tokens")
            if tokenizer.eos_token_id is not None:
                answer.append(tokenizer.eos_token_id)
        if not prompt:
            raise DataError(f"example {number}: the prompt {example.prompt!r} has no tokens")
        if max_length is not None and len(prompt) + len(answer) > max_length:
            raise DataError(
                f"example {number} is {len(prompt) + len(answer)} tokens long, more than "
                f"max_length={max_length}; shorten it or raise max_length"
            )
        labels = [IGNORED_LABEL] * len(prompt) + answer
        encoded.append(Encoded((*prompt, *answer), tuple(labels), example.task))
    return encoded


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool) -> list[int]:
    """Token ids of a formatted prompt; a chat template writes its special tokens itself."""
    ids = list(tokenizer(text, add_special_tokens=not chat)["input_ids"])
    # An encoder's closing token would stand between a plain prompt and its answer.
    if not chat and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def _example(entry: Any, number: int) -> Example:
    task = None
    if isinstance(entry, Example):
        prompt, answer, task = entry.prompt, entry.answer, entry.task
    elif isinstance(entry, Mapping):
        if "prompt" not in entry:
            raise DataError(f"example {number}: expected 'prompt' and 'answer', it has {sorted(entry)}")
        prompt, answer, task = entry["prompt"], entry.get("answer"), entry.get("task")
    elif isinstance(entry, tuple | list) and len(entry) == 2:
        prompt, answer = entry
    else:
        prompt, answer = entry, None
    if not isinstance(prompt, str) or not isinstance(answer, str | None) or not isinstance(task, str | None):
        raise DataError(
            f"example {number}: expected a prompt, a (prompt, answer) pair of texts, or a mapping with "
            f"'prompt' and 'answer', not {entry!r}"
        )
    return Example(prompt, answer, task)
