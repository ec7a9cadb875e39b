"""Every intervention, in every family, padded on either side, against plain hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import reftlab as rl
from tests.models import FAMILIES, batch_of, with_position_ids
from tests.oracle import (
    CASES,
    Case,
    assert_close,
    columns_by_hand,
    gathered,
    plain_edit,
    plain_read,
    randomise,
    raw_blocks,
)

LENGTHS = (7, 3, 9)
BLOCK = 1

every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
either_side = pytest.mark.parametrize("side", ["left", "right"])


def ends(real: list[int]) -> list[int]:
    """By hand what `first(2)+last(2)` means."""
    return real[:2] + real[-2:]


def bound_case(case: Case, model: PreTrainedModel, **options: Any) -> tuple[rl.BoundModel, Any]:
    """A graph of one edit at the ends of each prompt, bound, and its built intervention."""
    nodes: list[Any] = [rl.Source("other")] if case.source else []
    source = rl.Read(run="other") if case.source else None
    edit = rl.Edit(
        "edit", at=f"blocks[{BLOCK}].output", positions="first(2)+last(2)", intervention=case.make(),
        source=source, **options,
    )  # fmt: skip
    reft = rl.InterventionGraph(*nodes, edit).bind(model)
    randomise(reft)
    return reft, reft.interventions["edit"]


def sources_of(case: Case, side: str) -> dict[str, dict[str, Tensor]]:
    return {"other": batch_of(LENGTHS, side, seed=77)} if case.source else {}


def source_vectors(case: Case, model: PreTrainedModel, side: str, numbered: bool = False) -> Tensor | None:
    if not case.source:
        return None
    batch = batch_of(LENGTHS, side, seed=77)
    # In a generation real tokens are numbered from each row's first one, in sources too.
    hidden = plain_read(model, raw_blocks(model)[BLOCK], with_position_ids(batch) if numbered else batch)
    return gathered(hidden, columns_by_hand(batch["attention_mask"], ends))


@every_case
@either_side
def test_a_forward_pass_equals_plain_hooks(any_model: PreTrainedModel, case: Case, side: str) -> None:
    reft, built = bound_case(case, any_model)
    batch = batch_of(LENGTHS, side)
    mask, real = batch["attention_mask"], batch["attention_mask"].bool()
    with torch.no_grad():
        bare = any_model(**batch).logits
        source = source_vectors(case, any_model, side)
        columns = columns_by_hand(mask, ends)

        def change(base: Tensor, given: Tensor | None, numbers: list[int]) -> Tensor:
            return case.formula(built, base, given, numbers)

        with plain_edit(raw_blocks(any_model)[BLOCK], mask, columns, change, source):
            expected = any_model(**batch).logits
        got = reft(**batch, sources=sources_of(case, side)).logits
    assert_close(got[real], expected[real])
    for row in range(len(LENGTHS)):
        assert (expected - bare)[row][real[row]].abs().max() > 1e-2


@every_case
@either_side
@pytest.mark.parametrize("any_model", [f for f in FAMILIES if f != "bert"], indirect=True)
@pytest.mark.filterwarnings("ignore")
def test_generation_equals_plain_hooks(any_model: PreTrainedModel, case: Case, side: str) -> None:
    reft, built = bound_case(case, any_model)
    batch = batch_of(LENGTHS, side)
    mask = batch["attention_mask"]
    options: dict[str, Any] = {
        "max_new_tokens": 4, "do_sample": False, "output_scores": True, "return_dict_in_generate": True,
    }  # fmt: skip
    bare = any_model.generate(**batch, **options)
    source = source_vectors(case, any_model, side, numbered=True)

    def change(base: Tensor, given: Tensor | None, numbers: list[int]) -> Tensor:
        return case.formula(built, base, given, numbers)

    with (
        torch.no_grad(),
        plain_edit(raw_blocks(any_model)[BLOCK], mask, columns_by_hand(mask, ends), change, source),
    ):
        expected = any_model.generate(**batch, **options)
    got = reft.generate(**batch, **options, sources=sources_of(case, side))
    assert torch.equal(got.sequences, expected.sequences)
    assert_close(torch.stack(got.scores), torch.stack(expected.scores))
    assert (torch.stack(expected.scores)[0] - torch.stack(bare.scores)[0]).abs().max() > 1e-2
