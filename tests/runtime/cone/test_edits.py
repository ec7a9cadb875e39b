"""Whatever the edits, their positions, conditions and options: the cone gives the plain run's numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reftlab as rl
from reftlab.interventions import Intervention
from reftlab.interventions.passing import PassMean
from reftlab.runtime.cone import ConeRunner
from tests.models import LAYERS, VOCABULARY, WIDTH, word_tokenizer
from tests.oracle import VECTOR, orthonormal, raw_blocks

from .common import LENGTHS, answered, assert_equal, bound, close, on_the_cone, plainly, small_store


def edit(
    at: str = "blocks[1].output", positions: Any = "last", name: str = "edit", **options: Any
) -> rl.Edit:
    options.setdefault("intervention", rl.LoReFT(rank=3))
    return rl.Edit(name, at=at, positions=positions, **options)


def check(*edits: rl.Edit, family: str = "llama", tokenizer: Any = None, **more: Any) -> ConeRunner:
    """Both ways agree on batches padded on either side, at the first visit and at the second."""
    reft = bound(family, *edits, tokenizer=tokenizer)
    runner = ConeRunner(reft, small_store())
    for side in ("right", "left"):
        assert_equal(runner, {**answered(side=side), **more})
    assert runner.why_plain == ()
    return runner


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "at",
    [
        "blocks[0].output", f"blocks[{LAYERS - 1}].output", "blocks[0].input", "blocks[2].input",
        "blocks[1].mlp.output", "blocks[1].attn.output", "blocks[1].attn.heads", "blocks[1].attn.q",
        "blocks[1].attn.v", "embed.output", "final_norm.output", "unembed", "unembed.input",
    ],
)  # fmt: skip
def test_every_place_in_the_chain_is_right(family: str, at: str) -> None:
    check(edit(at), family=family)


@pytest.mark.parametrize("view", [{"heads": [1, 3]}, {"features": range(5, 17)}], ids=["heads", "features"])
def test_views_of_a_site_are_right(view: dict[str, Any]) -> None:
    check(edit("blocks[1].attn.heads", **view))


def test_several_edits_at_several_blocks_and_positions_are_right() -> None:
    runner = check(
        edit("blocks[0].output", "last(3)", "low", intervention=rl.DiReFT(2)),
        edit("blocks[2].output", "last", "high"),
        edit("blocks[1].mlp.output", "[-4]", "mlp", intervention=rl.NoReFT(2)),
        edit("final_norm.output", "last(2)", "norm", intervention=rl.NodiReFT(2)),
    )
    cone = runner.cone(answered())
    assert (cone.first_block, cone.starts, cone.stops) == (1, (5, 1, 8, 3), (10, 8, 12, 9))


@pytest.mark.parametrize("make", [rl.LoReFT, rl.NoReFT, rl.DiReFT, rl.NodiReFT, rl.ConsReFT, rl.LobiReFT])
def test_the_whole_family_of_low_rank_edits_is_right(make: Any) -> None:
    check(
        edit(intervention=make(rank=2)), edit("blocks[2].output", "last(2)", "b", intervention=make(rank=2))
    )


@pytest.mark.parametrize(
    "positions", ["first", "first(2)", "all", "first(2)+last(2)", "[0,2,-1]", [[3], [4, 0], [], [5, 6]], 3]
)
def test_positions_are_right(positions: Any) -> None:
    check(edit(positions=positions))


@pytest.mark.parametrize("positions", ["span('Eiffel Tower')", "token('is')", "after('Tower')"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_that_look_at_text_are_right(positions: str, side: str) -> None:
    tokenizer = word_tokenizer()
    assert len(tokenizer) <= VOCABULARY + 100
    prompts = [
        "the Eiffel Tower is in",
        "where is the Eiffel Tower ? what is",
        "a cat said the Eiffel Tower is",
    ]
    encoded = [tokenizer(p)["input_ids"] for p in prompts]
    assert max(map(max, encoded)) < VOCABULARY
    batch = answered(tuple((len(one), 2 + n) for n, one in enumerate(encoded)), side)
    for row, ids in enumerate(encoded):
        first = int(batch["attention_mask"][row].argmax())
        batch["input_ids"][row, first : first + len(ids)] = torch.tensor(ids)
    runner = ConeRunner(bound("llama", edit(positions=positions), tokenizer=tokenizer), small_store())
    assert_equal(runner, batch)
    assert runner.why_plain == ()


@pytest.mark.parametrize("phase", ["decode", "both"])
@pytest.mark.parametrize("positions", ["all", "last", "first(2)", [0]])
def test_edits_of_the_answer_are_right(phase: str, positions: Any) -> None:
    check(edit(positions=positions, phase=phase))


def test_an_edit_of_the_answers_last_token_is_counted_though_no_label_follows_it() -> None:
    """Its vectors are in the penalty, and the same numbers are drawn as in the plain run."""
    check(edit(positions="all", phase="decode", intervention=Loud()))


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_conditions_that_read_far_before_the_edit_are_right(shift: float) -> None:
    measure = rl.cosine("blocks[0].output @ last", "blocks[0].output @ first")
    runner = check(edit("blocks[2].output", when=measure > shift))
    assert runner.cone(answered()).starts == (0, 0, 0, 0)
    assert runner.cone(answered()).first_block == 1


def test_conditions_of_each_token_and_soft_ones_are_right() -> None:
    check(edit(positions="last(3)", when=rl.norm("blocks[1].input") > 1.0))
    gate = rl.gate("blocks[0].output @ last")
    check(edit("blocks[2].output", when=gate))


def test_a_condition_that_holds_in_no_row_leaves_the_bare_models_loss() -> None:
    reft = bound("llama", edit(when=rl.norm("blocks[0].output @ first") > 1e9))
    loss = ConeRunner(reft, small_store()).loss(answered())
    assert loss is not None
    torch.testing.assert_close(loss, reft.model(**answered()).loss, rtol=1e-5, atol=0)


def test_values_from_other_tokens_of_the_same_run_are_right() -> None:
    low = edit("blocks[0].output", "last", "low")
    swap = edit(
        "blocks[2].output", "last", "swap", intervention=rl.Swap(), source=rl.Read("blocks[1].output @ first")
    )
    runner = check(low, swap)
    assert runner.cone(answered()).starts == (0, 0, 0, 0)


TASKS = [["a", None, "b", "a+b"], [None, None, "a", "b"], ["a", "a", "a", "a"], "a"]


@pytest.mark.parametrize("tasks", TASKS, ids=str)
def test_rows_of_different_tasks_are_right(tasks: Any) -> None:
    check(
        edit("blocks[0].output", "last(3)", "one", tasks=["a"]),
        edit("blocks[1].output", "last", "two", tasks=["b"]),
        tasks=tasks,
    )


@pytest.mark.parametrize("tasks", [["a", None, "a", None], [None, "a", None, None]], ids=str)
def test_rows_of_other_tasks_are_right_where_an_edit_reads_before_itself(tasks: Any) -> None:
    """Reads are taken in all rows, and so must be there in those whose own cone begins later."""
    when = rl.cosine("blocks[0].output @ last", "blocks[0].output @ first") > -2
    first = rl.Read("blocks[0].output @ first")
    check(edit(when=when, tasks=["a"]), tasks=tasks)
    check(edit(), edit(name="swap", intervention=rl.Add(), source=first, tasks=["a"]), tasks=tasks)
    many = rl.Read("blocks[0].output @ first(2)")
    swap = edit(positions="last(2)", name="swap", intervention=rl.Add(), source=many, tasks=["a"])
    check(edit(), swap, tasks=tasks)


@pytest.mark.parametrize("tasks", [["a", None, "a", "b"], [None, "b", None, "b"]], ids=str)
def test_rows_of_other_tasks_are_right_where_an_edit_joins_tokens(tasks: Any) -> None:
    joined = edit(positions="joined(last(3))", name="joined", intervention=rl.LoReFT(2), tasks=["a"])
    check(joined, edit("blocks[1].output", "last", "b", tasks=["b"]), tasks=tasks)


def test_what_a_call_says_of_its_edits_is_right() -> None:
    runner = check(edit(), scale={"edit": [0.5, 2.0, 0.0, 1.0]}, subspace=[[0], None, [1, 2], [0, 2]])
    batch = answered()
    for more in (
        {"positions": {"edit": [[3], [4, 0], [5], []]}},
        {"positions": {"edit": "last(2)"}},
        {"subspace": [0, 2]},
        {"subspace": {"edit": [1]}},
        {"scale": {"edit": 3.0}},
        {"select": ["edit"]},
    ):
        assert_equal(runner, {**batch, **more})
    assert runner.why_plain == ()
    plain = plainly(runner.reft, batch)[0]
    assert not close(plainly(runner.reft, {**batch, "scale": {"edit": 3.0}})[0], plain, 1e-4)


def test_strength_and_shared_interventions_are_right() -> None:
    check(edit(strength=-0.7), edit("blocks[2].output", "last(2)", "b", strength=2.5))
    check(edit("blocks[0,1,2].output", share="one", name="shared"))


def test_edits_that_are_switched_off_or_replaced_are_right() -> None:
    reft = bound("llama", edit("blocks[0].output", "last(3)", "low"), edit("blocks[2].output", name="high"))
    runner = ConeRunner(reft, small_store())
    assert_equal(runner, answered())
    with reft.disabled("low"):
        assert_equal(runner, answered())
        assert runner.cone(answered()).first_block == 3
    with reft.disabled():
        loss = runner.loss(answered())
        assert loss is not None
        torch.testing.assert_close(loss, reft.model(**answered()).loss, rtol=1e-5, atol=0)
    with reft.replaced("high", rl.Add(VECTOR).build(WIDTH)):
        assert_equal(runner, answered())
    assert_equal(runner, answered())
    assert runner.why_plain == ()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_dropout_inside_an_edit_draws_the_same_numbers(mode: str) -> None:
    reft = bound(
        "llama",
        edit(positions="last(2)", intervention=rl.LoReFT(4, dropout=0.5)),
        edit("blocks[2].output", "last(3)", "b", intervention=rl.DiReFT(4, dropout=0.3)),
    )
    reft.train(mode == "train")
    runner = ConeRunner(reft, small_store())
    assert_equal(runner, answered())
    torch.manual_seed(1)
    first = runner.loss(answered())
    torch.manual_seed(2)
    second = runner.loss(answered())
    assert first is not None
    assert second is not None
    assert (float(first.detach()) != float(second.detach())) == (mode == "train")


def test_the_check_of_the_first_batch_leaves_random_numbers_alone() -> None:
    reft = bound("llama", edit(intervention=rl.LoReFT(4, dropout=0.5))).train()
    runner = ConeRunner(reft, small_store())
    torch.manual_seed(5)
    first = runner.loss(answered())
    torch.manual_seed(5)
    second = runner.loss(answered())
    assert first is not None
    assert second is not None
    torch.testing.assert_close(first, second, rtol=1e-6, atol=0)
    assert reft.training


def test_noise_by_token_number_is_the_same_on_the_cone() -> None:
    check(edit(), edit("blocks[2].output", "last(2)", "noise", intervention=rl.Noise(std=0.7, seed=3)))


class Loud(Intervention):
    """Add a learned vector, with a penalty on the mean square of all the vectors that it sees.

    h + v
    """

    def __init__(self) -> None:
        super().__init__()
        self.mean = PassMean()

    def setup(self, width: int) -> None:
        self.vector = nn.Parameter(torch.linspace(-1.0, 1.0, width))

    def forward(self, base: Tensor, source: Tensor | None = None) -> Tensor:
        new = base + self.vector
        self.mean.note(new.square())
        return new

    def penalty(self) -> Any:
        return self.mean.value()


@pytest.mark.parametrize(
    ("positions", "phase"), [("last(2)", "prompt"), ("first", "prompt"), ("all", "both")]
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_penalty_on_all_vectors_is_the_plain_runs(positions: str, phase: str, side: str) -> None:
    reft = bound("llama", edit(positions=positions, phase=phase, intervention=Loud()))
    runner = ConeRunner(reft, small_store())
    batch = answered(side=side)
    batch["labels"][1] = -100
    penalties = []
    for run in (lambda: reft(**batch), lambda: runner.loss(batch), lambda: runner.loss(batch)):
        run()
        penalty = reft.interventions["edit"].penalty()
        reft.interventions["edit"].vector.grad = None
        penalty.backward()
        penalties.append((penalty.detach(), reft.interventions["edit"].vector.grad.clone()))
    assert runner.why_plain == ()
    for value, gradient in penalties[1:]:
        assert close(value, penalties[0][0], 1e-5)
        assert close(gradient, penalties[0][1], 1e-5)


def test_the_gradient_of_one_edit_is_the_one_that_plain_hooks_give() -> None:
    """By hand, without reftlab's runtime: a hook on block 1 edits the last prompt token of each row."""
    reft = bound("llama")
    batch = answered()
    built: Any = reft.interventions["edit"]
    weight = built.linear.weight.detach().clone().requires_grad_()
    basis = orthonormal(built.basis.weight)
    lasts = [prompt - 1 for prompt, _ in LENGTHS]

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        h = hidden[range(4), lasts]
        new = h + (h @ weight.T + built.linear.bias - h @ basis) @ basis.T
        hidden = hidden.index_put((torch.arange(4), torch.tensor(lasts)), new)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    handle = raw_blocks(reft.model)[1].register_forward_hook(hook)
    logits = reft.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    handle.remove()
    losses = [
        -logits[row, column - 1].log_softmax(-1)[batch["input_ids"][row, column]]
        for row, (prompt, answer) in enumerate(LENGTHS)
        for column in range(prompt, prompt + answer)
    ]
    loss = torch.stack(losses).mean()
    loss.backward()
    got = on_the_cone(ConeRunner(reft, small_store()), batch)
    assert close(got[0], loss.detach(), 1e-5)
    assert weight.grad is not None
    assert close(got[2]["edit.linear.weight"], weight.grad, 1e-5)


