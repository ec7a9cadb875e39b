"""Separately trained edits put together over one model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import reftlab as rl
from reftlab.errors import BindError, GraphError
from tests.models import batch_of, copy_of
from tests.oracle import assert_close, randomise


def trained(
    model: Any, name: str, at: str = "blocks[1].output", seed: int = 0, **options: Any
) -> rl.BoundModel:
    graph = rl.InterventionGraph(
        rl.Edit(name, at=at, positions="last", intervention=rl.LoReFT(rank=2), **options)
    )
    reft = graph.bind(model)
    randomise(reft)
    with torch.no_grad():
        for parameter in reft.interventions.parameters():
            parameter.add_(0.1 * seed)
    return reft


@torch.no_grad()
def test_a_sum_acts_as_both_one_after_the_other(any_model: Any) -> None:
    batch = batch_of((7, 4))
    a, b = trained(any_model, "a"), trained(any_model, "b", seed=1)
    both = a + b
    inner, outer = a.interventions["a"], b.interventions["b"]
    read = "blocks[1].output @ last"
    bare = rl.InterventionGraph().bind(any_model).read(read, **batch)[read]
    got = both.read(read, **batch)[read]
    assert_close(got, outer(inner(bare[:, 0]))[:, None])
    assert_close((b + a).read(read, **batch)[read], inner(outer(bare[:, 0]))[:, None])
    assert (got - (b + a).read(read, **batch)[read]).abs().max() > 1e-3
    assert_close(both.select("a")(**batch).logits, a(**batch).logits)
    assert_close(both(**batch, select="b").logits, b(**batch).logits)
    assert torch.equal(both.scale("b", 0.0)(**batch).logits, a(**batch).logits)
    assert_close(both(**batch, scale={"a": 0.3}).logits, (a.scale("a", 0.3) + b)(**batch).logits)


def test_a_sum_shares_the_interventions_and_leaves_its_parts_alone(llama: Any) -> None:
    a, b = trained(llama, "a", at="blocks[*].output"), trained(llama, "b")
    both = a + b
    assert both.interventions["a[0]"] is a.interventions["a[0]"]
    assert both.interventions["b"] is b.interventions["b"]
    assert list(a.interventions) == ["a[0]", "a[1]", "a[2]"]
    renamed = a.rename({"a": "c"})
    assert renamed.interventions["c[1]"] is a.interventions["a[1]"]
    assert [edit.name for edit in a.graph.edits] == ["a"]


def test_clashes_are_told_with_a_way_out(llama: Any) -> None:
    a, other = trained(llama, "a"), trained(llama, "a", seed=1)
    with pytest.raises(GraphError, match=r"the name 'a' is used twice.*rename"):
        a + other
    assert [edit.name for edit in (a + other.rename({"a": "z"})).graph.edits] == ["a", "z"]
    with pytest.raises(BindError, match="two models"):
        a + trained(copy_of(llama), "b")
    with pytest.raises(BindError, match="both have an intervention 'w'"):
        trained(llama, "a", share="w") + trained(llama, "b", share="w")
    with pytest.raises(GraphError, match="no node 'x'"):
        a.select("x")


@torch.no_grad()
def test_a_sum_is_saved_and_loaded_whole(llama: Any, tmp_path: Any) -> None:
    batch = batch_of((7, 4))
    both = trained(llama, "a") + trained(llama, "b", seed=1).scale("b", 0.5)
    both.save(tmp_path / "both")
    again = rl.load(tmp_path / "both", llama)
    assert torch.equal(again(**batch).logits, both(**batch).logits)


@torch.no_grad()
def test_shared_edits_have_one_intervention(any_model: Any) -> None:
    batch = batch_of((7, 4))
    linked = trained(any_model, "a", at="blocks[0,2].output", share="one")
    assert list(linked.interventions) == ["one"]
    apart = trained(any_model, "a", at="blocks[0,2].output")
    for intervention in apart.interventions.values():
        intervention.load_state_dict(linked.interventions["one"].state_dict())
    assert torch.equal(linked(**batch).logits, apart(**batch).logits)
    with pytest.raises(BindError, match="share 'one' and differ"):
        rl.InterventionGraph(
            rl.Edit("a", at="blocks[0].output", intervention=rl.LoReFT(rank=2), share="one"),
            rl.Edit("b", at="blocks[0].output", intervention=rl.LoReFT(rank=3), share="one"),
        ).bind(any_model)


def test_plans_count_shared_numbers_once_and_gates_too(llama: Any) -> None:
    linked = trained(llama, "a", at="blocks[*].output", share="one")
    assert linked.plan().parameters == sum(p.numel() for p in linked.interventions.parameters())
    gated = trained(llama, "g", when=rl.gate("blocks[0].output"))
    assert gated.plan().parameters == sum(p.numel() for p in gated.interventions.parameters())
    assert gated.plan().parameters == trained(llama, "g").plan().parameters + llama.config.hidden_size + 1


@torch.no_grad()
def test_reads_see_the_chosen_edits_alone(llama: Any) -> None:
    batch, read = batch_of((7, 4)), "blocks[2].output @ last"
    a, b = trained(llama, "a"), trained(llama, "b", seed=1)
    got = (a + b).read(read, **batch, select="b", scale={"b": 0.5})[read]
    assert_close(got, b.scale("b", 0.5).read(read, **batch)[read])
