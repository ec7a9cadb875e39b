"""Examples: (prompt, answer) pairs as token ids and labels, plain or through a chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from reftlab.errors import DataError
from reftlab.runtime.window import IGNORED_LABEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoded", "Example", "as_examples", "encode", "format_prompt"]


@dataclass(frozen=True, repr=False)
class Example:
    """A prompt and the answer wanted; the answer is None where only the prompt matters.

    Attributes:
        prompt: what the model is asked.
        answer: what it should say.
        task: the tasks whose edits act on it, such as `emoji` or `formal+emoji`; None for all edits.
        sources: the prompt of each source run, by its name, such as the counterfactual one from which
            an interchange takes its vectors.
        positions: tokens in place of an edit's own, by its name, or by `name.source` for its source:
            numbers among the prompt's tokens, `{"swap": [4], "swap.source": [6]}`.

    >>> Example("2 + 2 =", "5", sources={"other": "3 + 2 ="}).sources
    {'other': '3 + 2 ='}
    """

    prompt: str
    answer: str | None = None
    task: str | None = None
    sources: Mapping[str, str] | None = None
    positions: Mapping[str, Sequence[int]] | None = None

    def __repr__(self) -> str:
        given = ((field.name, getattr(self, field.name)) for field in fields(self))
        return f"Example({', '.join(f'{name}={value!r}' for name, value in given if value is not None)})"


@dataclass(frozen=True)
class Encoded:
    """One example as numbers.

    Attributes:
        input_ids: token ids of prompt and answer.
        labels: the same, with -100 on the prompt, so that the loss counts the answer only.
        task: the example's task.
        sources: the token ids of each source run's prompt, by its name.
        positions: the example's own tokens of an edit, by its name.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    task: str | None = None
    sources: Mapping[str, tuple[int, ...]] | None = None
    positions: Mapping[str, tuple[int, ...]] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


def as_examples(data: Any) -> list[Example]:
    """Read examples from whatever users have.

    Args:
        data: an iterable of `Example`, of prompts, of (prompt, answer) pairs, or of mappings with
            `prompt` and perhaps `answer`, `task`, `sources` and `positions`; a `datasets.Dataset` and a
            list of its rows are such. Where one example has a task, all need one; and all name the
            same sources and the same edits' positions.

    Raises:
        DataError: an entry is none of these; the message names it by number.
    """
    data = table_rows(data)
    if isinstance(data, str | Mapping) or not isinstance(data, Iterable):
        raise DataError(
            "examples must be a list, such as [('What is the sea like?', '🌊🐠🐚')], "
            f"not {type(data).__name__}"
        )
    examples = [_example(entry, number) for number, entry in enumerate(data)]
    if not examples:
        raise DataError("there are no examples")
    for what in ("task", "sources", "positions"):
        _check_alike(examples, what)
    return examples


def table_rows(data: Any) -> Any:
    """The rows of a pandas frame as mappings; anything else as it is."""
    is_frame = hasattr(data, "to_dict") and hasattr(data, "columns") and not isinstance(data, Mapping)
    return data.to_dict("records") if is_frame else data


def _check_alike(examples: Sequence[Example], what: str) -> None:
    """Refuse examples of which some have what others have not."""
    some = next((found for one in examples if (found := getattr(one, what)) is not None), None)
    for number, example in enumerate(examples if some is not None else ()):
        value = getattr(example, what)
        if value is None:
            raise DataError(
                f"example {number}, {example.prompt!r}, has no {what} and others have; give each one "
                f"{'a task' if what == 'task' else what}, or none"
            )
        if isinstance(value, Mapping) and isinstance(some, Mapping) and value.keys() != some.keys():
            raise DataError(
                f"example {number}, {example.prompt!r}, has {what} for {sorted(value)} and another one for "
                f"{sorted(some)}; all need the same names"
            )


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

    def asked(number: int, text: str) -> list[int]:
        ids = prompt_ids(tokenizer, format_prompt(tokenizer, text, chat=chat, system=system), chat=chat)
        if not ids:
            raise DataError(f"example {number}: the prompt {text!r} has no tokens")
        return ids

    encoded = []
    for number, example in enumerate(examples):
        prompt = asked(number, example.prompt)
        answer: list[int] = []
        if example.answer is not None:
            answer = list(tokenizer(example.answer, add_special_tokens=False)["input_ids"])
            if not answer:
                raise DataError(f"example {number}: the answer {example.answer!r} has no tokens")
            if tokenizer.eos_token_id is not None:
                answer.append(tokenizer.eos_token_id)
        if max_length is not None and len(prompt) + len(answer) > max_length:
            raise DataError(
                f"example {number} is {len(prompt) + len(answer)} tokens long, more than "
                f"max_length={max_length}; shorten it or raise max_length"
            )
        labels = [IGNORED_LABEL] * len(prompt) + answer
        sources, positions = example.sources, example.positions
        encoded.append(
            Encoded(
                (*prompt, *answer),
                tuple(labels),
                example.task,
                None if sources is None else {n: tuple(asked(number, text)) for n, text in sources.items()},
                None if positions is None else {n: tuple(tokens) for n, tokens in positions.items()},
            )
        )
    return encoded


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool) -> list[int]:
    """Token ids of a formatted prompt; a chat template writes its special tokens itself."""
    ids = list(tokenizer(text, add_special_tokens=not chat)["input_ids"])
    # An encoder's closing token would stand between a plain prompt and its answer.
    if not chat and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def _example(entry: Any, number: int) -> Example:
    if isinstance(entry, Example):
        given = {field.name: getattr(entry, field.name) for field in fields(Example)}
    elif isinstance(entry, Mapping):
        if "prompt" not in entry:
            raise DataError(f"example {number}: expected 'prompt' and 'answer', it has {sorted(entry)}")
        given = {field.name: entry.get(field.name) for field in fields(Example)}
    elif isinstance(entry, tuple | list) and len(entry) == 2:
        given = {"prompt": entry[0], "answer": entry[1]}
    else:
        given = {"prompt": entry}
    further = given.get("answer"), given.get("task")
    if not isinstance(given["prompt"], str) or not all(isinstance(text, str | None) for text in further):
        raise DataError(
            f"example {number}: expected a prompt, a (prompt, answer) pair of texts, or a mapping with "
            f"'prompt' and 'answer', not {entry!r}"
        )
    sources, positions = given.get("sources"), given.get("positions")
    if sources is not None and not _by_name(sources, lambda text: isinstance(text, str)):
        raise DataError(
            f"example {number}: sources={sources!r}: expected the prompt of each source run by its name, "
            "{'other': '3 + 2 ='}"
        )
    if positions is not None and not _by_name(positions, _are_numbers):
        raise DataError(
            f"example {number}: positions={positions!r}: expected numbers of tokens by the edit's name, "
            "{'swap': [4]}"
        )
    return Example(**given)


def _by_name(value: Any, right: Callable[[Any], bool]) -> bool:
    """Whether a value is a mapping from names to values that are right."""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(name, str) and right(item) for name, item in value.items())
    )


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(number) is int for number in value)
