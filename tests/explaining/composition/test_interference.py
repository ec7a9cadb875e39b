"""How much edits interfere, where the truth is planted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import reftlab as rl
from reftlab.errors import DataError
from reftlab.explaining.composition.interference import principal_angles, write_basis
from tests.models import WIDTH, batch_of
from tests.oracle import assert_close, randomise


def unit(*numbers: int) -> torch.Tensor:
    vector = torch.zeros(WIDTH)
    vector[list(numbers)] = 1.0
    return vector


def both(model: Any, first: Any, second: Any, **second_options: Any) -> rl.BoundModel:
    options = {"at": "blocks[1].output", "positions": "last"}
    return rl.InterventionGraph(
        rl.Edit("a", **options, intervention=first),
        rl.Edit("b", **{**options, **second_options}, intervention=second),
    ).bind(model)


def test_principal_angles_are_the_planted_ones() -> None:
    turn = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64)).Q.float()
    planted = torch.tensor([0.0, 0.01, 30.0, 90.0])
    eye, radians = torch.eye(9), torch.deg2rad(planted)
    second = eye[:, :4] * torch.cos(radians) + eye[:, 4:8] * torch.sin(radians)
    torch.testing.assert_close(principal_angles(turn @ eye[:, :4], turn @ second), planted, atol=2e-3, rtol=0)
    assert_close(principal_angles(eye[:, :1], second)[:1], torch.tensor([0.0]), 1e-3)


def test_edits_that_add_commute_and_their_angle_is_that_of_their_vectors(llama: Any) -> None:
    reft = both(llama, rl.Add(unit(0)), rl.Add(unit(0, 1)))
    (pair,) = rl.interference(reft, batch_of((7, 4))).pairs
    (place,) = pair.places
    assert place.angles == pytest.approx((45.0,), abs=1e-3)
    assert place.overlap == pytest.approx(0.5, abs=1e-5)
    assert place.chance == pytest.approx(1 / WIDTH)
    assert place.commutator == pytest.approx(0.0, abs=1e-6)
    assert place.vectors == 2


def test_the_commutator_is_that_of_the_two_maps_on_the_models_own_vectors(llama: Any) -> None:
    torch.manual_seed(1)
    reft, batch = both(llama, rl.LoReFT(rank=2), rl.LoReFT(rank=3)), batch_of((7, 4))
    randomise(reft)
    a, b = reft.interventions["a"], reft.interventions["b"]
    read = "blocks[1].output @ last"
    h = rl.InterventionGraph().bind(llama).read(read, **batch)[read][:, 0]
    with torch.no_grad():
        apart = (a(b(h)) - b(a(h))).norm(dim=1).mean()
        size = ((a(h) - h).norm(dim=1) + (b(h) - h).norm(dim=1)).mean()
    found = rl.interference(reft, batch)
    (place,) = found.pairs[0].places
    assert place.commutator == pytest.approx(float(apart / size), rel=1e-4)
    assert len(place.angles) == 2
    logits = {
        names: reft(**batch, select=list(names)).logits[[0, 1], [6, 3]]
        for names in ((), ("a",), ("b",), ("a", "b"))
    }
    bare = logits[()]
    together = logits["a", "b"] - bare - (logits["a",] - bare) - (logits["b",] - bare)
    alone = (logits["a",] - bare).norm(dim=1) + (logits["b",] - bare).norm(dim=1)
    assert found.pairs[0].interaction == pytest.approx(
        float(together.norm(dim=1).mean() / alone.mean()), rel=1e-4
    )


def test_edits_in_separate_directions_of_the_last_layers_logits_do_not_interact(llama: Any) -> None:
    options = {"at": "unembed", "positions": "last"}
    logits = llama.config.vocab_size
    first, second = torch.zeros(logits), torch.zeros(logits)
    first[3], second[5] = 2.0, -1.0
    reft = rl.InterventionGraph(
        rl.Edit("a", **options, intervention=rl.Add(first)),
        rl.Edit("b", **options, intervention=rl.Add(second)),
    ).bind(llama)
    (pair,) = rl.interference(reft, batch_of((7, 4))).pairs
    assert pair.interaction == pytest.approx(0.0, abs=1e-5)
    assert pair.places[0].angles == pytest.approx((90.0,), abs=1e-3)


def test_places_are_compared_where_both_act_and_shown(llama: Any, tokenizer: Any) -> None:
    graph = rl.InterventionGraph(
        rl.Edit("wide", at="blocks[*].output", positions="last", intervention=rl.LoReFT(rank=2)),
        rl.Edit("late", at="blocks[2].output", positions="first", intervention=rl.Function(torch.sin)),
    )
    found = rl.interference(graph.bind(llama, tokenizer), ["the cat is in Paris"])
    (pair,) = found.pairs
    assert [(p.a, p.b, p.commutator, p.angles) for p in pair.places] == [("wide[2]", "late", None, ())]
    assert pair.interaction is not None
    assert list(found.to_frame()["site"]) == ["model.layers.2.output"]
    assert len(found.plot().legends[0].get_texts()) == 2
    assert "wide and late" in found._repr_html_()
    with pytest.raises(DataError, match="none of"):
        rl.interference(graph.bind(llama), {"ids": torch.ones(1, 2)})
    with pytest.raises(DataError, match="needs a tokenizer"):
        rl.interference(graph.bind(llama), ["x"])


def test_bases_are_those_that_edits_write_in() -> None:
    for made in (rl.LoReFT(rank=2), rl.NodiReFT(rank=2), rl.ConsReFT(rank=2)):
        built = made.build(WIDTH)
        h = torch.randn(20, WIDTH)
        with torch.no_grad():
            written = built(h) - h
        basis = write_basis(built)
        assert basis is not None
        assert_close(written @ basis @ basis.T, written, 1e-4)
    assert write_basis(rl.Function(torch.sin).build(WIDTH)) is None


def test_tasks_in_separate_directions_of_one_basis_are_told_apart(llama: Any) -> None:
    graph = rl.InterventionGraph(
        rl.Edit(
            "e", at="blocks[1].output", positions="last", intervention=rl.LoReFT(rank=4),
            tasks={"x": [0, 1], "y": [2, 3]},
        )
    )  # fmt: skip
    reft, batch = graph.bind(llama), batch_of((7, 4))
    randomise(reft)
    (pair,) = rl.interference(reft, batch).pairs
    assert (pair.a, pair.b) == ("e (x)", "e (y)")
    (place,) = pair.places
    assert place.angles == pytest.approx((90.0, 90.0), abs=1e-3)
    built, read = reft.interventions["e"], "blocks[1].output @ last"
    h = rl.InterventionGraph().bind(llama).read(read, **batch)[read][:, 0]
    masks = [torch.tensor([[k in own for k in range(4)]] * 2) for own in ((0, 1), (2, 3))]

    def act(vectors: torch.Tensor, which: int) -> torch.Tensor:
        return built.edited(vectors, subspace=masks[which])

    with torch.no_grad():
        apart = (act(act(h, 0), 1) - act(act(h, 1), 0)).norm(dim=1).mean()
        size = ((act(h, 0) - h).norm(dim=1) + (act(h, 1) - h).norm(dim=1)).mean()
    assert place.commutator == pytest.approx(float(apart / size), rel=1e-4)
    never = rl.norm("blocks[0].output") > 1e9
    (asked,) = rl.interference(both(llama, rl.Add(unit(0)), rl.Add(unit(1)), when=never), batch).pairs
    assert asked.places[0].commutator is None
    assert asked.interaction == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("a", "b"), [("last", "[-1]"), ("first+last", "[0, -1]")])
def test_the_order_matters_wherever_the_tokens_are_the_same(llama: Any, a: str, b: str) -> None:
    def pair(first: str, second: str) -> rl.BoundModel:
        torch.manual_seed(0)
        return rl.InterventionGraph(
            rl.Edit("a", at="blocks[1].output", positions=first, intervention=rl.LoReFT(rank=3)),
            rl.Edit("b", at="blocks[1].output", positions=second, intervention=rl.LoReFT(rank=3)),
        ).bind(llama)

    batch = batch_of((7, 4))
    [alike] = rl.interference(pair(a, a), batch).pairs[0].places
    [same] = rl.interference(pair(a, b), batch).pairs[0].places
    assert same.commutator is not None
    assert same.commutator == pytest.approx(alike.commutator)
    assert same.vectors == alike.vectors
    assert rl.interference(pair("last", "last(2)"), batch).pairs[0].places[0].commutator is None


def test_any_input_of_the_model_will_do_and_others_are_named(llama: Any) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3))
    graph = rl.InterventionGraph(
        *[rl.Edit(name, at="[0].output", intervention=rl.LoReFT(rank=2)) for name in ("a", "b")]
    )
    x = torch.randn(5, 4)
    found = rl.interference(graph.bind(net, example=x), {"input": x})
    assert found.rows == 5
    assert found.pairs[0].places[0].vectors == 5
    both = rl.InterventionGraph(
        *[rl.Edit(n, at="blocks[1].output", positions="last", intervention=rl.LoReFT(rank=2)) for n in "ab"]
    ).bind(llama)
    batch = batch_of((7, 4))
    vectors = llama.get_input_embeddings()(batch["input_ids"]).detach()
    embedded = {"inputs_embeds": vectors, "attention_mask": batch["attention_mask"]}
    assert rl.interference(both, embedded).pairs[0].interaction == pytest.approx(
        rl.interference(both, batch).pairs[0].interaction, rel=1e-4
    )
    with pytest.raises(DataError, match="'atention_mask' is no input"):
        rl.interference(both, {"input_ids": batch["input_ids"], "atention_mask": batch["attention_mask"]})
