"""What edits do together, where the truth is planted."""

from __future__ import annotations

import random
from copy import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

import reftlab as rl
from reftlab.errors import DataError
from reftlab.explaining.composition import composition as work
from reftlab.explaining.composition.collisions import find_collisions
from reftlab.explaining.composition.composing import Bench, Others
from reftlab.explaining.composition.composition import Composition
from reftlab.explaining.subject import Subject
from reftlab.measuring import behaviour_of
from tests.explaining.conftest import WIDTH, bound, loreft, orthonormal
from tests.oracle import randomise

METRIC = rl.logit_diff("z", "q")


def composition(reft: Any, examples: Any, metric: Any = None, **options: Any) -> Composition:
    return work.composition(reft, examples, metric, chat=False, progress=False, **options)


def texts(count: int, seed: int = 0) -> list[str]:
    chosen = random.Random(seed)
    return ["".join(chosen.choices("abcdefghijklmnop", k=chosen.randint(3, 9))) for _ in range(count)]


def add(name: str, vector: torch.Tensor, at: str = "blocks[1].output", **options: Any) -> rl.Edit:
    return rl.Edit(name, at=at, **{"positions": "last", **options}, intervention=rl.Add(vector))


@pytest.mark.parametrize("family", ["small_llama", "small_gpt2"])
def test_edits_that_add_before_a_linear_readout_add_up_and_their_order_is_nothing(
    family, byte_tokenizer, request
):
    first, second = 3 * orthonormal(2, 1)
    reft = bound(
        request.getfixturevalue(family), byte_tokenizer,
        add("a", first, "final_norm.output"), add("b", second, "final_norm.output"),
    )  # fmt: skip
    found = composition(reft, texts(6), METRIC)
    (pair,) = found.pairs
    assert abs(found.alone[0].effect.value) > 0.01
    assert pair.interaction.value == 0
    assert pair.order.value == 0
    assert pair.commutator == pytest.approx(0.0, abs=1e-6)
    assert pair.logits.value == pytest.approx(0.0, abs=1e-5)
    assert pair.effect.value == pytest.approx(sum(one.effect.value for one in found.alone), rel=1e-4)
    assert "the effects add up" in found.sentence
    assert found.collisions == ()


def test_edits_that_do_not_commute_are_found_and_both_orders_are_the_models_own(small_llama, byte_tokenizer):
    way = orthonormal(1, 2)
    gone = rl.Edit("project", at="blocks[0].output", positions="last", intervention=rl.ProjectOut(way))
    reft = bound(small_llama, byte_tokenizer, add("push", 20 * way[0], "blocks[0].output"), gone)
    prompts = texts(8)
    found = composition(reft, prompts, METRIC)
    (pair,) = found.pairs
    # Pushed and then projected, nothing of the push is left; the other way round all of it is.
    assert pair.commutator > 0.5
    assert pair.effect.value == pytest.approx(found.alone[1].effect.value, abs=1e-5)
    assert pair.order.excludes(0.0)
    plain = bound(small_llama, byte_tokenizer, gone, add("push", 20 * way[0], "blocks[0].output"))
    other = values(plain, prompts) - values(small_llama, prompts)
    assert pair.reversed.value == pytest.approx(float(other.mean()), abs=1e-4)
    both = values(reft, prompts) - values(small_llama, prompts)
    assert pair.effect.value == pytest.approx(float(both.mean()), abs=1e-4)
    assert pair.order.value == pytest.approx(float((other - both).mean()), abs=1e-4)
    assert "The order of push and project matters" in found.sentence


def values(model: Any, prompts: list[str]) -> torch.Tensor:
    """The logit difference after each prompt, one at a time."""
    tokenizer = values.tokenizer
    z, q = tokenizer.convert_tokens_to_ids(["z", "q"])
    found = []
    for prompt in prompts:
        with torch.no_grad():
            logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
        found.append(logits[z] - logits[q])
    return torch.stack(found)


@pytest.fixture(autouse=True)
def _tokenizer(byte_tokenizer):
    values.tokenizer = byte_tokenizer


@pytest.mark.parametrize("family", ["small_llama", "small_gpt2"])
def test_effects_alone_and_together_are_those_of_models_with_these_edits_only(
    family, byte_tokenizer, request
):
    model, prompts = request.getfixturevalue(family), texts(4, seed=2)
    edits = [
        loreft("a", "blocks[0].output"),
        loreft("b", "blocks[1].output"),
        loreft("c", "blocks[0].output"),
    ]
    reft = bound(model, byte_tokenizer, *edits)
    randomise(reft)
    found = composition(reft, prompts, METRIC)
    bare = values(model, prompts)
    change = {
        names: values(reft.select(*names), prompts) - bare
        for names in (("a",), ("b",), ("c",), ("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c"))
    }
    for one in found.alone:
        assert one.effect.value == pytest.approx(float(change[one.name,].mean()), abs=1e-4)
    for pair in found.pairs:
        apart = change[pair.a, pair.b] - change[pair.a,] - change[pair.b,]
        assert pair.interaction.value == pytest.approx(float(apart.mean()), abs=1e-4)
    everything = change["a", "b", "c"] - change["a",] - change["b",] - change["c",]
    assert found.together.interaction.value == pytest.approx(float(everything.mean()), abs=1e-4)
    assert found.pair("b", "a").order is None
    assert found.pair("a", "c").order is not None
    logits = {
        names: torch.stack([last_logits(model if not names else reft.select(*names), p) for p in prompts])
        for names in ((), ("a",), ("b",), ("a", "b"))
    }
    apart = (logits["a", "b"] - logits["a",] - logits["b",] + logits[()]).norm(dim=1)
    size = sum((logits[name,] - logits[()]).norm(dim=1) for name in "ab")
    expected = float(apart.mean() / size.mean())
    assert found.pair("a", "b").logits.value == pytest.approx(expected, rel=1e-3)


