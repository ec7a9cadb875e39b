"""What sentences make of numbers: as many digits as help, true minus signs, and no sign before 0."""

from dataclasses import replace

import pytest

from reftlab.explaining.composition.composition import Alone, Composition, PairEffect, Together
from reftlab.explaining.evidence.faithfulness import Faithfulness, Headline
from reftlab.measuring import Estimate

HEADLINE = Headline(
    "constant", 0, 32, Estimate(0.97, 0.9, 1.0), 0.9, True, "constant", (-0.001, 0.1), 6, 6, True
)


def faithful(share, low, high):
    headline = replace(HEADLINE, share=Estimate(share, low, high))
    return Faithfulness("answer loss", "nats", 12, Estimate(-3.0, -4.0, -2.0), (), headline, 2)


@pytest.mark.parametrize(
    ("share", "said"),
    [
        ((0.9712, 0.9, 1.0), "keeps 0.97 [0.90, 1.00] of"),
        ((0.9973, 0.9954, 0.9999), "keeps 0.997 [0.995, 1.00] of"),
        ((1.004, -0.25, 1.0), "keeps 1.00 [−0.25, 1.00] of"),
    ],
)
def test_a_share_has_two_decimals_unless_it_falls_short_of_the_whole_by_less(share, said):
    assert said in faithful(*share).sentence


def test_controls_about_0_have_no_sign():
    assert "keeps 0.05 (0.00 to 0.10 over 2 draws)" in faithful(0.97, 0.9, 1.0).sentence


def test_effects_of_edits_together_have_true_minus_signs():
    effect, nothing = Estimate(-13.0, -13.8, -12.3), Estimate(0.0, 0.0, 0.0)
    pair = PairEffect(effect, effect, nothing, "a", "b", effect, replace(effect, value=-1.0), None, None)
    both = Together(effect, effect, nothing)
    found = Composition("loss", "nats", 4, (Alone("a", effect), Alone("b", effect)), (pair,), both, ())
    assert found.sentence.startswith(
        "Together, a and b change the mean loss by −13 [−13.8, −12.3] nats; each alone, summed, by −13: "
    )
    assert "the other one changes it by −1 [−13.8, −12.3] nats" in found.sentence
    assert "-" not in found.sentence
