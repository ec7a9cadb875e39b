"""Questions in the layout of LLM-Adapters: reading them, their prompts, and which are used."""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BY_TEXT", "TASKS", "Chosen", "Question", "choose", "endings", "read_questions"]

BY_TEXT = "-text"
"""Ends the name of a task whose options are answered by their text; without it by their number."""

TASKS = ("boolq", f"ARC-Easy{BY_TEXT}", f"openbookqa{BY_TEXT}", "ARC-Easy", "openbookqa")
LEAD = "the correct answer is "
_FORMAT = re.compile(r"\s*Answer format:\s*(\S+)\s*$")
_OPTION = re.compile(r"\s*Answer(\d+):\s*")


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        id: its number in the file.
        instruction: what the model is asked, with the choices and the answer format.
        choices: what may be answered, such as `answer1` to `answer4`.
        answer: the right one.
        text: the question alone.
        options: the text of each choice; empty where the choices are all there is.
    """

    id: int
    instruction: str
    choices: tuple[str, ...]
    answer: str
    text: str
    options: tuple[str, ...]

    @property
    def right(self) -> int:
        """Number of the right choice, from 0."""
        return self.choices.index(self.answer)

    @property
    def prompt(self) -> str:
        """The instruction and the beginning of the answer, up to where the choices differ."""
        return f"{self.instruction}\n{endings(self.choices)[0]}"

    @property
    def ending(self) -> str:
        """What follows the prompt where the answer is right."""
        return endings(self.choices)[1][self.right]

    @property
    def open_prompt(self) -> str:
        """The question without its options, and the beginning of the answer."""
        return f"Question: {self.text}\nAnswer:"

    @property
    def key(self) -> str:
        """The question's words, the same for questions that differ in spacing and case only."""
        return " ".join(re.findall(r"\w+", self.text.casefold()))


def endings(choices: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """What all answers begin with, and how each goes on.

    >>> endings(["answer1", "answer2"])
    ('the correct answer is answer', ('1', '2'))
    >>> endings(["true", "false"])
    ('the correct answer is', (' true', ' false'))
    """
    answers = [LEAD + choice for choice in choices]
    # A space belongs to the token after it.
    begin = os.path.commonprefix(answers).rstrip(" ")  # noqa: RUF071, it is characters that count
    return begin, tuple(answer[len(begin) :] for answer in answers)


def read_questions(file: Path) -> list[Question]:
    """Read a file of LLM-Adapters: a list of `instruction`, `input`, `output` and `answer`.

    Raises:
        ValueError: an entry that is not so; it is named by its number.
    """
    entries = json.loads(file.read_text(encoding="utf-8"))
    return [_question(entry, number, file) for number, entry in enumerate(entries)]


def _question(entry: dict[str, str], number: int, file: Path) -> Question:
    where = f"{file}, entry {number}"
    missing = {"instruction", "output", "answer"} - set(entry)
    if missing:
        raise ValueError(f"{where}: it has no {', '.join(sorted(missing))}; expected LLM-Adapters' layout")
    if entry.get("input"):
        raise ValueError(f"{where}: input={entry['input']!r}: expected an empty one")
    found = _FORMAT.search(entry["instruction"])
    if found is None:
        raise ValueError(f"{where}: the instruction does not end in 'Answer format: …'")
    choices, answer = tuple(found[1].split("/")), entry["answer"]
    if answer not in choices or entry["output"] != LEAD + answer:
        raise ValueError(
            f"{where}: output={entry['output']!r} and answer={answer!r}: expected {LEAD!r} and one of "
            f"{'/'.join(choices)}"
        )
    asked = entry["instruction"][: found.start()]
    text, *options = _OPTION.split(asked)
    numbers, texts = options[::2], options[1::2]
    if options and [f"answer{n}" for n in numbers] != list(choices):
        raise ValueError(f"{where}: its options are numbered {numbers}, and the format says {found[1]!r}")
    question = re.split(r"question:\s*", text, maxsplit=1)[-1].strip()
    return Question(number, entry["instruction"], choices, answer, question, tuple(t.strip() for t in texts))


@dataclass(frozen=True)
class Chosen:
    """The questions of one task that are used.

    Attributes:
        task: its name.
        choices: what may be answered, the same for all.
        train, test: the questions.
        left_out: how many could not be used, by reason.
    """

    task: str
    choices: tuple[str, ...]
    train: tuple[Question, ...]
    test: tuple[Question, ...]
    left_out: dict[str, int]

    @property
    def by_text(self) -> bool:
        """Whether the options are answered by their text."""
        return self.task.endswith(BY_TEXT)

    def pair(self, question: Question) -> tuple[str, str]:
        """A question's prompt, and the answer to train on."""
        if self.by_text:
            return question.open_prompt, f" {question.options[question.right]}"
        return question.prompt, question.ending

    @property
    def commonest(self) -> int:
        """Number of the commonest right choice in `train`."""
        counts = Counter(question.right for question in self.train)
        return min(counts, key=lambda choice: (-counts[choice], choice))


def choose(
    folder: Path, task: str, *, train: int, test: int, tokens: Callable[[str], int], max_tokens: int
) -> Chosen:
    """Draw the questions to train and to test on, always the same ones.

    Left out are questions with an unusual number of choices, those whose prompt is too long, repeats in
    the test file, and training questions that are in the test file too.

    Args:
        folder: with `TASK/train.json` and `TASK/test.json`.
        task: which; the same questions are drawn in both forms of a task.
        train, test: how many; fewer where there are no more.
        tokens: how many tokens a text has.
        max_tokens: of the longest prompt.
    """
    files = folder / task.removesuffix(BY_TEXT)
    parts = {part: read_questions(files / f"{part}.json") for part in ("train", "test")}
    usual = Counter(question.choices for question in parts["train"]).most_common(1)[0][0]
    left_out: Counter[str] = Counter()
    known = {"test": set[str](), "train": {question.key for question in parts["test"]}}
    kept: dict[str, list[Question]] = {"test": [], "train": []}
    for part in ("test", "train"):
        for question in parts[part]:
            if question.choices != usual:
                left_out[f"{part}: other choices than {'/'.join(usual)}"] += 1
            elif question.key in known[part]:
                left_out[f"{part}: asked in the test file already"] += 1
            elif tokens(question.prompt) > max_tokens:
                left_out[f"{part}: a prompt of more than {max_tokens} tokens"] += 1
            else:
                kept[part].append(question)
            known["test"].add(question.key)
    drawn = {
        part: tuple(random.Random(0).sample(found, min(count, len(found))))
        for (part, found), count in zip(kept.items(), (test, train), strict=True)
    }
    return Chosen(task, usual, drawn["train"], drawn["test"], dict(left_out))
