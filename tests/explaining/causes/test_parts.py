"""Edits taken apart: what acts is what was chosen, all together are the edit, none is no edit."""

import pytest
import torch

import reftlab as rl
from reftlab.errors import DataError
from reftlab.explaining.altering import altered, nothing, scaled
from reftlab.explaining.causes.game import Coalitions
from reftlab.explaining.causes.parts import banded, game_of, parts_of, present, taken_apart
from reftlab.explaining.causes.tokens import Token
from reftlab.explaining.geometry.record import record
from reftlab.explaining.subject import Subject
from reftlab.measuring import behaviour_of
from reftlab.measuring.inputs import accepted
from tests.explaining.conftest import PAIRS, bound, loreft
from tests.models import batch_of, with_position_ids

FAMILIES = ["small_llama", "small_gpt2"]


def delta_of(built, h):
    """LoReFT written out: R (W h + b − Rᵀ h)."""
    basis = built.basis().detach()
    return (h @ built.linear.weight.detach().T + built.linear.bias.detach() - h @ basis) @ basis.T


def hooked(model, batch, edits):
    """Logits with plain hooks; `edits` are (block, row → columns, function of the vectors to what is added)."""
    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    handles = []
    for block, columns, added in edits:

        def act(module, args, output, columns=columns, added=added):
            hidden = output[0] if isinstance(output, tuple) else output
            new = hidden.clone()
            for row, chosen in enumerate(columns):
                for column in chosen:
                    new[row, column] += added(hidden[row, column][None])[0].to(new.dtype)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handles.append(blocks[block].register_forward_hook(act))
    try:
        with torch.no_grad():
            return model(**batch).logits
    finally:
        for handle in handles:
            handle.remove()


def columns_of(batch, numbers):
    """The columns of tokens by number, negative ones from the end, in each row."""
    found = []
    for mask in batch["attention_mask"]:
        real = mask.nonzero()[:, 0].tolist()
        found.append([real[number] for number in numbers])
    return found


def recorded_of(reft, *made):
    with torch.no_grad():
        return record(reft, made, accepted(reft.model))


