"""Edits under conditions, against masks computed by hand from plain reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import reftlab as rl
from reftlab.errors import BindError, GraphError
from reftlab.probing.directions import MeanDifference
from tests.models import WIDTH, batch_of, with_position_ids
from tests.oracle import VECTOR, assert_close, columns_by_hand, hooked, plain_edit, plain_read, raw_blocks

LENGTHS = (7, 4, 9)
sides = pytest.mark.parametrize("side", ["left", "right"])


def last_of(real: list[int]) -> list[int]:
    return real[-1:]


def bound(model: Any, when: Any, positions: str = "last", **options: Any) -> rl.BoundModel:
    edit = rl.Edit(
        "edit", at="blocks[2].output", positions=positions, intervention=rl.Add(VECTOR), when=when, **options
    )
    return rl.InterventionGraph(edit).bind(model)


def row_cosines(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Cosine of the first and the last token after block 0, for each row."""
    hidden, values = plain_read(model, raw_blocks(model)[0], batch), []
    for row, mask in enumerate(batch["attention_mask"]):
        real = mask.nonzero()[:, 0]
        a, b = hidden[row, real[0]], hidden[row, real[-1]]
        values.append((a @ b) / (a.norm() * b.norm()))
    return torch.stack(values)


@torch.no_grad()
@sides
def test_a_condition_of_each_row_keeps_the_edit_to_its_rows(any_model: Any, side: str) -> None:
    batch = batch_of(LENGTHS, side)
    cosines = row_cosines(any_model, batch)
    limit = float(cosines.sort().values[:2].mean())
    measure = rl.cosine("blocks[0].output @ last", "blocks[0].output @ first")
    for when, rows in (
        (measure > limit, cosines > limit),
        (measure <= limit, cosines <= limit),
        (~(measure >= limit), cosines < limit),
        ((measure < limit) | (measure > limit + 1e-4), (cosines < limit) | (cosines > limit + 1e-4)),
        ((measure > limit) & (measure < limit), cosines > 9),
    ):
        columns = columns_by_hand(batch["attention_mask"], last_of)
        chosen = [c if bool(keep) else [] for c, keep in zip(columns, rows, strict=True)]
        with plain_edit(
            raw_blocks(any_model)[2], batch["attention_mask"], chosen, lambda h, s, n: h + VECTOR
        ):
            expected = any_model(**batch).logits
        assert_close(bound(any_model, when)(**batch).logits, expected)
    assert 0 < int((cosines > limit).sum()) < len(cosines)


@torch.no_grad()
@sides
def test_a_condition_without_positions_is_asked_of_each_token(any_model: Any, side: str) -> None:
    batch = batch_of(LENGTHS, side)
    norms = plain_read(any_model, raw_blocks(any_model)[0], batch).norm(dim=-1)
    real = batch["attention_mask"].bool()
    limit = float(norms[real].median())
    chosen = [
        ((norm > limit) & keep).nonzero()[:, 0].tolist() for norm, keep in zip(norms, real, strict=True)
    ]
    assert any(chosen)
    with plain_edit(raw_blocks(any_model)[2], batch["attention_mask"], chosen, lambda h, s, n: h + VECTOR):
        expected = any_model(**batch).logits
    reft = bound(any_model, rl.norm("blocks[0].output") > limit, "all")
    assert_close(reft(**batch).logits, expected)


@torch.no_grad()
def test_conditions_hold_in_every_decoding_step(llama: Any) -> None:
    batch = batch_of(LENGTHS, "left")
    direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    unit = direction / direction.norm()

    def change(module: Any, args: Any, output: Tensor) -> Tensor:
        if output.shape[1] == 1:  # a decoding step
            keep = (seen[-1][:, -1] @ unit > 0.0)[:, None]
            fired.append(keep[:, 0])
            return torch.where(keep[..., None], output + VECTOR, output)
        return output

    seen: list[Tensor] = []
    fired: list[Tensor] = []
    early = raw_blocks(llama)[0].register_forward_hook(lambda m, a, o: seen.append(o))
    late = raw_blocks(llama)[2].register_forward_hook(change)
    try:
        expected = llama.generate(**batch, max_new_tokens=8, do_sample=False)
    finally:
        early.remove()
        late.remove()
    reft = bound(llama, rl.projection("blocks[0].output", direction) > 0.0, "all", phase="decode")
    assert torch.equal(reft.generate(**batch, max_new_tokens=8, do_sample=False), expected)
    together = torch.stack(fired)
    assert together.any()
    assert not together.all()


@torch.no_grad()
def test_a_condition_on_the_prompt_holds_for_the_whole_generation_and_every_beam(llama: Any) -> None:
    batch = batch_of(LENGTHS, "left")
    cosines = row_cosines(llama, with_position_ids(batch))
    limit = float(cosines.sort().values[:2].mean())
    when = rl.cosine("blocks[0].output @ last", "blocks[0].output @ first") > limit
    reft = bound(llama, when, "all", phase="both")
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    got = reft.generate(**batch, **options)
    mask = batch["attention_mask"]
    everywhere = columns_by_hand(mask, lambda real: real)
    with plain_edit(raw_blocks(llama)[2], mask, everywhere, lambda h, s, n: h + VECTOR, decode=True):
        edited = llama.generate(**batch, **options)
    bare = llama.generate(**batch, **options)
    expected = torch.where((cosines > limit)[:, None], edited, bare)
    assert torch.equal(got, expected)
    assert not torch.equal(edited, bare)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["LogisticRegression", "LinearDiscriminantAnalysis", "MeanDifference"])
