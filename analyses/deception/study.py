"""What the stages of the study share: how large it is, the arguments, the model, and what is kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from arguments import FILE, Argument, Split, read_arguments, splits
from editing import RANK, SITES, TRAINING
from judges import SYSTEMS

import reftlab as rl

__all__ = ["PROBED", "SMALL", "Settings", "Study"]

PROBED = "blocks[4,9,14,19,24,29].output @ last"


@dataclass(frozen=True)
class Settings:
    """How large the study is.

    Attributes:
        topics: how many topics, from the first on; None for all.
        folds: folds by topic.
        seeds: each splits, drops, repeats and trains anew.
        epochs: of each training.
        draws: resamples of topics.
        budget: seconds for each test of an explanation; None for no limit.
    """

    topics: int | None = None
    folds: int = 3
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 12
    draws: int = 2000
    budget: float | None = None


SMALL = Settings(topics=12, folds=2, seeds=(0,), epochs=4, draws=200, budget=5.0)


class Study:
    """The arguments, the model, and what earlier stages found.

    Attributes:
        settings: how large the study is.
        arguments: what is judged.
        folder: where stages keep what they found, by the data and settings that it depends on. It does not
            know the code: delete it after changing that.
    """

    def __init__(self, settings: Settings, work: Path) -> None:
        self.settings = settings
        rows = read_arguments()
        topics = list(dict.fromkeys(one.topic for one in rows))[: settings.topics]
        self.arguments: list[Argument] = [one for one in rows if one.topic in topics]
        self.texts = [one.text for one in self.arguments]
        self.topics = [one.topic for one in self.arguments]
        self.labels = np.array([one.deceptive for one in self.arguments])
        self.splits: list[Split] = [
            split for seed in settings.seeds for split in splits(self.arguments, settings.folds, seed)
        ]
        asked_for = (settings.topics, settings.folds, settings.epochs, SYSTEMS, SITES, RANK, TRAINING, PROBED)
        known = [FILE.read_bytes(), repr(asked_for).encode()]
        self.folder = work / hashlib.sha256(b"".join(known)).hexdigest()[:12]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.store = rl.ConeStore()

    @cached_property
    def model(self) -> tuple[Any, Any]:
        return rl.load_model()

    def kept(self, name: str, work: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """What a stage found, from its file or by doing it."""
        file = self.folder / f"{name}.npz"
        if not file.exists():
            found = work()
            partial = file.with_suffix(".partial.npz")
            np.savez(partial, **found)
            partial.rename(file)
        with np.load(file) as arrays:
            return dict(arrays)
