"""Parts left out and parts alone, against plain runs and against planted truth."""

import pytest
import torch

import reftlab as rl
from reftlab.errors import DataError
from reftlab.explaining.causes.leave_one_out import leave_one_out, left_out
from reftlab.explaining.causes.parts import game_of, parts_of, taken_apart
from reftlab.explaining.causes.shapley import shapley_values
from reftlab.explaining.subject import Subject
from reftlab.measuring import behaviour_of
from tests.explaining.causes.planted import (
    METRIC,
    PROMPTS,
    logit_direction,
    one_useful_dimension,
    with_amounts,
)
from tests.explaining.conftest import PAIRS, bound, loreft, orthonormal


def answer_nats(reft, tokenizer):
    """Row by row without any cache, nats per answer token of each example."""
    found = []
    for prompt, answer in PAIRS:
        ids, wanted = (
            tokenizer(prompt)["input_ids"],
            tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id],
        )
        labels = torch.tensor([[-100] * len(ids) + wanted])
        with torch.no_grad():
            logits = reft(input_ids=torch.tensor([ids + wanted]), labels=labels).logits[0]
        found.append(torch.nn.functional.cross_entropy(logits[len(ids) - 1 : -1], labels[0, len(ids) :]))
    return torch.stack(found).double()


@pytest.mark.parametrize("family", ["small_llama", "small_gpt2"])
def test_changes_are_those_of_plain_runs_without_each_edit_and_with_it_alone(family, byte_tokenizer, request):
    edits = loreft("a", "blocks[0].output"), loreft("b"), loreft("c")
    reft = bound(request.getfixturevalue(family), byte_tokenizer, *edits)
    found = leave_one_out(reft, PAIRS, chat=False, progress=False)
    full = answer_nats(reft, byte_tokenizer)
    with reft.disabled():
        none = answer_nats(reft, byte_tokenizer)
    torch.testing.assert_close(found.full, full, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.none, none, atol=1e-4, rtol=1e-4)
    for number, name in enumerate("abc"):
        with reft.disabled(name):
            without = answer_nats(reft, byte_tokenizer)
        with reft.disabled(*{"a", "b", "c"} - {name}):
            alone = answer_nats(reft, byte_tokenizer)
        torch.testing.assert_close(found.without[number], without, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.alone[number], alone, atol=1e-4, rtol=1e-4)
        mean = ((without - full) * found.weights).sum() / found.weights.sum()
        assert found.lost[number].value == pytest.approx(float(mean), abs=1e-4)
        mean = ((alone - none) * found.weights).sum() / found.weights.sum()
        assert found.gained[number].value == pytest.approx(float(mean), abs=1e-4)
    assert found.controls == ()


def test_the_useful_dimension_is_missed_and_random_directions_are_not(small_llama, byte_tokenizer):
    for seed in range(2):
        reft, place = one_useful_dimension(small_llama, byte_tokenizer, seed)
        found = leave_one_out(reft, PROMPTS, "dimension", metric=METRIC, chat=False, draws=3, progress=False)
        effect = found.effect.value
        for number, (lost, gained) in enumerate(zip(found.lost, found.gained, strict=True)):
            share = 1.0 if number == place else 0.0
            assert lost.value / -effect == pytest.approx(share, abs=1e-4)
            assert gained.value / effect == pytest.approx(share, abs=1e-4)
        assert [one.excludes(0.0) for one in found.lost] == [number == place for number in range(4)]
        span, space = found.controls
        assert (span.within, space.within) == ("span", "space")
        assert span.without.shape == space.alone.shape == (3, len(PROMPTS))
        # A direction drawn from 48 has by chance a 48th of the edit; one of its own four has a quarter.
        lost = [(c.without - found.full).mean(1) / -effect for c in (span, space)]
        assert float(lost[1].abs().mean()) < 0.2
        assert float(lost[0].mean()) > float(lost[1].mean())


def test_a_position_left_out_is_an_edit_of_the_other_positions(small_gpt2, byte_tokenizer):
    def edited(positions):
        edit = rl.Edit("e", at="blocks[0].output", positions=positions, intervention=rl.LoReFT(rank=2))
        return bound(small_gpt2, byte_tokenizer, edit)

    reft = edited("first(2)+last(2)")
    found = leave_one_out(reft, PAIRS, "position", chat=False, progress=False)
    others = ("[1]+last(2)", "[0]+last(2)", "first(2)+last", "first(2)+[-2]")
    for without, positions in zip(found.without, others, strict=True):
        other = edited(positions)
        other.interventions["e"].load_state_dict(reft.interventions["e"].state_dict())
        wanted = behaviour_of(other, PAIRS, chat=False).full.double()
        torch.testing.assert_close(without, wanted, atol=1e-5, rtol=1e-5)


