"""Reading named vectors, and stopping once they are there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import reftlab as rl
from tests.models import batch_of, copy_of, hook_count
from tests.oracle import assert_close, columns_by_hand, gathered, plain_edit, plain_read, raw_blocks

LENGTHS = (6, 3, 8)
EMPTY = rl.InterventionGraph()


def calls_of(model: Any) -> tuple[list[int], list[Any]]:
    """Which blocks ran, noted by hooks of the test's own."""
    ran: list[int] = []
    handles = [
        block.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
        for number, block in enumerate(raw_blocks(model))
    ]
    return ran, handles


def test_reads_equal_the_models_own_hidden_states(any_model: Any) -> None:
    batch = batch_of((6, 6))
    # transformers leaves recorders on a model that was asked for its hidden states.
    with torch.no_grad():
        states = copy_of(any_model)(**batch, output_hidden_states=True).hidden_states
    reading = EMPTY.bind(any_model).read("blocks[*].input", "final_norm.output", **batch)
    assert len(reading) == 4
    for got, expected in zip(reading.values(), states, strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_reads_are_named_tensors_of_the_chosen_tokens(any_model: Any, side: str) -> None:
    batch = batch_of(LENGTHS, side)
    reading = EMPTY.bind(any_model).read(
        "blocks[1].output @ f2+l1", rl.Read("blocks[0].output", [0], name="begin"), **batch
    )
    assert list(reading) == ["blocks[1].output @ first(2)+last", "begin"]
    hidden = plain_read(any_model, raw_blocks(any_model)[1], batch)
    columns = columns_by_hand(batch["attention_mask"], lambda real: real[:2] + real[-1:])
    got = reading["blocks[1].output @ first(2)+last"]
    assert got.shape == (3, 3, 32)
    assert_close(got.flatten(0, 1), gathered(hidden, columns))
    assert reading["begin"].shape == (3, 1, 32)


def test_rows_of_different_lengths_are_filled_with_nan_and_masked(llama: Any) -> None:
    batch = batch_of(LENGTHS, "left")
    reading = EMPTY.bind(llama).read("blocks[1].output", **batch)
    (name,) = reading
    assert name == "blocks[1].output @ all"
    assert reading[name].shape == (3, 8, 32)
    mask = reading.mask(name)
    assert mask.sum(1).tolist() == list(LENGTHS)
    assert torch.equal(reading[name].isnan().all(-1), ~mask)
    flat = reading.flat(name)
    assert flat.rows.tolist() == [0] * 6 + [1] * 3 + [2] * 8
    assert flat.positions.tolist() == [*range(6), *range(3), *range(8)]
    hidden = plain_read(llama, raw_blocks(llama)[1], batch)
    assert_close(flat.vectors, hidden[batch["attention_mask"].bool()])


def test_a_reading_becomes_a_frame_and_names_what_it_lacks(llama: Any) -> None:
    reading = EMPTY.bind(llama).read(
        "blocks[0].output @ last", "blocks[1].output @ last", **batch_of(LENGTHS)
    )
    frame = reading.to_frame()
    assert list(frame.columns[:3]) == ["read", "row", "position"]
    assert len(frame) == 6
    assert frame["position"].tolist() == [5, 2, 7] * 2
    assert repr(reading).startswith("Reading('blocks[0].output @ last': (3, 1, 32), ")
    with pytest.raises(KeyError, match="was not read"):
        reading["blocks[2].output @ last"]


def test_the_pass_stops_after_the_last_site_needed(any_model: Any) -> None:
    ran, handles = calls_of(any_model)
    try:
        EMPTY.bind(any_model).read("blocks[0].input @ last", "blocks[1].input @ last", **batch_of(LENGTHS))
    finally:
        for handle in handles:
            handle.remove()
    assert ran in ([0, 1], [0])
    assert 2 not in ran


def test_the_first_block_is_all_that_runs_for_its_output(any_model: Any) -> None:
    ran, handles = calls_of(any_model)
    before = hook_count(any_model)
    try:
        EMPTY.bind(any_model).read("blocks[0].output", **batch_of(LENGTHS))
        assert hook_count(any_model) == before
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0]


def test_a_read_sees_the_edits_before_it_and_at_its_own_site(any_model: Any) -> None:
    vector = torch.linspace(-1, 1, 32)
    graph = rl.InterventionGraph(
        rl.Edit("add", at="blocks[1].output", positions="last", intervention=rl.Add(vector))
    )
    batch = batch_of(LENGTHS)
    reft = graph.bind(any_model)
    edited = reft.read("blocks[1].output", "blocks[2].output", **batch)
    bare = EMPTY.bind(any_model).read("blocks[1].output", "blocks[2].output", **batch)
    with reft.disabled():
        disabled = reft.read("blocks[2].output", **batch)
    columns = columns_by_hand(batch["attention_mask"], lambda real: real[-1:])
    change = plain_edit(
        raw_blocks(any_model)[1], batch["attention_mask"], columns, lambda h, s, n: h + vector
    )
    with change:
        expected = plain_read(any_model, raw_blocks(any_model)[2], batch)[batch["attention_mask"].bool()]
    assert_close(edited.flat("blocks[2].output @ all").vectors, expected)
    added = edited.flat("blocks[1].output @ all").vectors - bare.flat("blocks[1].output @ all").vectors
    assert_close(added[5], vector)
    assert added[:5].abs().max() == 0
    name = "blocks[2].output @ all"
    assert torch.equal(disabled.flat(name).vectors, bare.flat(name).vectors)
    assert (edited.flat(name).vectors - bare.flat(name).vectors).abs().max() > 1e-2