def last_logits(model: Any, prompt: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**values.tokenizer(prompt, return_tensors="pt")).logits[0, -1]


def test_without_answers_both_orders_are_held_against_the_same_edited_model(small_llama, byte_tokenizer):
    way = orthonormal(1, 2)
    gone = rl.Edit("project", at="blocks[0].output", positions="last", intervention=rl.ProjectOut(way))
    push = add("push", 20 * way[0], "blocks[0].output")
    reft, prompts = bound(small_llama, byte_tokenizer, push, gone), texts(5)
    (pair,) = composition(reft, prompts).pairs
    other = bound(small_llama, byte_tokenizer, gone, push)

    def divergence(model):
        wanted = torch.stack([last_logits(reft, p) for p in prompts]).log_softmax(-1)
        found = torch.stack([last_logits(model, p) for p in prompts]).log_softmax(-1)
        return (wanted.exp() * (wanted - found)).sum(-1).mean()

    expected = divergence(other) - divergence(reft)
    assert expected > 1e-3
    assert pair.order.value == pytest.approx(float(expected), abs=1e-4)


def test_answers_are_measured_in_nats_and_groups_count_as_one(small_gpt2, byte_tokenizer):
    edits = [
        loreft(name, at)
        for name, at in zip("abc", ("blocks[0].output",) * 2 + ("blocks[1].output",), strict=True)
    ]
    reft = bound(small_gpt2, byte_tokenizer, *edits)
    randomise(reft)
    pairs = [(text, "z") for text in texts(5)]
    found = composition(reft, pairs, groups={"early": ["a"], "rest": ["b", "c"]})
    assert (found.behaviour, found.unit) == ("answer loss", "nats per answer token")
    assert [one.name for one in found.alone] == ["early", "rest"]
    alone = behaviour_of(reft.select("b", "c"), pairs, chat=False)
    assert found.alone[1].effect.value == pytest.approx(alone.effect.value, abs=1e-5)
    (pair,) = found.pairs
    turned = behaviour_of(reft.select("b", "c") + reft.select("a"), pairs, chat=False)
    assert pair.reversed.value == pytest.approx(turned.effect.value, abs=1e-5)
    assert pair.commutator > 0


@pytest.mark.parametrize(
    "sites", [("blocks[1].output", "blocks[1].output"), ("blocks[0].output", "blocks[1].output")]
)
def test_edits_that_cancel_along_a_planted_direction_are_caught_with_opposite_signs(
    sites, small_llama, byte_tokenizer
):
    way, *rest = orthonormal(5, 7)
    reft = bound(
        small_llama, byte_tokenizer,
        add("plus", 4 * way + 2 * rest[0], sites[0]), add("minus", -3 * way + 2 * rest[1], sites[1]),
    )  # fmt: skip
    writer = loreft("other", "blocks[1].output")
    found = composition(reft, texts(6), METRIC)
    (collision,) = found.collisions
    # Each writes one vector, so that the direction they share lies between the two.
    assert (collision.a, collision.b) == ("plus", "minus")
    assert collision.kind == "cancels"
    assert collision.mean[0] > 0 > collision.mean[1]
    assert abs(float(collision.direction @ way)) > 0.9
    assert collision.angle < collision.chance
    assert len(collision.promoted) == 4
    assert writer.name not in {collision.a, collision.b}
    assert found.plot().axes
    assert "cancels" in found._repr_html_()


def written_along(model: Any, tokenizer: Any, first: torch.Tensor, second: torch.Tensor) -> rl.BoundModel:
    """Two edits of rank 3 at one site that write in two given subspaces, amounts as they come."""
    reft = bound(
        model, tokenizer,
        *(rl.Edit(name, at="blocks[0].output", positions="last", intervention=rl.DiReFT(rank=3)) for name in "ab"),
    )  # fmt: skip
    randomise(reft)
    for name, basis in (("a", first), ("b", second)):
        weight = dict(reft.interventions[name].named_parameters())
        with torch.no_grad():
            largest = next(p for p in weight.values() if p.shape == (WIDTH, 3))
            largest.copy_(basis.T)
    return reft


