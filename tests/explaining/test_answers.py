"""Which places, controls and sections an explanation has."""

import pytest
import torch

import reftlab as rl
from reftlab.explaining import explain
from tests.explaining.conftest import PAIRS, bound, loreft
from tests.oracle import randomise

QUIET = {"chat": False, "max_new_tokens": 0, "max_edits": 0, "progress": False, "runs": 8}
TEXTS = [f"the sea and a dog on a hill {number}" for number in range(6)]


def swapped(model, tokenizer, intervention=None):
    """An edit that takes the last token's vector after the last block from another prompt."""
    edit = rl.Edit(
        "swap", at="blocks[2].output", positions="last", intervention=intervention or rl.Swap(),
        source=rl.Read(run="other"),
    )  # fmt: skip
    return rl.InterventionGraph(rl.Source("other"), edit).bind(model, tokenizer)


def counterfactuals(model, tokenizer, count=6):
    """Pairs of prompts whose answer is what the model says after the other one."""
    found = []
    for number in range(200):
        other = f"{chr(97 + number % 26)}{chr(97 + number // 26)} "
        with torch.no_grad():
            best = int(model(**tokenizer(other, return_tensors="pt")).logits[0, -1].argmax())
            own = int(model(**tokenizer("the sea", return_tensors="pt")).logits[0, -1].argmax())
        answer = tokenizer.decode([best])
        if best != own and tokenizer(answer)["input_ids"] == [best]:
            found.append(rl.Example("the sea", answer, sources={"other": other}))
        if len(found) == count:
            return found
    raise AssertionError("the model says the same after every prompt")


def test_edits_beside_the_stream_have_their_own_sites_looked_at_too(small_llama, byte_tokenizer):
    reft = bound(
        small_llama, byte_tokenizer, loreft("a", "blocks[0].output"), loreft("b", "blocks[0,1].mlp.output")
    )
    randomise(reft)
    (section,) = explain(reft, TEXTS, only="mediation", **QUIET).sections
    names = [site.name for site in section.result.sites]
    stream = [f"model.layers.{block}.output" for block in range(3)]
    assert names == [*stream, "model.layers.0.mlp.output", "model.layers.1.mlp.output"]
    # Each path has panels of its own.
    assert {site.path for site in section.result.sites} == {"blocks[*].output", "blocks[0,1].mlp.output"}


def test_every_random_control_is_drawn_five_times_at_least(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, loreft("a", "blocks[0].output", 3), loreft("b"))
    randomise(reft)
    frame = explain(reft, TEXTS, only="faithfulness", **QUIET).section("faithfulness").to_frame()
    assert set(frame["edits"]) == {"all edits", "a", "b"}
    assert frame["draws"].min() >= 5
    pairs = [(text, "blue") for text in TEXTS]
    removal = explain(reft, pairs, only=[], **{**QUIET, "max_edits": 1}).removal
    assert sum(one.what == "random" for one in removal.removed) == 5


def test_what_does_not_apply_is_told_from_what_cannot_be_had(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, loreft("a", rank=1))
    randomise(reft)
    only = ["probes", "interchange", "shapley", "composition", "dose"]
    found = explain(reft, TEXTS, only=only, **QUIET)
    idle = {section.name for section in found.sections if not section.applies}
    assert idle == {"probes", "interchange", "composition"} | (
        {"shapley"} if found.section("shapley").missing else set()
    )
    assert found.section("interchange").missing == "no edit takes its values from a source run"
    # With a source run the question arises, but these prompts say nothing of what should come out.
    asked = swapped(small_llama, byte_tokenizer)
    sources = {"other": byte_tokenizer(TEXTS[::-1], return_tensors="pt", padding=True)}
    (section,) = explain(asked, TEXTS, sources=sources, only="interchange", **QUIET).sections
    assert section.applies
    assert "has no answer" in section.missing
    bare = explain(bound(small_llama, byte_tokenizer), PAIRS, **QUIET)
    assert not any(section.applies for section in bare.sections)


@pytest.mark.parametrize("metric", [None, rl.answer_log_probability("z")])
def test_what_is_swapped_is_asked_for_the_counterfactual_answer(small_llama, byte_tokenizer, metric):
    pairs = counterfactuals(small_llama, byte_tokenizer)
    reft = swapped(small_llama, byte_tokenizer)
    (section,) = explain(reft, pairs, metric=metric, only="interchange", **QUIET).sections
    assert section.question == "evidence"
    assert section.missing is None
    # What stands after the last block alone decides the next token.
    assert section.result.accuracy.value == 1
    assert section.result.accuracy_without_swap.value == 0
    assert len(section.result.random) >= 5
    assert "for 100% of 6 examples; whole vectors 100%, no swap 0%" in section.says[0]
    assert "give just the same answers" in section.says[0]
    small = swapped(small_llama, byte_tokenizer, rl.RotatedSwap(rank=2))
    (section,) = explain(small, pairs, only="interchange", **QUIET).sections
    assert section.says[0].startswith("Swapping 2 directions from the source run")
    assert "random subspaces as large 0% (5 draws). It is not told from these." in section.says[0]
    assert section.plot().axes