def test_the_graphs_own_reads_are_the_default(llama: Any) -> None:
    graph = rl.InterventionGraph(
        rl.Read("blocks[0].output @ last", name="early"), rl.Read("blocks[*].mlp.output @ first", name="mlp")
    )
    reading = graph.bind(llama).read(**batch_of(LENGTHS))
    assert list(reading) == ["early", "mlp[0]", "mlp[1]", "mlp[2]"]


def test_the_graphs_reads_in_source_runs_are_returned_too(llama: Any) -> None:
    graph = rl.InterventionGraph(
        rl.Source("other"),
        rl.Edit("zero", at="blocks[0].output", run="other", intervention=rl.Zero()),
        rl.Read("blocks[0].output @ last", run="other", name="there"),
        rl.Read("blocks[1].output @ last", name="here"),
    )
    batch, other = batch_of(LENGTHS), batch_of(LENGTHS, seed=9)
    reading = graph.bind(llama).read(**batch, sources={"other": other})
    assert set(reading) == {"there", "here"}
    assert reading["there"].abs().max() == 0
    expected = EMPTY.bind(llama).read("blocks[1].output @ last", **batch)["blocks[1].output @ last"]
    assert torch.equal(reading["here"], expected)
    with pytest.raises(rl.RunError, match=r"'there'.*run 'other'.*no inputs were given"):
        graph.bind(llama).read(**batch)


def test_positions_are_shared_by_reads_that_name_none(llama: Any) -> None:
    reading = EMPTY.bind(llama).read(
        "blocks[0].output",
        "blocks[1].output @ first",
        rl.Read("blocks[2].output"),
        positions="last",
        **batch_of(LENGTHS),
    )
    assert list(reading) == ["blocks[0].output @ last", "blocks[1].output @ first", "blocks[2].output @ last"]


def test_heads_and_features_can_be_read(llama: Any) -> None:
    batch = batch_of(LENGTHS)
    reading = EMPTY.bind(llama).read(
        rl.Read("blocks[1].attn.heads @ last", name="all"), rl.Read("blocks[1].attn.heads @ last", name="one", heads=2),
        rl.Read("blocks[1].attn.heads @ last", name="few", features=[3, 0]), **batch,
    )  # fmt: skip
    assert torch.equal(reading["one"], reading["all"][..., 24:36])
    assert torch.equal(reading["few"], reading["all"][..., [3, 0]])


def test_two_reads_of_one_label_must_be_named(llama: Any) -> None:
    site = "blocks[1].attn.heads @ last"
    with pytest.raises(rl.RunError, match="give them names"):
        EMPTY.bind(llama).read(rl.Read(site, name="a"), rl.Read(site, name="a", heads=1), **batch_of(LENGTHS))


def test_reads_of_different_heads_have_different_names_in_one_block_and_in_all(llama: Any) -> None:
    reft, batch = EMPTY.bind(llama), batch_of(LENGTHS)
    site = "blocks[1].attn.heads @ last"
    (whole,) = reft.read(site, **batch).values()
    found = reft.read(rl.Read(site, heads=0), rl.Read(site, heads=3), **batch)
    assert list(found) == ["blocks[1].attn.heads (heads 0) @ last", "blocks[1].attn.heads (heads 3) @ last"]
    assert torch.equal(found["blocks[1].attn.heads (heads 3) @ last"], whole[..., 36:])
    every = [rl.Read("blocks[*].attn.heads @ last", heads=head) for head in (0, 3)]
    found = reft.read(*every, **batch)
    assert len(found) == 6
    assert torch.equal(found["model.layers.1.self_attn.o_proj.input (heads 3) @ last"], whole[..., 36:])


def test_reading_nothing_or_what_is_not_there_is_an_error(llama: Any) -> None:
    reft = EMPTY.bind(llama)
    with pytest.raises(rl.RunError, match="nothing to read"):
        reft.read(**batch_of(LENGTHS))
    with pytest.raises(rl.AddressError, match="has 3 entries"):
        reft.read("blocks[7].output", **batch_of(LENGTHS))
    with pytest.raises(rl.RunError, match="only the base run"):
        reft.read(rl.Read("blocks[0].output", run="other"), **batch_of(LENGTHS))


def test_vectors_carry_gradients_only_when_asked(llama: Any) -> None:
    reft, name = EMPTY.bind(llama), "blocks[1].output @ last"
    assert not reft.read(name, **batch_of(LENGTHS))[name].requires_grad
    reft.read(name, grad=True, **batch_of(LENGTHS))[name].sum().backward()
    assert llama.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    llama.zero_grad()


def test_reads_keep_the_models_dtype(llama: Any) -> None:
    reading = EMPTY.bind(copy_of(llama).bfloat16()).read("blocks[0].output @ last", **batch_of(LENGTHS))
    assert reading["blocks[0].output @ last"].dtype == torch.bfloat16
