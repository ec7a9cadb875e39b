"""Direct effects are what a write does by the residual stream alone, against hooks put on by hand."""

import pytest
import torch

import reftlab as rl
from reftlab.errors import DataError
from reftlab.explaining.causes.direct import direct_effect
from reftlab.explaining.causes.split import DirectEffect, DirectEffects
from reftlab.measuring import Estimate
from tests.explaining.conftest import PAIRS, bound, loreft, orthonormal

pytestmark = pytest.mark.usefixtures("users_call")

VECTOR = 2 * torch.randn(32, generator=torch.Generator().manual_seed(9))
BLOCKS = {"small_llama": "model.layers", "small_gpt2": "transformer.h"}
NORM = {"small_llama": "model.norm", "small_gpt2": "transformer.ln_f"}
PROJECTION = {"small_llama": "self_attn.o_proj", "small_gpt2": "attn.c_proj"}
QUIET = {"progress": False, "chat": False}
PROMPTS = ["the sea", "a cat and a dog", "snow"]


def add(at="blocks[0].output", positions="last", vector=VECTOR, name="push"):
    return rl.Edit(name, at=at, positions=positions, intervention=rl.Add(vector))


@torch.no_grad()
def final_vectors(call, model, family, tokenizer, prompts=PROMPTS):
    """What enters the final norm at each prompt's last token, row by row, and the logits there."""
    kept, logits = [], []
    norm = model.get_submodule(NORM[family])
    handle = norm.register_forward_pre_hook(lambda module, args: kept.append(args[0][0, -1]))
    try:
        for prompt in prompts:
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            logits.append(call(input_ids=ids).logits[0, -1])
    finally:
        handle.remove()
    return torch.stack(kept), torch.stack(logits)


@torch.no_grad()
def read_out(model, family, vectors):
    return model.lm_head(model.get_submodule(NORM[family])(vectors))


def centred(change):
    return (change - change.mean(-1, keepdim=True)).mean(0)


@pytest.mark.parametrize("family", ["small_llama", "small_gpt2"])
def test_the_direct_change_is_that_of_base_residual_plus_delta(family, byte_tokenizer, request):
    model = request.getfixturevalue(family)
    reft = bound(model, byte_tokenizer, add())
    found = direct_effect(reft, PROMPTS, **QUIET)["push"]
    residual, base = final_vectors(model, model, family, byte_tokenizer)
    _, total = final_vectors(reft, model, family, byte_tokenizer)
    direct = read_out(model, family, residual + VECTOR)
    torch.testing.assert_close(found.direct_logits, centred(direct - base), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.total_logits, centred(total - base), atol=1e-4, rtol=1e-4)
    assert found.at_last == 3
    assert 0.01 < abs(found.logit_share.value) < 0.99


def test_the_metric_is_measured_in_all_three_runs(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, add())
    metric = rl.logit_diff(40, 77)
    found = direct_effect(reft, PROMPTS[:1], metric, **QUIET)["push"]
    residual, base = final_vectors(small_llama, small_llama, "small_llama", byte_tokenizer, PROMPTS[:1])
    _, total = final_vectors(reft, small_llama, "small_llama", byte_tokenizer, PROMPTS[:1])
    direct = read_out(small_llama, "small_llama", residual + VECTOR)
    bare, by_stream, full = (float(run[0, 40] - run[0, 77]) for run in (base, direct, total))
    assert found.direct.value == pytest.approx(by_stream - bare, abs=1e-4)
    assert found.total.value == pytest.approx(full - bare, abs=1e-4)
    assert found.share.value == pytest.approx((by_stream - bare) / (full - bare), rel=1e-3)


@pytest.mark.parametrize("family", ["small_llama", "small_gpt2"])
def test_a_write_inside_attention_goes_through_its_own_projection(family, byte_tokenizer, request):
    model = request.getfixturevalue(family)
    reft = bound(model, byte_tokenizer, add("blocks[0].attn.heads"))
    found = direct_effect(reft, PROMPTS, **QUIET)["push"]
    residual, base = final_vectors(model, model, family, byte_tokenizer)
    weight = model.get_submodule(BLOCKS[family])[0].get_submodule(PROJECTION[family]).weight.detach()
    written = VECTOR @ weight if family == "small_gpt2" else weight @ VECTOR
    expected = centred(read_out(model, family, residual + written) - base)
    torch.testing.assert_close(found.direct_logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["small_llama", "small_gpt2"])
def test_an_edit_behind_the_last_block_is_all_direct(family, dtype, byte_tokenizer, request):
    model = request.getfixturevalue(family).to(dtype)
    last = len(model.get_submodule(BLOCKS[family])) - 1
    found = direct_effect(bound(model, byte_tokenizer, loreft(at=f"blocks[{last}].output")), PAIRS, **QUIET)
    assert found["shift"].logit_share.value == pytest.approx(1, abs=1e-6)
    assert found["shift"].direct.value == pytest.approx(found["shift"].total.value, abs=1e-6)
    assert found.sentence == (
        "100% of what shift changes in the logits after the prompt goes by the residual stream alone."
    )


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (0.3, "30% of what e changes in the logits after the prompt goes by the residual stream alone; later "
              "blocks make the rest of it."),
        (1.2, "later blocks take the surplus back."),
        (-0.001, "Next to nothing of what e changes"),
        (-0.2, "the other way (−20% of its whole change, which later blocks make)."),
    ],
)  # fmt: skip
def test_the_sentence_says_what_is_left_for_later_blocks(share, said):
    one = Estimate(share, share, share)
    empty = torch.zeros(0)
    effect = DirectEffect("e", ("blocks[0].output",), 3, one, one, one, one, empty, empty, ())
    assert said in DirectEffects("loss", "nats", "alone", (effect,)).sentence


