"""The answer loss against cross-entropies computed row by row, and replies against `generate`."""

import pytest
import torch

import reftlab as rl

from .conftest import PAIRS, bind, make_graph, make_model, make_tokenizer


def by_hand(model, tokenizer, pairs) -> float:
    losses = []
    for prompt, answer in pairs:
        ids = tokenizer(prompt).input_ids
        wanted = [*tokenizer(answer).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + wanted])).logits[0].log_softmax(-1)
        losses += [-logits[len(ids) + k - 1, token].item() for k, token in enumerate(wanted)]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_the_loss_is_the_mean_over_all_answer_tokens_whatever_the_batches(side, batch_size):
    model, tokenizer = make_model(), make_tokenizer()
    loss = rl.answer_loss(model, PAIRS, tokenizer, batch_size=batch_size, side=side)
    assert loss == pytest.approx(by_hand(model, tokenizer, PAIRS), abs=1e-5)


def test_edits_are_in_the_loss_and_the_training_mode_comes_back():
    reft = bind()
    reft.train()
    edited = rl.answer_loss(reft, PAIRS)
    assert reft.training
    assert reft.model.training
    with reft.disabled():
        assert rl.answer_loss(reft, PAIRS) == pytest.approx(
            by_hand(reft.model, reft.tokenizer, PAIRS), abs=1e-5
        )
    assert abs(edited - by_hand(reft.model, reft.tokenizer, PAIRS)) > 1e-4


def test_an_example_without_an_answer_is_named():
    with pytest.raises(rl.DataError, match="example 1, 'who', has no answer"):
        rl.answer_loss(bind(), [("who", "red"), "who"])


def test_without_a_tokenizer_there_is_no_loss_and_no_reply():
    with pytest.raises(rl.DataError, match="needs a tokenizer"):
        rl.answer_loss(make_model(), PAIRS)
    with pytest.raises(rl.DataError, match="needs a tokenizer"):
        rl.reply(make_model(), "who")


def test_replies_of_a_mixed_batch_are_those_of_each_prompt_alone():
    reft = bind()
    prompts = [prompt for prompt, _ in PAIRS]
    together = rl.reply(reft, prompts, max_new_tokens=6)
    assert together == [rl.reply(reft, prompt, max_new_tokens=6)[0] for prompt in prompts]
    alone = []
    for prompt in prompts:
        ids = reft.tokenizer(prompt, return_tensors="pt").input_ids
        tokens = reft.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        alone.append(reft.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True))
    assert together == alone
    with reft.disabled():
        assert rl.reply(reft, prompts, max_new_tokens=6) != together


def test_a_system_message_of_the_training_stays_unless_another_is_given(tokenizer_with_template):
    reft = make_graph().bind(make_model(), tokenizer_with_template)
    plain = rl.answer_loss(reft, PAIRS)
    told = rl.answer_loss(reft, PAIRS, system="who is the cat")
    assert told != plain
    rl.train(reft, PAIRS, epochs=0.1, learning_rate=0.0, system="who is the cat", progress=False)
    assert rl.answer_loss(reft, PAIRS) == pytest.approx(told, abs=1e-6)
    assert rl.answer_loss(reft, PAIRS, chat=False) != pytest.approx(told, abs=1e-3)
