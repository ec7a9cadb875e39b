"""Dose-response against plain hooks, against autograd, and against planted shapes."""

import time

import pytest
import torch

from reftlab.errors import DataError
from reftlab.explaining.causes.dose import DoseCurve, DoseResponse, dose_response, dosed
from reftlab.measuring import behaviour_of
from tests.explaining.causes.planted import METRIC, PROMPTS, logit_direction, with_amounts
from tests.explaining.conftest import PAIRS, bound, loreft, orthonormal


def curve(scales, means, noise=0.0, examples=1):
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor(means)[:, None] + noise * torch.randn(len(scales), examples, generator=generator)
    return DoseCurve("e", tuple(map(float, scales)), values, torch.ones(examples), 0)


def hooked(model, tokenizer, prompt, block, added):
    """The difference of two logits after a prompt, with a plain hook that adds to the last token of a block."""

    def act(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        new = torch.cat([hidden[:, :-1], hidden[:, -1:] + added(hidden[:, -1:])], dim=1)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    handle = blocks[block].register_forward_hook(act)
    try:
        logits = model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1]
    finally:
        handle.remove()
    z, q = (tokenizer.convert_tokens_to_ids(letter) for letter in "zq")
    return logits[z] - logits[q]


def delta_of(built, h):
    basis = built.basis().detach()
    return (h @ built.linear.weight.detach().T + built.linear.bias.detach() - h @ basis) @ basis.T


@pytest.mark.parametrize("family", ["small_llama", "small_gpt2"])
def test_every_dose_is_that_of_a_plain_hook_and_slopes_are_those_of_autograd(family, byte_tokenizer, request):
    model = request.getfixturevalue(family)
    reft = bound(model, byte_tokenizer, loreft("e", strength=0.7))
    scales = (0, 0.02, 0.04, 0.5, 0.98, 1.02, 2)
    found = dose_response(reft, PROMPTS[:3], scales, metric=METRIC, chat=False, progress=False)
    (one,) = found.curves
    assert one.scales == (0, 0.02, 0.04, 0.5, 0.98, 1.0, 1.02, 2)
    built = reft.interventions["e"]
    for row, scale in enumerate(one.scales):
        dose = torch.tensor(scale, requires_grad=True)
        hand = [
            hooked(model, byte_tokenizer, p, 1, lambda h, dose=dose: 0.7 * dose * delta_of(built, h))
            for p in PROMPTS[:3]
        ]
        torch.testing.assert_close(one.values[row], torch.stack(hand).detach(), atol=1e-4, rtol=1e-4)
        if scale in (0.0, 1.0):
            (slope,) = torch.autograd.grad(torch.stack(hand).mean(), dose)
            assert one.slope(scale).value == pytest.approx(
                float(slope), abs=0.02 * max(1.0, abs(float(slope)))
            )


def test_a_single_edit_varies_while_the_others_stay(small_llama, byte_tokenizer):
    reft = bound(
        small_llama, byte_tokenizer, loreft("a", "blocks[0,1].output"), loreft("b", "blocks[2].output")
    )
    found = dose_response(reft, PAIRS, (0, 0.5), chat=False, progress=False)
    assert [one.edit for one in found.curves] == [None, "a", "b"]
    behaviour = behaviour_of(reft, PAIRS, chat=False)
    half = behaviour_of(reft.scale("a", 0.5), PAIRS, chat=False).full
    torch.testing.assert_close(found["a"].values[1], half, atol=1e-5, rtol=1e-5)
    both = behaviour_of(reft.scale("a", 0.5).scale("b", 0.5), PAIRS, chat=False).full
    torch.testing.assert_close(found[None].values[1], both, atol=1e-5, rtol=1e-5)
    with reft.disabled("b"):
        torch.testing.assert_close(found["b"].values[0], behaviour(), atol=1e-6, rtol=1e-6)
    assert torch.equal(found[None].values[0], behaviour.bare)
    assert all(torch.equal(one.values[2], behaviour.full) for one in found.curves)


def test_edits_that_share_an_intervention_vary_apart(small_llama, byte_tokenizer):
    reft = bound(
        small_llama, byte_tokenizer, loreft("a", share="w"), loreft("b", "blocks[2].output", share="w")
    )
    found = dose_response(reft, PAIRS, (0, 1, 2), edits="a", together=False, chat=False, progress=False)
    behaviour = behaviour_of(reft, PAIRS, chat=False)
    with reft.disabled("a"):
        torch.testing.assert_close(found["a"].values[0], behaviour(), atol=1e-6, rtol=1e-6)
    assert set(reft.interventions) == {"w"}


def test_an_edit_that_does_nothing_is_flat_and_one_that_pushes_rises(small_llama, byte_tokenizer):
    reft = bound(
        small_llama, byte_tokenizer, loreft("idle", rank=1), loreft("busy", "blocks[2].output", rank=1)
    )
    with_amounts(reft.interventions["idle"], orthonormal(1, 3), torch.zeros(1))
    push = logit_direction(small_llama, byte_tokenizer)[None]
    with_amounts(reft.interventions["busy"], push, torch.tensor([2.0]))
    found = dose_response(reft, PROMPTS, metric=METRIC, chat=False, progress=False)
    assert [one.shape for one in found.curves] == ["rising", "flat", "rising"]
    assert [one.best for one in found.curves] == [2.0, 1.0, 2.0]
    assert "of all edits, the" in found.sentence
    gained = float((found.curves[0].values[-1] - found.curves[0].values[0]).mean())
    assert f" rises by {gained:.3g} logits; the effect is largest at scale 2." in found.sentence
    assert found["busy"].slope(0.0).low > 0
    assert found["idle"].slope(1.0).value == pytest.approx(0, abs=1e-5)
    assert found["busy"].effect.value > 0.1


