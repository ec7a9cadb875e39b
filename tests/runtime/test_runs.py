"""Source runs: shared inputs, broadcast rows, given tensors, gradients, and path patching."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import reftlab as rl
from tests.families.hand import read_by_hand
from tests.families.table import into
from tests.models import HEAD_SIZE, batch_of
from tests.oracle import assert_close, columns_by_hand, gathered, hooked, plain_edit, plain_read, raw_blocks

LENGTHS = (7, 4, 9)
sides = pytest.mark.parametrize("side", ["left", "right"])


def swap(at: str = "blocks[1].output", positions: str = "last", **read: Any) -> rl.InterventionGraph:
    source = rl.Read(run="other", **read)
    return rl.InterventionGraph(
        rl.Source("other"), rl.Edit("swap", at=at, positions=positions, intervention=rl.Swap(), source=source)
    )


def swapped_by_hand(model: Any, batch: dict[str, Tensor], vectors: Tensor, block: int = 1) -> Tensor:
    columns = columns_by_hand(batch["attention_mask"], lambda real: real[-1:])
    with plain_edit(raw_blocks(model)[block], batch["attention_mask"], columns, lambda h, s, n: s, vectors):
        return model(**batch).logits


@torch.no_grad()
@sides
def test_one_row_of_a_source_stands_for_all_rows(any_model: Any, side: str) -> None:
    batch, other = batch_of(LENGTHS, side), batch_of((5,), side, seed=3)
    vectors = plain_read(any_model, raw_blocks(any_model)[1], other)
    last = gathered(vectors, columns_by_hand(other["attention_mask"], lambda real: real[-1:]))
    expected = swapped_by_hand(any_model, batch, last.expand(3, -1))
    assert_close(swap().bind(any_model)(**batch, sources={"other": other}).logits, expected)


@torch.no_grad()
def test_several_tokens_of_one_row_stand_for_all_rows(llama: Any) -> None:
    batch, other = batch_of(LENGTHS), batch_of((6,), seed=3)
    reft = swap(positions="last(3)").bind(llama)
    repeated = {key: value.expand(3, -1) for key, value in other.items()}
    expected = reft(**batch, sources={"other": repeated}).logits
    assert_close(reft(**batch, sources={"other": other}).logits, expected)


@torch.no_grad()
def test_given_tensors_take_the_place_of_a_run(any_model: Any) -> None:
    batch, other = batch_of(LENGTHS), batch_of(LENGTHS, seed=3)
    columns = columns_by_hand(other["attention_mask"], lambda real: real[-1:])
    vectors = gathered(plain_read(any_model, raw_blocks(any_model)[1], other), columns)
    expected = swapped_by_hand(any_model, batch, vectors)
    reft = swap(name="patch").bind(any_model)
    for key in ("other", "swap", "patch"):
        assert_close(reft(**batch, reads={key: vectors[:, None]}).logits, expected)
        assert_close(reft(**batch, reads={key: vectors}).logits, expected)
    one = swapped_by_hand(any_model, batch, vectors[:1].expand(3, -1))
    assert_close(reft(**batch, reads={"other": vectors[0]}).logits, one)
    several = swap(positions="last(2)").bind(any_model)
    flat = torch.randn(6, vectors.shape[1])
    assert_close(
        several(**batch, reads={"swap": flat}).logits,
        several(**batch, reads={"swap": flat.reshape(3, 2, -1)}).logits,
    )


@pytest.mark.usefixtures("users_call")
def test_given_tensors_that_do_not_fit_are_refused(llama: Any) -> None:
    batch, reft = batch_of(LENGTHS), swap(positions="last(2)").bind(llama)
    for reads, message in (
        ({"othr": torch.ones(32)}, "reads has 'othr'.*Did you mean 'other'"),
        ({"other": torch.ones(5, 32)}, "edits 6 vectors.*gives it 5"),
        ({"other": torch.ones(3, 1, 32)}, "row 0 edits 2 tokens.*source offers 1"),
        ({"other": torch.ones(3, 2, 31)}, r"source's vectors are \(6, 31\)"),
        ({"other": [1.0]}, "expected a tensor"),
        ([1], "expected tensors by name"),
    ):
        with pytest.raises(rl.RunError, match=message):
            reft(**batch, reads=reads)


@torch.no_grad()
def test_a_source_can_run_on_the_bases_own_inputs(any_model: Any) -> None:
    """The token before takes the place of the last one: a read of the clean run, shifted."""
    batch = batch_of(LENGTHS)
    graph = rl.InterventionGraph(
        rl.Source("clean", inputs="base"),
        rl.Edit(
            "shift", at="blocks[1].output", positions="last", intervention=rl.Swap(),
            source=rl.Read(positions=[-2], run="clean"),
        ),
    )  # fmt: skip
    columns = columns_by_hand(batch["attention_mask"], lambda real: real[-2:-1])
    vectors = gathered(plain_read(any_model, raw_blocks(any_model)[1], batch), columns)
    expected = swapped_by_hand(any_model, batch, vectors)
    reft = graph.bind(any_model)
    assert_close(reft(**batch).logits, expected)
    assert_close(reft(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, expected)
    with pytest.raises(rl.GraphError, match="refers to run 'clear'"):
        rl.InterventionGraph(rl.Source("clean", inputs="clear"))


def test_gradients_flow_through_a_source_only_when_asked(llama: Any) -> None:
    batch, other = batch_of(LENGTHS), batch_of(LENGTHS, seed=3)
    for grad in (False, True):
        graph = rl.InterventionGraph(
            rl.Source("other", grad=grad),
            rl.Edit("learn", at="blocks[0].output", run="other", intervention=rl.LoReFT(rank=2)),
            rl.Edit(
                "swap",
                at="blocks[1].output",
                positions="last",
                intervention=rl.Swap(),
                source=rl.Read(run="other"),
            ),
        )
        reft = graph.bind(llama).requires_grad_(False)
        reft.interventions.requires_grad_(True)
        logits = reft(**batch, sources={"other": other}).logits
        assert logits.requires_grad is grad
        if grad:
            logits.sum().backward()
            assert float(reft.interventions["learn"].linear.weight.grad.abs().sum()) > 0


@torch.no_grad()
@sides
def test_direct_path_patching_from_one_head_to_anothers_queries_is_a_plain_graph(
    llama: Any, side: str
) -> None:
    """Sender: head 1 of layer 0 at every token, from the corrupt run. Receiver: queries of head 2 in layer 2.

    In the run `path` the sender is corrupt and every other head and every MLP between is held as
    in the clean run, so that only the residual stream carries the change; the base run then takes
    from it the receiver's queries and nothing else.
    """
    batch, corrupt = batch_of(LENGTHS, side), batch_of(LENGTHS, side, seed=3)

    def held(name: str, at: str, **view: Any) -> rl.Edit:
        return rl.Edit(name, at=at, run="path", intervention=rl.Swap(), source=rl.Read(run="clean"), **view)

    graph = rl.InterventionGraph(
        rl.Edit(
            "receive", at="model.layers[2].self_attn.q_proj.output", heads=[2], intervention=rl.Swap(),
            source=rl.Read(run="path"),
        ),
        rl.Edit("send", at="blocks[0].attn.heads", heads=[1], run="path", intervention=rl.Swap(), source=rl.Read(run="corrupt")),
        held("rest", "blocks[0].attn.heads", heads=[0, 2, 3]),
        held("attn1", "blocks[1].attn.output"),
        held("mlps", "blocks[0,1].mlp.output"),
        rl.Source("path", inputs="base"), rl.Source("clean", inputs="base"), rl.Source("corrupt"),
    )  # fmt: skip
    layers = llama.model.layers
    mask = batch["attention_mask"][..., None].bool()

    own = slice(HEAD_SIZE, 2 * HEAD_SIZE)
    heads = into("model.layers.0.self_attn.o_proj")
    clean_heads, other_heads = (read_by_hand(llama, heads, inputs) for inputs in (batch, corrupt))
    patched = clean_heads.clone()
    patched[..., own] = torch.where(mask, other_heads[..., own], clean_heads[..., own])
    change = (patched - clean_heads) @ layers[0].self_attn.o_proj.weight.T
    residual = plain_read(llama, layers[1], batch) + change
    queries = layers[2].self_attn.q_proj(layers[2].input_layernorm(residual))
    receiver = slice(2 * HEAD_SIZE, 3 * HEAD_SIZE)

    def receive(output: Tensor) -> Tensor:
        output[..., receiver] = torch.where(mask, queries[..., receiver], output[..., receiver])
        return output

    with hooked(layers[2].self_attn.q_proj, receive):
        expected = llama(**batch).logits
    real = batch["attention_mask"].bool()
    got = graph.bind(llama)(**batch, sources={"corrupt": corrupt}).logits
    assert_close(got[real], expected[real], 1e-4)
    assert (expected - llama(**batch).logits)[real].abs().max() > 1e-2


@torch.no_grad()
def test_a_source_on_the_bases_inputs_is_refused_where_the_base_continues_a_cache(llama: Any) -> None:
    batch = batch_of((5, 5))
    graph = rl.InterventionGraph(
        rl.Source("clean", inputs="base"),
        rl.Edit(
            "e", at="blocks[1].output", positions="last", intervention=rl.Swap(), source=rl.Read(run="clean")
        ),
    )
    reft = graph.bind(llama)
    cache = reft(**batch, use_cache=True).past_key_values
    with pytest.raises(rl.RunError, match="covers a part of them alone"):
        reft(input_ids=batch["input_ids"][:, :1], past_key_values=cache)
