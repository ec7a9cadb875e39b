"""One training, and everything that is measured of it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tasks import TASKS, Task
from torch import Tensor

import reftlab as rl
from reftlab.demo import UNSEEN
from reftlab.explaining.geometry.tokens import token_effects
from reftlab.explaining.subject import Subject

__all__ = ["Bare", "Run", "bare_of", "batch_of", "run_of", "write_whole"]


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        task, rank, seed: which.
        facts: its numbers, replies and explanation.
        start: orthonormal basis of the write subspace before training, `(width, rank)`.
        write: that after it.
        read: the read directions, one a column, `(width, rank)`; not orthonormal.
        delta: what the edit adds at the last token of each prompt, `(prompt, width)`.
        end: output of the last block there, with the edit, `(prompt, width)`.
        log_probabilities: of the next token, `(prompt, vocabulary)`.
        artifact: folder of the trained edit.
    """

    task: str
    rank: int
    seed: int
    facts: dict[str, Any]
    start: Tensor
    write: Tensor
    read: Tensor
    delta: Tensor
    end: Tensor
    log_probabilities: Tensor
    artifact: Path


@dataclass(frozen=True)
class Bare:
    """What the model does without edits.

    Attributes:
        end: output of the last block at the last token of each prompt, `(prompt, width)`.
        log_probabilities: of the next token, `(prompt, vocabulary)`.
        covariance: of the vectors at the edited site, over all tokens of all prompts but each one's first,
            `(width, width)`.
        instructed: by task, the mean of the vectors at the last token of prompts with the task's instruction
            minus that of prompts without, `(width,)`.
    """

    end: Tensor
    log_probabilities: Tensor
    covariance: Tensor
    instructed: dict[str, Tensor]


