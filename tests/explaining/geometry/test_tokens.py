"""Tokens that a direction promotes: planted ones, the formula, and how tokens are shown."""

import pytest
import torch

import reftlab as rl
from reftlab.explaining import explain, readable_token
from reftlab.explaining.geometry.tokens import Lens
from tests.explaining.conftest import PAIRS, WIDTH, TextMLP, bound


def steering(model, tokenizer, number: int, site: str = "blocks[2].output"):
    """Add the unembedding row of one token, made as long as the vectors there."""
    row = model.get_output_embeddings().weight[number].detach()
    value = 3.0 * row / row.norm()
    edit = rl.Edit("steer", at=site, positions="last", intervention=rl.Add(value))
    return bound(model, tokenizer, edit)


@pytest.mark.parametrize("family", ["small_llama", "small_gpt2"])
@pytest.mark.parametrize("number", [17, 70, 201])
def test_adding_a_tokens_unembedding_promotes_that_token(family, number, byte_tokenizer, request):
    model = request.getfixturevalue(family)
    reft = steering(model, byte_tokenizer, number, "blocks[1].output")
    tokens = explain(reft, PAIRS, max_new_tokens=0, only=[], progress=False).edits[0].tokens
    assert tokens.missing is None
    assert tokens.promoted[0][0].id == number
    assert tokens.promoted[0][0].change > 0 > tokens.suppressed[0][0].change


def test_the_change_is_the_symmetric_difference_through_norm_and_unembedding(small_llama, byte_tokenizer):
    reft = steering(small_llama, byte_tokenizer, 70)
    edit = explain(reft, PAIRS, max_new_tokens=0, only=[], progress=False, top=5).edits[0]
    direction, size = edit.directions.write[0], float(edit.directions.rms[0])
    # After the last block nothing follows but the norm, so its input is the edited vector.
    centre = edit.vectors.after.mean(0)

    def read(h):
        norm = (
            h * small_llama.model.norm.weight / (h.square().mean() + small_llama.config.rms_norm_eps).sqrt()
        )
        return small_llama.lm_head.weight @ norm

    change = (read(centre + size * direction) - read(centre - size * direction)).detach() / 2
    change = change - change.mean()
    values, numbers = change.topk(5)
    assert [token.id for token in edit.tokens.promoted[0]] == numbers.tolist()
    got = torch.tensor([token.change for token in edit.tokens.promoted[0]])
    torch.testing.assert_close(got, values, atol=1e-4, rtol=1e-4)
    lowest = change.topk(5, largest=False).indices.tolist()
    assert [token.id for token in edit.tokens.suppressed[0]] == lowest


def test_a_model_without_known_norm_says_so(byte_tokenizer):
    edit = rl.Edit("push", at="hidden[1].output", positions="last", intervention=rl.LoReFT(rank=2))
    tokens = explain(bound(TextMLP(), byte_tokenizer, edit), PAIRS, only=[], progress=False).edits[0].tokens
    assert "TextMLP has no final norm and unembedding" in tokens.missing
    assert tokens.promoted == ()
    assert "not available" in repr(tokens)
    assert tokens.missing.split("(")[0] in tokens._repr_html_()
    assert tokens.to_frame().empty
    assert tokens.plot().axes


def test_berts_readout_does_more_than_norm_and_unembedding_and_that_is_noticed(small_bert, byte_tokenizer):
    edit = rl.Edit("push", at="blocks[0].output", positions="all", intervention=rl.LoReFT(rank=2))
    tokens = explain(bound(small_bert, byte_tokenizer, edit), PAIRS, only=[], progress=False).edits[0].tokens
    assert "does not give this model's own logits" in tokens.missing


def test_vectors_of_another_width_are_not_read_as_tokens(small_llama, byte_tokenizer):
    edit = rl.Edit("heads", at="blocks[1].attn.heads", positions="last", heads=[0], intervention=rl.Zero())
    tokens = explain(bound(small_llama, byte_tokenizer, edit), PAIRS, only=[], progress=False).edits[0].tokens
    assert f"vectors of 8 features and the residual stream has {WIDTH}" in tokens.missing


def test_a_site_beside_the_residual_stream_gets_a_caveat(small_llama, byte_tokenizer):
    edit = rl.Edit(
        "query", at="model.layers[1].self_attn.q_proj.output", positions="last", intervention=rl.Zero()
    )
    tokens = (
        explain(bound(small_llama, byte_tokenizer, edit), PAIRS, max_new_tokens=0, only=[], progress=False)
        .edits[0]
        .tokens
    )
    assert tokens.missing is None
    assert "not the residual stream" in tokens.caveat


def test_the_lens_is_the_models_own_readout(small_gpt2):
    lens, ids = Lens(small_gpt2), torch.tensor([[5, 9, 40]])
    with torch.no_grad():
        output = small_gpt2(ids, output_hidden_states=True)
        stream = []
        handle = small_gpt2.transformer.ln_f.register_forward_pre_hook(lambda m, a: stream.append(a[0]))
        small_gpt2(ids)
        handle.remove()
    torch.testing.assert_close(lens.logits(stream[0][0]), output.logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("piece", "shown"),
    [("a", "a"), ("Ġa", "␣a"), ("Ġ", "␣"), ("Ċ", "⏎"), ("ð", "‹F0›"), ("ðŁ", "‹F0 9F›"), ("ĠðŁ", "␣‹F0 9F›"),
     ("the", "the"), ("<eos>", "<eos>")],
)  # fmt: skip
def test_tokens_are_shown_readably(piece, shown, byte_tokenizer):
    assert readable_token(byte_tokenizer, byte_tokenizer.convert_tokens_to_ids(piece)) == shown


class Pieces:
    """A tokenizer of a few pieces, as sentencepiece spells them."""

    pieces = ("▁the", "<0xF0>", "é", "\u200d", "☃")

    def convert_ids_to_tokens(self, number):
        return self.pieces[number] if number < len(self.pieces) else None

    def decode(self, numbers, **options):
        return self.pieces[numbers[0]].replace("▁", "")


@pytest.mark.parametrize(
    ("number", "shown"), [(0, "␣the"), (1, "‹F0›"), (2, "é"), (3, "‹U+200D›"), (4, "☃"), (9, "‹token 9›")]
)
def test_pieces_of_other_tokenizers_are_shown_readably(number, shown):
    assert readable_token(Pieces(), number) == shown