def test_a_direction_shared_by_two_subspaces_is_found_among_those_that_are_not(small_gpt2, byte_tokenizer):
    vectors = orthonormal(5, 3)
    first, second = vectors[:3], torch.cat([vectors[:1], vectors[3:5]])
    turn = orthonormal(3, 8, 3)
    reft = written_along(small_gpt2, byte_tokenizer, first, turn @ second)
    (collision,) = composition(reft, texts(9), METRIC).collisions
    assert abs(float(collision.direction @ vectors[0])) == pytest.approx(1.0, abs=1e-4)
    assert collision.angle == pytest.approx(0.0, abs=0.1)


def test_random_subspaces_seldom_collide(small_gpt2, byte_tokenizer):
    prompts, met = texts(6), 0
    for seed in range(20):
        reft = written_along(
            small_gpt2, byte_tokenizer, orthonormal(3, 100 + seed), orthonormal(3, 200 + seed)
        )
        with torch.no_grad():
            recorded = Subject.of("test", reft, prompts, METRIC, chat=False).recorded
            met += bool(find_collisions(reft, recorded, [(("a",), ("b",))]))
    assert met <= 4


def test_interactions_that_chance_alone_makes_are_seldom_told_from_none(small_gpt2, byte_tokenizer):
    """Right and wrong are drawn at random for each example, so that edits add up on average."""
    reft = bound(small_gpt2, byte_tokenizer, loreft("a"), loreft("b", "blocks[0].output"))
    randomise(reft)
    others = Others(Subject.of("test", reft, texts(40), METRIC, chat=False))
    units, behaviour, told = {"a": ("a",), "b": ("b",)}, others.behaviour, 0
    with torch.no_grad():
        runs = {names: others.with_only(names) for names in (("a",), ("b",), ("a", "b"))}
    for seed in range(20):
        # Swapping right and wrong turns the sign of a logit difference.
        turn = torch.tensor([random.Random(f"{seed}/{n}").choice([1.0, -1.0]) for n in range(40)])
        drawn = copy(others)
        drawn.behaviour = replace(behaviour, bare=turn * behaviour.bare, full=turn * behaviour.full)
        drawn.with_only = {names: turn * found for names, found in runs.items()}.__getitem__
        found = Bench(drawn, units, lambda names: torch.zeros(0), {}, seed, []).together("a", "b")
        assert found.interaction.value != 0
        told += found.interaction.excludes(0.0)
    assert told <= 4


def test_pairs_beyond_the_limit_or_the_budget_are_left_out_and_said_so(small_llama, byte_tokenizer):
    vectors = torch.tensor([0.1, 4.0, 5.0])[:, None] * orthonormal(3, 4)
    edits = [add(name, vector) for name, vector in zip("abc", vectors, strict=True)]
    reft = bound(small_llama, byte_tokenizer, *edits)
    found = composition(reft, texts(4), METRIC, max_pairs=1)
    size = {one.name: abs(one.effect.value) for one in found.alone}
    most = sorted(size, key=size.get, reverse=True)[:2]
    assert {found.pairs[0].a, found.pairs[0].b} == set(most)
    assert len(found.pairs) == 1
    assert "of 3 pairs the 1 were measured" in found.note
    found = composition(reft, texts(4), METRIC, budget=1e-9)
    assert len(found.pairs) == 1
    assert "after 1 of 3 pairs" in found.note
    with pytest.raises(KeyError, match="there is no pair"):
        found.pair("a", "x")


def test_the_frame_has_a_line_each_and_the_model_is_left_as_it_was(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, loreft("a"), loreft("b"))
    randomise(reft)
    before = values(reft, texts(3))
    found = composition(reft, texts(4), METRIC)
    frame = found.to_frame()
    assert list(frame["edits"]) == ["a", "b", "a + b", "all together"]
    assert frame["interaction"][2] == pytest.approx(found.pairs[0].interaction.value)
    assert torch.equal(values(reft, texts(3)), before)
    assert repr(found).startswith("Composition(Together, a and b change")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"groups": {"x": ["a"], "y": ["bb"]}}, "there is no edit 'bb'"),
        ({"groups": {"x": ["a"], "y": ["a", "b"]}}, "'a' is named twice"),
        ({"groups": {"x": ["a"], "y": []}}, r"groups\['y'\]"),
        ({"groups": {"x": ["a"]}}, "leave the edit 'b' out"),
        ({"groups": {"x": ["a", "b"]}}, "needs two edits or groups"),
        ({"max_pairs": 0}, "max_pairs=0"),
        ({"budget": -1.0}, "budget=-1.0"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(options, said, small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, loreft("a"), loreft("b"))
    with pytest.raises(DataError, match=said):
        composition(reft, texts(3), METRIC, **options)


def test_one_edit_has_nothing_to_be_composed_with(small_llama, byte_tokenizer):
    with pytest.raises(DataError, match="needs two edits"):
        composition(bound(small_llama, byte_tokenizer, loreft("a")), texts(3), METRIC)
