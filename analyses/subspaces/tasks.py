"""The two tasks: the same ten questions, answered in emojis or in capital letters."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reftlab.demo import PAIRS, UNSEEN, only_emojis

__all__ = ["TASKS", "Task", "in_capitals"]

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Task:
    """One way to answer.

    Attributes:
        name: its name.
        pairs: questions and answers to train on.
        instruction: how a prompt asks for such answers.
        fits: whether a reply is of the kind.
    """

    name: str
    pairs: Pairs
    instruction: str
    fits: Callable[[str], bool]

    @property
    def prompts(self) -> list[str]:
        """The questions that were trained on, then those that were not."""
        return [question for question, _ in self.pairs] + list(UNSEEN)


def in_capitals(text: str) -> bool:
    """Whether a text has letters and all of them are capitals.

    >>> in_capitals("BLUE, 7!"), in_capitals("Blue"), in_capitals("7!")
    (True, False, False)
    """
    return text.isupper()


def _read(file: Path) -> Pairs:
    return tuple((question, answer) for question, answer in json.loads(file.read_text(encoding="utf-8")))


TASKS = {
    task.name: task
    for task in (
        Task("emoji", PAIRS, "Answer only with emojis.", only_emojis),
        Task(
            "capitals",
            _read(Path(__file__).parent / "capitals.json"),
            "Answer in capital letters only.",
            in_capitals,
        ),
    )
}
