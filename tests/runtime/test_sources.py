"""Values from other forward passes: interchange, nested sources, and edits inside sources."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import reftlab as rl
from tests.models import batch_of
from tests.oracle import assert_close, columns_by_hand, gathered, plain_edit, plain_read, raw_blocks

LENGTHS = (6, 3, 8)


def swap(
    name: str = "swap", block: int = 1, positions: Any = "last", source: rl.Read | None = None
) -> rl.Edit:
    source = source or rl.Read(run="other")
    at = f"blocks[{block}].output"
    return rl.Edit(name, at=at, positions=positions, intervention=rl.Swap(), source=source)


def swap_from(name: str, block: int, run: str, source: str) -> rl.Edit:
    at = f"blocks[{block}].output"
    return rl.Edit(name, at=at, positions="last", run=run, intervention=rl.Swap(), source=rl.Read(run=source))


def last(real: list[int]) -> list[int]:
    return real[-1:]


def swapped(model: Any, batch: dict[str, Tensor], block: int, vectors: Tensor, choose: Any = last) -> Any:
    columns = columns_by_hand(batch["attention_mask"], choose)
    return plain_edit(raw_blocks(model)[block], batch["attention_mask"], columns, lambda h, s, n: s, vectors)


def vectors_of(model: Any, batch: dict[str, Tensor], block: int, choose: Any = last) -> Tensor:
    columns = columns_by_hand(batch["attention_mask"], choose)
    return gathered(plain_read(model, raw_blocks(model)[block], batch), columns)


@pytest.mark.parametrize("side", ["left", "right"])
def test_interchange_from_another_site_and_another_position(any_model: Any, side: str) -> None:
    batch, other = batch_of(LENGTHS, side), batch_of((4, 9, 2), "right", seed=3)
    graph = rl.InterventionGraph(
        rl.Source("other"), swap(source=rl.Read("blocks[0].output @ first", run="other"))
    )
    with torch.no_grad():
        got = graph.bind(any_model)(**batch, sources={"other": other}).logits
        vectors = vectors_of(any_model, other, 0, lambda real: real[:1])
        with swapped(any_model, batch, 1, vectors):
            expected = any_model(**batch).logits
        bare = any_model(**batch).logits
    real = batch["attention_mask"].bool()
    assert_close(got[real], expected[real])
    assert (got - bare)[real].abs().max() > 1e-2


def test_sources_feed_sources(any_model: Any) -> None:
    batch, middle, inner = batch_of(LENGTHS), batch_of(LENGTHS, seed=3), batch_of(LENGTHS, seed=4)
    graph = rl.InterventionGraph(
        swap_from("outer", 2, "base", "middle"),
        rl.Source("middle"), swap_from("inside", 0, "middle", "inner"), rl.Source("inner"),
    )  # fmt: skip
    with torch.no_grad():
        got = graph.bind(any_model)(**batch, sources={"middle": middle, "inner": inner}).logits
        with swapped(any_model, middle, 0, vectors_of(any_model, inner, 0)):
            vectors = vectors_of(any_model, middle, 2)
        plain = vectors_of(any_model, middle, 2)
        with swapped(any_model, batch, 2, vectors):
            expected = any_model(**batch).logits
    real = batch["attention_mask"].bool()
    assert_close(got[real], expected[real])
    assert (vectors - plain).abs().max() > 1e-2


def test_a_source_may_be_an_earlier_site_of_the_same_run(any_model: Any) -> None:
    batch = batch_of(LENGTHS)
    graph = rl.InterventionGraph(
        rl.Edit(
            "copy", at="blocks[2].output", positions="last", intervention=rl.Swap(),
            source=rl.Read("blocks[0].output @ first"),
        )
    )  # fmt: skip
    with torch.no_grad():
        got = graph.bind(any_model)(**batch).logits
        with swapped(any_model, batch, 2, vectors_of(any_model, batch, 0, lambda real: real[:1])):
            expected = any_model(**batch).logits
    real = batch["attention_mask"].bool()
    assert_close(got[real], expected[real])


def test_one_source_serves_several_edits_and_every_site_of_one(llama: Any) -> None:
    batch, other = batch_of(LENGTHS), batch_of(LENGTHS, seed=3)
    source = rl.Source("other")
    every = rl.Edit(
        "every", at="blocks[*].output", positions="last", intervention=rl.Swap(), source=rl.Read(run="other")
    )
    with torch.no_grad():
        one = rl.InterventionGraph(source, every).bind(llama)(**batch, sources={"other": other}).logits
        several = rl.InterventionGraph(source, *(swap(f"s{n}", n) for n in range(3)))
        three = several.bind(llama)(**batch, sources={"other": other}).logits
        theirs = llama(**other).logits
    assert_close(one, three)
    for row, length in enumerate(LENGTHS):
        assert_close(one[row, length - 1], theirs[row, length - 1])


def test_a_swap_with_a_run_on_the_same_inputs_changes_nothing(any_model: Any) -> None:
    batch = batch_of(LENGTHS, "left")
    graph = rl.InterventionGraph(rl.Source("other"), swap(positions="all"))
    with torch.no_grad():
        got = graph.bind(any_model)(**batch, sources={"other": batch}).logits
        bare = any_model(**batch).logits
    real = batch["attention_mask"].bool()
    assert torch.equal(got[real], bare[real])


def test_heads_are_exchanged_and_the_others_left(llama: Any) -> None:
    batch, other = batch_of(LENGTHS), batch_of(LENGTHS, seed=3)
    edit = rl.Edit(
        "swap",
        at="blocks[1].attn.heads",
        heads=[2],
        positions="last",
        intervention=rl.Swap(),
        source=rl.Read(run="other"),
    )
    reft = rl.InterventionGraph(rl.Source("other"), edit).bind(llama)
    site = "blocks[1].attn.heads @ last"
    got = reft.read(site, **batch, sources={"other": other})[site]
    with reft.disabled():
        mine, theirs = reft.read(site, **batch)[site], reft.read(site, **other)[site]
    assert torch.equal(got[..., 24:36], theirs[..., 24:36])
    assert torch.equal(got[..., :24], mine[..., :24])
    assert torch.equal(got[..., 36:], mine[..., 36:])


def test_a_source_is_run_no_further_than_it_is_read(llama: Any) -> None:
    ran: list[int] = []
    handle = llama.model.layers[2].register_forward_pre_hook(lambda *_: ran.append(2))
    try:
        reft = rl.InterventionGraph(rl.Source("other"), swap(block=1)).bind(llama)
        with torch.no_grad():
            reft(**batch_of(LENGTHS), sources={"other": batch_of(LENGTHS)})
    finally:
        handle.remove()
    assert ran == [2]


def test_generation_reads_its_source_once_for_every_beam(llama: Any) -> None:
    batch, other = batch_of(LENGTHS, "left"), batch_of(LENGTHS, "left", seed=3)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "do_sample": False}
    reft = rl.InterventionGraph(rl.Source("other"), swap(positions="l2")).bind(llama)
    got = reft.generate(**batch, **options, sources={"other": other})

    def two(real: list[int]) -> list[int]:
        return real[-2:]

    with swapped(llama, batch, 1, vectors_of(llama, other, 1, two), two):
        expected = llama.generate(**batch, **options)
    assert torch.equal(got, expected)
    assert not torch.equal(got, llama.generate(**batch, **options))


@pytest.mark.parametrize("call", ["forward", "generate", "read"])
def test_a_missing_source_is_named_with_the_edit_that_needs_it(llama: Any, call: str) -> None:
    reft = rl.InterventionGraph(rl.Source("other"), swap()).bind(llama)
    batch = batch_of(LENGTHS)
    calls = {
        "forward": lambda: reft(**batch),
        "generate": lambda: reft.generate(**batch, max_new_tokens=2),
        "read": lambda: reft.read("blocks[2].output", **batch),
    }
    with pytest.raises(rl.RunError, match="edit 'swap' reads from run 'other', and no inputs were given"):
        calls[call]()
    with reft.disabled():
        calls[call]()


def test_a_source_that_the_graph_does_not_declare_is_refused(llama: Any) -> None:
    reft = rl.InterventionGraph(rl.Source("other"), swap()).bind(llama)
    with pytest.raises(rl.RunError, match=r"has 'othr'.*Did you mean 'other'"):
        reft(**batch_of(LENGTHS), sources={"othr": batch_of(LENGTHS)})
    with pytest.raises(rl.RunError, match="does not declare"):
        rl.InterventionGraph().bind(llama)(**batch_of(LENGTHS), sources={"other": batch_of(LENGTHS)})


def test_sources_of_another_batch_or_other_counts_name_the_row(llama: Any) -> None:
    batch = batch_of(LENGTHS)
    reft = rl.InterventionGraph(rl.Source("other"), swap(positions="first(4)")).bind(llama)
    with pytest.raises(rl.RunError, match="has 2 rows, this one 3"):
        reft(**batch, sources={"other": batch_of((6, 3))})
    with pytest.raises(rl.RunError, match=r"row 1 edits 3 tokens \(first\(4\)\) and its source offers 4"):
        reft(**batch, sources={"other": batch_of((6, 6, 8))})


def test_an_edit_in_a_run_that_nobody_reads_is_refused(llama: Any) -> None:
    graph = rl.InterventionGraph(
        rl.Source("other"), rl.Edit("lost", at="blocks[0].output", run="other", intervention=rl.Zero())
    )
    with pytest.raises(rl.BindError, match="edit 'lost' acts in run 'other', and nothing reads that run"):
        graph.bind(llama)


def test_sources_are_constants_to_autograd(llama: Any) -> None:
    graph = rl.InterventionGraph(
        rl.Source("other"), swap(block=2),
        rl.Edit("there", at="blocks[0].output", run="other", intervention=rl.LoReFT(2)),
        rl.Edit("here", at="blocks[0].output", intervention=rl.LoReFT(2)),
    )  # fmt: skip
    reft = graph.bind(llama)
    reft(**batch_of((6, 6)), sources={"other": batch_of((6, 6), seed=3)}).logits.square().sum().backward()
    assert all(p.grad is None for p in reft.interventions["there"].parameters())
    assert all(p.grad is not None for p in reft.interventions["here"].parameters())
    llama.zero_grad()
