"""Odd combinations of the language, each of which once went wrong without a word."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reftlab as rl
from reftlab.training.edit_trainer import _parts
from tests.models import batch_of, build, copy_of, inputs_of
from tests.oracle import VECTOR, assert_close

B, SQUARE = batch_of((7, 4, 9)), batch_of((7, 7, 7))
GREEDY: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}


def edit(name: str, block: int, positions: Any = "last", intervention: Any = None, **options: Any) -> rl.Edit:
    intervention = intervention or rl.Add(VECTOR)
    return rl.Edit(
        name, at=f"blocks[{block}].output", positions=positions, intervention=intervention, **options
    )


def reft(name: str, block: int, **options: Any) -> rl.Edit:
    return edit(name, block, intervention=rl.LoReFT(rank=2), **options)


def swap(
    name: str, block: int, positions: Any = "last", at: str | None = None, run: str = "c", **options: Any
) -> rl.Edit:
    return edit(name, block, positions, rl.Swap(), source=rl.Read(at, run=run), **options)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["source", "condition"])
def test_edits_of_other_sites_may_be_listed_in_any_order(llama: Any, kind: str) -> None:
    if kind == "source":
        late = edit("late", 2, intervention=rl.Swap(), source=rl.Read("blocks[0].output"))
    else:
        late = edit("late", 2, when=rl.norm("blocks[0].output @ last") > 50)
    early = edit("early", 0, intervention=rl.Add(100 * VECTOR))
    one, other = rl.InterventionGraph(late, early).bind(llama), rl.InterventionGraph(early, late).bind(llama)
    assert torch.equal(one(**B).logits, other(**B).logits)
    assert (one(**B).logits - one(**B, select="early").logits).abs().max() > 1e-5


@torch.no_grad()
def test_a_run_on_the_bases_inputs_knows_where_its_prompt_ends(llama: Any) -> None:
    labels = B["input_ids"].clone()
    for row, length in enumerate((7, 4, 9)):
        labels[row, : length - 2] = -100
        labels[row, length:] = -100
    graph = rl.InterventionGraph(rl.Source("c", inputs="base"), swap("e", 2, at="blocks[0].output"))
    bound = graph.bind(llama)
    assert_close(
        bound(**B, labels=labels).logits,
        bound(**B, labels=labels, sources={"c": {**B, "labels": labels}}).logits,
    )


@torch.no_grad()
def test_a_run_on_the_bases_inputs_takes_all_of_them() -> None:
    class Gained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
            return self.a(x * gain)

    net, x = Gained(), torch.randn(3, 4)
    itself = rl.Edit("e", at="a.output", intervention=rl.Swap(), source=rl.Read(run="c"))
    bound = rl.InterventionGraph(rl.Source("c", inputs="base"), itself).bind(
        net, example={"x": torch.randn(2, 4)}
    )
    assert torch.equal(bound(x, gain=3.0), net(x, gain=3.0))


def test_a_sum_does_not_let_one_part_edit_what_the_other_reads(llama: Any) -> None:
    patched = rl.InterventionGraph(rl.Source("c"), edit("p", 0, "all", run="c"), swap("a", 1))
    plain = rl.InterventionGraph(rl.Source("c"), swap("b", 1))
    with pytest.raises(rl.GraphError, match="only one of them edits it"):
        patched + plain
    both = patched + plain.rename({"c": "d"})
    batch = {"sources": {"c": SQUARE, "d": SQUARE}, **B}
    with torch.no_grad():
        got = both.bind(llama)(**batch, select="b").logits
        assert_close(got, plain.bind(llama)(**B, sources={"c": SQUARE}).logits)


@torch.no_grad()
def test_the_edits_of_a_source_stay_with_whoever_reads_it(llama: Any) -> None:
    graph = rl.InterventionGraph(rl.Source("c"), edit("p", 0, "all", run="c"), swap("a", 1), edit("z", 2))
    bound = graph.bind(llama)
    alone = bound.select("a")
    assert [e.name for e in alone.graph.edits] == ["p", "a"]
    expected = alone(**B, sources={"c": SQUARE}).logits
    assert_close(bound(**B, sources={"c": SQUARE}, select="a").logits, expected)
    assert_close(bound(**B, sources={"c": SQUARE}, tasks="a").logits, expected)
    two = rl.InterventionGraph(*graph, edit("p2", 0, "all", run="c")).bind(llama)
    assert_close(two(**B, sources={"c": SQUARE}, select=["a", "p"]).logits, expected)
    assert [e.name for e in two.select("a", "p").graph.edits] == ["p", "a"]


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_prompt_in_chunks_is_read_as_one(llama: Any, size: int) -> None:
    options: dict[str, Any] = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    pair = edit("e", 1, "last(2)", rl.Swap(), source=rl.Read("blocks[0].output @ first(2)"))
    alike = edit("e", 2, when=rl.cosine("blocks[0].output @ last", "blocks[0].output @ first") > -2)
    for one, batch in ((pair, SQUARE), (alike, batch_of((7, 4, 9), "left"))):
        bound = rl.InterventionGraph(one).bind(llama)
        whole = bound.generate(**batch, **options).logits
        parts = bound.generate(**batch, **options, prefill_chunk_size=size).logits
        assert_close(torch.stack(parts), torch.stack(whole), 1e-4)


@torch.no_grad()
def test_gates_of_shared_edits_are_their_own(llama: Any) -> None:
    one = reft("a", 0, share="w", when=rl.gate("blocks[0].output", sparsity=0.1))
    other = reft(
        "b", 1, share="w", when=rl.gate(rl.Read("blocks[0].output", features=[0, 1, 2]), sparsity=0.9)
    )
    bound = rl.InterventionGraph(one, other).bind(llama)
    assert sorted(bound.interventions) == ["a(gate)", "b(gate)", "w"]
    assert bound.interventions["b(gate)"].sparsity == 0.9
    bound(**B)


@torch.no_grad()
def test_means_match_rows_as_swaps_do(llama: Any) -> None:
    mean = edit("e", 1, "last(2)", rl.Mean(), source=rl.Read(run="c"))
    bound, x = rl.InterventionGraph(rl.Source("c"), mean).bind(llama), torch.randn(3, 2, 32)
    assert_close(bound(**B, reads={"e": x.reshape(6, 32)}).logits, bound(**B, reads={"e": x}).logits)
    assert_close(bound(**B, reads={"e": x.mean(1)}).logits, bound(**B, reads={"e": x}).logits)
    for lengths in ((5, 5), (5, 5, 5, 5)):
        with pytest.raises(rl.RunError, match=f"has {len(lengths)} rows, this one 3"):
            bound(**B, sources={"c": batch_of(lengths)})
    with pytest.raises(rl.RunError, match="row 1 has no vector"):
        bound(**B, sources={"c": B}, positions={"e": [[1], [2], [3]], "e.source": [[1], [], [2]]})


@torch.no_grad()
def test_patterns_of_batches_that_are_padded_otherwise_are_not_mixed(llama: Any) -> None:
    at = rl.Edit(
        "e", at="blocks[1].attn.pattern", positions="last", intervention=rl.Swap(), source=rl.Read(run="c")
    )
    bound = rl.InterventionGraph(rl.Source("c"), at).bind(llama)
    with pytest.raises(rl.RunError, match="padded otherwise"):
        bound(**batch_of((7, 4, 9), "left"), sources={"c": B})


@torch.no_grad()
def test_logits_kept_by_number_are_not_edited_blindly(llama: Any) -> None:
    bound = rl.InterventionGraph(
        rl.Edit("e", at="lm_head.output", positions="last", intervention=rl.Add(5.0))
    ).bind(llama)
    with pytest.raises(rl.RunError, match=r"logits_to_keep=\[0\]"):
        bound(**SQUARE, logits_to_keep=torch.tensor([0]))


def test_penalties_count_acting_rows_and_each_module_once(llama: Any) -> None:
    graph = rl.InterventionGraph(reft("a", 1, when=rl.gate("blocks[0].output", sparsity=1.0)), reft("z", 1))
    bound = graph.bind(llama)
    with torch.no_grad():
        bound.interventions["a(gate)"].weight.normal_()
        bound(**B, tasks=["a", "z", "a"])
        mixed = bound.interventions["a(gate)"].penalty()
        bound(**{k: v[[0, 2]] for k, v in B.items()}, tasks="a")
        assert_close(mixed, bound.interventions["a(gate)"].penalty())
        bound(**B, tasks="z")
    assert bound.interventions["a(gate)"].penalty() is None
    gated = bound.select("a")
    assert len(_parts(gated + gated.rename({"a": "b"}))) == 2


def test_a_disabled_block_holds_for_its_thread_and_in_compositions(llama: Any) -> None:
    bound = rl.InterventionGraph(edit("e", 1)).bind(llama)
    with torch.no_grad():
        expected, seen = bound(**B).logits, []
    with bound.disabled("e"):
        worker = threading.Thread(target=lambda: seen.append(bound(**B).logits))
        worker.start()
        worker.join()
        renamed = bound.rename({"e": "z"})
    assert torch.equal(seen[0], expected)
    with torch.no_grad():
        assert torch.equal(bound(**B).logits, expected)
        assert torch.equal(renamed(**B).logits, llama(**B).logits)


@torch.no_grad()
def test_edits_that_change_nothing_keep_all_digits_of_a_double(llama: Any) -> None:
    double = copy_of(llama).double()
    bound = rl.InterventionGraph(edit("z", 0, "all", rl.Scale(1.0))).bind(double)
    assert torch.equal(bound(**B).logits, double(**B).logits)


@torch.no_grad()
def test_one_source_row_goes_with_choices_for_each_row(llama: Any) -> None:
    bound = rl.InterventionGraph(rl.Source("c"), swap("e", 1)).bind(llama)
    one = batch_of((5,))
    whole = bound(**B, sources={"c": one}).logits
    got = bound(**B, sources={"c": one}, tasks=["e", None, "e"], scale={"e": [1.0, 1.0, 0.0]}).logits
    bare = llama(**B).logits
    assert_close(got[0], whole[0])
    assert_close(got[1:], bare[1:])


def test_training_goes_on_where_nothing_acts(llama: Any, tokenizer: Any) -> None:
    model = copy_of(llama)
    tasks = rl.InterventionGraph(reft("a", 1, when=rl.gate("blocks[0].output", sparsity=1.0)), reft("z", 1))
    rows = [
        rl.Example("the cat", "dog", "a"),
        rl.Example("the dog", "cat", "z"),
        rl.Example("the dog in", "cat", "z"),
    ]
    rl.train(tasks.bind(model, tokenizer), rows, epochs=2, batch_size=1, progress=False)
    never = rl.InterventionGraph(reft("a", 1, when=rl.norm("blocks[0].output") > 1e6)).bind(model, tokenizer)
    before = {name: p.clone() for name, p in never.interventions.named_parameters()}
    rl.train(never, [("the cat", "dog")], epochs=1, progress=False)
    assert all(torch.equal(before[name], p) for name, p in never.interventions.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"when": rl.norm("blocks[0].output") > 1},
        {"intervention": rl.Swap(), "source": rl.Read("blocks[0].output")},
    ],
)
def test_joined_tokens_with_a_read_of_the_same_run_generate(llama: Any, options: dict[str, Any]) -> None:
    bound = rl.InterventionGraph(
        edit("e", 1, "joined(last(2))", **{"intervention": rl.Add(1.0), **options})
    ).bind(llama)
    left = batch_of((7, 4, 9), "left")
    assert torch.equal(bound.generate(**left, **GREEDY), bound.generate(**left, **GREEDY, use_cache=False))


@torch.no_grad()
def test_beams_of_a_decoder_see_what_was_read_in_the_encoder() -> None:
    t5 = build("t5")
    at = {"at": "decoder.block[1].output", "phase": "both", "intervention": rl.Add(VECTOR)}
    always = rl.InterventionGraph(rl.Edit("e", **at)).bind(t5)
    asked = rl.InterventionGraph(rl.Edit("e", **at, when=rl.norm("encoder.block[1].output @ last") > 0)).bind(
        t5
    )
    for beams in (1, 2):
        options = {**GREEDY, "num_beams": beams}
        assert torch.equal(asked.generate(**B, **options), always.generate(**B, **options))


@torch.no_grad()
def test_a_call_may_leave_an_edit_no_token_at_all() -> None:
    vit = build("vit")
    bound = rl.InterventionGraph(edit("e", 1, "given", rl.Add(1.0))).bind(vit)
    inputs = inputs_of("vit")
    rows = len(inputs["pixel_values"])
    assert torch.equal(bound(**inputs, positions={"e": [[]] * rows}).logits, vit(**inputs).logits)


@torch.no_grad()
def test_given_tensors_stand_for_what_conditions_read_too(llama: Any) -> None:
    when = rl.norm(rl.Read("blocks[0].output @ last", run="c", name="x")) > 3
    bound = rl.InterventionGraph(rl.Source("c"), edit("e", 1, when=when)).bind(llama)
    x = torch.zeros(3, 1, 32)
    x[1] = 1.0
    expected = bound(**B, reads={"x": torch.ones(3, 1, 32)}).logits
    got, bare = bound(**B, reads={"x": x}).logits, llama(**B).logits
    assert_close(got[1], expected[1])
    assert_close(got[[0, 2]], bare[[0, 2]])


def test_what_cannot_be_is_told_when_it_is_bound(llama: Any) -> None:
    for wrong, message in (
        (
            edit("e", 1, when=rl.projection("blocks[0].output", torch.ones(7)) > 0),
            "7 numbers for vectors of 32",
        ),
        (reft("e", 1, subspace=[7]), "directions 0 to 1"),
        (reft("e", 1, tasks={"x": [9]}), "directions 0 to 1"),
        (edit("e", 1, intervention=rl.Function(torch.sin), subspace=[7]), "has no directions"),
        (edit("e", 1, when=rl.norm("blocks[0].output @ generated(0:1)") > 0), "leave the positions out"),
    ):
        with pytest.raises(rl.BindError, match=message):
            rl.InterventionGraph(wrong).bind(llama)


@pytest.mark.usefixtures("users_call")
def test_options_of_wrong_kinds_are_named(llama: Any) -> None:
    bound = rl.InterventionGraph(reft("e", 1, tasks={"x": [0], "y": [1]})).bind(llama)
    for options, message in (
        ({"tasks": [[1], None, None]}, "is no task"),
        ({"tasks": ["x"]}, "tasks has 1 entries and the batch 3 rows"),
        ({"scale": {"e": []}}, "expected a factor"),
        ({"select": [["e"]]}, "no edit"),
    ):
        with pytest.raises(rl.RunError, match=message):
            bound(**B, **options)
    with pytest.raises(rl.RunError, match="expected a site"):
        bound.read(5, **B)
    with pytest.raises(rl.GraphError, match="expected new names"):
        bound.rename("e")
    with pytest.raises(rl.BindError, match="bind it first"):
        bound + rl.InterventionGraph()


def test_plans_tell_the_order_of_one_site_as_it_runs(llama: Any) -> None:
    graph = rl.InterventionGraph(
        edit("q", 1), rl.Edit("a", at="blocks[1,2].output", intervention=rl.Scale(2.0)), edit("b", 1)
    )
    assert [bound.key for bound in graph.bind(llama).edits] == ["q", "a[1]", "b", "a[2]"]
    asked = rl.Edit(
        "e", at="blocks[1,2].output", intervention=rl.Scale(2.0), when=rl.norm("blocks[1].output") > 0
    )
    rl.InterventionGraph(asked).bind(llama)(**B)


@torch.no_grad()
def test_one_pattern_for_all_rows_needs_rows_padded_as_it_is(llama: Any) -> None:
    at = rl.Edit(
        "e", at="blocks[1].attn.pattern", positions="last", intervention=rl.Swap(), source=rl.Read(run="c")
    )
    bound, one = rl.InterventionGraph(rl.Source("c"), at).bind(llama), batch_of((6,), seed=3)
    with pytest.raises(rl.RunError, match="padded otherwise"):
        bound(**batch_of((6, 4), "left"), sources={"c": one})
    alike, repeated = batch_of((6, 6)), {name: value.expand(2, -1) for name, value in one.items()}
    expected = bound(**alike, sources={"c": repeated}).logits
    assert_close(bound(**alike, sources={"c": one}).logits, expected)


@torch.no_grad()
def test_a_run_that_nothing_in_a_call_reads_is_not_run_and_needs_no_inputs(llama: Any) -> None:
    inner = edit("a", 0, "last", rl.Swap(), run="mid", source=rl.Read(run="in"))
    outer = edit("b", 1, "last", rl.Swap(), source=rl.Read(run="mid"))
    graph = rl.InterventionGraph(rl.Source("in"), rl.Source("mid"), inner, outer, edit("c", 1))
    bound, passes = graph.bind(llama), []
    alone = bound.select("c")(**B).logits
    handle = llama.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        for options in ({"select": "c"}, {"tasks": "c"}, {"sources": {"in": B}, "select": "c"}):
            passes.clear()
            assert_close(bound(**B, **options).logits, alone)
            assert len(passes) == 1
        with bound.disabled("b"):
            assert_close(bound(**B).logits, alone)
        vector = torch.ones(32)
        expected = bound.select("b", "c")(**B, sources={"in": B, "mid": B}, reads={"mid": vector}).logits
        passes.clear()
        assert_close(bound(**B, reads={"mid": vector}).logits, expected)
        assert len(passes) == 1
    finally:
        handle.remove()