def test_without_answers_the_divergence_from_the_edited_model_is_measured(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, loreft("a"), loreft("b", "blocks[2].output"))
    found = leave_one_out(reft, PROMPTS[:3], chat=False, progress=False)
    ids = [torch.tensor([byte_tokenizer(prompt)["input_ids"]]) for prompt in PROMPTS[:3]]
    with torch.no_grad():
        full = torch.stack([reft(input_ids=row).logits[0, -1] for row in ids]).log_softmax(-1)
        with reft.disabled("a"):
            other = torch.stack([reft(input_ids=row).logits[0, -1] for row in ids]).log_softmax(-1)
    divergence = torch.nn.functional.kl_div(other, full, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(found.without[0], divergence.double(), atol=1e-5, rtol=1e-4)
    assert float(found.full.abs().max()) < 1e-6


def test_random_directions_of_the_span_are_those_of_the_seed_by_hand(small_llama, byte_tokenizer):
    """Removing any unit direction r of the span leaves `Δ − r (r·Δ)`: by hand for the seed's own draws."""
    reft = bound(small_llama, byte_tokenizer, loreft("e", "blocks[2].output", rank=2))
    found = leave_one_out(
        reft, PROMPTS, "dimension", metric=METRIC, chat=False, draws=1, seed=3, progress=False
    )
    behaviour = behaviour_of(reft, PROMPTS, METRIC, chat=False)
    built = reft.interventions["e"]
    basis = built.basis().detach()
    generator = torch.Generator().manual_seed(3)
    parts = rows_of(reft, PROMPTS)
    direction = torch.nn.functional.normalize(torch.randn(1, len(parts), generator=generator) @ parts)
    # What LoReFT adds lies in its basis, so that taking r out is taking it out of the basis.
    kept = rl.Function(lambda h: h + added(built, basis, h) @ (torch.eye(32) - direction.T @ direction))
    with reft.replaced("e", kept.build(32)), torch.no_grad():
        by_hand = behaviour().double()
    torch.testing.assert_close(found.controls[0].without[0], by_hand, atol=1e-4, rtol=1e-4)


def added(built, basis, h):
    return (h @ built.linear.weight.T + built.linear.bias - h @ basis) @ basis.T


def rows_of(reft, prompts):
    subject = Subject.of("test", reft, prompts, METRIC, chat=False)
    return torch.cat([part.rows for part in taken_apart(subject, "dimension", None)])


def test_random_directions_follow_the_seed_and_none_may_be_drawn(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, loreft())

    def controls(**options):
        return leave_one_out(reft, PAIRS, "dimension", chat=False, progress=False, **options).controls

    one = controls(seed=1, draws=1)[0].without
    assert torch.equal(one, controls(seed=1, draws=1)[0].without)
    assert not torch.equal(one, controls(seed=2, draws=1)[0].without)
    assert controls(draws=0) == ()


def test_an_edit_of_one_direction_has_no_random_direction_of_its_span(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, loreft("e", rank=1))
    with_amounts(reft.interventions["e"], orthonormal(1, 5), torch.tensor([3.0]))
    found = leave_one_out(reft, PAIRS, "dimension", chat=False, draws=2, progress=False)
    assert [control.within for control in found.controls] == ["space"]
    assert "one direction" in found.note


def test_of_two_edits_that_do_the_same_work_neither_is_missed(small_llama, byte_tokenizer):
    twice = [
        rl.Edit(name, at="blocks[1].mlp.output", positions="last", intervention=rl.Zero()) for name in "ab"
    ]
    found = leave_one_out(bound(small_llama, byte_tokenizer, *twice), PAIRS, chat=False, progress=False)
    assert all(abs(one.value) < 1e-6 for one in found.lost)
    assert all(one.value == pytest.approx(found.effect.value, abs=1e-6) for one in found.gained)
    assert abs(found.effect.value) > 1e-3


def test_of_two_layers_the_one_that_pushes_is_missed_and_the_idle_one_is_not(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, loreft("e", "blocks[1,2].output", rank=1))
    with_amounts(reft.interventions["e[1]"], orthonormal(1, 3), torch.zeros(1))
    push = logit_direction(small_llama, byte_tokenizer)[None]
    with_amounts(reft.interventions["e[2]"], push, torch.tensor([5.0]))
    found = leave_one_out(reft, PROMPTS, "layer", metric=METRIC, chat=False, progress=False)
    assert found.labels == ("block 1", "block 2")
    idle, busy = found.lost
    assert idle.value == pytest.approx(0, abs=1e-5)
    assert busy.value == pytest.approx(-found.effect.value, abs=1e-5)
    assert busy.excludes(0.0)


def test_a_game_that_others_have_measured_is_not_measured_again(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, loreft("a"), loreft("b"), loreft("c"))
    behaviour, parts = behaviour_of(reft, PAIRS, chat=False), parts_of(reft)
    game = game_of(reft, behaviour, parts)
    shapley_values(game)
    ran = game.ran
    found = left_out(reft, behaviour, parts, game=game)
    assert game.ran == ran
    torch.testing.assert_close(found.without[0], game({1, 2}))


def test_results_have_a_frame_a_figure_and_a_page(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, loreft())
    found = leave_one_out(reft, PAIRS, "dimension", chat=False, draws=3, progress=False)
    frame = found.to_frame()
    assert frame.kind.value_counts().to_dict() == {"part": 2, "random in span": 3, "random in space": 3}
    assert frame.left_out[0] == pytest.approx(found.lost[0].value)
    assert frame.alone_low.le(frame.alone).all()
    left, right = found.plot().axes
    assert [bar.get_width() for bar in left.patches[-2:]] == pytest.approx(frame.left_out[:2].tolist())
    assert [bar.get_width() for bar in right.patches[-2:]] == pytest.approx(frame.alone[:2].tolist())
    assert "nats" in left.get_xlabel()
    assert "<table" in found._repr_html_()
    assert "left out: direction 1" in repr(found)


def test_wrong_settings_are_refused(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, loreft())
    with pytest.raises(DataError, match="draws=-1: expected"):
        leave_one_out(reft, PAIRS, chat=False, draws=-1, progress=False)
    with pytest.raises(DataError, match="takes a bound model"):
        leave_one_out(small_llama, PAIRS)
