"""Prompts end where labels begin, and no edit is passed over in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import reftlab as rl
from tests.models import batch_of
from tests.oracle import columns_by_hand

IGNORED = -100


def touched(
    model: Any, positions: Any, phase: Any = "prompt", tokenizer: Any = None, **batch: Tensor
) -> list[list[int]]:
    """For each row the columns whose vectors an edit was handed, seen through what it writes."""
    edit = rl.Edit(
        "mark",
        at="blocks[0].output",
        positions=positions,
        phase=phase,
        intervention=rl.Function(lambda h: h + 99),
    )
    reft = rl.InterventionGraph(edit, rl.Read("blocks[0].output")).bind(model, tokenizer)
    kept: list[Tensor] = []
    handle = model.get_submodule("model.layers.1").register_forward_pre_hook(
        lambda m, args, kwargs: kept.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    try:
        with torch.no_grad():
            reft(**batch)
    finally:
        handle.remove()
    return [[c for c, vector in enumerate(row) if vector.mean() > 50] for row in kept[0]]


def answered(side: str) -> dict[str, Tensor]:
    """Two rows of 7 and 5 tokens, of which the last 3 and 2 are answers."""
    batch = batch_of((7, 5), side)
    labels = torch.full_like(batch["input_ids"], IGNORED)
    for row, answer in enumerate((3, 2)):
        real = batch["attention_mask"][row].nonzero()[:, 0]
        labels[row, real[-answer:]] = batch["input_ids"][row, real[-answer:]]
    return {**batch, "labels": labels}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("positions", "numbers"),
    [
        ("all", [[0, 1, 2, 3], [0, 1, 2]]),
        ("last", [[3], [2]]),
        ("f7+l7", [[0, 1, 2, 3], [0, 1, 2]]),
        ("f2+l2", [[0, 1, 2, 3], [0, 1, 2]]),
        ("[0, -1]", [[0, 3], [0, 2]]),
    ],
)
def test_nothing_spills_into_the_answer(
    llama: Any, side: str, positions: str, numbers: list[list[int]]
) -> None:
    batch = answered(side)
    offset = [0, 2 if side == "left" else 0]
    expected = [[n + offset[row] for n in chosen] for row, chosen in enumerate(numbers)]
    assert touched(llama, positions, **batch) == expected


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("positions", "phase", "numbers"),
    [
        ("all", "decode", [[4, 5, 6], [3, 4]]),
        ("first", "decode", [[4], [3]]),
        ("[1]", "decode", [[5], [4]]),
        ("all", "both", [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4]]),
        ("first", "both", [[0, 4], [0, 3]]),
    ],
)
def test_the_answer_stands_for_generated_tokens(
    llama: Any, side: str, positions: str, phase: str, numbers: list[list[int]]
) -> None:
    offset = [0, 2 if side == "left" else 0]
    expected = [[n + offset[row] for n in chosen] for row, chosen in enumerate(numbers)]
    assert touched(llama, positions, phase, **answered(side)) == expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_without_labels_the_prompt_is_every_real_token(llama: Any, side: str) -> None:
    batch = batch_of((7, 2), side)
    for positions, choose in (
        ("all", lambda real: real),
        ("last", lambda real: real[-1:]),
        ("f7+l7", lambda real: real),
        ("f1+l1", lambda real: real[:1] + real[-1:]),
    ):
        assert touched(llama, positions, **batch) == columns_by_hand(batch["attention_mask"], choose)


def test_an_ignored_label_inside_the_answer_is_still_answer(llama: Any) -> None:
    batch = batch_of((6,))
    labels = torch.tensor([[IGNORED, IGNORED, 5, IGNORED, 6, IGNORED]])
    assert touched(llama, "all", **batch, labels=labels) == [[0, 1]]
    assert touched(llama, "all", "decode", **batch, labels=labels) == [[2, 3, 4, 5]]


def test_a_masked_language_models_labels_end_no_prompt(bert: Any) -> None:
    batch = batch_of((6,))
    labels = torch.tensor([[IGNORED, IGNORED, 5, IGNORED, IGNORED, IGNORED]])
    edit = rl.Edit("mark", at="blocks[1].output", positions="last", intervention=rl.Clamp(-0.1, 0.1))
    reft = rl.InterventionGraph(edit).bind(bert)
    with torch.no_grad():
        assert torch.equal(reft(**batch, labels=labels).logits, reft(**batch).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_of_text_are_found_behind_padding(llama: Any, tokenizer: Any, side: str) -> None:
    tokenizer.padding_side = side
    texts = ["the Eiffel Tower is in Paris", "in Paris is the Eiffel Tower and the cat"]
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    batch.pop("token_type_ids", None)
    offset = 3 if side == "left" else 0
    for positions, numbers in (
        ("span('Eiffel Tower')", [[1, 2], [4, 5]]),
        ("token('Paris')", [[5], [1]]),
        ("after('Tower')", [[3, 4, 5], [6, 7, 8]]),
    ):
        expected = [[n + offset for n in numbers[0]], numbers[1]]
        assert touched(llama, positions, tokenizer=tokenizer, **batch) == expected


def reft_at(model: Any, positions: Any, tokenizer: Any = None, **more: Any) -> rl.BoundModel:
    edit = rl.Edit("edit", at="blocks[1].output", positions=positions, intervention=rl.Zero(), **more)
    return rl.InterventionGraph(edit).bind(model, tokenizer)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ("[4]", "row 1: position 4 of .* outside its 3 prompt tokens"),
        ("span('cat')", "row 1: .*'cat' does not occur"),
    ],
)
def test_a_row_without_the_position_is_named(
    llama: Any, tokenizer: Any, positions: str, message: str
) -> None:
    tokenizer.padding_side = "right"
    batch = tokenizer(["the cat is in Paris", "the dog is"], padding=True, return_tensors="pt")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    for call in (reft_at(llama, positions, tokenizer), reft_at(llama, positions, tokenizer).generate):
        with pytest.raises(rl.PositionError, match=message):
            call(**inputs)


def test_a_row_without_a_prompt_is_named(llama: Any) -> None:
    batch = batch_of((4, 4))
    empty = {**batch, "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])}
    with pytest.raises(rl.PositionError, match="row 1 has no prompt tokens"):
        reft_at(llama, "last")(**empty)
    with pytest.raises(rl.PositionError, match="row 0 has no prompt tokens"):
        reft_at(llama, "last")(**batch, labels=batch["input_ids"])


def test_text_positions_without_a_tokenizer_or_ids_say_so(llama: Any, tokenizer: Any) -> None:
    batch = batch_of((4,))
    with pytest.raises(rl.PositionError, match="needs tokenizer"):
        reft_at(llama, "span('a')")(**batch)
    with pytest.raises(rl.PositionError, match="needs input_ids"):
        reft_at(llama, "span('a')", tokenizer)(inputs_embeds=torch.zeros(1, 4, 32))


def test_a_decode_edit_that_meets_no_generated_token_warns(llama: Any) -> None:
    with pytest.warns(rl.UntouchedEditWarning, match="edit 'edit' has phase 'decode' and this call has no"):
        reft_at(llama, "all", phase="decode")(**batch_of((4,)))


def test_a_mask_that_cannot_be_counted_is_refused(llama: Any) -> None:
    ids = batch_of((4,))["input_ids"]
    with pytest.raises(rl.RunError, match=r"attention_mask must be \(row, token\)"):
        reft_at(llama, "last")(input_ids=ids, attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(rl.RunError, match=r"attention_mask is \(1, 3\), the tokens are \(1, 4\)"):
        reft_at(llama, "last")(input_ids=ids, attention_mask=torch.ones(1, 3))


def test_embeddings_are_counted_like_ids(llama: Any) -> None:
    batch = batch_of((6, 3), "left")
    reft = reft_at(llama, "f1+l1")
    with torch.no_grad():
        embeddings = llama.get_input_embeddings()(batch["input_ids"])
        got = reft(inputs_embeds=embeddings, attention_mask=batch["attention_mask"]).logits
        assert torch.equal(got, reft(**batch).logits)
