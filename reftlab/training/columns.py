"""Columns of a table of examples: which holds the prompts, which the answers, and what a row says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from reftlab.errors import DataError, did_you_mean
from reftlab.training.data import Example, as_examples

__all__ = ["ANSWER_NAMES", "PROMPT_NAMES", "Columns", "Rows", "read_rows"]

PROMPT_NAMES = ("prompt", "question", "instruction", "query", "input")
"""Usual names of the column that holds the prompts."""

ANSWER_NAMES = ("answer", "response", "output", "completion", "target")
"""Usual names of the column that holds the answers."""

MESSAGE_NAMES = ("messages", "conversations", "conversation")
"""Usual names of a column that holds whole conversations."""

_ROLES = {"human": "user", "gpt": "assistant"}  # as ShareGPT calls them


@dataclass(frozen=True)
class Columns:
    """Which columns hold what.

    Attributes:
        prompt: the prompts, texts or lists of messages.
        answer: the answers, or None where there are only prompts.
        context: what is added to a prompt below an empty line, where a row has it.
        messages: conversations, in the place of prompts and answers.
        task: the tasks whose edits act, or None where all act.
        further: those of `sources` and `positions` that there are; a row's is taken where it is a mapping.
    """

    prompt: str | None = None
    answer: str | None = None
    context: str | None = None
    messages: str | None = None
    task: str | None = None
    further: tuple[str, ...] = ()

    @classmethod
    def among(
        cls,
        names: Sequence[str],
        prompt: str | None = None,
        answer: str | None = None,
        task: str | None = None,
    ) -> Columns:
        """Find the columns by name.

        Args:
            names: the columns that there are.
            prompt, answer: those wanted; the usual names are looked for where they are not given:
                `prompt` with `answer`; `messages`; Alpaca's `instruction`, `input` and `output`; and
                else the one column of `PROMPT_NAMES` and the one of `ANSWER_NAMES` that there is.
            task: the column of tasks; without it `task`, but only beside columns called `prompt` and
                `answer`, for in tables made elsewhere the word means other things.

        Raises:
            DataError: a column is not there, none has a usual name, or several have.
        """
        for argument, name in (("prompt", prompt), ("answer", answer), ("task", task)):
            if name is not None and name not in names:
                raise DataError(
                    f"{argument}={name!r}: there is no such column; there is {_listed(names)}."
                    + did_you_mean(name, names)
                )
        if prompt is None and answer is None:
            known = _known_layout(names)
            if known is not None:
                return known if task is None else replace(known, task=task)
        prompt = prompt or _only("prompt", PROMPT_NAMES, [name for name in names if name != answer])
        if prompt is None:
            raise DataError(
                f"there is no column with a usual name of a prompt ({', '.join(PROMPT_NAMES)}, or "
                f"{MESSAGE_NAMES[0]}); there is {_listed(names)}; say which it is, prompt='…'."
                + did_you_mean(PROMPT_NAMES[0], names)
            )
        rest = [name for name in names if name != prompt]
        return cls(prompt, answer or _only("answer", ANSWER_NAMES, rest), task=task)

    def example(self, row: Mapping[str, Any], number: int) -> tuple[Example, str | None]:
        """Read one row.

        Returns:
            The example, and the system message of its conversation or None.

        Raises:
            DataError: a value is missing, no text, or a conversation of another form; named by number.
        """
        example, system = self._said(row, number)
        task = row.get(self.task) if self.task is not None else None
        if task is not None:
            example = replace(example, task=_text(task, str(self.task), number))
        # Parquet gives every row all names that any row has, with nothing under those that it lacks.
        further: dict[str, Any] = {
            name: {key: value for key, value in row[name].items() if value is not None}
            for name in self.further
            if isinstance(row.get(name), Mapping)
        }
        return replace(example, **{name: found for name, found in further.items() if found}), system

    def _said(self, row: Mapping[str, Any], number: int) -> tuple[Example, str | None]:
        if self.messages is not None:
            return _from_messages(row.get(self.messages), self.messages, number)
        assert self.prompt is not None
        if self.prompt not in row:
            raise DataError(f"example {number} has no {self.prompt!r}; it has {_listed(list(row))}")
        prompt, answer = row[self.prompt], row.get(self.answer) if self.answer is not None else None
        if _is_conversation(prompt) and (answer is None or _is_conversation(answer)):
            column = self.prompt if answer is None else f"{self.prompt}+{self.answer}"
            return _from_messages([*prompt, *(answer or ())], column, number)
        text = _text(prompt, self.prompt, number)
        if self.context is not None and row.get(self.context):
            text = f"{text}\n\n{_text(row[self.context], self.context, number)}"
        return Example(text, None if answer is None else _text(answer, str(self.answer), number)), None


@dataclass(frozen=True)
class Rows:
    """What was read from a table.

    Attributes:
        examples: one a row.
        names: the table's columns; empty where its entries are pairs or prompts.
        columns: those that were used, or None where there are none.
        system: the system message of all conversations, or None.
    """

    examples: list[Example]
    names: tuple[str, ...] = ()
    columns: Columns | None = None
    system: str | None = None


def read_rows(
    entries: Iterable[Any],
    *,
    prompt: str | None = None,
    answer: str | None = None,
    task: str | None = None,
    limit: int | None = None,
) -> Rows:
    """Read the entries of a table or a list.

    Args:
        entries: mappings, or whatever else `as_examples` takes.
        prompt, answer, task: names of columns, see `Columns.among`.
        limit: read so many entries at most.

    Raises:
        DataError: an entry or a column cannot be used, or the conversations' system messages differ.
    """
    read = list(islice(entries, limit))
    names = tuple(dict.fromkeys(str(key) for entry in read if isinstance(entry, Mapping) for key in entry))
    if not names:
        for argument, name in (("prompt", prompt), ("answer", answer), ("task", task)):
            if read and name is not None:
                raise DataError(
                    f"{argument}={name!r} names a column, and the examples are no table; leave it out"
                )
        return Rows(as_examples(read))
    columns = Columns.among(names, prompt, answer, task)
    examples, systems = [], set()
    for number, entry in enumerate(read):
        if isinstance(entry, Mapping):
            example, system = columns.example(entry, number)
            systems.add(system)
            examples.append(example)
        else:
            examples.append(entry)
    if len(systems) > 1:
        some = sorted(str(system) for system in systems)[:2]
        raise DataError(
            f"the conversations have different system messages, such as {some[0]!r} and {some[1]!r}; all "
            "examples of a training share one"
        )
    return Rows(as_examples(examples), names, columns, next(iter(systems)))


def _known_layout(names: Sequence[str]) -> Columns | None:
    """The columns of a table whose layout is widely used, in which other names may stand beside."""
    there = set(names)
    if {"prompt", "answer"} <= there:
        further = tuple(name for name in ("sources", "positions") if name in there)
        return Columns("prompt", "answer", task="task" if "task" in there else None, further=further)
    for name in MESSAGE_NAMES:
        if name in there:
            return Columns(messages=name)
    if {"instruction", "output"} <= there:
        return Columns("instruction", "output", context="input" if "input" in there else None)
    return None


def _only(argument: str, usual: Sequence[str], names: Sequence[str]) -> str | None:
    found = [name for name in usual if name in names]
    if len(found) > 1:
        raise DataError(
            f"the columns {_listed(found)} all have a usual name of {argument}s; say which it is, "
            f"{argument}={found[0]!r}"
        )
    return found[0] if found else None


def _text(value: Any, column: str, number: int) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"example {number}: the column {column!r} holds {value!r}, {type(value).__name__}, and a text is "
            "needed; turn it into one first, or name another column"
        )
    return value


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(v, Mapping) for v in value)


def _from_messages(messages: Any, column: str, number: int) -> tuple[Example, str | None]:
    """A conversation of one question and perhaps one answer, perhaps after a system message."""
    if not _is_conversation(messages):
        raise DataError(f"example {number}: the column {column!r} holds {messages!r}, no list of messages")
    said = []
    for message in messages:
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        said.append((_ROLES.get(str(role), str(role)), _text(content, column, number)))
    system = said.pop(0)[1] if said[0][0] == "system" else None
    roles = [role for role, _ in said]
    if roles not in (["user"], ["user", "assistant"]):
        raise DataError(
            f"example {number}: the conversation in {column!r} has the turns {', '.join(roles)}; "
            "expected one of the user and one of the assistant, perhaps after a system message"
        )
    return Example(said[0][1], said[1][1] if len(said) > 1 else None), system


def _listed(names: Sequence[Any]) -> str:
    return ", ".join(map(repr, names))
