"""Mediation finds the sites through which an effect flows, against hooks put on by hand."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import reftlab as rl
from reftlab.errors import DataError, PositionError
from reftlab.explaining.causes.mediation import mediate
from reftlab.measuring import behaviour_of
from tests.explaining.conftest import PAIRS, bound, loreft

# Shapes are checked at each call in the tests of what runs underneath.
pytestmark = pytest.mark.usefixtures("users_call")

VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(9))
METRIC = rl.logit_diff(40, 77)
BLOCKS = {"small_llama": "model.layers", "small_gpt2": "transformer.h"}
PROJECTION = {"small_llama": "self_attn.o_proj", "small_gpt2": "attn.c_proj"}
QUIET = {"progress": False, "chat": False}


def add(at="blocks[0].output", positions="last", vector=VECTOR, name="push"):
    return rl.Edit(name, at=at, positions=positions, intervention=rl.Add(vector))


def main(value):
    return value[0] if isinstance(value, tuple) else value


class ByHand:
    """One unpadded row through a bare model, with hooks that add, keep and replace vectors."""

    def __init__(self, model, family, ids):
        self.model, self.blocks, self.ids = model, model.get_submodule(BLOCKS[family]), ids
        self.projections = [block.get_submodule(PROJECTION[family]) for block in self.blocks]

    @torch.no_grad()
    def __call__(self, edit=None, site="output", patch=None):
        """Logits and the vectors at all sites; `edit` is (block, token, vector), `patch` (block, where, vector)."""
        kept, handles = {}, []

        def write(tensor, where, vector):
            tensor = tensor.clone()
            tensor[(0, *where)] = vector
            return tensor

        def on_block(number):
            def hook(module, args, output):
                hidden = main(output)
                if edit is not None and edit[0] == number:
                    hidden = write(hidden, (edit[1],), hidden[0, edit[1]] + edit[2])
                if patch is not None and site == "output" and patch[0] == number:
                    hidden = write(hidden, patch[1], patch[2])
                kept["output", number] = hidden[0]
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            return hook

        def on_heads(number):
            def hook(module, args):
                hidden = args[0]
                if patch is not None and site == "heads" and patch[0] == number:
                    hidden = write(hidden, patch[1], patch[2])
                kept["heads", number] = hidden[0]
                return (hidden, *args[1:])

            return hook

        for number, block in enumerate(self.blocks):
            handles.append(block.register_forward_hook(on_block(number)))
            handles.append(self.projections[number].register_forward_pre_hook(on_heads(number)))
        try:
            return self.model(input_ids=torch.tensor([self.ids])).logits[0], kept
        finally:
            for handle in handles:
                handle.remove()


def diff(logits):
    return float(logits[-1, 40] - logits[-1, 77])


@pytest.mark.parametrize(("family", "token"), [("small_llama", 1), ("small_gpt2", -1)])
def test_shares_of_blocks_and_tokens_are_those_of_hooks_by_hand(family, token, byte_tokenizer, request):
    model, prompt = request.getfixturevalue(family), "a hill"
    ids = byte_tokenizer(prompt)["input_ids"]
    reft = bound(model, byte_tokenizer, add(positions=[token]))
    result = mediate(reft, [prompt], metric=METRIC, **QUIET)
    run = ByHand(model, family, ids)
    edit = (0, token, VECTOR)
    (bare, base), (full, edited) = run(), run(edit)
    whole = diff(full) - diff(bare)
    assert result.sufficiency.shape == (len(run.blocks), 1, len(ids))
    for block in range(len(run.blocks)):
        for column in range(len(ids)):
            alone, _ = run(patch=(block, (column,), edited["output", block][column]))
            without, _ = run(edit, patch=(block, (column,), base["output", block][column]))
            assert result.sufficiency[block, 0, column] == pytest.approx(
                (diff(alone) - diff(bare)) / whole, abs=1e-3
            )
            assert result.necessity[block, 0, column] == pytest.approx(
                (diff(full) - diff(without)) / whole, abs=1e-3
            )
    # The whole stream at the edited block and token carries everything.
    assert result.sufficiency[0, 0, token] == pytest.approx(1, abs=1e-4)
    assert result.necessity[0, 0, token] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("family", ["small_llama", "small_gpt2"])
def test_shares_of_heads_are_those_of_hooks_by_hand(family, byte_tokenizer, request):
    model, prompt = request.getfixturevalue(family), "the sea"
    ids = byte_tokenizer(prompt)["input_ids"]
    reft = bound(model, byte_tokenizer, add(positions=[1]))
    result = mediate(
        reft, [prompt], "blocks[*].attn.heads", ["last"], METRIC, heads=True, necessity=False, **QUIET
    )
    run = ByHand(model, family, ids)
    (bare, _), (full, edited) = run(), run((0, 1, VECTOR))
    for block in range(len(run.blocks)):
        for head in range(4):
            own = slice(8 * head, 8 * head + 8)
            values = edited["heads", block][-1, own]
            alone, _ = run(site="heads", patch=(block, (len(ids) - 1, own), values))
            expected = (diff(alone) - diff(bare)) / (diff(full) - diff(bare))
            assert result.sufficiency[block, head, 0] == pytest.approx(expected, abs=1e-3)


def test_the_answer_loss_of_padded_prompts_is_that_of_rows_by_hand(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, add())
    result = mediate(reft, PAIRS, positions=["first", "last"], **QUIET)
    assert result.columns == ("first", "last", "answer")
    behaviour = behaviour_of(reft, PAIRS, chat=False)
    torch.testing.assert_close(result.bare, behaviour.bare, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(result.full, behaviour.full, atol=1e-4, rtol=1e-4)
    for number, (prompt, answer) in enumerate(PAIRS):
        asked = byte_tokenizer(prompt)["input_ids"]
        wanted = [*byte_tokenizer(answer)["input_ids"], byte_tokenizer.eos_token_id]
        run, last = ByHand(small_llama, "small_llama", asked + wanted), len(asked) - 1

        def loss(logits, last=last, wanted=wanted):
            return float(cross_entropy(logits[last:-1], torch.tensor(wanted)))

        given = slice(last + 1, len(asked + wanted) - 1)
        (_, base), (_, edited) = run(), run((0, last, VECTOR))
        for column, where in enumerate([slice(0, 1), slice(last, last + 1), given]):
            for block in range(3):
                alone, _ = run(patch=(block, (where,), edited["output", block][where]))
                without, _ = run((0, last, VECTOR), patch=(block, (where,), base["output", block][where]))
                assert result.sufficient[block, 0, column, number] == pytest.approx(loss(alone), abs=1e-3)
                assert result.necessary[block, 0, column, number] == pytest.approx(loss(without), abs=1e-3)


def test_half_precision_gives_the_shares_of_float32(small_llama, byte_tokenizer):
    prompt, edit = ["the sea", "a hill on a hill"], add(positions=[1], vector=4 * VECTOR)
    where = {"positions": [1, "last"], "metric": METRIC, **QUIET}
    exact = mediate(bound(small_llama, byte_tokenizer, edit), prompt, **where)
    coarse = mediate(bound(small_llama.to(torch.bfloat16), byte_tokenizer, edit), prompt, **where)
    span = float((exact.full - exact.bare).abs().max())
    np.testing.assert_allclose(coarse.sufficient, exact.sufficient, atol=0.1 * span)


def one_head(model, block, head):
    """Only one head of the model brings anything from one token to another after the first block."""
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            weight = layer.self_attn.o_proj.weight
            kept = weight[:, 8 * head : 8 * head + 8].clone()
            weight.zero_()
            if number == block:
                weight[:, 8 * head : 8 * head + 8] = kept
    return model


def test_the_planted_head_is_found_and_no_other_in_any_seed(small_llama, byte_tokenizer):
    recovered, alarms = 0, 0
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        block, head = 1 + seed % 2, seed % 4
        with torch.no_grad():
            for parameter in small_llama.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0, 0.2, generator=generator)
        edit = add(positions=[0], vector=3 * torch.randn(32, generator=generator))
        reft = bound(one_head(small_llama, block, head), byte_tokenizer, edit)
        ids = [int(token) for token in torch.randint(1, 200, (5,), generator=generator)]
        prompt = byte_tokenizer.decode(ids)
        result = mediate(
            reft,
            [prompt],
            "blocks[1:].attn.heads",
            ["last"],
            METRIC,
            heads=True,
            necessity=seed == 0,
            **QUIET,
        )
        effects = np.abs(result.sufficient[:, :, 0, 0] - float(result.bare))
        recovered += result.sufficiency[block - 1, head, 0] == pytest.approx(1, abs=1e-3)
        if seed == 0:
            assert result.necessity[block - 1, head, 0] == pytest.approx(1, abs=1e-3)
            place = f"{result.sites[block - 1].name}, head {head}, position 'last'"
            assert f"{place}, alone brings about 100% of the effect" in result.sentence
            assert f"{place}, costs most: 100% of the effect" in result.sentence
        effects[block - 1, head] = 0
        alarms += int((effects > 1e-5).sum())
    assert (recovered, alarms) == (5, 0)


def test_cells_outside_the_cone_are_exactly_0_and_not_run(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, add("blocks[1].output", [2]))
    result = mediate(reft, ["a cat and a dog"], metric=METRIC, **QUIET)
    outside = np.ones_like(result.sufficiency, dtype=bool)
    outside[1:, :, 2:] = False
    outside[2, :, :-1] = True  # behind the last block, a token that predicts nothing that is asked
    assert (result.sufficiency[outside] == 0).all()
    assert (result.necessity[outside] == 0).all()
    assert sum(count for name, count in result.counts.items() if "not run" in name) >= outside.sum()
    assert result.counts["cells computed"] < outside.size


def test_an_edit_without_an_effect_has_no_shares(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, add(vector=torch.zeros(32)))
    result = mediate(reft, ["the sea"], metric=METRIC, **QUIET)
    assert not result.defined
    assert np.isnan(result.sufficiency).all()
    result.plot()


def test_intervals_hold_the_shares_of_all_examples(small_llama, byte_tokenizer):
    prompts = [f"a cat {letter} {letter}" for letter in "abcdefghij"]
    reft = bound(small_llama, byte_tokenizer, add("blocks[0].output", [1], 3 * VECTOR))
    result = mediate(reft, prompts, positions=[1, "last"], necessity=False, **QUIET)
    low, high = result.interval()
    assert ((low <= result.sufficiency + 1e-9) & (result.sufficiency <= high + 1e-9)).all()
    assert low[0, 0, 0] == pytest.approx(1, abs=1e-3)


def test_the_sentence_names_blocks_and_the_answers_tokens_in_words(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, add("blocks[1].output", vector=9 * VECTOR))
    result = mediate(reft, [("the sea", "blue")], "blocks[1].output", ["last"], **QUIET)
    assert "the edited vector at block 1, position 'last', alone brings" in result.sentence
    every = mediate(reft, ["the sea"], "blocks[1].output", metric=METRIC, **QUIET)
    assert "at block 1, token 'a', alone brings about 100% of the effect" in every.sentence
    edit = rl.Edit(
        "late", at="blocks[1].output", positions="all", phase="decode", intervention=rl.Add(9 * VECTOR)
    )
    result = mediate(
        bound(small_llama, byte_tokenizer, edit), [("the sea", "blue")], "blocks[1].output", ["last"], **QUIET
    )
    assert "at block 1, at the answer's tokens, alone brings about 100% of the effect" in result.sentence


def test_what_the_time_did_not_allow_is_named(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, loreft())
    result = mediate(reft, ["the sea"], metric=METRIC, budget=0, **QUIET)
    assert np.isnan(result.sufficient).all()
    assert all(f"block {block}" in result.note for block in range(3))
    assert "left out" in repr(result)
    assert result.sentence.startswith("No place was measured. The time was over")


def test_edits_that_take_from_a_source_run_are_mediated_too(small_llama, byte_tokenizer):
    swap = rl.Edit(
        "swap", at="blocks[1].output", positions="last", intervention=rl.Swap(), source=rl.Read(run="other")
    )
    reft = rl.InterventionGraph(rl.Source("other"), swap).bind(small_llama, byte_tokenizer)
    example = rl.Example("the sea", sources={"other": "a hill"})
    result = mediate(reft, [example, rl.Example("a cat", sources={"other": "dog b"})], metric=METRIC, **QUIET)
    with torch.no_grad():
        other = small_llama(**byte_tokenizer("a hill", return_tensors="pt"), output_hidden_states=True)
    run = ByHand(small_llama, "small_llama", byte_tokenizer("the sea")["input_ids"])
    logits, _ = run(patch=(1, (-1,), other.hidden_states[2][0, -1]))
    assert float(result.full[0]) == pytest.approx(diff(logits), abs=1e-3)
    np.testing.assert_allclose(result.sufficient[1:, 0, -1], result.full[None].expand(2, -1), atol=1e-3)


def test_encoders_are_mediated_by_whole_passes(small_bert, byte_tokenizer):
    reft = bound(small_bert, byte_tokenizer, add(positions=[1], vector=5 * VECTOR))
    result = mediate(reft, ["the sea", "a cat and a dog"], positions=[1, "last"], metric=METRIC, **QUIET)
    np.testing.assert_allclose(result.sufficient[0, 0, 0], result.full, atol=1e-3)
    np.testing.assert_allclose(result.necessary[0, 0, 0], result.bare, atol=1e-3)


def test_what_cannot_be_used_is_refused_by_name(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, add())
    with pytest.raises(DataError, match="prompts of one length"):
        mediate(reft, ["the sea", "a cat and a dog"], positions="all", metric=METRIC, **QUIET)
    with pytest.raises(PositionError, match="column '\\[9\\]', prompt: row 0"):
        mediate(reft, ["the sea"], positions=[9], metric=METRIC, **QUIET)
    with pytest.raises(DataError, match="budget=-1"):
        mediate(reft, ["the sea"], metric=METRIC, budget=-1, **QUIET)
    with pytest.raises(DataError, match="tasks"):
        mediate(reft, [rl.Example("the sea", "b", task="x")], **QUIET)


def test_frame_and_figure_show_every_cell(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, add(positions=[1]))
    result = mediate(reft, PAIRS, **QUIET)
    frame = result.to_frame()
    assert len(frame) == result.sufficiency.size
    assert "last" in result.note
    assert list(frame["sufficiency"]) == pytest.approx(list(result.sufficiency.ravel()), nan_ok=True)
    one = mediate(reft, PAIRS[:1], **QUIET)
    texts = {label.get_text() for axes in one.plot().axes for label in axes.get_xticklabels()}
    assert {"answer", "the"} <= texts
    assert "<img" in result._repr_html_()
