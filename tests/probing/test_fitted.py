"""Where a probe's condition looks: the tokens that were probed, others, or the edit's own, prompt and reply."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reftlab as rl
from reftlab.probing import FittedProbe, probe
from tests.models import VOCABULARY
from tests.oracle import plain_read, raw_blocks
from tests.probing.planted_vectors import QUICK

NAME = "blocks[0].output @ last"


def _rows(count: int = 24) -> list[list[int]]:
    """Prompts that begin with one of two tokens and end with one of the same, independently."""
    generator = np.random.default_rng(3)
    rows = [generator.integers(10, VOCABULARY, generator.integers(2, 8)).tolist() for _ in range(count)]
    return [[5 + number // 2 % 2, *row, 5 + number % 2] for number, row in enumerate(rows)]


ROWS = _rows()


@pytest.fixture
def fitted(llama: Any) -> FittedProbe:
    return probe(llama, ROWS, [row[-1] for row in ROWS], sites="blocks[0].output", **QUICK)[NAME]


def _blanked(model: Any, condition: rl.Condition, row: list[int], positions: str = "all") -> list[bool]:
    """For each token whether an edit under a condition made it zero."""
    edit = rl.Edit(
        "blank", at="blocks[2].output", positions=positions, intervention=rl.Zero(), when=condition
    )
    reft = rl.InterventionGraph(edit).bind(model)
    found = reft.read("blocks[2].output @ all", input_ids=torch.tensor([row]))["blocks[2].output @ all"][0]
    return (found == 0).all(-1).tolist()


def _likely(model: Any, fitted: FittedProbe, row: list[int]) -> list[bool]:
    """What scikit-learn says of each token alone."""
    hidden = plain_read(model, raw_blocks(model)[0], {"input_ids": torch.tensor([row])})[0]
    return (fitted.estimator.predict_proba(hidden.double().numpy())[:, 1] > 0.5).tolist()


def test_it_looks_at_the_tokens_that_were_probed_unless_told_others(llama: Any, fitted: FittedProbe) -> None:
    assert fitted.condition().reads == (rl.Read(NAME),)
    assert fitted.condition(positions="first").reads == (rl.Read("blocks[0].output @ first"),)
    seen = set()
    for row in ROWS[:8]:
        likely = _likely(llama, fitted, row)
        seen.add((likely[0], likely[-1]))
        assert _blanked(llama, fitted.condition(), row) == [likely[-1]] * len(row)
        assert _blanked(llama, fitted.condition(positions="first"), row) == [likely[0]] * len(row)
        every = fitted.condition(positions="last(2)")
        assert _blanked(llama, every, row, "last(2)")[-2:] == likely[-2:]
    assert len(seen) == 4
    with pytest.raises(rl.PositionError, match="cannot read positions"):
        fitted.condition(positions="lst")


@torch.no_grad()
def test_without_positions_it_is_asked_of_each_token_of_prompt_and_reply(
    llama: Any, fitted: FittedProbe
) -> None:
    edit = rl.Edit(
        "turn", at="blocks[2].output", positions="all", phase="both", intervention=rl.Scale(-1.0),
        when=fitted.condition(positions=None),
    )  # fmt: skip
    reft = rl.InterventionGraph(edit).bind(llama)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    seen: list[Tensor] = []
    fired: list[bool] = []
    replied: set[bool] = set()

    def turn(module: Any, args: Any, output: Tensor) -> Tensor:
        said = torch.tensor(fitted.estimator.predict_proba(seen[-1][0].double().numpy())[:, 1] > 0.5)
        fired.extend(said.tolist())
        return torch.where(said[None, :, None], -output, output)

    for row in ROWS[:8]:
        assert _blanked(llama, fitted.condition(positions=None), row) == _likely(llama, fitted, row)
        fired.clear()
        early = raw_blocks(llama)[0].register_forward_hook(lambda m, a, o: seen.append(o))
        late = raw_blocks(llama)[2].register_forward_hook(turn)
        try:
            expected = llama.generate(torch.tensor([row]), **options)
        finally:
            early.remove()
            late.remove()
        assert torch.equal(reft.generate(torch.tensor([row]), **options), expected)
        replied |= set(fired[len(row) :])
    assert replied == {True, False}


def test_each_of_several_labels_can_be_asked_elsewhere_too(llama: Any) -> None:
    table = np.array([[row[0] == 6, row[-1] == 6] for row in ROWS]).astype(int)
    found = probe(llama, ROWS, table, sites="blocks[0].output", estimator="lda", **QUICK)[NAME]
    condition = found.condition(label=1, positions="first")
    for row in ROWS[:4]:
        hidden = plain_read(llama, raw_blocks(llama)[0], {"input_ids": torch.tensor([row])})[0, :1]
        chance = found.estimator.estimators_[1].predict_proba(hidden.double().numpy())[0, 1]
        assert _blanked(llama, condition, row) == [bool(chance > 0.5)] * len(row)