def sentence(scales, means):
    return DoseResponse("answer loss", "nats", (curve(scales, means),)).sentence


def test_the_sentence_says_up_to_which_dose_the_behaviour_goes_which_way():
    scales = (0, 0.5, 1, 1.5, 2)
    began = "From scale 0 to 2 of e, the answer loss"
    assert sentence(scales, [4.0, 2.0, 1.0, 0.5, 3.0]) == (
        f"{began} falls up to scale 1.5 (by 3.5 nats), then rises (by 2.5); the effect is largest at scale 1.5."
    )
    assert sentence(scales, [0.0, 2.0, 2.0, 1.0, 3.0]) == (
        f"{began} rises up to scale 0.5 (by 2 nats), then falls up to scale 1.5 (by 1), then rises (by 2); the "
        "effect is largest at scale 2."
    )
    assert sentence(scales, [5.0, 4.0, 3.0, 2.0, 2.0]).startswith(f"{began} falls by 3 nats; ")
    assert sentence(scales, [1.0, 1.0, 1.0, 1.0, 1.0]) == f"{began} does not change."
    many = sentence((-1, 0, 0.5, 1, 1.5, 2), [0.0, 1.0, 0.0, 3.0, 0.5, 1.0])
    assert "From scale −1 to 2" in many
    assert "turns 4 times, is highest at scale 1 and lowest at scale −1" in many


def test_the_shape_and_the_best_dose_are_those_of_the_curve():
    scales = (0, 0.5, 1, 1.5, 2)
    bowl = curve(scales, [4.0, 2.0, 1.0, 0.5, 3.0])
    assert (bowl.shape, bowl.best) == ("neither", 1.5)  # the edit lowers it, and lowest is best
    hill = curve(scales, [0.0, 2.0, 1.0, 0.5, 0.0])
    assert (hill.shape, hill.best) == ("neither", 0.5)
    assert curve(scales, [5.0, 4.0, 3.0, 2.0, 2.0]).shape == "falling"
    assert curve(scales, [5.0, 4.0, 3.0, 2.0, 2.0]).best == 1.5  # as good, and nearer to 1
    assert curve(scales, [1.0, 1.0, 1.0, 1.0 + 1e-8, 1.0]).shape == "flat"
    square = curve((0, 0.5, 1, 3), [0.0, 0.25, 1.0, 9.0])
    for scale in (0.0, 1.0):  # exact for a parabola
        assert square.slope(scale).value == pytest.approx(2 * scale)


def test_slopes_of_noise_are_told_from_none_as_rarely_as_the_level_says():
    alarms = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(5, 30, generator=generator)
        noise = DoseCurve("e", (0.0, 0.5, 1.0, 1.5, 2.0), values, torch.ones(30), seed)
        alarms += noise.slope(0.0).excludes(0.0) + noise.slope(1.0).excludes(0.0)
    assert alarms <= 6  # of 40; 2 expected at 95%


def test_a_budget_leaves_doses_out_and_says_how_many(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, loreft("a"), loreft("b"))
    behaviour = behaviour_of(reft, PAIRS, chat=False)
    none = dosed(reft, behaviour, (0, 0.5, 1, 2), budget=0)
    assert all(one.scales == (0.0, 1.0) for one in none.curves)
    assert "before 6 of the doses were measured" in none.note
    assert "nan" in str(none.summary_frame().slope_at_0[0])
    told = []

    def slowly(what):
        told.append(what)
        time.sleep(0.05)

    found = dosed(reft, behaviour, (0, 0.5, 1, 2), edits=[], budget=0.04, tick=slowly)
    assert told == ["all edits × 2"]  # the farthest first
    assert found.curves[0].scales == (0.0, 1.0, 2.0)


def test_results_have_frames_a_figure_and_a_page(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, loreft("a"), loreft("b"))
    found = dose_response(reft, PAIRS, (0, 1, 2), chat=False, progress=False)
    frame = found.to_frame()
    assert len(frame) == 9
    assert frame.low.le(frame["mean"]).all()
    assert found.summary_frame().edit.tolist() == ["all edits", "a", "b"]
    assert "<table" in found._repr_html_()
    assert "all edits" in repr(found)
    panels = found.plot().axes
    assert [axes.get_title(loc="left") for axes in panels] == ["all edits", "a", "b"]
    assert panels[0].get_ylabel().replace("\n", " ") == "answer loss (nats per answer token)"
    means = panels[0].lines[0].get_ydata()
    assert list(means) == pytest.approx(frame["mean"][:3].tolist())


def test_wrong_settings_are_refused(small_llama, byte_tokenizer, users_call):
    reft = bound(small_llama, byte_tokenizer, loreft("a"))
    for scales, message in (
        ((0, float("nan")), "scales: nan is no finite number"),
        ((1.0, float("inf")), "scales: inf is no finite number"),
        ("12", "scales: '12' is no finite number"),
        ((True,), "scales: True is no finite number"),
    ):
        with pytest.raises(DataError, match=message):
            dose_response(reft, PAIRS, scales, progress=False)
    with pytest.raises(DataError, match=r"edits='aa': there is no such edit.*Did you mean 'a'"):
        dose_response(reft, PAIRS, edits="aa", progress=False)
    with pytest.raises(DataError, match="leave nothing to scale"):
        dose_response(reft, PAIRS, edits=[], together=False, progress=False)
    with pytest.raises(KeyError, match="there is no curve of 'b'"):
        dose_response(reft, PAIRS, (0, 1), progress=False)["b"]
    with pytest.raises(DataError, match="expected one of three or more scales"):
        curve((0, 1), [0.0, 1.0]).slope(0.0)
    with pytest.raises(DataError, match="takes a bound model"):
        dose_response(small_llama, PAIRS)
