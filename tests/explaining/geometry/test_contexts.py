"""What drives a read direction: a planted token comes back, and random directions are not special."""

import random
import re

import pytest
import torch

import reftlab as rl
from reftlab.errors import DataError
from reftlab.explaining.geometry.directions import find_directions
from reftlab.explaining.geometry.driving import contexts_of, driving_contexts
from reftlab.explaining.geometry.vectors import EditVectors
from reftlab.explaining.subject import Subject
from tests.explaining.conftest import WIDTH, bound, loreft, orthonormal, set_directions

LETTERS = "bcdefghijklmnoprstuvwxyz"


def texts(count=16, seed=0, extra="q"):
    """Texts of random letters; every second one holds the letter `extra` once."""
    generator = random.Random(seed)
    found = []
    for number in range(count):
        letters = generator.choices(LETTERS, k=10)
        if number % 2:
            letters[3 + number % 5] = extra
        found.append("".join(letters))
    return found


def with_token(model, tokenizer, piece, direction, size):
    """Let one token alone carry a direction, of all tokens' embeddings."""
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        table -= (table @ direction)[:, None] * direction
        table[tokenizer.convert_tokens_to_ids(piece)] += size * direction


def reading(model, tokenizer, direction, at="blocks[0].output", positions="last"):
    edit = rl.Edit("e", at=at, positions=positions, intervention=rl.LoReFT(rank=1))
    reft = bound(model, tokenizer, edit)
    write = orthonormal(1, 9)
    set_directions(reft.interventions["e"], write, torch.ones(1), direction[None], torch.zeros(1))
    return reft


@pytest.mark.parametrize("family", ["small_llama", "small_gpt2"])
def test_an_edit_that_reads_what_one_token_carries_is_driven_by_that_token(family, byte_tokenizer, request):
    model, direction = request.getfixturevalue(family), orthonormal(1, 4)[0]
    with_token(model, byte_tokenizer, "q", direction, 12.0)
    reft = reading(model, byte_tokenizer, direction)
    found = driving_contexts(reft, texts(), chat=False, progress=False, top=8)
    [drive] = found.directions
    # The direction is turned so that the mean amount is positive, so either end may be the planted one.
    ends = (drive.most, drive.least)
    assert sum([one.token for one in end] == ["q"] * 8 for end in ends) == 1
    assert {drive.highest[0].text, drive.lowest[0].text} >= {"q"}
    measures = {one.measure: one for one in drive.against}
    assert measures["variance"].p <= 0.01
    assert measures["largest"].p <= 0.05
    assert found.tokens == 160
    assert re.search(r"e is found (most|least) at the tokens q, ", found.sentence)
    assert "Beside 200 random directions, the vectors differ more along it (p 0.005)" in found.sentence


def test_the_values_are_the_models_own_at_every_token_padded_or_not(small_llama, byte_tokenizer):
    direction, some = orthonormal(1, 5)[0], ["abc", ("a longer text", "yes"), "b"]
    reft = reading(small_llama, byte_tokenizer, direction, "blocks[1].output", "first(2)")
    found = driving_contexts(reft, some[:2], chat=False, progress=False)
    [drive] = found.directions
    seen = []
    hook = small_llama.model.layers[1].register_forward_hook(lambda m, a, out: seen.append(out[0]))
    with torch.no_grad():
        for text in ("abc", "a longer text"):
            small_llama(torch.tensor([byte_tokenizer(text)["input_ids"]]))
    hook.remove()
    for one in drive.most:
        values = seen[one.example] @ direction
        got = torch.tensor(one.values)[: len(values)]
        sign = torch.sign((got * values).sum())
        torch.testing.assert_close(sign * got, values, atol=1e-4, rtol=1e-4)
        assert one.edited == tuple(n < 2 for n in range(len(one.tokens)))
        assert one.value == max(one.values)
    assert max(len(one.tokens) for one in drive.most) > len(byte_tokenizer("a longer text")["input_ids"])
    alone = driving_contexts(reft, ["abc"], chat=False, progress=False)
    together = next(one for one in drive.most if one.example == 0)
    assert [abs(v) for v in alone.directions[0].most[0].values] == pytest.approx(
        [abs(v) for v in together.values], abs=1e-4
    )


def test_edits_of_earlier_sites_are_in_force_and_this_sites_are_not(small_gpt2, byte_tokenizer):
    direction = orthonormal(1, 6)[0]
    first = rl.Edit("first", at="blocks[0].output", positions="all", intervention=rl.Add(2.0))
    here = rl.Edit("here", at="blocks[1].output", positions="all", intervention=rl.LoReFT(rank=1))
    reft = bound(small_gpt2, byte_tokenizer, first, here)
    set_directions(
        reft.interventions["here"], orthonormal(1, 9), torch.ones(1), direction[None], torch.zeros(1)
    )
    [drive] = driving_contexts(reft, ["a text"], "here", chat=False, progress=False).directions
    ids = torch.tensor([byte_tokenizer("a text")["input_ids"]])
    with reft.disabled("here"), torch.no_grad():
        own = reft.read("blocks[1].output @ all", input_ids=ids)["blocks[1].output @ all"][0] @ direction
    got = torch.tensor(drive.most[0].values)
    torch.testing.assert_close(torch.sign((got * own).sum()) * got, own, atol=1e-4, rtol=1e-4)
    with pytest.raises(DataError, match=r"expected the key of one of the edits, \['first', 'here'\]"):
        driving_contexts(reft, ["a text"], chat=False, progress=False)
    with pytest.raises(DataError, match="Did you mean 'here'"):
        driving_contexts(reft, ["a text"], "her", chat=False, progress=False)


