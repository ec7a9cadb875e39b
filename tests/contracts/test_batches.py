"""What a batch may not change: its rows, its precision, and a model whose edits do nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import reftlab as rl
from tests.models import FAMILIES, batch_of, copy_of, row_of, with_position_ids
from tests.oracle import (
    CASES,
    Case,
    assert_close,
    columns_by_hand,
    plain_edit,
    randomise,
    raw_blocks,
)

LENGTHS = (7, 3, 9)

causal = pytest.mark.parametrize("any_model", [f for f in FAMILIES if f != "bert"], indirect=True)
either_side = pytest.mark.parametrize("side", ["left", "right"])


def bind(case: Case, model: PreTrainedModel, positions: str = "first(2)+last(2)") -> rl.BoundModel:
    nodes = [rl.Source("other")] if case.source else []
    source = rl.Read(run="other") if case.source else None
    edit = rl.Edit(
        "edit", at="blocks[1].output", positions=positions, intervention=case.make(), source=source
    )
    reft = rl.InterventionGraph(*nodes, edit).bind(model)
    randomise(reft)
    return reft


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
@either_side
def test_a_batch_of_mixed_lengths_equals_its_rows_one_by_one(
    any_model: PreTrainedModel, case: Case, side: str
) -> None:
    reft = bind(case, any_model)
    batch = with_position_ids(batch_of(LENGTHS, side))
    other = with_position_ids(batch_of(LENGTHS, side, seed=77))

    sources = {"other": other} if case.source else None
    with torch.no_grad():
        together = reft(**batch, sources=sources).logits
        for row in range(len(LENGTHS)):
            one = {"other": row_of(other, row)} if case.source else None
            alone = reft(**row_of(batch, row), sources=one).logits[0]
            assert_close(together[row][batch["attention_mask"][row].bool()], alone)


@causal
def test_a_left_padded_batch_generates_what_its_rows_generate(any_model: PreTrainedModel) -> None:
    reft = bind(CASES[0], any_model)
    batch = batch_of(LENGTHS, "left")
    together = reft.generate(**batch, max_new_tokens=5, do_sample=False)
    for row in range(len(LENGTHS)):
        alone = reft.generate(**row_of(batch, row), max_new_tokens=5, do_sample=False)
        assert torch.equal(together[row, -5:], alone[0, -5:])


def test_a_batch_of_one_row_without_a_mask_is_edited(any_model: PreTrainedModel) -> None:
    reft = bind(CASES[0], any_model)
    batch = batch_of((6,))
    with torch.no_grad():
        got = reft(batch["input_ids"]).logits
        assert_close(got, reft(**batch).logits, 0.0)
        assert (got - any_model(**batch).logits).abs().max() > 1e-2


@either_side
def test_bfloat16_models_are_edited_in_float32_and_cast_back(any_model: PreTrainedModel, side: str) -> None:
    # Both sides cast the edited vectors to bfloat16, so that at most its last bit may differ where the
    # float32 sums were ordered differently; 2 ** -6 is four such bits of a logit near 1.
    model = copy_of(any_model).bfloat16()
    case = CASES[0]
    reft = bind(case, model)
    assert {p.dtype for p in reft.interventions.parameters()} == {torch.float32}
    batch = batch_of(LENGTHS, side)
    mask, real = batch["attention_mask"], batch["attention_mask"].bool()
    columns = columns_by_hand(mask, lambda tokens: tokens[:2] + tokens[-2:])

    def change(base: Tensor, source: Tensor | None, numbers: list[int]) -> Tensor:
        assert base.dtype == torch.float32
        return case.formula(reft.interventions["edit"], base, source, numbers)

    with torch.no_grad(), plain_edit(raw_blocks(model)[1], mask, columns, change):
        expected = model(**batch).logits
    with torch.no_grad():
        got = reft(**batch).logits
        bare = model(**batch).logits
    assert got.dtype == torch.bfloat16
    assert_close(got[real].float(), expected[real].float(), 2**-6)
    assert (got - bare)[real].abs().max() > 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("nothing", ["scale by one", "strength zero", "disabled", "no nodes"])
def test_edits_that_change_nothing_leave_the_bare_model_bit_for_bit(
    any_model: PreTrainedModel, nothing: str, dtype: torch.dtype
) -> None:
    model = any_model if dtype == torch.float32 else copy_of(any_model).to(dtype)
    intervention = rl.Scale(1.0) if nothing == "scale by one" else rl.LoReFT(4)
    strength = 0.0 if nothing == "strength zero" else 1.0
    graph = rl.InterventionGraph(
        rl.Edit("edit", at="blocks[*].output", intervention=intervention, strength=strength)
    )
    reft = (rl.InterventionGraph() if nothing == "no nodes" else graph).bind(model)
    batch = batch_of(LENGTHS, "left")
    with torch.no_grad():
        expected = model(**batch).logits
        if nothing == "disabled":
            with reft.disabled():
                got = reft(**batch).logits
        else:
            got = reft(**batch).logits
    real = batch["attention_mask"].bool()
    assert torch.equal(got[real], expected[real])


@causal
@pytest.mark.parametrize("case", CASES[:1] + CASES[8:9], ids=lambda case: case.name)
def test_a_strength_interpolates_between_the_bare_and_the_edited_vector(
    any_model: PreTrainedModel, case: Case
) -> None:
    graph = rl.InterventionGraph(
        rl.Edit("edit", at="blocks[2].output", positions="last", intervention=case.make())
    )
    batch = batch_of((5, 5))
    values = {}
    for strength in (0.0, 0.25, 1.0):
        reft = graph.scale("edit", strength).bind(any_model)
        randomise(reft)
        values[strength] = reft.read("blocks[2].output @ last", **batch)["blocks[2].output @ last"]
    assert_close(values[0.25], values[0.0] + 0.25 * (values[1.0] - values[0.0]))
    assert (values[1.0] - values[0.0]).abs().max() > 1e-2


def test_dropout_acts_in_train_mode_and_not_in_eval_mode(llama: PreTrainedModel) -> None:
    graph = rl.InterventionGraph(
        rl.Edit("edit", at="blocks[1].output", intervention=rl.LoReFT(4, dropout=0.5))
    )
    reft = graph.bind(llama)
    randomise(reft)
    batch = batch_of((6, 6))
    with torch.no_grad():
        assert not reft.training
        assert torch.equal(reft(**batch).logits, reft(**batch).logits)
        still = reft(**batch).logits
        reft.train()
        assert (reft(**batch).logits - reft(**batch).logits).abs().max() > 1e-2
        reft.eval()
        assert torch.equal(reft(**batch).logits, still)


def test_a_model_bound_in_train_mode_has_interventions_in_train_mode(llama: PreTrainedModel) -> None:
    graph = rl.InterventionGraph(rl.Edit("edit", at="blocks[1].output", intervention=rl.LoReFT(4)))
    assert graph.bind(copy_of(llama).train()).interventions["edit"].training
    assert not graph.bind(llama).interventions["edit"].training
