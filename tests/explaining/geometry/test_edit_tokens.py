"""The tokens of bound edits by both lenses: a lens that was handed in, or fitted on the way."""

import copy
import random

import pytest
import torch

import reftlab as rl
from reftlab.errors import DataError
from reftlab.explaining import explain
from reftlab.explaining.geometry.edit_tokens import promoted_tokens
from reftlab.explaining.geometry.lens_fit import fit_lens
from tests.explaining.conftest import PAIRS, TextMLP, bound, loreft
from tests.explaining.geometry.test_lens import planted, texts

QUIET = {"chat": False, "only": [], "max_edits": 0, "max_new_tokens": 0, "progress": False}


@pytest.mark.parametrize("family", ["small_llama", "small_gpt2"])
def test_the_lens_fitted_to_data_names_the_token_that_later_blocks_turn_a_direction_to(
    family, byte_tokenizer, request
):
    model, turn, site = planted(family, request)
    row = model.get_output_embeddings().weight[17].detach()
    edit = rl.Edit("e", at=site, positions="last", intervention=rl.Add(3 * turn.T @ row / row.norm()))
    reft = bound(model, byte_tokenizer, edit)
    lens = fit_lens(model, texts(), site, tokenizer=byte_tokenizer, chat=False, progress=False)
    given = explain(reft, texts(), lens=lens, **QUIET)["e"].tokens
    fitted = explain(reft, texts(), lens="fit", **QUIET)["e"].tokens
    alone = promoted_tokens(reft, texts(), lens=[lens], chat=False)
    for found in (given, fitted, alone):
        assert found.promoted[0][0].id != 17
        assert found.data.promoted[0][0].id == 17
        assert found.data.caveat == ""
        assert set(found.to_frame()["lens"]) == {"logit lens", "data lens"}
        torch.testing.assert_close(found.data_lens.matrix, lens.matrix, atol=1e-5, rtol=1e-5)
    assert given.data_lens is lens
    plain = explain(reft, texts(), **QUIET)["e"].tokens
    assert plain.data is None
    assert plain.promoted == given.promoted


def test_a_lens_is_fitted_at_every_site_of_every_edit_and_says_where_it_is_weak(small_llama, byte_tokenizer):
    head = rl.Edit(
        "head", at="blocks[1].attn.heads", heads=[1], positions="last", intervention=rl.LoReFT(rank=1)
    )
    reft = bound(small_llama, byte_tokenizer, loreft("a", "blocks[0,1].output"), head)
    found = explain(reft, texts(), lens="fit", **QUIET)
    for key, at in (("a[0]", "blocks[0].output"), ("a[1]", "blocks[1].output"), ("head", None)):
        lens = found[key].tokens.data_lens
        site = rl.Read("blocks[1].attn.heads", "all", heads=[1]) if at is None else at
        own = fit_lens(small_llama, texts(), site, tokenizer=byte_tokenizer, chat=False, progress=False)
        torch.testing.assert_close(lens.matrix, own.matrix, atol=1e-5, rtol=1e-5)
        assert lens.r2 == pytest.approx(own.r2, abs=1e-4)
        assert found[key].tokens.data.caveat == own.caveat
    assert "variance of what enters the final norm, so it misses most" in found["a[0]"].tokens.data.caveat


def test_too_few_texts_and_other_models_give_the_reason_in_place_of_tokens(small_llama, byte_tokenizer):
    few = explain(bound(small_llama, byte_tokenizer, loreft("a")), PAIRS, lens="fit", **QUIET)["a"].tokens
    assert few.missing is None
    assert "3 examples are too few" in few.data.missing
    assert few.plot().axes
    edit = rl.Edit("push", at="hidden[1].output", positions="last", intervention=rl.LoReFT(rank=2))
    other = explain(bound(TextMLP(), byte_tokenizer, edit), PAIRS, lens="fit", **QUIET)["push"].tokens
    assert "no final norm" in other.data.missing


