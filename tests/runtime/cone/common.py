"""Batches with answers, and both ways of running them: plainly, and on the cone."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import reftlab as rl
from reftlab.runtime.cone import ConeRunner, ConeStore
from tests.models import PAD, VOCABULARY, build
from tests.oracle import randomise

__all__ = ["LENGTHS", "answered", "assert_equal", "bound", "on_the_cone", "plainly", "small_store"]

LENGTHS = ((9, 2), (5, 4), (12, 1), (7, 3))
"""Tokens of each row's prompt and of its answer."""


def answered(
    lengths: Sequence[tuple[int, int]] = LENGTHS,
    side: str = "right",
    seed: int = 5,
    vocabulary: int = VOCABULARY,
) -> dict[str, Any]:
    """Random prompts and answers, padded on one side, as a training makes them."""
    generator = torch.Generator().manual_seed(seed)
    width = max(prompt + answer for prompt, answer in lengths)
    ids, labels = torch.full((len(lengths), width), PAD), torch.full((len(lengths), width), -100)
    mask = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(lengths):
        first = width - prompt - answer if side == "left" else 0
        here, wanted = slice(first, first + prompt + answer), slice(first + prompt, first + prompt + answer)
        ids[row, here] = torch.randint(3, vocabulary, (prompt + answer,), generator=generator)
        mask[row, here] = 1
        labels[row, wanted] = ids[row, wanted]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "labels": labels,
    }


def bound(family: str | Any, *edits: rl.Edit, tokenizer: Any = None, **options: Any) -> rl.BoundModel:
    """The edits bound to a frozen model, with numbers large enough to show."""
    model = build(family) if isinstance(family, str) else family
    edits = edits or (rl.Edit("edit", at="blocks[1].output", positions="last", intervention=rl.LoReFT(3)),)
    reft = rl.InterventionGraph(*edits).bind(model, tokenizer, **options)
    randomise(reft)
    model.requires_grad_(False)
    return reft


def small_store(memory: int | str = "50MB", disk: int | str = 0, folder: Any = None) -> ConeStore:
    return ConeStore(memory=memory, disk=disk, folder=folder)


def plainly(reft: rl.BoundModel, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, logits at the labels, and gradients of the plain run."""
    taken = {k: v for k, v in batch.items() if k != "position_ids" or k in reft._calls._takes}
    output = reft(**taken)
    rows, columns = (batch["labels"][:, 1:] != -100).nonzero().unbind(1)
    return output.loss.detach(), output.logits[rows, columns].detach(), _gradients(reft, output.loss)


def on_the_cone(runner: ConeRunner, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, logits at the labels, and gradients of the run on the cone."""
    drawn = torch.get_rng_state()
    loss = runner.loss(batch)
    assert loss is not None, runner.why_plain or "no reason"
    gradients = _gradients(runner.reft, loss)
    torch.set_rng_state(drawn)
    with torch.no_grad():
        found = runner.predictions(batch)
    assert found is not None
    return loss.detach(), found.logits, gradients


def assert_equal(runner: ConeRunner, batch: Mapping[str, Any], tolerance: float = 1e-5) -> None:
    """Loss, logits and gradients of both ways agree, relative to their size, and some gradient is there."""
    before = copy.deepcopy(dict(batch))
    torch.manual_seed(3)
    expected = plainly(runner.reft, batch)
    torch.manual_seed(3)
    got = on_the_cone(runner, batch)
    assert close(got[0], expected[0], tolerance), (got[0], expected[0])
    assert close(got[1], expected[1], tolerance), (got[1] - expected[1]).abs().max()
    assert got[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        assert close(got[2][name], gradient, tolerance), (name, got[2][name], gradient)
    for name, value in before.items():
        same = torch.equal(value, batch[name]) if isinstance(value, Tensor) else value == batch[name]
        assert same, f"{name} was changed"


def close(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    difference = (got.double() - expected.double()).norm()
    return bool(difference <= tolerance * expected.double().norm() + 1e-12)


def _gradients(reft: rl.BoundModel, loss: Tensor) -> dict[str, Tensor]:
    for parameter in reft.interventions.parameters():
        parameter.grad = None
    if loss.requires_grad:
        loss.backward()
    found = {n: p.grad for n, p in reft.interventions.named_parameters() if p.grad is not None}
    for parameter in reft.interventions.parameters():
        parameter.grad = None
    return found