def test_a_condition_can_read_another_run_and_a_probe_can_decide(llama: Any, kind: str) -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    batch, other = batch_of(LENGTHS), batch_of(LENGTHS, seed=9)
    generator = torch.Generator().manual_seed(2)
    vectors = torch.randn(60, WIDTH, generator=generator) * 3 + 1
    kinds: list[Any] = [LogisticRegression, LinearDiscriminantAnalysis, MeanDifference]
    head = next(one for one in kinds if one.__name__ == kind)()
    probe = make_pipeline(StandardScaler(), head).fit(vectors.numpy(), (vectors[:, 0] > 1).numpy())
    hidden = plain_read(llama, raw_blocks(llama)[1], other)
    last = [int(row.nonzero()[-1]) for row in other["attention_mask"]]
    chances = torch.tensor(probe.predict_proba(hidden[range(3), last].numpy())[:, 1])
    limit = float(chances.sort().values[1])
    when = rl.probability(rl.Read("blocks[1].output @ last", run="other"), probe) > limit - 1e-6
    graph = rl.InterventionGraph(
        rl.Source("other"),
        rl.Edit("edit", at="blocks[2].output", positions="last", intervention=rl.Add(VECTOR), when=when),
    )
    columns = columns_by_hand(batch["attention_mask"], last_of)
    chosen = [c if chance > limit - 1e-6 else [] for c, chance in zip(columns, chances, strict=True)]
    assert sum(map(len, chosen)) == 2
    with plain_edit(raw_blocks(llama)[2], batch["attention_mask"], chosen, lambda h, s, n: h + VECTOR):
        expected = llama(**batch).logits
    assert_close(graph.bind(llama)(**batch, sources={"other": other}).logits, expected)
    again = rl.InterventionGraph.from_yaml(graph.to_yaml())
    assert again == graph
    assert_close(again.bind(llama)(**batch, sources={"other": other}).logits, expected)


def test_a_gate_applies_its_share_and_learns_with_its_penalty(llama: Any) -> None:
    batch = batch_of(LENGTHS)
    reft = bound(llama, rl.gate("blocks[0].output", sparsity=0.1), "all")
    gate = reft.interventions["edit(gate)"]
    with torch.no_grad():
        gate.weight.copy_(torch.linspace(-1, 1, WIDTH))
        gate.bias.fill_(0.3)
    hidden = plain_read(llama, raw_blocks(llama)[0], batch)
    opened = torch.sigmoid(hidden @ gate.weight + gate.bias)

    with hooked(raw_blocks(llama)[2], lambda h: h + (opened * batch["attention_mask"])[..., None] * VECTOR):
        expected = llama(**batch).logits
    logits = reft(**batch).logits
    assert_close(logits, expected)
    penalty = gate.penalty()
    assert_close(penalty, 0.1 * opened[batch["attention_mask"].bool()].mean())
    (logits.sum() + penalty).backward()
    assert gate.weight.grad is not None
    assert float(gate.weight.grad.abs().sum()) > 0


def test_gates_are_saved_with_their_edit(llama: Any, tmp_path: Any) -> None:
    reft = bound(llama, rl.gate("blocks[0].output"), "all")
    with torch.no_grad():
        reft.interventions["edit(gate)"].weight.normal_()
    reft.save(tmp_path / "gated")
    again = rl.load(tmp_path / "gated", llama)
    batch = batch_of(LENGTHS)
    assert torch.equal(again(**batch).logits, reft(**batch).logits)


def test_conditions_that_come_too_late_or_have_no_tokens_are_refused(llama: Any) -> None:
    with pytest.raises(BindError, match="reached later"):
        bound(llama, rl.norm("final_norm.output @ last") > 1)
    with pytest.raises(GraphError, match="no truth value"):
        bool((rl.norm("blocks[0].output") > 1) and (rl.norm("blocks[0].output") < 3))
    with pytest.raises(GraphError, match="no truth value"):
        0 < rl.norm("blocks[0].output") < 3  # noqa: B015
    with pytest.raises(rl.RunError, match=r"row 0 edits 1 tokens.*condition offers 2"):
        bound(llama, rl.norm("blocks[0].output @ first(2)") > 1)(**batch_of(LENGTHS))


def test_plans_show_conditions(llama: Any) -> None:
    reft = bound(llama, rl.cosine("blocks[0].output @ last", "blocks[0].output @ first") > 0.8)
    assert "when cosine('blocks[0].output @ last', 'blocks[0].output @ first') > 0.8" in str(reft.plan())


@pytest.mark.parametrize("wrong_first", [True, False])
def test_every_width_that_a_condition_asks_of_one_read_is_checked(llama: Any, wrong_first: bool) -> None:
    wrong, right = (rl.projection("blocks[0].output @ last", torch.ones(n)) > 0 for n in (8, WIDTH))
    when = wrong & right if wrong_first else right & wrong
    edit = rl.Edit("e", at="blocks[1].output", intervention=rl.Zero(), when=when)
    with pytest.raises(rl.BindError, match="its condition has 8 numbers for vectors of"):
        rl.InterventionGraph(edit).bind(llama)


@torch.no_grad()
@pytest.mark.parametrize("phase", ["both", "decode"])
def test_a_condition_on_tokens_of_the_prompt_says_why_it_does_not_reach_generated_ones(
    llama: Any, phase: str
) -> None:
    reft = bound(llama, rl.norm("blocks[0].output @ all") > 3.0, "all", phase=phase)
    message = r"'all', which are tokens of the prompt alone; leave the read's positions out"
    with pytest.raises(rl.RunError, match=message):
        reft.generate(**batch_of((5,), "left"), max_new_tokens=3, do_sample=False)