def write_whole(file: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def run_of(
    model: Any,
    tokenizer: Any,
    task: Task,
    rank: int,
    seed: int,
    *,
    block: int,
    epochs: int,
    draws: int,
    store: rl.ConeStore,
    folder: Path,
) -> Run:
    """Train and measure, or read what an earlier call of the same settings kept.

    Args:
        model, tokenizer: the bare model.
        task, rank, seed: which run. No two runs begin from the same numbers.
        block: where the edit acts, at the last prompt token.
        epochs: steps of all ten pairs each.
        draws: random controls of the faithfulness.
        store: keeps the frozen model's values between trainings.
        folder: what is kept between calls.
    """
    home = folder / f"{task.name}-r{rank}-s{seed}"
    facts_file, settings = home / "facts.json", {"block": block, "epochs": epochs, "draws": draws}
    if not facts_file.exists():
        facts, tensors = _trained(model, tokenizer, task, rank, seed, settings, store, home)
        save_file(tensors, home / "measured.safetensors")
        write_whole(facts_file, json.dumps({"settings": settings, **facts}, ensure_ascii=False, indent=1))
    facts = json.loads(facts_file.read_text(encoding="utf-8"))
    if facts["settings"] != settings:
        raise SystemExit(
            f"{home} is of other settings, {facts['settings']}, than asked for, {settings}; give another "
            "--work, or delete it"
        )
    tensors = load_file(home / "measured.safetensors")
    return Run(task.name, rank, seed, facts, artifact=home / "edit", **tensors)


def _trained(
    model: Any,
    tokenizer: Any,
    task: Task,
    rank: int,
    seed: int,
    settings: dict[str, int],
    store: rl.ConeStore,
    home: Path,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    # Otherwise the same seed would begin both tasks, and the smaller ranks, in the same subspace.
    torch.manual_seed(10_000 * list(TASKS).index(task.name) + 100 * rank + seed)
    edit = rl.Edit(
        "edit", at=f"blocks[{settings['block']}].output", positions="last", intervention=rl.LoReFT(rank=rank)
    )
    reft = rl.InterventionGraph(edit).bind(model, tokenizer)
    built: Any = reft.interventions["edit"]
    start = built.basis().detach().clone()
    result = rl.train(
        reft, task.pairs, epochs=settings["epochs"], learning_rate=4e-3, batch_size=len(task.pairs),
        seed=seed, cone=store, progress=False,
    )  # fmt: skip
    reft.eval()
    evaluation = rl.evaluate(reft, task.pairs, max_new_tokens=24)
    unseen = rl.reply(reft, UNSEEN, max_new_tokens=24)
    affine = built.affine()
    tensors = {
        "start": start,
        "write": affine.write.detach(),
        "read": affine.read.detach().T,
        **_looked_at(reft, tokenizer, task.prompts, settings["block"]),
    }
    reft.save(home / "edit")
    facts = {
        "steps": result.steps,
        "seconds": round(result.seconds, 2),
        "loss": evaluation.loss,
        "exact": evaluation.exact,
        "fits": sum(map(task.fits, unseen)),
        "unseen": unseen,
        **_explained(reft, tokenizer, task, settings["draws"], seed),
    }
    return facts, {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def _explained(reft: Any, tokenizer: Any, task: Task, draws: int, seed: int) -> dict[str, Any]:
    """Tokens of the direction that it writes most along, and what simple explanations keep of its effect."""
    subject = Subject.of("subspaces", reft, task.pairs)
    (bound,) = reft.edits
    recorded, directions = subject.recorded, subject.directions[bound.key]
    effects = token_effects(recorded.lens, tokenizer, directions, recorded.centres.get(bound.key), top=6)
    most = int(directions.rms.argmax())
    kept = rl.faithfulness(reft, task.pairs, top=1, draws=draws, progress=False, seed=seed)
    found = {one.label: one for one in kept.of()}
    return {
        "effect": kept.effect.value,
        "direction_share": float(directions.share[most]),
        "promoted": [token.text for token in effects.promoted[most]] if effects.missing is None else [],
        "kept": {label: one.share.value for label, one in found.items()},
        "kept_at_random": {label: float(np.mean(one.controls)) for label, one in found.items()},
    }


@torch.no_grad()
def _looked_at(reft: Any, tokenizer: Any, prompts: Sequence[str], block: int) -> dict[str, Tensor]:
    batch = batch_of(tokenizer, prompts)
    here = f"blocks[{block}].output @ last"
    edited = reft.read(here, "blocks[-1].output @ last", **batch)
    with reft.disabled():
        plain = reft.read(here, **batch)
    return {
        "delta": edited[here][:, 0] - plain[here][:, 0],
        "end": edited["blocks[-1].output @ last"][:, 0],
        "log_probabilities": reft(**batch, logits_to_keep=1).logits[:, -1].log_softmax(-1),
    }


@torch.no_grad()
def bare_of(model: Any, tokenizer: Any, block: int) -> Bare:
    reft = rl.InterventionGraph().bind(model, tokenizer)
    prompts = next(iter(TASKS.values())).prompts
    site = f"blocks[{block}].output"
    looked = _looked_at(reft, tokenizer, prompts, block)
    found = rl.collect(model, prompts, f"{site} @ all", tokenizer=tokenizer, chat=True, progress=False)
    values = found.flat(f"{site} @ all")
    later = torch.as_tensor(values.positions) > 0
    # The first token's vector is hundreds of times as long as the others, and the same for all prompts.
    covariance = torch.cov(torch.as_tensor(values.vectors)[later].double().T)
    plain = reft.read(f"{site} @ last", **batch_of(tokenizer, prompts))[f"{site} @ last"][:, 0]
    instructed = {}
    for task in TASKS.values():
        asked = batch_of(tokenizer, [f"{prompt} {task.instruction}" for prompt in prompts])
        there = reft.read(f"{site} @ last", **asked)[f"{site} @ last"][:, 0]
        instructed[task.name] = (there - plain).mean(0)
    return Bare(looked["end"], looked["log_probabilities"], covariance, instructed)


def batch_of(tokenizer: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Prompts in the chat template, padded on the left."""
    texts = [rl.format_prompt(tokenizer, prompt, chat=True) for prompt in prompts]
    tokenizer.padding_side = "left"
    batch = dict(tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False))
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}
