"""LoReFT as the judge: binding, training and asking it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from arguments import Argument, Split
from judges import PLAIN, examples, yes_minus_no

import reftlab as rl

SITES = "blocks[9,14,19,24].output"
RANK = 4
TRAINING: dict[str, Any] = {"learning_rate": 2e-3, "batch_size": 32, "warmup_steps": 5}


@dataclass(frozen=True)
class Trained:
    """One training.

    Attributes:
        reft: the bound model.
        scores: log P(Yes) − log P(No) of the test arguments `(test,)`.
        losses: mean answer loss of each epoch's steps, nats per answer token `(epoch,)`.
        steps: optimiser steps.
        numbers: how many numbers were trained.
    """

    reft: Any
    scores: np.ndarray
    losses: np.ndarray
    steps: int
    numbers: int


def trained(
    model: Any,
    tokenizer: Any,
    arguments: list[Argument],
    split: Split,
    *,
    epochs: int,
    store: rl.ConeStore,
    shuffled: bool = False,
) -> Trained:
    """Train on a fold's training arguments, then judge its test arguments.

    Args:
        model, tokenizer: the bare model.
        arguments: all of them.
        split: the fold.
        epochs: passes over the training arguments.
        store: where the frozen model's values before the last prompt token are kept between trainings.
        shuffled: whether to deal the training labels out anew at random, as a control.
    """
    torch.manual_seed(split.seed)
    edit = rl.Edit("judge", at=SITES, positions="last", intervention=rl.LoReFT(rank=RANK))
    reft = rl.InterventionGraph(edit).bind(model, tokenizer)
    pairs = examples([arguments[number] for number in split.train])
    if shuffled:
        pairs = dealt_anew(pairs, split.seed)
    result = rl.train(
        reft, pairs, epochs=epochs, seed=split.seed, system=PLAIN, cone=store, progress=False, **TRAINING
    )
    reft.eval()
    losses = [step.loss for step in result.history if step.loss is not None]
    texts = [arguments[number].text for number in split.test]
    scores = yes_minus_no(reft, tokenizer, texts, PLAIN, what=f"seed {split.seed}, fold {split.fold}")
    numbers = sum(one.numel() for one in reft.interventions.parameters() if one.requires_grad)
    by_epoch = np.array([part.mean() for part in np.array_split(np.array(losses), epochs)])
    return Trained(reft, scores, by_epoch, result.steps, numbers)


def dealt_anew(pairs: list[rl.Example], seed: int) -> list[rl.Example]:
    """The same prompts with answers dealt out at random, the same to prompts that are the same."""
    prompts = sorted({one.prompt for one in pairs})
    half = ["Yes", "No"] * (len(prompts) // 2 + 1)
    dealt = dict(zip(prompts, np.random.default_rng(seed).permutation(half[: len(prompts)]), strict=True))
    return [rl.Example(one.prompt, str(dealt[one.prompt])) for one in pairs]
