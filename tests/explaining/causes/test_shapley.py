"""Shapley values against the formula by hand, against plain runs, and against planted truth."""

import functools
import itertools
import math
import time

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

import reftlab as rl
from reftlab.errors import DataError
from reftlab.explaining.causes.game import Coalitions
from reftlab.explaining.causes.parts import game_of, parts_of
from reftlab.explaining.causes.shapley import shapley, shapley_values
from reftlab.measuring import behaviour_of
from tests.explaining.causes.planted import (
    METRIC,
    PROMPTS,
    logit_direction,
    one_useful_dimension,
    with_amounts,
)
from tests.explaining.conftest import PAIRS, bound, loreft, orthonormal


def game(value, count, **options):
    return Coalitions(value, [str(number) for number in range(count)], **options)


def scalar(value):
    return lambda players: torch.tensor([float(value(players))])


def over_orders(value, count):
    """The mean change by each player over all orders, written out."""
    found = np.zeros(count)
    for order in itertools.permutations(range(count)):
        for place, player in enumerate(order):
            found[player] += value(frozenset(order[: place + 1])) - value(frozenset(order[:place]))
    return found / math.factorial(count)


def random_game(count, seed, examples=3):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(2**count, examples, generator=generator)
    return lambda players: table[sum(1 << player for player in players)]


def test_glove_airport_and_additive_games_have_their_known_values():
    glove = shapley_values(game(scalar(lambda s: 0 in s and (1 in s or 2 in s)), 3))
    assert glove.values[:, 0].tolist() == pytest.approx([2 / 3, 1 / 6, 1 / 6])
    # Littlechild and Owen (1973): those who need a piece of the runway share its cost.
    costs = [1.0, 3.0, 7.0, 12.0]
    airport = shapley_values(game(scalar(lambda s: max((costs[i] for i in s), default=0)), 4))
    assert airport.values[:, 0].tolist() == pytest.approx(
        [0.25, 0.25 + 2 / 3, 0.25 + 2 / 3 + 2, 0.25 + 2 / 3 + 7]
    )
    additive = shapley_values(game(scalar(lambda s: sum(costs[i] for i in s) - 5), 4))
    assert additive.values[:, 0].tolist() == pytest.approx(costs)
    assert torch.nan_to_num(additive.interactions).abs().max() < 1e-12
    assert additive.to_frame().difference.abs().max() < 1e-12


@pytest.mark.parametrize("count", [1, 2, 5])
def test_exact_values_are_the_mean_over_all_orders_for_each_example(count):
    value = random_game(count, seed=count)
    found = shapley_values(game(value, count))
    assert found.exact
    assert found.coalitions == 2**count
    for example in range(3):
        wanted = over_orders(lambda players, example=example: float(value(players)[example]), count)
        np.testing.assert_allclose(found.values[:, example], wanted, atol=1e-6)
    torch.testing.assert_close(found.values.sum(0), found.full - found.none)


def test_the_interaction_index_is_that_of_grabisch_and_roubens():
    team = {0, 1, 3}  # worth 1 together: each two of them interact by 1 / (3 − 1)
    found = shapley_values(game(scalar(lambda s: team <= s), 4)).interactions[..., 0]
    for i, j in itertools.permutations(range(4), 2):
        assert float(found[i, j]) == pytest.approx(0.5 if {i, j} <= team else 0.0)
    assert bool(found.diagonal().isnan().all())
    pair = shapley_values(game(random_game(2, 0), 2))
    v = random_game(2, 0)
    assert pair.interaction("0", "1").value == pytest.approx(
        float((v({0, 1}) - v({0}) - v({1}) + v(set())).mean()), abs=1e-6
    )
    assert len(pair.interaction_frame()) == 1


def test_sampled_values_sum_to_the_effect_and_their_intervals_hold_the_exact_values():
    outside = 0
    for seed in range(20):
        value = random_game(7, seed, examples=2)
        exact = shapley_values(game(value, 7))
        found = shapley_values(game(value, 7), exact_up_to=6, permutations=100, seed=seed)
        assert not found.exact
        assert found.permutations == 100
        torch.testing.assert_close(found.values.sum(0), found.full - found.none)
        outside += sum(
            not one.low <= float(truth) <= one.high
            for one, truth in zip(found.sampling, exact.values.mean(1), strict=True)
        )
    assert outside <= 14  # of 140; 7 expected at 95%


def test_a_sampled_additive_game_is_exact_and_what_ran_is_said():
    found = shapley_values(game(scalar(lambda s: sum(i * i for i in s)), 12), permutations=7)
    assert found.values[:, 0].tolist() == pytest.approx([i * i for i in range(12)])
    assert found.permutations == 8
    assert found.note == "8 random orders were sampled (12 parts, and exact values are for up to 10)"
    assert found.coalitions < 8 * 12
    assert found.interactions is None
    assert len(found.interaction_frame()) == 0
    with pytest.raises(DataError, match="known for exact values alone"):
        found.interaction("0", "1")