def test_random_read_directions_are_special_as_often_as_chance_says(small_llama, byte_tokenizer):
    reft = bound(small_llama.bfloat16(), byte_tokenizer, loreft("e", "blocks[1].output", 1))
    seen = Subject.of("test", reft, texts(), chat=False).seen
    alarms = dict.fromkeys(("variance", "kurtosis", "largest"), 0)
    for seed in range(20):
        built = rl.LoReFT(rank=1).build(WIDTH)
        set_directions(built, orthonormal(1, 9), torch.ones(1), orthonormal(1, 100 + seed), torch.zeros(1))
        own: EditVectors = seen.vectors["e"]
        found = contexts_of(
            find_directions(built, 1.0, own), seen.tokens["e"], byte_tokenizer, top=2, seed=seed
        )
        for one in found.directions[0].against:
            alarms[one.measure] += one.p <= 0.05
    # Of 20 tries at 5%, more than 4 happen once in 400.
    assert max(alarms.values()) <= 4


def test_a_token_that_all_texts_begin_with_drives_a_direction_once(small_llama, byte_tokenizer):
    direction = orthonormal(1, 4)[0]
    with_token(small_llama, byte_tokenizer, "q", direction, 12.0)
    reft = reading(small_llama, byte_tokenizer, direction)
    some = ["q" + text for text in texts(12, extra="x")]
    [drive] = driving_contexts(reft, some, chat=False, progress=False, top=12).directions
    ends = {end: [one.example for one in some if one.token == "q"] for end, some in
            (("most", drive.most), ("least", drive.least))}  # fmt: skip
    assert sorted(ends.values()) == [[], [0]]
    means = [one for one in (*drive.highest, *drive.lowest) if one.text == "q"]
    assert {one.count for one in means} == {1}


def test_a_repeat_has_the_same_ids_and_the_same_edits_before_it(small_llama, byte_tokenizer):
    first = rl.Edit("first", at="blocks[0].output", positions="last", intervention=rl.Add(2.0))
    here = rl.Edit("here", at="blocks[1].output", positions="last", intervention=rl.LoReFT(rank=1))
    reft = bound(small_llama, byte_tokenizer, first, here)
    tokens = Subject.of("test", reft, ["xyz", "xyzw", "xyzv", "yz"], chat=False).seen.tokens["here"]
    assert byte_tokenizer("xyzw")["input_ids"] == tokens.ids[3:7].tolist()
    # In the first text z is edited, so that it is another vector than in the second.
    expected = [False] * 3 + [True, True, False, False] + [True] * 3 + [False] + [False] * 2
    assert tokens.repeats.tolist() == expected


def test_where_tokens_see_what_follows_only_a_whole_text_is_a_repeat(small_bert, byte_tokenizer):
    reft = bound(small_bert, byte_tokenizer, rl.Edit("e", at="blocks[0].output", intervention=rl.Add(1.0)))
    tokens = Subject.of("test", reft, ["xyz", "xyzw", "xyz"], chat=False).seen.tokens["e"]
    assert tokens.repeats.tolist() == [False] * 7 + [True] * 3
    assert len(tokens.usual) == 7


def test_massive_vectors_are_left_out_and_counted(small_llama, byte_tokenizer):
    direction = orthonormal(1, 4)[0]
    with_token(small_llama, byte_tokenizer, "A", orthonormal(1, 7)[0], 4000.0)
    reft = reading(small_llama, byte_tokenizer, direction)
    found = driving_contexts(reft, ["A" + text for text in texts(6)], chat=False, progress=False)
    # All are the same vector once more.
    assert found.note.startswith("1 token, the first of its text, whose vector is over 10 times as long")
    assert "5 tokens that repeat an earlier example" in found.note
    assert all(one.token != "A" for one in (*found.directions[0].most, *found.directions[0].least))
    assert found.directions[0].most[0].tokens[0] == "A"


def test_the_texts_are_shown_escaped_with_every_value(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, loreft("e", "blocks[1].output", 2))
    found = driving_contexts(reft, ["a <b> & c", "the sea"], chat=False, progress=False)
    page = found._repr_html_()
    assert "&lt;" in page
    assert "<b>" not in page
    assert "&amp;</span>" in page
    value = found.directions[0].most[0].values[0]
    assert f'title="v · h = {value:+.3g}' in page
    assert 'class="more edited' in page or 'class="less edited' in page
    frame = found.to_frame()
    assert set(frame["end"]) == {"most", "least"}
    assert len(found.controls()) == 6
    assert "most driven by" in repr(found)
    titles = [axes.get_title(loc="left") for axes in found.plot().axes]
    assert sum("excess kurtosis" in title for title in titles) == 2


def test_an_edit_that_reads_nothing_says_so(small_llama, byte_tokenizer):
    added = bound(small_llama, byte_tokenizer, rl.Edit("e", at="blocks[0].output", intervention=rl.Add(1.0)))
    found = driving_contexts(added, ["the sea"], chat=False, progress=False)
    assert "reads nothing" in found.missing
    assert "not available" in repr(found)
    assert found.plot().axes
    assert "reads nothing" in found._repr_html_()
    with pytest.raises(DataError, match="top=0"):
        driving_contexts(added, ["the sea"], top=0)
    with pytest.raises(DataError, match="needs a tokenizer"):
        driving_contexts(bound(small_llama, None, loreft()), ["the sea"])