def real(batch, logits):
    return logits[batch["attention_mask"].bool()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_set_of_edits_and_layers_is_that_of_plain_hooks(family, side, byte_tokenizer, request):
    model = request.getfixturevalue(family)
    reft = bound(model, byte_tokenizer, loreft("a", "blocks[0,1].output"), loreft("b", "blocks[1].output"))
    batch = with_position_ids(batch_of(side=side))
    last = columns_of(batch, [-1])
    built = reft.interventions

    def logits(keys):
        blocks = {"a[0]": 0, "a[1]": 1, "b": 1}
        return hooked(model, batch, [(blocks[k], last, lambda h, k=k: delta_of(built[k], h)) for k in keys])

    by_edit, by_layer, by_site = (parts_of(reft, by=by) for by in ("edit", "layer", "site"))
    assert [part.label for part in by_edit] == ["a", "b"]
    assert [(part.label, part.edits) for part in by_layer] == [
        ("block 0", ("a[0]",)),
        ("block 1", ("a[1]", "b")),
    ]
    assert [part.label for part in by_site] == ["a[0]", "a[1]", "b"]
    wanted = {
        (by_edit, frozenset({0})): ["a[0]", "a[1]"], (by_edit, frozenset({1})): ["b"], (by_edit, frozenset()): [],
        (by_layer, frozenset({1})): ["a[1]", "b"], (by_layer, frozenset({0})): ["a[0]"],
        (by_site, frozenset({0, 2})): ["a[0]", "b"], (by_site, frozenset({0, 1, 2})): ["a[0]", "a[1]", "b"],
    }  # fmt: skip
    for (parts, chosen), keys in wanted.items():
        with torch.no_grad(), present(reft, parts, chosen):
            found = reft(**batch).logits
        torch.testing.assert_close(real(batch, found), real(batch, logits(keys)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_edited_position_is_that_of_plain_hooks(side, small_gpt2, byte_tokenizer):
    edit = rl.Edit("e", at="blocks[0].output", positions="first(2)+last(2)", intervention=rl.LoReFT(rank=2))
    reft = bound(small_gpt2, byte_tokenizer, edit)
    batch = with_position_ids(batch_of(side=side))
    parts = parts_of(reft, recorded_of(reft, batch), "position")
    assert [part.label for part in parts] == ["first", "second", "second last", "last"]
    built = reft.interventions["e"]
    for chosen, numbers in (({0}, [0]), ({1, 2}, [1, -2]), ({0, 1, 3}, [0, 1, -1]), (set(), [])):
        with torch.no_grad(), present(reft, parts, chosen):
            found = reft(**batch).logits
        plain = hooked(small_gpt2, batch, [(0, columns_of(batch, numbers), lambda h: delta_of(built, h))])
        torch.testing.assert_close(real(batch, found), real(batch, plain), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("positions", "length", "labels"),
    [
        ("first(2)+last(2)", 3, ["first", "second", "last"]),
        ("last(3)", 2, ["second last", "last"]),
        ("all", 4, ["first", "second", "third", "4th"]),
        ("every(2)", 5, ["first", "third", "5th"]),
        ([0, -1], 6, ["first", "last"]),
        ([5, -2, -1], 9, ["6th", "second last", "last"]),
        ([5, -2, -1], 6, ["6th", "first of [5, -2, -1]"]),
        ("first(1)+[4]", 9, ["first", "5th"]),
        ("rows([1, 3])", 5, ["first of rows([1, 3])", "second of rows([1, 3])"]),
    ],
)  # fmt: skip
def test_tokens_are_named_as_the_positions_count_them(positions, length, labels, small_gpt2, byte_tokenizer):
    edit = rl.Edit("e", at="blocks[0].output", positions=positions, intervention=rl.LoReFT(rank=1))
    reft = bound(small_gpt2, byte_tokenizer, edit)
    parts = parts_of(reft, recorded_of(reft, batch_of((length,))), "position")
    assert {part.label for part in parts} == set(labels)


def test_one_position_belongs_to_all_edits_that_have_it(small_llama, byte_tokenizer):
    first = rl.Edit("f", at="blocks[0].output", positions="first+last", intervention=rl.LoReFT(rank=1))
    reft = bound(small_llama, byte_tokenizer, first, loreft("g"))
    parts = parts_of(reft, recorded_of(reft, batch_of()), "position")
    assert [(part.label, part.edits) for part in parts] == [("first", ("f",)), ("last", ("f", "g"))]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_set_of_dimensions_is_that_of_a_projection_by_hand(family, byte_tokenizer, request):
    model = request.getfixturevalue(family)
    reft = bound(model, byte_tokenizer, loreft(rank=3, strength=0.5))
    batch = with_position_ids(batch_of(side="left"))
    parts = parts_of(reft, recorded_of(reft, batch), "dimension")
    assert [part.label for part in parts] == ["direction 1", "direction 2", "direction 3"]
    assert all(torch.allclose(part.rows @ part.rows.T, torch.ones(1, 1), atol=1e-5) for part in parts)
    built, last = reft.interventions["shift"], columns_of(batch, [-1])
    for chosen in ({0}, {1, 2}, set()):
        rows = torch.cat([torch.zeros(1, 32), *(parts[number].rows for number in chosen)])
        with torch.no_grad(), present(reft, parts, chosen):
            found = reft(**batch).logits
        onto = rows.T @ rows
        plain = hooked(model, batch, [(1, last, lambda h, onto=onto: 0.5 * delta_of(built, h) @ onto)])
        torch.testing.assert_close(real(batch, found), real(batch, plain), atol=1e-4, rtol=1e-4)


def test_what_lies_outside_the_directions_is_a_part_of_its_own(small_llama, byte_tokenizer):
    edit = rl.Edit("e", at="blocks[1].output", positions="all", intervention=rl.Scale(0.2))
    reft = bound(small_llama, byte_tokenizer, edit)
    batch, deltas = batch_of((9, 9)), []
    recorded = recorded_of(reft, batch)
    parts = parts_of(reft, recorded, "dimension")
    assert parts[-1].label == "rest"
    assert len(parts) > 2
    for chosen in (*({number} for number in range(len(parts))), {0, len(parts) - 1}):
        watching = reft.watching(lambda bound, tokens, base, new, source: deltas.append(new - base))
        with torch.no_grad(), present(reft, parts, chosen), watching:
            reft(**batch)
    torch.testing.assert_close(sum(deltas[:-1]), recorded.vectors["e"].delta, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(deltas[-1], deltas[0] + deltas[len(parts) - 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("by", ["edit", "site", "layer", "position", "dimension"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_parts_are_the_model_bit_for_bit_and_none_is_without_edits(
    by, dtype, small_llama, byte_tokenizer
):
    edit = rl.Edit("e", at="blocks[1].output", positions="first+last(2)", intervention=rl.LoReFT(rank=2))
    reft = bound(small_llama.to(dtype), byte_tokenizer, edit)
    batch = batch_of(side="left")
    parts = parts_of(reft, recorded_of(reft, batch), by)
    with torch.no_grad():
        full = reft(**batch).logits
        with reft.disabled():
            bare = reft(**batch).logits
        with present(reft, parts, set(range(len(parts)))):
            assert torch.equal(reft(**batch).logits, full)
        with present(reft, parts, set()):
            assert torch.equal(reft(**batch).logits, bare)
    assert not torch.equal(full, bare)


def test_sites_that_share_an_intervention_are_left_out_one_by_one(small_llama, byte_tokenizer):
    shared = rl.Edit(
        "s", at="blocks[0,1,2].output", positions="last", intervention=rl.LoReFT(rank=2), share="w"
    )
    reft = bound(small_llama, byte_tokenizer, shared)
    batch = with_position_ids(batch_of())
    built, last, parts = reft.interventions["w"], columns_of(batch, [-1]), parts_of(reft, by="layer")
    keys, edits = set(reft.interventions), reft.edits
    with torch.no_grad(), present(reft, parts, {0, 2}):
        found = reft(**batch).logits
    plain = hooked(small_llama, batch, [(block, last, lambda h: delta_of(built, h)) for block in (0, 2)])
    torch.testing.assert_close(real(batch, found), real(batch, plain), atol=1e-4, rtol=1e-4)
    assert (set(reft.interventions), reft.edits) == (keys, edits)
    with pytest.raises(ZeroDivisionError), altered(reft, {"s[1]": scaled(0.5)}):
        raise ZeroDivisionError
    assert (set(reft.interventions), reft.edits) == (keys, edits)
    assert reft.interventions["w"] is built


def test_neighbouring_layers_act_and_rest_together(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, loreft("a", "blocks[0,1,2].output"))
    behaviour = behaviour_of(reft, PAIRS, chat=False)
    bands = banded(parts_of(reft, by="layer"), 2)
    assert [(band.label, band.edits) for band in bands] == [
        ("block 0", ("a[0]",)),
        ("block 1 to block 2", ("a[1]", "a[2]")),
    ]
    with present(reft, bands, {0}):
        alone = behaviour()
    with altered(reft, {"a[1]": nothing, "a[2]": nothing}):
        torch.testing.assert_close(behaviour(), alone)
    assert not torch.allclose(alone, behaviour.full)
    assert banded(bands, 2) == bands


def test_edits_that_are_not_taken_apart_stay_in_force(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, loreft("a"), loreft("b", "blocks[2].output"))
    batch = batch_of()
    parts = parts_of(reft, by="edit", of="a")
    with torch.no_grad(), present(reft, parts, set()):
        found = reft(**batch).logits
    with torch.no_grad(), reft.disabled("a"):
        torch.testing.assert_close(found, reft(**batch).logits)
    behaviour = behaviour_of(reft, PAIRS, chat=False)
    with reft.disabled("a"):
        torch.testing.assert_close(game_of(reft, behaviour, parts)(), behaviour().double())


def test_no_set_is_measured_twice(small_llama, byte_tokenizer):
    asked = []
    game = Coalitions(lambda players: asked.append(players) or torch.tensor([float(len(players))]), "abc")
    assert [float(game(players)) for players in ([0, 1], (1, 0), {2})] == [2.0, 2.0, 1.0]
    assert asked == [frozenset({0, 1}), frozenset({2})]
    reft = bound(small_llama, byte_tokenizer, loreft("a"), loreft("b"))
    behaviour = behaviour_of(reft, PAIRS, chat=False)
    game = game_of(reft, behaviour, parts_of(reft))
    assert torch.equal(game({0, 1}), behaviour.full.double())
    assert torch.equal(game(), behaviour.bare.double())
    assert game.ran == 0


def test_tokens_are_told_in_words():
    assert [Token(0, number).label for number in (0, 1, 2, 3, 20, 21, 110)] == [
        "first", "second", "third", "4th", "21st", "22nd", "111th",
    ]  # fmt: skip
    assert [Token(2, number).label for number in (-1, -2, -3, -4)] == [
        "last", "second last", "third last", "4th last",
    ]  # fmt: skip


def test_what_cannot_be_taken_apart_is_refused_with_the_reason(small_llama, byte_tokenizer, users_call):
    reft = bound(small_llama, byte_tokenizer, loreft("a"), loreft("b"))
    recorded = recorded_of(reft, batch_of())
    with pytest.raises(DataError, match="by='head': expected one of"):
        parts_of(reft, recorded, "head")
    with pytest.raises(DataError, match=r"of='aa': there is no such edit.*Did you mean 'a'"):
        parts_of(reft, of="aa")
    with pytest.raises(DataError, match=r"of=\[\] names no edit"):
        parts_of(reft, of=[])
    with pytest.raises(
        DataError, match=r"dimensions are those of one edit at one site; choose one of \['a', 'b'\]"
    ):
        parts_of(reft, recorded, "dimension")
    with pytest.raises(DataError, match="by='position' needs recorded="):
        parts_of(reft, by="position")
    with pytest.raises(DataError, match="leave_one_out takes a bound model"):
        rl.leave_one_out(small_llama, PAIRS)
    with pytest.raises(DataError, match="no edits"):
        parts_of(rl.InterventionGraph(rl.Read("blocks[0].output")).bind(small_llama))
    gated = loreft("c", when=rl.norm("blocks[0].output") > 0.1)
    reft = bound(small_llama, byte_tokenizer, gated)
    with pytest.raises(DataError, match="edit 'c' acts under a condition"):
        parts_of(reft, recorded_of(reft, batch_of()), "position")
    reft = bound(small_llama, byte_tokenizer, loreft("a"))
    own = [rl.Example("the sea", "blue", positions={"a": [1]})]
    with pytest.raises(DataError, match="the examples give edit 'a' other tokens than its own, 'last'"):
        taken_apart(Subject.of("test", reft, own), "position", None)
    still = rl.Edit("z", at="blocks[0].output", positions="last", intervention=rl.Scale(1.0))
    reft = bound(small_llama, byte_tokenizer, still)
    with pytest.raises(DataError, match="edit 'z' changes no token"):
        parts_of(reft, recorded_of(reft, batch_of()), "dimension")