ODD = {
    "prompts of one token": ((1, 2), (1, 3), (6, 1)),
    "one row": ((9, 3),),
    "answers of one token": ((4, 1), (9, 1)),
    "very different lengths": ((2, 1), (40, 9), (3, 12)),
}


@pytest.mark.parametrize("lengths", ODD.values(), ids=ODD)
@pytest.mark.parametrize("side", ["left", "right"])
def test_odd_batches_are_right(lengths: Any, side: str) -> None:
    runner = ConeRunner(bound("llama"), small_store())
    assert_equal(runner, answered(lengths, side))
    assert runner.why_plain == ()


@pytest.mark.parametrize("positions", ["last", "[-5]", "first(2)", "last(3)"])
def test_rows_without_labels_are_right(positions: str) -> None:
    runner = ConeRunner(bound("llama", edit(positions=positions)), small_store())
    batch = answered()
    batch["labels"][1] = -100
    assert_equal(runner, batch)
    fresh = ConeRunner(bound("llama", edit(positions=positions)), small_store())
    batch["labels"][2:] = -100
    assert_equal(fresh, batch)
    assert runner.why_plain == fresh.why_plain == ()


def test_labels_that_are_other_tokens_than_the_inputs_are_right() -> None:
    batch = answered()
    batch["labels"] = torch.where(batch["labels"] == -100, -100, (batch["labels"] + 7) % VOCABULARY)
    assert_equal(ConeRunner(bound("llama"), small_store()), batch)


def test_answers_with_gaps_and_labels_in_the_prompt_are_right() -> None:
    batch = answered(((9, 4), (5, 5), (12, 3)))
    batch["labels"][1, 7] = -100
    batch["labels"][2, 3] = batch["input_ids"][2, 3]
    for phase in ("prompt", "both"):
        runner = ConeRunner(bound("llama", edit(positions="all", phase=phase)), small_store())
        assert_equal(runner, batch)
        assert runner.why_plain == ()
