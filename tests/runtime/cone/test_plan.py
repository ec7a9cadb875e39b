"""The plan of a batch: where the cone begins, what is computed, cached and skipped, and how much work it is."""

from __future__ import annotations

from typing import Any

import matplotlib
import pytest
import torch

import reftlab as rl
from reftlab.errors import RunError
from reftlab.runtime.cone import ConeRunner, cone_of
from reftlab.runtime.cone.work import work_of
from tests.models import (
    HEAD_SIZE,
    HEADS,
    KEY_VALUE_HEADS,
    LAYERS,
    VOCABULARY,
    WIDTH,
    batch_of,
    build,
    word_tokenizer,
)

from .common import LENGTHS, answered, bound, small_store

matplotlib.use("Agg")


def edit(
    at: str = "blocks[1].output", positions: Any = "last", name: str = "edit", **options: Any
) -> rl.Edit:
    return rl.Edit(name, at=at, positions=positions, intervention=rl.LoReFT(2), **options)


WHERE = {
    "blocks[0].input": 0, "embed.output": 0, "blocks[0].attn.heads": 0, "blocks[0].output": 1, "blocks[1].input": 1,
    "blocks[1].mlp.output": 1, "blocks[1].output": 2, "blocks[2].output": 3, "final_norm.output": 3, "unembed": 3,
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize(("at", "block"), WHERE.items(), ids=WHERE)
def test_the_first_block_that_runs_is_the_first_that_an_edit_can_change(
    family: str, at: str, block: int
) -> None:
    cone = cone_of(bound(family, edit(at)), answered())
    assert cone.why == ()
    assert (cone.first_block, cone.blocks) == (block, LAYERS)
    assert [reach.block for reach in cone.reaches] == [block]


def test_the_cone_begins_at_the_first_edited_token_of_each_row_and_ends_before_the_last() -> None:
    for side in ("left", "right"):
        cone = cone_of(
            bound("llama", edit(positions="last(3)"), edit("blocks[2].output", name="b")), answered(side=side)
        )
        assert cone.lengths == (11, 9, 13, 10)
        assert cone.starts == (6, 2, 9, 4)
        assert cone.stops == (10, 8, 12, 9)
        assert cone.targets == ((8, 9), (4, 5, 6, 7), (11,), (6, 7, 8))
        assert [reach.starts for reach in cone.reaches] == [(6, 2, 9, 4), (8, 4, 11, 6)]
        assert cone.first_block == 2
        # One block of four, six, three and five tokens, of three blocks of 43.
        assert cone.share == pytest.approx(18 / (3 * 43))


def test_an_edit_behind_the_labels_begins_the_cone_at_the_first_label() -> None:
    """Generated token 1 is edited, and token 0 is predicted before it."""
    cone = cone_of(bound("llama", edit(positions=[0], phase="decode")), answered(((9, 4),)))
    assert (cone.starts, cone.stops) == ((8,), (13,))
    assert cone.reaches[0].starts == (9,)


def test_rows_of_other_tasks_begin_at_their_labels() -> None:
    reft = bound(
        "llama", edit(positions="first", tasks=["a"]), edit("blocks[2].output", "last(2)", "b", tasks=["b"])
    )
    cone = cone_of(reft, {**answered(), "tasks": ["a", "b", None, "a+b"]})
    assert cone.starts == (0, 3, 11, 0)
    assert [reach.starts for reach in cone.reaches] == [(0, None, None, 0), (None, 3, None, 5)]
    # One example is kept for one first block, whoever comes with it.
    assert cone_of(reft, {**answered(), "tasks": "b"}).first_block == 2


def test_a_batch_without_labels_wants_its_last_tokens_logits() -> None:
    cone = cone_of(bound("llama", edit(positions="last(2)")), batch_of((7, 4, 9)))
    assert cone.targets == ((6,), (3,), (8,))
    assert (cone.starts, cone.stops) == ((5, 2, 7), (7, 4, 9))


def test_a_batch_does_not_change_by_being_planned() -> None:
    reft, batch = bound("llama", edit()), answered()
    before = {name: value.clone() for name, value in batch.items()}
    reft.plan(batch)
    assert all(torch.equal(value, before[name]) for name, value in batch.items())


PLANS = {
    "one edit": (edit(),),
    "several": (edit("blocks[0].output", "last(3)", "a"), edit("final_norm.output", name="b")),
    "at the end": (edit("unembed"),),
    "at the beginning": (edit("embed.output"),),
    "everything": (edit("blocks[0].input", "first"),),
}


@pytest.mark.parametrize("edits", PLANS.values(), ids=PLANS)
def test_the_cells_of_a_plan_add_up(edits: tuple[rl.Edit, ...]) -> None:
    plan = bound("llama", *edits).plan(answered()).cone
    assert plan is not None
    frame = plan.to_frame()
    assert frame["tokens"].tolist() == [11, 9, 13, 10]
    assert (frame[["computed", "cached", "skipped"]].sum(axis=1) == LAYERS * frame["tokens"]).all()
    assert (frame[["computed", "cached", "skipped"]] >= 0).all(axis=None)
    assert frame["computed"].sum() / (LAYERS * 43) == pytest.approx(plan.cone.share)
    assert (frame["stop_token"] > frame["first_token"]).all()
    if plan.cone.why:
        assert frame["computed"].tolist() == [33, 27, 39, 30]


def test_the_cells_of_one_row_by_hand() -> None:
    plan = bound("llama", edit("blocks[0].output", "last(3)")).plan(answered(((9, 4),))).cone
    assert plan is not None
    assert plan.to_frame().to_dict("records") == [
        {
            "row": 0, "tokens": 13, "first_token": 6, "stop_token": 12, "first_block": 1, "computed": 12,
            "cached": 12, "skipped": 15,
        }
    ]  # fmt: skip


def test_a_plan_says_what_it_does_in_words() -> None:
    text = str(bound("llama", edit("blocks[0].output", "last(3)")).plan(answered(((9, 4),))))
    assert "causal cone of 1 row, 13 tokens:" in text
    assert "edit can change blocks 1 to 2 from token 6 on" in text
    assert (
        "computed: blocks 1 to 2 at tokens 6 to 11, and logits where labels are: 30.8% of all cells" in text
    )
    assert "keys and values of tokens 0 to 5 in blocks 1 to 2; what leaves block 0 at tokens 6 to 11" in text
    assert "skipped:  everything else" in text
    assert "of a plain training step's multiplications" in text
    html = bound("llama", edit()).plan(answered())._repr_html_()
    assert "causal cone of 4 rows, 43 tokens" in html
    assert "<script" not in html


def test_a_plan_at_the_end_of_the_chain_keeps_no_keys() -> None:
    text = str(bound("llama", edit("unembed")).plan(answered()))
    assert (
        "computed: no block at 2 to 5 tokens a row" in text
        or "computed: no block at 1 to 4 tokens a row" in text
    )
    assert "keys and values" not in text
    assert "what leaves block 2" in text


def test_a_plan_of_many_edits_names_the_first_and_the_last() -> None:
    text = str(
        bound("llama", *(edit(positions=f"last({n + 1})", name=f"e{n}") for n in range(9))).plan(answered())
    )
    assert "e0 can change" in text
    assert "e8 can change" in text
    assert "… 6 more …" in text
    assert "e5 can" not in text


def test_a_plan_of_an_edit_that_acts_in_no_row_says_so() -> None:
    text = str(bound("llama", edit(tasks=["a"])).plan({**answered(), "tasks": [None] * 4}))
    assert "edit acts in no row" in text


def test_a_plan_without_a_batch_has_no_cone() -> None:
    reft = bound("llama", edit())
    assert reft.plan().cone is None
    with pytest.raises(RunError, match="give one, as in"):
        reft.plan().plot()


def test_figures_of_every_plan_can_be_drawn() -> None:
    for edits in PLANS.values():
        plan = bound("llama", *edits).plan(answered())
        for row in range(4):
            assert plan.plot(row).axes
        with pytest.raises(RunError, match="rows 0 to 3"):
            plan.plot(4)
        with pytest.raises(RunError, match="rows 0 to 3"):
            plan.plot(-1)


def test_tokens_of_a_plan_are_the_rows_own_words() -> None:
    tokenizer = word_tokenizer()
    encoded = tokenizer(
        ["the cat", "where is the Eiffel Tower"], return_tensors="pt", padding=True, padding_side="left"
    )
    plan = bound("llama", edit(), tokenizer=tokenizer).plan(encoded).cone
    assert plan is not None
    assert [word.strip() for word in plan.tokens[0]] == ["the", "cat"]
    assert len(plan.tokens[1]) == 5
    assert [len(row) for row in bound("llama", edit()).plan(answered()).cone.tokens] == [11, 9, 13, 10]


MATRICES = (
    2 * WIDTH * HEADS * HEAD_SIZE + 2 * WIDTH * KEY_VALUE_HEADS * HEAD_SIZE  # q, o; k, v
    + 3 * WIDTH * 48
)  # fmt: skip
ATTENTION = HEADS * HEAD_SIZE


def pairs(start: int, stop: int) -> int:
    """How many (token, earlier token) pairs there are, by counting."""
    return sum(1 for token in range(start, stop) for _ in range(token + 1))


def test_work_is_what_one_counts_by_hand() -> None:
    """One row of 9 + 4 tokens, an edit after block 0 at the last prompt token: tokens 8 to 11, blocks 1 and 2."""
    reft = bound("llama", edit("blocks[0].output"))
    work = work_of(reft.model, cone_of(reft, answered(((9, 4),))))
    block = 13 * MATRICES + 2 * ATTENTION * pairs(0, 13)
    small = 4 * MATRICES + 2 * ATTENTION * pairs(8, 12)
    shorter = 12 * MATRICES + 2 * ATTENTION * pairs(0, 12)
    # Forward through three blocks, back through the two above the edit; and the head, there and back.
    assert work.plain == 3 * block + 2 * block + 2 * 13 * WIDTH * VOCABULARY
    assert work.cone == 2 * 2 * small + 2 * 4 * WIDTH * VOCABULARY
    assert work.first == work.cone + 3 * shorter
    assert work.share == work.cone / work.plain
    assert work.first_share == work.first / work.plain
    plan = reft.plan(answered(((9, 4),)))
    assert f"{work.share:.1%} of a plain training step's" in str(plan)


def test_work_is_that_of_the_plain_step_where_everything_runs() -> None:
    reft = bound("llama", edit("embed.output", "first"))
    cone = cone_of(reft, answered())
    work = work_of(reft.model, cone)
    assert cone.why
    tokens, seen = 43, sum(pairs(0, p + a) for p, a in LENGTHS)
    everything = 3 * (tokens * MATRICES + 2 * ATTENTION * seen)
    assert work.plain == work.cone == work.first == 2 * everything + 2 * tokens * WIDTH * VOCABULARY
    assert work.share == work.first_share == 1.0


def test_experts_count_as_far_as_tokens_are_sent_to_them() -> None:
    """Two of four experts see each token."""
    reft = bound("mixtral", edit("unembed"))
    work = work_of(reft.model, cone_of(reft, answered(((9, 1),))))
    experts = sum(
        p.numel() for name, p in build("mixtral").named_parameters() if "experts" in name and p.dim() > 1
    )
    router = LAYERS * WIDTH * 4
    attention = LAYERS * (2 * WIDTH * ATTENTION + 2 * WIDTH * KEY_VALUE_HEADS * HEAD_SIZE)
    block = 10 * (experts // 2 + router + attention) + LAYERS * 2 * ATTENTION * pairs(0, 10)
    assert work.plain == block + 2 * 10 * WIDTH * VOCABULARY


@torch.no_grad()
def test_what_the_plan_says_is_computed_is_what_runs() -> None:
    reft = bound("llama", edit("blocks[0].output", "last(3)"))
    runner = ConeRunner(reft, small_store())
    batch = answered(((9, 4),))
    runner.predictions(batch)
    ran: list[int] = []
    handles = [
        block.mlp.register_forward_hook(lambda module, args, output: ran.append(output.shape[1]))
        for block in reft.model.model.layers
    ]
    found = runner.predictions(batch)
    for handle in handles:
        handle.remove()
    frame = reft.plan(batch).cone.to_frame()
    assert sum(ran) == frame["computed"].sum() == 12
    assert found is not None
    assert len(found.logits) == 4
    assert found.rows.tolist() == [0, 0, 0, 0]
    assert found.labels.tolist() == batch["input_ids"][0, 9:13].tolist()


def test_a_plan_says_what_a_training_would_do_in_whatever_mode_the_model_is() -> None:
    reft = bound("gpt2", edit())
    reft.model.eval()
    for module in reft.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    assert "dropout in the base model" in reft.plan(answered()).cone.cone.why[0]
    assert reft.plan(answered(), training=False).cone.cone.why == ()
    why = reft.plan(answered(), training=False, train_model=True).cone.cone.why
    assert why == ("parameters of the model itself learn (train_model=True)",)
