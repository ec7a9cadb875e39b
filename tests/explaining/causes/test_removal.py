"""The answer loss, and what becomes of it when something is taken away."""

import pytest
import torch

import reftlab as rl
from reftlab.explaining import explain
from reftlab.explaining.altering import altered, nothing, without_directions
from reftlab.explaining.causes.removal import removals
from reftlab.measuring import AnswerRuns, behaviour_of
from reftlab.measuring.inputs import accepted, batches
from reftlab.training.data import as_examples, encode
from tests.explaining.conftest import PAIRS, bound, loreft, orthonormal, set_directions


def measure(reft, pairs=PAIRS):
    encoded = encode(reft.tokenizer, as_examples(pairs))
    return AnswerRuns(reft, batches(reft, encoded, None), accepted(reft.model))


def plain_loss(reft, pairs=PAIRS):
    """Row by row through the bound model itself, with torch's cross entropy."""
    losses = []
    for example in encode(reft.tokenizer, as_examples(pairs)):
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        with torch.no_grad():
            logits = reft(input_ids=ids, labels=labels).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], labels[0, 1:], reduction="none")
        losses.append(loss[labels[0, 1:] != -100])
    return torch.cat(losses)


def test_prompts_of_a_batch_end_together_and_nothing_is_lost(small_llama, byte_tokenizer):
    encoded = encode(byte_tokenizer, as_examples(PAIRS))
    (batch,) = batches(bound(small_llama, byte_tokenizer), encoded, None)
    starts = (batch["labels"] != -100).long().argmax(1)
    assert len(set(starts.tolist())) == 1
    for row, one in enumerate(encoded):
        real = batch["attention_mask"][row] == 1
        assert tuple(batch["input_ids"][row][real].tolist()) == one.input_ids
        assert tuple(batch["labels"][row][real].tolist()) == one.labels
        assert batch["position_ids"][row][real].tolist() == list(range(len(one)))
        assert bool((batch["labels"][row][~real] == -100).all())


@pytest.mark.parametrize("family", ["small_llama", "small_gpt2"])
@pytest.mark.parametrize("positions", ["last", "first", "all", "first(2)+last(2)"])
def test_the_loss_is_that_of_plain_cross_entropy(family, positions, byte_tokenizer, request):
    edit = rl.Edit("shift", at="blocks[0].output", positions=positions, intervention=rl.LoReFT(rank=2))
    reft = bound(request.getfixturevalue(family), byte_tokenizer, edit)
    loss = measure(reft)
    for _ in range(2):  # the second call is the one that may use the cache
        torch.testing.assert_close(loss(), plain_loss(reft), atol=1e-4, rtol=1e-4)
    with reft.disabled():
        torch.testing.assert_close(loss(), plain_loss(reft), atol=1e-4, rtol=1e-4)


def test_tokens_before_the_first_edit_and_the_last_answer_are_not_run_again(small_llama, byte_tokenizer):
    loss = measure(bound(small_llama, byte_tokenizer, loreft()))
    loss()
    widths = []
    handle = small_llama.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    loss()
    handle.remove()
    answers = [
        sum(label != -100 for label in one.labels) for one in encode(byte_tokenizer, as_examples(PAIRS))
    ]
    # The last token of the prompt and those of the answer, of which the last predicts nothing.
    assert widths == [max(answers)]


def test_answers_that_edits_of_generated_tokens_change_are_measured_too(small_llama, byte_tokenizer):
    edit = rl.Edit(
        "both", at="blocks[0].output", positions="all", phase="both", intervention=rl.LoReFT(rank=2)
    )
    reft = bound(small_llama, byte_tokenizer, edit)
    torch.testing.assert_close(measure(reft)(), plain_loss(reft), atol=1e-4, rtol=1e-4)


def test_many_examples_in_several_batches_give_the_same(small_llama, byte_tokenizer, monkeypatch):
    monkeypatch.setattr("reftlab.measuring.inputs._TOKENS_A_BATCH", 40)
    reft = bound(small_llama, byte_tokenizer, loreft())
    loss = measure(reft)
    assert len(loss._batches) > 1
    torch.testing.assert_close(loss(), plain_loss(reft), atol=1e-4, rtol=1e-4)


def pushing(model, tokenizer):
    """A rank-2 edit after the last block that hardly reads: along direction 1 it pushes the token z hard,
    along direction 2 it does next to nothing."""
    reft = bound(model, tokenizer, loreft(at="blocks[2].output"))
    push = model.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids("z")].detach()
    write = torch.linalg.qr(torch.stack([push, orthonormal(1, 3)[0]], dim=1)).Q.T
    write = write * torch.sign(write @ push)[:1, None]
    gains, amounts = torch.tensor([1e-2, 5e-3]), torch.tensor([60.0, 1e-3])
    set_directions(reft.interventions["shift"], write, gains, orthonormal(2, 9), amounts)
    return reft


