"""Whose hooks stand on the model, and what a call leaves behind: nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import reftlab as rl
from tests.models import batch_of, copy_of, hook_count
from tests.oracle import assert_close


def graph(name: str = "edit", block: int = 1, **more: Any) -> rl.InterventionGraph:
    more.setdefault("intervention", rl.Add(torch.linspace(-1, 1, 32)))
    return rl.InterventionGraph(rl.Edit(name, at=f"blocks[{block}].output", positions="last", **more))


def failing() -> rl.Function:
    def fail(base: Tensor) -> Tensor:
        raise ArithmeticError("on purpose")

    return rl.Function(fail)


def test_binding_and_calling_leave_no_hook(llama: Any) -> None:
    before = hook_count(llama)
    reft, batch = graph().bind(llama), batch_of()
    assert hook_count(llama) == before
    with torch.no_grad():
        reft(**batch)
    reft.generate(**batch, max_new_tokens=2)
    reft.read("blocks[0].output", **batch)
    reft(**batch).logits.sum().backward()
    assert hook_count(llama) == before


def test_a_users_own_hooks_survive_and_fire_once_a_call(llama: Any) -> None:
    seen: list[str] = []
    layer = llama.model.layers[1]
    handles = [
        layer.register_forward_hook(lambda *_: seen.append("output")),
        layer.register_forward_pre_hook(lambda *_: seen.append("input")),
        llama.register_forward_pre_hook(lambda *_: seen.append("model")),
    ]
    try:
        before = hook_count(llama)
        reft = graph().bind(llama)
        assert seen == []
        with torch.no_grad():
            reft(**batch_of())
        assert seen == ["model", "input", "output"]
        llama(**batch_of())
        assert seen == ["model", "input", "output"] * 2
        assert hook_count(llama) == before
        assert handles[0].id in layer._forward_hooks
    finally:
        for handle in handles:
            handle.remove()


def test_a_users_own_edit_by_hook_adds_to_the_graphs(llama: Any) -> None:
    batch = batch_of()
    with torch.no_grad():
        twice = (graph() + graph("second")).bind(llama)(**batch).logits
        handle = llama.model.layers[1].register_forward_hook(
            lambda module, args, output: output.index_put(
                (torch.arange(3), torch.tensor([6, 3, 8])), torch.linspace(-1, 1, 32), accumulate=True
            )
        )
        try:
            assert_close(graph().bind(llama)(**batch).logits, twice)
        finally:
            handle.remove()


def calls_of(reft: rl.BoundModel, in_source: rl.BoundModel, batch: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "forward": lambda: reft(**batch),
        "generate": lambda: reft.generate(**batch, max_new_tokens=2),
        "read": lambda: reft.read("blocks[2].output", **batch),
        "source": lambda: in_source(**batch, sources={"other": batch}),
    }


@pytest.mark.parametrize("call", ["forward", "generate", "read", "source"])
def test_an_exception_inside_an_intervention_leaves_no_hook(llama: Any, call: str) -> None:
    before, batch = hook_count(llama), batch_of()
    with torch.no_grad():
        expected = llama(**batch).logits
    reft = (graph(block=0) + graph("bad", intervention=failing())).bind(llama)
    in_source = rl.InterventionGraph(
        rl.Source("other"),
        rl.Edit("bad", at="blocks[0].output", run="other", intervention=failing()),
        rl.Edit("swap", at="blocks[1].output", intervention=rl.Swap(), source=rl.Read(run="other")),
    ).bind(llama)
    with pytest.raises(ArithmeticError, match="on purpose"):
        calls_of(reft, in_source, batch)[call]()
    assert hook_count(llama) == before
    with torch.no_grad():
        assert torch.equal(llama(**batch).logits, expected)


def test_an_exception_inside_the_model_leaves_no_hook(llama: Any) -> None:
    reft, before = graph().bind(llama), hook_count(llama)
    with pytest.raises(IndexError):
        reft(input_ids=torch.full((1, 3), 10_000))
    assert hook_count(llama) == before


def test_a_model_changed_after_binding_leaves_no_hook(llama: Any) -> None:
    model = copy_of(llama)
    reft = (graph(block=0) + graph("later", block=2)).bind(model)
    before = hook_count(model)
    removed = hook_count(model.model.layers[2])
    model.model.layers = model.model.layers[:2]
    with pytest.raises(AttributeError):
        reft(**batch_of())
    assert hook_count(model) == before - removed


def test_two_bound_graphs_on_one_model_stay_apart_unless_added(llama: Any) -> None:
    batch = batch_of()
    first, second = graph("a", block=0), graph("b", block=2, intervention=rl.Clamp(-0.1, 0.1))
    one, two, both = first.bind(llama), second.bind(llama), (first + second).bind(llama)
    with torch.no_grad():
        alone = graph("a", block=0).bind(copy_of(llama))(**batch).logits
        bare = llama(**batch).logits
        results = [reft(**batch).logits for reft in (one, two, both, one)]
    assert torch.equal(results[0], alone)
    assert torch.equal(results[3], alone)
    pairs = [(results[0], results[1]), (results[0], results[2]), (results[1], results[2]), (results[1], bare)]
    for a, b in pairs:
        assert (a - b).abs().max() > 1e-2


def test_no_argument_is_mutated(llama: Any) -> None:
    nodes = [
        rl.Source("other"),
        rl.Edit(
            "swap",
            at="blocks[1].output",
            positions="last",
            intervention=rl.Swap(),
            source=rl.Read(run="other"),
        ),
        rl.Edit("clamp", at="model.layers[2].self_attn.input", intervention=rl.Clamp(-0.1, 0.1)),
    ]
    reft = rl.InterventionGraph(*nodes).bind(llama)
    batch = {**batch_of(side="left"), "labels": batch_of(side="left")["input_ids"].clone()}
    batch["labels"][:, :-2] = -100
    sources = {"other": batch_of(side="left", seed=1)}
    kept_batch, kept_sources = copy.deepcopy(batch), copy.deepcopy(sources)
    prompt = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        reft(**batch, sources=sources)
        reft.read("blocks[2].output", sources=sources, **prompt)
    options = {"max_new_tokens": 2, "do_sample": False}
    reft.generate(**prompt, **options, sources=sources)
    assert options == {"max_new_tokens": 2, "do_sample": False}
    for given, kept in ((batch, kept_batch), (sources["other"], kept_sources["other"])):
        assert given.keys() == kept.keys()
        assert all(torch.equal(given[key], kept[key]) for key in kept)


def test_edits_are_out_of_place_for_modules_that_return_their_input() -> None:
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(4, 4))
    inputs = torch.randn(2, 3, 4)
    kept = inputs.clone()
    edit = rl.Edit("zero", at="0.output", intervention=rl.Zero())
    rl.InterventionGraph(edit).bind(model, example=inputs)(inputs)
    assert torch.equal(inputs, kept)


def test_disabling_leaves_edits_out_and_brings_them_back(llama: Any) -> None:
    batch = batch_of()
    reft = (graph("a", block=0) + graph("b", block=2, intervention=rl.Clamp(-0.1, 0.1))).bind(llama)
    with torch.no_grad():
        bare, only_b = llama(**batch).logits, reft.graph.select("b").bind(llama)(**batch).logits
        edited = reft(**batch).logits
        with reft.disabled():
            assert torch.equal(reft(**batch).logits, bare)
            assert torch.equal(
                reft.generate(**batch, max_new_tokens=3), llama.generate(**batch, max_new_tokens=3)
            )
        with reft.disabled("a") as same:
            assert same is reft
            assert torch.equal(reft(**batch).logits, only_b)
            with reft.disabled("b"):
                assert torch.equal(reft(**batch).logits, bare)
            assert torch.equal(reft(**batch).logits, only_b)
        with pytest.raises(KeyboardInterrupt), reft.disabled():
            raise KeyboardInterrupt
        assert torch.equal(reft(**batch).logits, edited)
        with pytest.raises(rl.RunError, match=r"no edit 'c'"), reft.disabled("c"):
            pass


def test_replacing_puts_another_intervention_in_its_place_for_a_while(llama: Any) -> None:
    batch, reft = batch_of(), graph().bind(llama)
    with torch.no_grad():
        edited = reft(**batch).logits
        with reft.replaced("edit", rl.Clamp(-0.1, 0.1)):
            clamped = reft(**batch).logits
        assert_close(clamped, graph(intervention=rl.Clamp(-0.1, 0.1)).bind(llama)(**batch).logits)
        assert torch.equal(reft(**batch).logits, edited)
        with pytest.raises(rl.RunError, match=r"no intervention 'edt'.*Did you mean 'edit'"), \
                reft.replaced("edt", rl.Zero()):  # fmt: skip
            pass
