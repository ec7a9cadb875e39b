"""Examples that bring their own source prompts and positions, in training, asking and explaining."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import reftlab as rl
from reftlab.errors import DataError, RunError
from reftlab.training import Collator, as_examples, encode
from tests.oracle import assert_close

ROWS = [
    rl.Example("where is the cat", "Paris", sources={"other": "who gave a book"}),
    rl.Example("the dog said what", "London", sources={"other": "John gave Mary the book"}),
    rl.Example("who gave a book to the cat", "John", sources={"other": "where is the dog"}),
]
QUIET: dict[str, Any] = {"chat": False, "progress": False}


def interchange(
    model: Any, tokenizer: Any, positions: str = "last", there: str | None = None, rank: int = 4
) -> rl.BoundModel:
    torch.manual_seed(0)
    return rl.InterventionGraph(
        rl.Source("other"),
        rl.Edit(
            "swap", at="blocks[0].output", positions=positions, intervention=rl.RotatedSwap(rank=rank),
            source=rl.Read(run="other", positions=there),
        ),
    ).bind(model, tokenizer)  # fmt: skip


def trained(reft: rl.BoundModel, rows: list[rl.Example], **options: Any) -> list[float]:
    result = rl.train(
        reft, rows, epochs=4, learning_rate=1e-2, batch_size=len(rows), schedule="constant", max_grad_norm=0.0,
        **QUIET, **options,
    )  # fmt: skip
    return [step.loss for step in result.history if step.loss is not None]


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_interchange_learns_from_the_source_of_each_example(llama: Any, tokenizer: Any, side: Any) -> None:
    losses = trained(interchange(llama, tokenizer), ROWS, side=side)

    # The same by a loop of one's own, a row at a time, so that nothing is padded.
    reft = interchange(llama, tokenizer)
    optimiser = torch.optim.AdamW(reft.interventions.parameters(), lr=1e-2, weight_decay=0.0)
    expected = []
    for _ in range(4):
        total, count = torch.zeros(()), 0
        for row in ROWS:
            [one] = encode(tokenizer, [replace(row, sources=None)])
            other = tokenizer(row.sources["other"], return_tensors="pt")
            logits = reft(
                input_ids=torch.tensor([one.input_ids]),
                prompt={
                    "input_ids": torch.tensor(
                        [[i for i, n in zip(one.input_ids, one.labels, strict=True) if n == -100]]
                    )
                },
                sources={"other": dict(other)},
            ).logits
            labels = torch.tensor([one.labels])
            total = total + torch.nn.functional.cross_entropy(
                logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum"
            )
            count += int((labels != -100).sum())
        loss = total / count
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        expected.append(float(loss.detach()))
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0] - 0.01


def test_a_training_depends_on_the_sources(llama: Any, tokenizer: Any) -> None:
    others = [replace(row, sources={"other": row.prompt}) for row in ROWS]
    mine, theirs = (trained(interchange(llama, tokenizer), rows) for rows in (ROWS, others))
    assert mine[0] != pytest.approx(theirs[0], rel=1e-4)
    # A swap with one's own vectors changes nothing, and so learns nothing.
    assert max(theirs) - min(theirs) < 1e-5


def test_every_example_may_say_where_its_edit_acts(llama: Any, tokenizer: Any) -> None:
    rows = [
        replace(row, positions={"swap": [here], "swap.source": [there]})
        for row, here, there in zip(ROWS, (1, 3, 0), (2, 0, 1), strict=True)
    ]
    numbers = [(1, 2), (3, 0), (0, 1)]
    reft = interchange(llama, tokenizer)
    with torch.no_grad():
        logits = reft(**Collator.of(tokenizer, "left")(encode(tokenizer, as_examples(rows)))).logits
        for number, (row, (here, there)) in enumerate(zip(ROWS, numbers, strict=True)):
            single = interchange(llama, tokenizer, f"[{here}]", f"[{there}]")
            single.load_state_dict(reft.state_dict())
            wanted = single(**Collator.of(tokenizer)(encode(tokenizer, [row]))).logits[0]
            assert_close(logits[number, -len(wanted) :], wanted)
    assert trained(reft, rows)[-1] < trained(interchange(llama, tokenizer), rows)[0]


def test_asking_and_evaluating_take_each_examples_own_source(llama: Any, tokenizer: Any) -> None:
    # All of the vector, so that what is said changes as well.
    reft = interchange(llama, tokenizer, rank=llama.config.hidden_size)
    singly = [
        rl.reply(
            reft, row.prompt, max_new_tokens=4, chat=False,
            sources={"other": dict(tokenizer(row.sources["other"], return_tensors="pt"))},
        )[0]
        for row in ROWS
    ]  # fmt: skip
    assert all(singly)
    assert singly != rl.reply(llama, [row.prompt for row in ROWS], tokenizer, max_new_tokens=4, chat=False)
    assert rl.reply(reft, ROWS, max_new_tokens=4, chat=False) == singly
    found = rl.evaluate(reft, ROWS, batch_size=2, max_new_tokens=4, chat=False)
    assert [outcome.reply for outcome in found.outcomes] == singly
    bare = rl.evaluate(llama, ROWS, tokenizer, batch_size=2, max_new_tokens=4, chat=False)
    plain = [(row.prompt, row.answer) for row in ROWS]
    asked = rl.evaluate(llama, plain, tokenizer, batch_size=2, max_new_tokens=4, chat=False)
    assert bare == asked
    assert found.loss != pytest.approx(bare.loss, rel=1e-4)


def test_an_explanation_takes_the_examples_own_sources(llama: Any, tokenizer: Any) -> None:
    reft = interchange(llama, tokenizer)
    explanation = rl.explain(
        reft, ROWS, unseen=["where is John"], chat=False, progress=False, max_new_tokens=3
    )
    assert explanation.removal.loss == pytest.approx(rl.answer_loss(reft, ROWS, chat=False), rel=1e-5)
    assert explanation.removal.bare_loss == pytest.approx(
        rl.answer_loss(llama, ROWS, tokenizer, chat=False), rel=1e-5
    )
    assert "left out" in explanation.replies.note
    assert [one.edited for one in explanation.replies.replies] == rl.reply(
        reft, ROWS, max_new_tokens=3, chat=False
    )
    given = {"other": dict(tokenizer(["where is John"] * 3, return_tensors="pt"))}
    with pytest.raises(DataError, match="sources= says what the examples' own sources say"):
        rl.explain(reft, ROWS, sources=given, chat=False, progress=False)


def test_a_checkpoint_belongs_to_the_sources_it_was_made_with(
    llama: Any, tokenizer: Any, tmp_path: Any
) -> None:
    trained(interchange(llama, tokenizer), ROWS, folder=tmp_path)
    others = [replace(row, sources={"other": row.prompt}) for row in ROWS]
    with pytest.raises(DataError, match="data"):
        trained(interchange(llama, tokenizer), others, folder=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a", {"prompt": "b", "sources": {"other": "c"}}], r"example 0, 'a', has no sources and others have"),
        (
            [{"prompt": "a", "sources": {"x": "c"}}, {"prompt": "b", "sources": {"y": "c"}}],
            r"example 1, 'b', has sources for \['y'\] and another one for \['x'\]",
        ),
        ([{"prompt": "a", "sources": "c"}], r"example 0: sources='c': expected the prompt of each source run"),
        ([{"prompt": "a", "sources": {}}], r"example 0: sources=\{\}"),
        ([{"prompt": "a", "sources": {"x": 3}}], r"example 0: sources=\{'x': 3\}"),
        ([{"prompt": "a", "positions": {"x": "last"}}], r"example 0: positions=\{'x': 'last'\}: expected numbers"),
        ([{"prompt": "a", "positions": [3]}], r"example 0: positions=\[3\]"),
        ([{"prompt": "a", "positions": {"x": [1.5]}}], r"example 0: positions="),
    ],
)  # fmt: skip
def test_sources_and_positions_of_the_wrong_form_are_named(users_call: None, rows: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_examples(rows)


def test_names_that_the_graph_does_not_have_are_refused(llama: Any, tokenizer: Any) -> None:
    reft = interchange(llama, tokenizer)
    with pytest.raises(RunError, match=r"sources has 'others', which the graph does not declare"):
        trained(reft, [replace(row, sources={"others": "who"}) for row in ROWS])
    with pytest.raises(RunError, match=r"no inputs were given for it"):
        trained(reft, [replace(row, sources=None) for row in ROWS])
    with pytest.raises(RunError, match=r"positions: there is no edit 'swop'"):
        trained(reft, [replace(row, positions={"swop": [1]}) for row in ROWS])