def test_a_budget_is_kept_and_its_effect_said():
    def slow(players):
        time.sleep(0.004)
        return torch.tensor([float(len(players))])

    begin = time.perf_counter()
    found = shapley_values(game(slow, 9), budget=0.2)
    assert time.perf_counter() - begin < 1.0  # all 512 would take two seconds and more
    assert "no time for all 512 combinations in 0.2 seconds" in found.note
    assert found.values[:, 0].tolist() == pytest.approx([1.0] * 9)
    least = shapley_values(game(slow, 9), budget=0)
    assert least.permutations == 2
    assert math.isnan(least.sampling[0].low)
    assert shapley_values(game(slow, 3), budget=60.0).exact


def test_means_are_weighted_and_intervals_are_over_examples():
    values = torch.tensor([1.0, 2.0, 6.0])
    weights = torch.tensor([1.0, 1.0, 2.0])
    found = shapley_values(game(lambda s: values * (0 in s), 2, weights=weights))
    (first, second) = found.estimates
    assert first.value == pytest.approx((1 + 2 + 12) / 4)
    assert first.low < first.value < first.high
    assert second.value == 0
    assert (second.low, second.high) == (0, 0)
    rounded = shapley_values(game(lambda s: values * (0 in s) + 1e-6 * (1 in s), 2, weights=weights))
    assert [(one.value, one.low, one.high) for one in rounded.estimates[1:]] == [(0, 0, 0)]


@pytest.mark.parametrize("family", ["small_llama", "small_gpt2"])
@pytest.mark.parametrize("metric", [None, METRIC])
def test_every_coalition_of_edits_is_a_plain_run_of_these_edits(family, metric, byte_tokenizer, request):
    edits = loreft("a", "blocks[0].output"), loreft("b", "blocks[1].output"), loreft("c", "blocks[1].output")
    model = request.getfixturevalue(family)
    reft = bound(model, byte_tokenizer, *edits)
    found = shapley(reft, PAIRS, metric=metric, chat=False, progress=False)

    @functools.cache
    def value(players):
        chosen = [name for number, name in enumerate("abc") if number in players]
        return plainly(reft.select(*chosen) if chosen else model, byte_tokenizer, metric)

    for example in range(len(PAIRS)):
        wanted = over_orders(lambda players, example=example: float(value(players)[example]), 3)
        np.testing.assert_allclose(found.values[:, example], wanted, atol=2e-4)
    assert found.labels == ("a", "b", "c")
    assert (found.unit == "logits") is (metric is not None)


def plainly(model, tokenizer, metric):
    """Row by row without any cache: nats per answer token, or the difference of two logits."""
    found = []
    for prompt, answer in PAIRS:
        ids = tokenizer(prompt)["input_ids"]
        wanted = tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(ids) + wanted])
        with torch.no_grad():
            if metric is None:
                logits = model(input_ids=torch.tensor([ids + wanted]), labels=labels).logits[0]
                loss = torch.nn.functional.cross_entropy(logits[len(ids) - 1 : -1], labels[0, len(ids) :])
                found.append(float(loss))
            else:
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
                z, q = (tokenizer.convert_tokens_to_ids(letter) for letter in "zq")
                found.append(float(logits[z] - logits[q]))
    return found


def test_one_useful_dimension_has_all_of_the_value_and_three_useless_ones_none(small_llama, byte_tokenizer):
    for seed in range(4):
        reft, place = one_useful_dimension(small_llama, byte_tokenizer, seed)
        found = shapley(reft, PROMPTS, "dimension", metric=METRIC, chat=False, progress=False)
        assert found.labels == tuple(f"direction {number}" for number in range(1, 5))
        shares = found.to_frame().share
        assert shares[place] == pytest.approx(1.0, abs=1e-4)
        assert found.effect.value > 0.5
        # What is left of the useless ones is rounding.
        assert all(abs(share) < 1e-5 for number, share in enumerate(shares) if number != place)
        # Rounding changes all examples alike, and is not taken for an effect.
        told = [one.excludes(0.0) for one in found.estimates]
        assert told == [number == place for number in range(4)]
        assert f"direction {place + 1} has the largest part of the effect" in found.sentence
        assert found.sentence.endswith(f"{found.unit}, 100% of the whole.")


def test_noise_of_useless_parts_is_taken_for_an_effect_as_rarely_as_the_level_says():
    alarms, missed = 0, 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        own = torch.randn(4, 30, generator=generator)
        own[0] += 2.0
        joint = 0.3 * torch.randn(16, 30, generator=generator)

        def value(players, own=own, joint=joint):
            return own[sorted(players)].sum(0) + joint[sum(1 << player for player in players)]

        useful, *useless = shapley_values(game(value, 4), seed=seed).estimates
        missed += not useful.excludes(0.0)
        alarms += sum(one.excludes(0.0) for one in useless)
    assert missed == 0
    assert alarms <= 8  # of 60; 3 expected at 95%


