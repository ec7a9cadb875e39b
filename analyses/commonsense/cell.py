"""One cell of the study, in a process of its own, so that its peak of memory is its own.

    python cell.py '{"task": "boolq", "method": "loreft", "seed": 0, ...}' result.json

`run.py` starts it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from answering import choice_scores, option_scores
from methods import METHODS, bind, trained_numbers
from questions import Chosen, choose

import reftlab as rl

__all__ = ["ASKED", "Cell", "chosen_for", "write_whole"]

ASKED = {
    "zero-shot": "bare model, plain prompt",
    "zero-shot-chat": "bare model, chat template",
}
"""Ways to ask the bare model."""

MEGABYTE = 2**20


@dataclass(frozen=True)
class Cell:
    """One training, or one way to ask the bare model.

    Attributes:
        task, method, seed: which cell.
        data: folder of the data.
        train, test: how many questions.
        epochs: passes over the training questions.
        batch_size: rows of a step.
        warmup: share of the steps in which the learning rate rises.
        max_tokens: of the longest prompt.
        save: where to keep the trained edits.
    """

    task: str
    method: str
    seed: int
    data: str
    train: int
    test: int
    epochs: int
    batch_size: int
    warmup: float
    max_tokens: int
    save: str

    @property
    def settings(self) -> dict[str, Any]:
        """What the result depends on, beside task, method and seed."""
        of_training = ("train", "epochs", "batch_size", "warmup") if self.method in METHODS else ()
        return {name: getattr(self, name) for name in (*of_training, "test", "max_tokens")}


def chosen_for(cell: Cell, tokenizer: Any) -> Chosen:
    return choose(
        Path(cell.data), cell.task, train=cell.train, test=cell.test, max_tokens=cell.max_tokens,
        tokens=lambda text: len(tokenizer(text)["input_ids"]),
    )  # fmt: skip


def write_whole(file: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def asked(cell: Cell) -> dict[str, Any]:
    """Ask the bare model."""
    model, tokenizer = rl.load_model()
    chosen = chosen_for(cell, tokenizer)
    if chosen.by_text:
        scores = option_scores(rl.InterventionGraph().bind(model, tokenizer), chosen.test)
    else:
        scores = choice_scores(model, tokenizer, chosen.test, chat=cell.method == "zero-shot-chat")
    return {"scores": scores.tolist()}


def trained(cell: Cell) -> dict[str, Any]:
    """Train a method, and ask the model with it."""
    model, tokenizer = rl.load_model()
    model.requires_grad_(False)
    chosen, method = chosen_for(cell, tokenizer), METHODS[cell.method]
    reft, figures = bind(cell.method, model, tokenizer, cell.seed)
    lora = not reft.edits
    pairs = [rl.Example(*chosen.pair(question)) for question in chosen.train]
    loaded = _forget_peak()
    began = time.process_time()
    result = rl.train(
        reft, pairs, epochs=cell.epochs, batch_size=cell.batch_size,
        learning_rate=method.learning_rate, warmup_steps=cell.warmup, seed=cell.seed, chat=False,
        train_model=lora, progress=sys.stderr.isatty(),
    )  # fmt: skip
    seconds, peak = time.process_time() - began, _peak()
    reft.eval()
    if chosen.by_text:
        scores = option_scores(reft, chosen.test)
    else:
        scores = choice_scores(reft, tokenizer, chosen.test)
    if not lora:
        reft.save(cell.save)
    tenth = max(1, len(result.history) // 10)
    return {
        "scores": scores.tolist(),
        "figures": figures,
        "trained": trained_numbers(reft),
        "learning_rate": method.learning_rate,
        "train_rows": len(pairs),
        "steps": result.steps,
        "seconds": round(seconds, 2),
        "loss_first": sum(step.loss for step in result.history[:tenth]) / tenth,
        "loss_last": sum(step.loss for step in result.history[-tenth:]) / tenth,
        "on_cone": result.on_cone,
        "loaded_mb": round(loaded / MEGABYTE),
        "peak_mb": round(peak / MEGABYTE),
    }


def _forget_peak() -> int:
    """Begin the peak of memory anew, where Linux lets one; returns what is resident now, in bytes."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return int(psutil.Process().memory_info().rss)


def _peak() -> int:
    """Most bytes that were resident at once."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most) * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    cell = Cell(**json.loads(sys.argv[1]))
    started = time.perf_counter()
    model_free = cell.method in ASKED
    found = asked(cell) if model_free else trained(cell)
    found = {"cell": {"task": cell.task, "method": cell.method, "seed": cell.seed}, "settings": cell.settings,
             **found, "whole_seconds": round(time.perf_counter() - started, 1)}  # fmt: skip
    write_whole(Path(sys.argv[2]), json.dumps(found))


if __name__ == "__main__":
    main()
