"""The arguments: reading them, telling repeats, splitting by topic, and what a training is given."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.model_selection import GroupKFold

FILE = Path(__file__).parent / "arguments.jsonl"
OVERLAP = 0.5
"""From which share of common word trigrams on two texts count as one."""


@dataclass(frozen=True)
class Argument:
    """One argument of two to four sentences.

    Attributes:
        id: its name.
        topic: what it argues about; repeats of other arguments have topics of their own.
        domain: the topic's field.
        text: the argument.
        label: `honest` or `deceptive`.
        device: by what a deceptive one misleads.
        duplicate_of: id of the argument that it repeats. The study does not use it, it finds repeats itself.
    """

    id: str
    topic: str
    domain: str
    text: str
    label: str
    device: str | None
    duplicate_of: str | None

    @property
    def deceptive(self) -> bool:
        return self.label == "deceptive"


def read_arguments(file: Path = FILE) -> list[Argument]:
    with file.open(encoding="utf-8") as lines:
        return [Argument(**json.loads(line)) for line in lines]


def normalised(text: str) -> tuple[str, ...]:
    """The words, without case, spacing and punctuation."""
    return tuple(re.findall(r"\w+", text.casefold()))


def overlap(first: str, second: str) -> float:
    """Word trigrams that two texts share, as a share of those that either has (Jaccard)."""
    one, other = (
        {words[i : i + 3] for i in range(len(words) - 2)} for words in map(normalised, (first, second))
    )
    return len(one & other) / max(len(one | other), 1)


def repeats(arguments: list[Argument]) -> np.ndarray:
    """`(n, n)` whether two arguments are the same text but for a few words, the diagonal too."""
    count = len(arguments)
    same = np.eye(count, dtype=bool)
    for i in range(count):
        for j in range(i):
            same[i, j] = same[j, i] = overlap(arguments[i].text, arguments[j].text) >= OVERLAP
    return same


@dataclass(frozen=True)
class Split:
    """One fold: which arguments are learned from and which are judged.

    Attributes:
        seed, fold: which one.
        train: numbers of the training arguments, some of them more than once; see `splits`.
        dropped: how many honest ones were dropped from the training part.
        repeated: how many of the honest ones that were left stand in `train` a second time or more.
        test: numbers of the arguments to judge.
        removed: numbers of those in the test part's topics that repeat another and are not judged.
    """

    seed: int
    fold: int
    train: tuple[int, ...]
    dropped: int
    repeated: int
    test: tuple[int, ...]
    removed: tuple[int, ...]


def splits(arguments: list[Argument], folds: int, seed: int, drop: float = 1 / 3) -> list[Split]:
    """Folds by topic.

    No topic is on both sides. A test argument that repeats a training argument under another topic is
    removed from the evaluation, and so is one that repeats an earlier test argument. Of the honest
    training arguments a share is dropped, so that deception is the commoner class, as in a collection of
    complaints; then honest ones are repeated at random until both classes have as many.

    Args:
        arguments: all of them.
        folds: number of folds.
        seed: of the folds, of what is dropped and of what is repeated.
        drop: which share of the honest training arguments is dropped.
    """
    random = np.random.default_rng(seed)
    same = repeats(arguments)
    topics = [one.topic for one in arguments]
    labels = np.array([one.deceptive for one in arguments])
    found = []
    folder = GroupKFold(folds, shuffle=True, random_state=seed)
    for fold, (train, test) in enumerate(folder.split(topics, labels, topics)):
        judged: list[int] = []
        for number in test:
            if not same[number, train].any() and not same[number, judged].any():
                judged.append(int(number))
        honest, deceptive = train[~labels[train]], train[labels[train]]
        kept = random.permutation(honest)[: len(honest) - round(drop * len(honest))]
        again = random.choice(kept, max(len(deceptive) - len(kept), 0))
        everything = random.permutation(np.concatenate([deceptive, kept, again]))
        removed = tuple(int(number) for number in test if number not in judged)
        found.append(
            Split(
                seed,
                fold,
                tuple(everything.tolist()),
                len(honest) - len(kept),
                len(again),
                tuple(judged),
                removed,
            )
        )
    return found