def test_edits_at_earlier_tokens_have_no_direct_effect_over_20_seeds(small_llama, byte_tokenizer):
    edits = []
    for seed in range(20):
        vector = torch.randn(32, generator=torch.Generator().manual_seed(seed))
        edits.append(add(positions=[seed % 2], vector=vector, name=f"push{seed}"))
    found = direct_effect(bound(small_llama, byte_tokenizer, *edits), ["a hill"], **QUIET)
    assert "push0 does not act at the last token of any prompt" in found.sentence
    assert found.sentence.endswith("The table has 17 edits more.")
    found = found.effects
    assert [effect.at_last for effect in found] == [0] * 20
    alarms = sum(bool(effect.direct_logits.any()) or effect.direct.value != 0 for effect in found)
    felt = sum(float(effect.total_logits.abs().max()) > 1e-3 for effect in found)
    assert (alarms, felt) == (0, 20)


def test_a_write_that_norm_and_unembedding_do_not_see_has_no_direct_effect(small_llama, byte_tokenizer):
    """The mirror image of the final residual along a direction that the unembedding does not read."""
    unread = orthonormal(1, 5)[0]
    with torch.no_grad():
        head = small_llama.lm_head.weight
        head -= torch.outer(head @ unread, unread)
    prompts = ["the sea"]
    residual, _ = final_vectors(small_llama, small_llama, "small_llama", byte_tokenizer, prompts)
    mirrored = -2 * (residual[0] @ unread) * unread
    reft = bound(small_llama, byte_tokenizer, add(vector=mirrored))
    found = direct_effect(reft, prompts, **QUIET)["push"]
    assert float(found.direct_logits.abs().max()) < 1e-4
    assert float(found.total_logits.abs().max()) > 0.05


@pytest.mark.parametrize("family", ["small_llama", "small_gpt2"])
def test_where_later_blocks_write_nothing_direct_is_total(family, byte_tokenizer, request):
    model = request.getfixturevalue(family)
    with torch.no_grad():
        for block in model.get_submodule(BLOCKS[family])[1:]:
            for name, parameter in block.named_parameters():
                if any(part in name for part in ("o_proj", "down_proj", "c_proj")):
                    parameter.zero_()
    found = direct_effect(bound(model, byte_tokenizer, loreft(at="blocks[0].output")), PROMPTS, **QUIET)
    assert found["shift"].logit_share.value == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(found["shift"].direct_logits, found["shift"].total_logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("context", ["alone", "together"])
def test_other_edits_are_off_or_write_what_they_write_without_it(context, small_llama, byte_tokenizer):
    """The second edit reads what the first writes; that is a way through a later part, and no direct one."""
    edits = add(), loreft("reads", at="blocks[1].output")
    reft = bound(small_llama, byte_tokenizer, *edits)
    with torch.no_grad():
        reft.interventions["reads"].linear.weight.mul_(5)
    found = direct_effect(reft, PROMPTS, context=context, **QUIET)["push"]
    other = small_llama if context == "alone" else reft.select("reads")
    residual, base = final_vectors(other, small_llama, "small_llama", byte_tokenizer)
    direct = read_out(small_llama, "small_llama", residual + VECTOR)
    torch.testing.assert_close(found.direct_logits, centred(direct - base), atol=1e-4, rtol=1e-4)
    whole = reft.select("push") if context == "alone" else reft
    _, total = final_vectors(whole, small_llama, "small_llama", byte_tokenizer)
    torch.testing.assert_close(found.total_logits, centred(total - base), atol=1e-4, rtol=1e-4)


def test_models_without_the_path_are_refused_with_a_reason(small_bert, small_llama, byte_tokenizer):
    assert "does not continue texts" in repr(
        direct_effect(bound(small_bert, byte_tokenizer, add()), PROMPTS, **QUIET)
    )

    class PostNorm(torch.nn.Module):
        """Normalises the stream itself after the block."""

        def __init__(self, block):
            super().__init__()
            self.block, self.norm = block, torch.nn.LayerNorm(32)
            self.self_attn, self.mlp = block.self_attn, block.mlp

        def forward(self, *args, **kwargs):
            output = self.block(*args, **kwargs)
            return (self.norm(output[0]), *output[1:]) if isinstance(output, tuple) else self.norm(output)

    small_llama.model.layers[1] = PostNorm(small_llama.model.layers[1])
    found = direct_effect(bound(small_llama, byte_tokenizer, add()), PROMPTS, **QUIET)
    assert "there is no direct path" in found.missing
    found.plot()


def test_what_cannot_be_used_is_refused_by_name(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, add())
    with pytest.raises(DataError, match="context='off'"):
        direct_effect(reft, PROMPTS, context="off", **QUIET)
    with pytest.raises(DataError, match="top=0"):
        direct_effect(reft, PROMPTS, top=0, **QUIET)
    condition = rl.norm("blocks[0].output @ last") > 0.1
    gated = rl.Edit("gated", at="blocks[1].output", intervention=rl.Add(VECTOR), when=condition)
    with pytest.raises(DataError, match="'gated' has a condition"):
        direct_effect(bound(small_llama, byte_tokenizer, add(), gated), PROMPTS, context="together", **QUIET)


def test_frames_and_figure_show_every_edit(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, add(), add(positions="first", name="early"))
    found = direct_effect(reft, PAIRS, **QUIET)
    assert list(found.to_frame()["edit"]) == ["push", "early"]
    tokens = found.tokens_to_frame()
    best = int(found["push"].total_logits.argmax())
    assert best in set(tokens[tokens["edit"] == "push"]["id"])
    labels = {label.get_text().split("\n")[0] for label in found.plot().axes[0].get_yticklabels()}
    assert {"push", "early"} <= labels
    assert "<img" in found._repr_html_()