def test_of_two_edits_the_one_that_does_nothing_is_worth_nothing(small_llama, byte_tokenizer):
    reft = bound(
        small_llama, byte_tokenizer, loreft("idle", rank=1), loreft("busy", "blocks[2].output", rank=1)
    )
    with_amounts(reft.interventions["idle"], orthonormal(1, 3), torch.zeros(1))
    push = logit_direction(small_llama, byte_tokenizer)[None]
    with_amounts(reft.interventions["busy"], push, torch.tensor([5.0]))
    found = shapley(reft, PROMPTS, metric=METRIC, chat=False, progress=False)
    idle, busy = found.values
    assert float(idle.abs().max()) < 1e-5
    torch.testing.assert_close(busy, found.full - found.none)
    assert float(busy.min()) > 0.1


def test_two_edits_that_do_the_same_work_share_it_where_leaving_one_out_finds_neither(
    small_llama, byte_tokenizer
):
    twice = [
        rl.Edit(name, at="blocks[1].mlp.output", positions="last", intervention=rl.Zero()) for name in "ab"
    ]
    found = shapley(bound(small_llama, byte_tokenizer, *twice), PAIRS, chat=False, progress=False)
    effect = found.full - found.none
    assert float(effect.abs().min()) > 1e-3
    torch.testing.assert_close(found.values, torch.stack([effect, effect]) / 2, atol=1e-6, rtol=1e-5)
    assert float(found.last.abs().max()) < 1e-6
    torch.testing.assert_close(found.interactions[0, 1], -effect, atol=1e-6, rtol=1e-5)


def test_of_four_positions_the_one_that_can_be_seen_has_all_of_the_value(small_gpt2, byte_tokenizer):
    edit = rl.Edit("e", at="blocks[1].output", positions="first(2)+last(2)", intervention=rl.LoReFT(rank=2))
    reft = bound(small_gpt2, byte_tokenizer, edit)
    long = [prompt for prompt in PROMPTS if len(prompt) > 4]
    found = shapley(reft, long, "position", metric=METRIC, chat=False, progress=False)
    assert found.labels == ("first", "second", "second last", "last")
    # After the last block no token sees another one.
    torch.testing.assert_close(found.values[3], found.full - found.none, atol=1e-5, rtol=1e-4)
    assert float(found.values[:3].abs().max()) < 1e-5


def test_what_was_measured_before_is_not_measured_again(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, loreft("a"), loreft("b"), loreft("c"))
    behaviour = behaviour_of(reft, PAIRS, chat=False)
    shared = game_of(reft, behaviour, parts_of(reft))
    assert shapley_values(shared).coalitions == 6  # 8 less none and all
    again = shapley_values(shared, exact_up_to=0, permutations=6)
    assert again.coalitions == 0
    torch.testing.assert_close(again.values.sum(0), behaviour.full.double() - behaviour.bare.double())


def test_results_have_a_frame_a_figure_and_a_page(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, loreft("a"), loreft("b", "blocks[0].output"))
    found = shapley(reft, PAIRS, "layer", chat=False, progress=False)
    frame = found.to_frame()
    assert frame.part.tolist() == ["block 0", "block 1"]
    assert frame.shapley.sum() == pytest.approx(found.effect.value, abs=1e-6)
    assert frame.low.le(frame.shapley).all()
    assert frame.high.ge(frame.shapley).all()
    assert "exact, 2 coalitions" in repr(found)
    assert "<table" in found._repr_html_()
    axes = found.plot().axes[0]
    assert {label.get_text() for label in axes.get_yticklabels()} == {"block 0", "block 1"}
    assert "answer loss" in axes.get_xlabel()
    assert "nats" in axes.get_xlabel()
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(frame.shapley.tolist())


@pytest.mark.parametrize("count", [1, 20, 150])
def test_names_of_many_parts_do_not_overlap(count):
    value = torch.linspace(-1, 1, count)[:, None].expand(count, 4)
    whole = game(lambda players: value[sorted(players)].sum(0), count)
    figure = shapley_values(whole, exact_up_to=1, permutations=2).plot()
    FigureCanvasAgg(figure).draw()
    labels = figure.axes[0].get_yticklabels()
    boxes = sorted(label.get_window_extent().get_points()[:, 1].tolist() for label in labels)
    assert all(one[1] <= other[0] + 1 for one, other in itertools.pairwise(boxes))
    assert max(figure.get_size_inches()) < 20


def test_wrong_settings_are_refused(small_llama, byte_tokenizer, users_call):
    reft = bound(small_llama, byte_tokenizer, loreft("a"))
    for options, message in (
        ({"permutations": 1}, "permutations=1: expected"),
        ({"exact_up_to": -1}, "exact_up_to=-1: expected"),
        ({"budget": -2}, "budget=-2: expected"),
        ({"by": "head"}, "by='head': expected one of"),
    ):
        with pytest.raises(DataError, match=message):
            shapley(reft, PAIRS, chat=False, progress=False, **options)
