"""The lens fitted to data: a planted linear block comes back, and nothing is found in noise."""

import random

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import nn

import reftlab as rl
from reftlab.errors import DataError
from reftlab.explaining import explain
from reftlab.explaining.geometry.lens_fit import _fitted, _Ridge, _scale, fit_lens
from reftlab.explaining.geometry.tokens import Lens, token_effects
from tests.explaining.conftest import PAIRS, WIDTH, TextMLP, bound

LETTERS = "abcdefghijklmnopqrstuvwxyz "


def texts(count=20, length=12, seed=0):
    generator = random.Random(seed)
    return ["".join(generator.choices(LETTERS, k=length)) for _ in range(count)]


def planted(family, request):
    """A model whose last block multiplies the residual stream by a known rotation, and the rotation."""
    model = request.getfixturevalue(family)
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q
    linear = nn.Linear(WIDTH, WIDTH, bias=False)
    with torch.no_grad():
        linear.weight.copy_(turn - torch.eye(WIDTH))
    if family == "small_llama":
        block = model.model.layers[-1]
        block.self_attn.o_proj.weight.data.zero_()
        block.post_attention_layernorm, block.mlp = nn.Identity(), linear
        site = "blocks[1].output"
    else:
        block = model.transformer.h[-1]
        block.attn.c_proj.weight.data.zero_()
        block.attn.c_proj.bias.data.zero_()
        block.ln_2, block.mlp = nn.Identity(), linear
        site = "blocks[0].output"
    return model, turn, site


def by_hooks(model, tokenizer, some):
    """What leaves block 0 and enters the final norm at every token, each text alone; the text of each, and
    whether all ids up to it stood in an earlier text."""
    x, y, rows, repeats, seen = [], [], [], [], set()
    hooks = [
        model.model.layers[0].register_forward_hook(lambda m, a, out: x.append(out[0])),
        model.model.norm.register_forward_pre_hook(lambda m, a: y.append(a[0][0])),
    ]
    with torch.no_grad():
        for row, text in enumerate(some):
            ids = tokenizer(text)["input_ids"]
            model(torch.tensor([ids]))
            rows += [row] * len(ids)
            starts = [tuple(ids[: end + 1]) for end in range(len(ids))]
            repeats += [start in seen for start in starts]
            seen |= set(starts)
    for hook in hooks:
        hook.remove()
    return torch.cat(x), torch.cat(y), torch.tensor(rows), torch.tensor(repeats)


@pytest.mark.parametrize("family", ["small_llama", "small_gpt2"])
def test_a_block_that_is_linear_comes_back_and_names_the_token_that_the_logit_lens_misses(
    family, byte_tokenizer, request
):
    model, turn, site = planted(family, request)
    lens = fit_lens(model, texts(), site, tokenizer=byte_tokenizer, chat=False, progress=False)
    assert lens.missing is None
    assert lens.caveat == ""
    assert lens.r2 > 0.99
    assert lens.agreement.value > 0.95
    assert lens.logit_agreement.value < 0.4
    assert lens.logit_r2 < 0.5
    torch.testing.assert_close(lens.matrix, turn, atol=0.05, rtol=0)
    for number in (17, 201):
        row = model.get_output_embeddings().weight[number].detach()
        edit = rl.Edit("e", at=site, positions="last", intervention=rl.Add(3 * turn.T @ row / row.norm()))
        reft = bound(model, byte_tokenizer, edit)
        found = explain(
            reft, PAIRS, chat=False, only=[], max_edits=0, max_new_tokens=0, progress=False
        ).edits[0]
        centre = found.vectors.after.mean(0) @ turn.T
        effects = token_effects(Lens(model), byte_tokenizer, found.directions, centre, data_lens=lens)
        assert effects.data.promoted[0][0].id == number
        assert effects.promoted[0][0].id != number
        assert set(effects.to_frame()["lens"]) == {"logit lens", "data lens"}
    assert effects.plot().axes


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("alpha", [1e-3, 1.0, 50.0])
def test_the_closed_form_is_scikit_learns_ridge(wide, alpha):
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(12 if wide else 40, 20)) + 3, generator.normal(size=(12 if wide else 40, 5))
    new, plain, own = generator.normal(size=(6, 20)), Ridge(alpha=alpha).fit(x, y), _Ridge(x, y)
    np.testing.assert_allclose(own.slopes(alpha), plain.coef_.T, atol=1e-8)
    np.testing.assert_allclose(own.predicted(new, alpha), plain.predict(new), atol=1e-8)


def test_the_map_is_that_of_the_models_own_vectors_taken_by_plain_hooks(small_llama, byte_tokenizer):
    some = texts(12)
    lens = fit_lens(
        small_llama, some, "blocks[0].output", tokenizer=byte_tokenizer, chat=False, progress=False
    )
    x, y, _, repeats = by_hooks(small_llama, byte_tokenizer, some)
    x, y = (part[~repeats].double().numpy() for part in (x, y))
    assert lens.tokens == len(x)
    plain = Ridge(alpha=lens.alpha * _scale(x)).fit(x, y - x)
    np.testing.assert_allclose(lens.matrix.numpy(), plain.coef_ + np.eye(WIDTH), atol=1e-4)
    np.testing.assert_allclose(lens.constant.numpy(), plain.intercept_, atol=1e-4)
    same = lens.through(torch.as_tensor(x).float()).numpy()
    np.testing.assert_allclose(same, plain.predict(x) + x, atol=1e-3)


