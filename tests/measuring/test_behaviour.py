"""What is measured of a bound model's runs, against its plain forward passes."""

import math
import warnings

import numpy as np
import pytest
import torch

import reftlab as rl
from reftlab.errors import DataError, RunError
from reftlab.explaining.altering import altered, nothing, only_along, scaled
from reftlab.measuring import Estimate, behaviour_of, mean_of, share_kept
from tests.explaining.conftest import PAIRS, bound, loreft, orthonormal

FAMILIES = ["small_llama", "small_gpt2"]
PROMPTS = [prompt for prompt, _ in PAIRS]


def answer_loss(reft, prompt, answer):
    """One example by itself: the bound model's own forward and torch's cross entropy, in nats a token."""
    form = {"add_special_tokens": False, "return_tensors": "pt"}
    asked = reft.tokenizer(prompt, return_tensors="pt")["input_ids"]
    said = torch.cat([reft.tokenizer(answer, **form)["input_ids"], torch.tensor([[0]])], dim=1)
    ids = torch.cat([asked, said], dim=1)
    labels = torch.cat([torch.full_like(asked, -100), said], dim=1)
    with torch.no_grad():
        logits = reft(input_ids=ids, labels=labels).logits[0, asked.shape[1] - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, said[0]), said.shape[1]


def next_logits(reft, prompt):
    with torch.no_grad():
        return reft(**reft.tokenizer(prompt, return_tensors="pt")).logits[0, -1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["last", "first", "all"])