def test_what_is_no_lens_of_an_edits_site_is_refused(small_llama, byte_tokenizer, users_call):
    reft = bound(small_llama, byte_tokenizer, loreft("a", "blocks[1].output"))
    generator = random.Random(0)
    some = ["".join(generator.choices("abc xyz", k=12)) for _ in range(12)]
    options = {"tokenizer": byte_tokenizer, "chat": False, "progress": False}
    elsewhere = fit_lens(small_llama, some, "blocks[0].output", **options)
    with pytest.raises(DataError, match=r"no edit acts there.*model\.layers\.1\.output with 32 features"):
        explain(reft, some, lens=elsewhere, **QUIET)
    for wrong in ("fitted", 3, [elsewhere, "fit"]):
        with pytest.raises(DataError, match=r"expected what .* returns, a list of these, or 'fit'"):
            promoted_tokens(reft, some, "a", lens=wrong, chat=False)
    with pytest.raises(DataError, match="Did you mean 'a'"):
        promoted_tokens(reft, some, "aa", chat=False)
    with pytest.raises(DataError, match="top=0"):
        promoted_tokens(reft, some, "a", top=0, chat=False)


def test_a_lens_of_other_heads_is_refused_and_of_several_the_edits_own_is_taken(small_llama, byte_tokenizer):
    texts = [(f"{letter} {letter * 2} the sea", "a") for letter in "abcdefgh"]
    head = rl.Edit(
        "head", at="blocks[1].attn.heads", heads=0, positions="last", intervention=rl.LoReFT(rank=2)
    )
    reft = bound(small_llama, byte_tokenizer, head)
    lenses = [
        rl.fit_lens(reft, texts, rl.Read("blocks[1].attn.heads", heads=number), progress=False)
        for number in (0, 3)
    ]
    own = rl.promoted_tokens(reft, texts, lens=lenses[0])
    assert own.data is not None
    with pytest.raises(DataError, match=r"no edit acts there, on the same heads or features.*heads 0"):
        rl.promoted_tokens(reft, texts, lens=lenses[1])
    several = bound(small_llama, byte_tokenizer, loreft("m", "blocks[*].output"))
    each = [rl.fit_lens(several, texts, f"blocks[{n}].output", progress=False) for n in range(3)]
    assert rl.promoted_tokens(several, texts, "m[1]", lens=each).data_lens is each[1]


def test_a_lens_of_another_model_is_refused(small_llama, byte_tokenizer):
    texts = [(f"{letter} {letter * 2} the sea", "a") for letter in "abcdefgh"]
    reft = bound(small_llama, byte_tokenizer, loreft("shift", "blocks[1].output"))
    other = copy.deepcopy(small_llama)
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(1.5)
    lens = rl.fit_lens(other, texts, "blocks[1].output", tokenizer=byte_tokenizer, progress=False)
    with pytest.raises(DataError, match=r"lens=DataLens.*fitted to a model with other weights"):
        rl.promoted_tokens(reft, texts, lens=lens)
    copied = rl.fit_lens(
        copy.deepcopy(small_llama), texts, "blocks[1].output", tokenizer=byte_tokenizer, progress=False
    )
    assert rl.promoted_tokens(reft, texts, lens=copied).data_lens is copied


@pytest.mark.parametrize(
    ("edit", "lens", "message"),
    [
        (["shift"], None, r"edit=\['shift'\]"),
        (0, None, "edit=0"),
        ("shift", [], r"lens=\[\]"),
        ("shift", torch.zeros(2), "lens=tensor"),
    ],
)
def test_what_names_no_edit_or_lens_is_refused_by_name(
    small_llama, byte_tokenizer, users_call, edit, lens, message
):
    reft = bound(small_llama, byte_tokenizer, loreft("shift", "blocks[1].output"))
    with pytest.raises(DataError, match=message):
        rl.promoted_tokens(reft, [("the sea", "blue")], edit, lens=lens)