def test_what_all_texts_begin_with_counts_once_and_makes_the_held_out_score_no_better(
    small_llama, byte_tokenizer
):
    """Copies of the same vectors in every fold would be predicted without error."""
    some = [texts(1, 40, seed=9)[0] + text for text in texts(24, 4)]
    lens = fit_lens(
        small_llama, some, "blocks[0].output", tokenizer=byte_tokenizer, chat=False, progress=False
    )
    x, y, rows, repeats = by_hooks(small_llama, byte_tokenizer, some)
    assert lens.tokens == int((~repeats).sum())
    assert f"{int(repeats.sum())} tokens that repeat an earlier example" in lens.note
    inner = Lens(small_llama)
    once = _fitted(inner, "x", x[~repeats], y[~repeats], rows[~repeats], True, "")
    copied = _fitted(inner, "x", x, y, rows, True, "")
    assert lens.r2 == pytest.approx(once.r2, abs=1e-3)
    assert lens.agreement.value == pytest.approx(once.agreement.value, abs=1e-6)
    assert copied.r2 > lens.r2 + 0.3
    # A draw of examples takes the beginning from the first one drawn, whichever it is.
    few = fit_lens(
        small_llama, some, "blocks[0].output", tokenizer=byte_tokenizer, chat=False, progress=False,
        samples=80,
    )  # fmt: skip
    assert 40 < few.tokens <= 80
    assert "examples, drawn at random" in few.note


def test_a_lens_that_misses_most_of_the_variance_says_so(small_llama, byte_tokenizer):
    lens = fit_lens(
        small_llama, texts(), "blocks[0].output", tokenizer=byte_tokenizer, chat=False, progress=False
    )
    assert 0 < lens.r2 < 0.5
    assert f"explains {lens.r2:.0%} of the variance" in lens.caveat


def test_nothing_is_found_between_vectors_that_have_nothing_to_do_with_each_other(small_llama):
    lens, alarms = Lens(small_llama), 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(80, WIDTH, generator=generator) for _ in range(2))
        found = _fitted(lens, "x", x, y, torch.arange(80) // 10, False, "")
        assert found.r2 < 0.05
        alarms += found.r2 > 0.01
    assert alarms <= 1


def test_few_tokens_and_other_models_are_refused_with_the_reason(small_bert, small_llama, byte_tokenizer):
    options = {"tokenizer": byte_tokenizer, "chat": False, "progress": False}
    few = fit_lens(small_llama, texts(3), "blocks[0].output", **options)
    assert "3 examples are too few" in few.missing
    assert "not available" in repr(few)
    assert few.plot().axes
    with pytest.raises(DataError, match="not available"):
        few.carried(torch.ones(1, WIDTH))
    bert = fit_lens(small_bert, texts(8), "blocks[0].output", **options)
    assert "own logits" in bert.missing
    other = rl.InterventionGraph().bind(
        TextMLP(), byte_tokenizer, example={"input_ids": torch.zeros(2, 5, dtype=torch.long)}
    )
    assert "no final norm" in fit_lens(other, texts(8), "hidden[0].output", progress=False).missing
    with pytest.raises(DataError, match="names 3 places"):
        fit_lens(small_llama, texts(8), "blocks[*].output", **options)
    with pytest.raises(DataError, match="samples=0"):
        fit_lens(small_llama, texts(8), "blocks[0].output", samples=0, **options)
    with pytest.raises(DataError, match="tokenizer"):
        fit_lens(small_llama, texts(8), "blocks[0].output")


def test_a_sample_is_said_to_be_one_and_edits_are_left_out(small_llama, byte_tokenizer):
    edit = rl.Edit("e", at="blocks[0].output", positions="all", intervention=rl.Add(5.0))
    reft = bound(small_llama.bfloat16(), byte_tokenizer, edit)
    options = {"chat": False, "progress": False, "samples": 150}
    lens = fit_lens(reft, texts(), "blocks[0].output", **options)
    assert "of 20 examples, drawn at random" in lens.note
    assert lens.tokens <= 150
    bare = fit_lens(small_llama, texts(), "blocks[0].output", tokenizer=byte_tokenizer, **options)
    torch.testing.assert_close(lens.matrix, bare.matrix)
    assert list(lens.to_frame()["lens"]) == ["data lens", "logit lens"]
    assert [axes.get_ylabel() for axes in lens.plot().axes] == ["share of held-out tokens", "held-out R²"]
    assert "<table" in lens._repr_html_()


def test_a_head_is_mapped_to_the_stream_though_the_logit_lens_cannot_read_it(small_llama, byte_tokenizer):
    read = rl.Read("blocks[1].attn.heads", "all", heads=[0])
    lens = fit_lens(small_llama, texts(), read, tokenizer=byte_tokenizer, chat=False, progress=False)
    assert lens.matrix.shape == (WIDTH, 8)
    assert lens.logit_agreement is None
    with pytest.raises(DataError, match="takes 8"):
        lens.carried(torch.ones(1, WIDTH))