def test_without_a_metric_it_is_the_answer_loss_of_each_example(family, positions, byte_tokenizer, request):
    edit = rl.Edit("shift", at="blocks[0].output", positions=positions, intervention=rl.LoReFT(rank=2))
    reft = bound(request.getfixturevalue(family), byte_tokenizer, edit)
    behaviour = behaviour_of(reft, PAIRS, chat=False)
    wanted = [answer_loss(reft, *pair) for pair in PAIRS]
    torch.testing.assert_close(
        behaviour.full, torch.stack([loss for loss, _ in wanted]), atol=1e-4, rtol=1e-4
    )
    assert behaviour.weights.tolist() == [count for _, count in wanted]
    with reft.disabled():
        wanted = [answer_loss(reft, *pair)[0] for pair in PAIRS]
        torch.testing.assert_close(behaviour(), torch.stack(wanted), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(behaviour.bare, torch.stack(wanted), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(behaviour(), behaviour.full)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_metric_looks_at_the_logits_after_each_prompt(family, byte_tokenizer, request):
    reft = bound(request.getfixturevalue(family), byte_tokenizer, loreft())
    behaviour = behaviour_of(reft, PROMPTS, rl.logit_diff("z", "a"), chat=False)
    z, a = (byte_tokenizer.convert_tokens_to_ids(letter) for letter in "za")
    wanted = torch.stack([next_logits(reft, p)[z] - next_logits(reft, p)[a] for p in PROMPTS])
    torch.testing.assert_close(behaviour(), wanted, atol=1e-4, rtol=1e-4)
    own = behaviour_of(reft, PROMPTS, lambda logits: logits[:, z], chat=False)
    torch.testing.assert_close(own(), torch.stack([next_logits(reft, p)[z] for p in PROMPTS]))
    several = behaviour_of(reft, PROMPTS, rl.answer_logit(["z", "a", "z"]), chat=False)
    assert several()[1] == pytest.approx(float(next_logits(reft, PROMPTS[1])[a]), abs=1e-4)


def test_prompts_alone_are_compared_with_the_model_with_all_edits(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, loreft())
    behaviour = behaviour_of(reft, PROMPTS, chat=False)
    assert behaviour.full.abs().max() < 1e-6
    for row, prompt in enumerate(PROMPTS):
        edited = next_logits(reft, prompt).log_softmax(-1)
        with reft.disabled():
            plain = next_logits(reft, prompt).log_softmax(-1)
        divergence = float((edited.exp() * (edited - plain)).sum())
        assert float(behaviour.bare[row]) == pytest.approx(divergence, abs=1e-5)
        assert divergence > 1e-4


def test_a_model_that_reads_both_ways_is_measured_at_its_last_token(small_bert, byte_tokenizer):
    reft = bound(small_bert, byte_tokenizer, loreft())
    z = byte_tokenizer.convert_tokens_to_ids("z")
    behaviour = behaviour_of(reft, PROMPTS, rl.answer_logit("z"), chat=False)
    wanted = torch.stack([next_logits(reft, prompt)[z] for prompt in PROMPTS])
    torch.testing.assert_close(behaviour(), wanted, atol=1e-4, rtol=1e-4)


def test_what_edits_write_can_be_altered_and_is_whole_again_afterwards(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, loreft("a", "blocks[0].output"), loreft("b"))
    behaviour = behaviour_of(reft, PAIRS, chat=False)
    with altered(reft, {"a": nothing, "b": nothing}):
        torch.testing.assert_close(behaviour(), behaviour.bare)
    with altered(reft, {"a": scaled(0.5)}):
        half = behaviour()
    torch.testing.assert_close(half, behaviour_of(reft.scale("a", 0.5), PAIRS, chat=False).full)
    with altered(reft, {"a": only_along(torch.eye(32))}):
        torch.testing.assert_close(behaviour(), behaviour.full, atol=1e-5, rtol=1e-5)
    with pytest.raises(ZeroDivisionError), altered(reft, {"a": lambda written: written.delta / (1 // 0)}):
        behaviour()
    torch.testing.assert_close(behaviour(), behaviour.full)
    with (
        pytest.raises(RunError, match=r"there is no edit 'c'; there is \['a', 'b'\]"),
        altered(reft, {"c": nothing}),
    ):
        pass


def test_the_share_kept_is_one_with_all_edits_and_zero_with_none(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, loreft())
    with torch.no_grad():
        reft.interventions["shift"].linear.bias.add_(30 * orthonormal(1, 3, 2)[0])
    behaviour = behaviour_of(reft, PROMPTS, chat=False)
    assert behaviour.share(behaviour.full).value == pytest.approx(1.0)
    assert behaviour.share(behaviour.bare).value == pytest.approx(0.0)
    middle = (behaviour.full + behaviour.bare) / 2
    share = behaviour.share(middle)
    assert (share.value, share.low, share.high) == pytest.approx((0.5, 0.5, 0.5))


def test_an_effect_whose_interval_holds_zero_has_no_shares():
    generator = torch.Generator().manual_seed(0)
    bare, full = torch.randn(2, 40, generator=generator)
    assert math.isnan(share_kept(full, bare, full).value)
    assert str(share_kept(full, bare, full)) == "not defined"


def test_an_effect_that_few_examples_carry_has_an_interval_of_shares():
    bare, full = torch.zeros(40), torch.zeros(40)
    full[:5] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        share = share_kept(0.5 * full, bare, full)
    # (35/40)^40 is 0.5%: some of 2000 resamples hold none of the five.
    assert (share.value, share.low, share.high) == pytest.approx((0.5, 0.5, 0.5))


def test_bootstrap_intervals_hold_the_true_mean_about_as_often_as_they_say():
    held = 0
    for seed in range(200):
        values = torch.randn(30, generator=torch.Generator().manual_seed(seed)) + 2.0
        found = mean_of(values, draws=300, seed=seed)
        held += found.low <= 2.0 <= found.high
    assert 0.88 <= held / 200 <= 0.99


def test_weights_count_examples_by_their_tokens():
    values, weights = torch.tensor([1.0, 4.0]), torch.tensor([3.0, 1.0])
    assert mean_of(values, weights).value == pytest.approx(1.75)
    single = mean_of(torch.tensor([2.0]))
    assert single.value == 2.0
    assert np.isnan(single.low)
    assert str(Estimate(0.5, 0.25, 0.75)) == "0.5 [0.25, 0.75]"


@pytest.mark.parametrize(
    ("examples", "metric", "message"),
    [
        ([], None, "there are no examples"),
        (PROMPTS, rl.logit_diff(["z", "a"], "b"), "2 answers"),
        (PROMPTS, lambda logits: logits, "one number a row"),
        (PROMPTS, lambda logits: logits[:, 0] / 0, "not finite"),
        (PROMPTS, "accuracy", "metric='accuracy'"),
    ],
)
def test_what_cannot_be_measured_is_said(examples, metric, message, small_llama, byte_tokenizer):
    with pytest.raises(DataError, match=message):
        behaviour_of(bound(small_llama, byte_tokenizer, loreft()), examples, metric, chat=False)


def test_texts_need_a_tokenizer(small_llama):
    with pytest.raises(DataError, match=r"graph\.bind\(model, tokenizer\)"):
        behaviour_of(bound(small_llama, None, loreft()), PAIRS)