def test_removing_the_planted_direction_costs_and_removing_the_other_does_not(small_llama, byte_tokenizer):
    reft = pushing(small_llama, byte_tokenizer)
    pairs = [("what is last", "z"), ("and now", "z")]
    removal = explain(reft, pairs, chat=False, max_new_tokens=0, only=[], progress=False).removal
    first, second = removal.of("shift", "direction")
    (whole,) = removal.of("shift", "edit")
    assert removal.bare_loss > removal.loss + 0.3
    assert first.change == pytest.approx(whole.change, abs=0.05)
    assert first.change > 0.3
    assert abs(second.change) < 0.01
    assert whole.loss == pytest.approx(removal.bare_loss, abs=1e-4)
    assert len(removal.of("shift", "random")) == 5
    assert sum(first.changes) > 0
    assert removal.loss == pytest.approx(float(plain_loss(reft, pairs).mean()), abs=1e-4)


def test_a_direction_taken_out_is_gone_from_what_is_written(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, loreft(rank=3))
    built, out, seen = reft.interventions["shift"], orthonormal(1, 4), []
    inputs = byte_tokenizer("the sea", return_tensors="pt")

    def delta(change):
        seen.clear()
        watching = reft.watching(lambda bound, tokens, base, new, source: seen.append((base, new)))
        with torch.no_grad(), altered(reft, {"shift": change}), watching:
            reft(**inputs)
        ((base, new),) = seen
        return base, new - base

    base, after = delta(without_directions(out))
    with torch.no_grad():
        before = built(base) - base
    torch.testing.assert_close(after, before - (before @ out.T) @ out, atol=1e-5, rtol=1e-5)
    assert float(before.norm()) > 1e-3
    assert not delta(nothing)[1].any()
    assert reft.interventions["shift"] is built


def test_only_the_most_important_edits_are_taken_apart_and_the_report_says_so(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, loreft("a", "blocks[0,1,2].output"), loreft("b"))
    found = explain(reft, PAIRS, max_edits=2, draws=1, max_new_tokens=0, only=[], progress=False)
    removal = found.removal
    whole = {one.edit: one.change for one in removal.removed if one.what == "edit"}
    assert set(whole) == {"a[0]", "a[1]", "a[2]", "b"}
    assert list(removal.detailed) == sorted(whole, key=whole.get, reverse=True)[:2]
    assert {one.edit for one in removal.removed if one.what == "direction"} == set(removal.detailed)
    assert "for the other 2 only the whole edit" in removal.note
    assert len(removal.to_frame()) == 4 + 2 * 2 + 2
    assert removal.plot().axes or removal.plot().subfigs


def test_random_controls_follow_the_seed(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, loreft())

    def controls(seed):
        removal = explain(reft, PAIRS, seed=seed, max_new_tokens=0, only=[], progress=False).removal
        return [one.change for one in removal.of("shift", "random")]

    assert controls(1) == controls(1)
    assert controls(1) != controls(2)


def test_an_intervention_that_several_places_share_is_taken_away_once(small_llama, byte_tokenizer):
    shared = rl.Edit(
        "s", at="blocks[0,1,2].output", positions="last", intervention=rl.LoReFT(rank=2), share="w"
    )
    reft, told = bound(small_llama, byte_tokenizer, shared), []
    directions = explain(reft, PAIRS, max_new_tokens=0, only=[], progress=False).edits
    found = removals(
        reft,
        behaviour_of(reft, PAIRS, chat=False),
        {one.edit: one.directions for one in directions},
        max_edits=0,
        tick=told.append,
    )
    assert [one.edit for one in found.removed] == ["s[0]", "s[1]", "s[2]"]
    assert len({one.change for one in found.removed}) == 1
    assert told == ["without s[0]"]


def test_unseen_prompts_with_positions_of_their_own_are_left_out_before_anything_fails(
    small_llama, byte_tokenizer
):
    reft = bound(small_llama, byte_tokenizer, loreft("a"))
    unseen = [{"prompt": "who", "positions": {"a": [0]}}]
    found = explain(reft, PAIRS[:2], unseen=unseen, max_new_tokens=1, only=[], progress=False, max_edits=0)
    assert "positions of other edits" in found.replies.note
    assert len(found.replies.replies) == 2
