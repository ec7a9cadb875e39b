"""What a sweep is asked: prompts, positions, metrics, kinds, attribution; and how it answers."""

import functools
import re
from typing import Any

import numpy as np
import pytest
import torch

import reftlab as rl
from tests.models import WIDTH, batch_of, build, word_tokenizer
from tests.sweeping.by_hand import blocks_of, changing, difference, last_logits, patched, prompts, value_at

METRIC = rl.logit_diff(7, 9)
sweep = functools.partial(rl.sweep, metric=METRIC, progress=False)


def close(found, wanted, atol=1e-5):
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), atol=atol, rtol=0)


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_padded_batch_are_pairs_without_their_padding(llama, side):
    clean, corrupt = (batch_of((7, 9), side, seed) for seed in (1, 2))
    found = sweep(llama, clean, corrupt, positions=["first", [1, 3], "last(2)"])
    for row, length in enumerate((7, 9)):
        alone = [
            {"input_ids": batch["input_ids"][row][batch["attention_mask"][row].bool()][None]}
            for batch in (clean, corrupt)
        ]
        assert alone[0]["input_ids"].shape[1] == length
        for number, tokens in enumerate(([0], [1, 3], [length - 2, length - 1])):
            for block, module in enumerate(blocks_of(llama)):
                values = value_at(llama, module, "output", alone[0])[0]
                run = patched(llama, module, "output", alone[1], tokens, values[tokens])
                close(found.values[row, block, 0, number], difference(run))


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_row_of_position_ids_serves_all_rows(side):
    model = build("gpt2")
    clean, corrupt = (batch_of((7, 9), side, seed) for seed in (1, 2))
    shared = {"position_ids": torch.arange(9)[None] + 3}
    found = sweep(model, {**clean, **shared}, {**corrupt, **shared}, positions=["last", "first(2)"])
    each = {"position_ids": torch.arange(9).expand(2, -1) + 3}
    wanted = sweep(model, {**clean, **each}, {**corrupt, **each}, positions=["last", "first(2)"])
    np.testing.assert_array_equal(found.values, wanted.values)
    row = corrupt["attention_mask"][0].bool()
    alone = {"input_ids": corrupt["input_ids"][:1, row], "position_ids": shared["position_ids"][:, row]}
    close(found.corrupt[0], difference(last_logits(model, alone)))


CLEAN = ["the cat said Mary is in Paris", "Mary said the book is in Paris and London"]
CORRUPT = ["the cat said John is in Paris", "John said the book is in Paris and London"]


def test_named_positions_line_up_pairs_of_different_lengths(llama, tokenizer):
    positions = {"name": ("span('Mary')", "span('John')"), "city": "span('Paris')", "end": "last"}
    found = sweep(llama, CLEAN, CORRUPT, positions=positions, tokenizer=tokenizer)
    assert found.columns == ("name", "city", "end")
    assert found.tokens == (("John", "Paris", "Paris"), ("John", "Paris", "London"))
    for number, (one, other) in enumerate(zip(CLEAN, CORRUPT, strict=True)):
        clean, corrupt = ({"input_ids": tokenizer(t, return_tensors="pt")["input_ids"]} for t in (one, other))
        place = one.split().index("Mary")
        values = value_at(llama, blocks_of(llama)[1], "output", clean)[0]
        run = patched(llama, blocks_of(llama)[1], "output", corrupt, [place], values[[place]])
        close(found.values[number, 1, 0, 0], difference(run))


def test_columns_show_the_tokens_and_where_the_prompts_differ(llama, tokenizer):
    found = sweep(llama, CLEAN[0], CORRUPT[0], tokenizer=tokenizer)
    assert found.columns == ("the", "cat", "said", "Mary/John", "is", "in", "Paris")
    assert found.tokens == (("the", "cat", "said", "John", "is", "in", "Paris"),)
    noising = sweep(llama, CLEAN[0], CORRUPT[0], tokenizer=tokenizer, direction="noise")
    assert noising.tokens[0][3] == "Mary"


def test_tokens_of_a_text_answer_are_looked_up_and_each_pair_may_have_its_own(llama, tokenizer):
    mary, john = (tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in ("Mary", "John"))
    found = sweep(
        llama,
        CLEAN,
        CORRUPT,
        positions="last",
        tokenizer=tokenizer,
        metric=rl.logit_diff(["Mary", "John"], ["John", "Mary"]),
    )
    for number, (right, wrong) in enumerate([(mary, john), (john, mary)]):
        logits = last_logits(llama, {"input_ids": tokenizer(CLEAN[number], return_tensors="pt")["input_ids"]})
        close(found.clean[number], logits[right] - logits[wrong])


@pytest.mark.parametrize(
    ("metric", "by_hand"),
    [
        (rl.answer_logit(5), lambda logits, clean: logits[5]),
        (rl.answer_probability(5), lambda logits, clean: logits.softmax(-1)[5]),
        (rl.answer_log_probability(5), lambda logits, clean: logits.log_softmax(-1)[5]),
        (
            rl.kl_divergence(),
            lambda logits, clean: torch.nn.functional.kl_div(
                logits.log_softmax(-1), clean.log_softmax(-1), log_target=True, reduction="sum"
            ),
        ),
        (lambda logits: logits.max(-1).values, lambda logits, clean: logits.max()),
    ],
    ids=["logit", "probability", "log-probability", "divergence", "own"],
)
def test_metrics_are_what_they_say(llama, metric, by_hand):
    clean, corrupt = prompts()
    found = sweep(llama, clean, corrupt, "blocks[1].output", positions=[5], metric=metric)
    values = value_at(llama, blocks_of(llama)[1], "output", clean)[0]
    run = patched(llama, blocks_of(llama)[1], "output", corrupt, [5], values[[5]])
    close(found.values[0, 0, 0, 0], by_hand(run, last_logits(llama, clean)))
    close(found.corrupt[0], by_hand(last_logits(llama, corrupt), last_logits(llama, clean)))


def test_normalised_effects_are_0_for_the_corrupted_and_1_for_the_clean_run(llama):
    clean, corrupt = prompts()
    found = sweep(llama, clean, corrupt, positions=["all", "last"])
    close(found.normalised[0, :, 0, 0], [1, 1, 1])  # every token is clean
    close(found.normalised[0, -1, 0, 1], 1)  # only the last token is read after the last block
    close(found.normalised, (found.values - found.corrupt[0]) / (found.clean[0] - found.corrupt[0]))


def fills(llama, rows):
    """Means over all tokens of all rows, and over rows, of each block's MLP."""
    outputs = [
        torch.stack(
            [value_at(llama, block.mlp, "output", {"input_ids": ids[None]})[0] for ids in rows]
        )  # (row, token, width)
        for block in blocks_of(llama)
    ]
    return {
        "zero": [torch.zeros(rows.shape[1], WIDTH) for _ in outputs],
        "mean": [values.mean((0, 1)).expand(rows.shape[1], -1) for values in outputs],
        "position mean": [values.mean(0) for values in outputs],
    }


@pytest.mark.parametrize("fill", ["zero", "mean", "position mean"])
def test_ablation_puts_zeros_or_means_in(llama, fill):
    clean, _ = prompts(8, rows=3)
    found = sweep(llama, clean, sites="blocks[*].mlp.output", kind="ablate", fill=fill)
    wanted = fills(llama, clean["input_ids"])[fill]
    for row, ids in enumerate(clean["input_ids"]):
        inputs = {"input_ids": ids[None]}
        close(found.base[row], difference(last_logits(llama, inputs)))
        for block, module in enumerate(blocks_of(llama)):
            for token in range(8):
                run = patched(llama, module.mlp, "output", inputs, [token], wanted[block][[token]])
                close(found.values[row, block, 0, token], difference(run))
    assert np.isnan(found.normalised).all()


def test_ablation_takes_vectors_for_each_site_and_splits_them_by_head(llama):
    clean, _ = prompts(6)
    vectors = {"blocks[0].attn.heads": torch.randn(48), "blocks[1].attn.heads": torch.randn(48)}
    found = sweep(
        llama, clean, sites=list(vectors), kind="ablate", fill=vectors, heads=True, positions="last(2)"
    )
    for block, vector in enumerate(vectors.values()):
        for head in range(4):
            part = slice(12 * head, 12 * head + 12)
            module = blocks_of(llama)[block].self_attn.o_proj
            run = patched(llama, module, "input", clean, [4, 5], vector[part].expand(2, -1), part)
            close(found.values[0, block, head, 0], difference(run))


def test_noise_has_the_spread_asked_for_and_comes_again_with_its_seed(llama):
    clean, _ = prompts(6)
    seen = []

    def metric(logits):
        seen.append(logits[:, 7])
        return logits[:, 7]

    arguments = {"sites": "final_norm.output", "positions": "last", "kind": "noise", "samples": 4000}
    found = sweep(llama, clean, metric=metric, scale=0.5, **arguments)
    draws = torch.cat([part for part in seen if len(part) > 1])
    vectors = value_at(llama, llama.model.norm, "output", clean)[0]
    spread = 0.5 * vectors.std() * llama.lm_head.weight[7].detach().norm()
    assert len(draws) == 4000
    assert float(draws.mean()) == pytest.approx(found.base[0], abs=4 * float(spread) / 4000**0.5)
    assert float(draws.std()) == pytest.approx(float(spread), rel=0.05)
    close(found.values[0, 0, 0, 0], draws.mean())
    again = sweep(llama, clean, metric=metric, scale=0.5, **arguments)
    other = sweep(llama, clean, metric=metric, scale=0.5, seed=1, **arguments)
    np.testing.assert_array_equal(again.values, found.values)
    assert (other.values != found.values).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "falcon"])
@pytest.mark.parametrize("frozen", [False, True])
def test_attribution_is_gradient_times_difference(family, frozen):
    model = build(family).requires_grad_(not frozen)
    clean, corrupt = prompts()
    found = sweep(model, clean, corrupt, attribution=True)
    for number, module in enumerate(blocks_of(model)):
        wanted_values = value_at(model, module, "output", clean)[0]
        shift = torch.zeros(11, wanted_values.shape[1], requires_grad=True)
        with changing(module, "output", lambda tensor, shift=shift: tensor + shift):
            difference(model(**corrupt).logits[0, -1].float()).backward()
        own = value_at(model, module, "output", corrupt)[0]
        close(found.estimates[0, number, 0], (shift.grad * (wanted_values - own)).sum(-1))
        shift.grad = None
    error = np.abs(found.estimates - found.effect)
    agreement = found.agreement
    close(agreement.mean_absolute, error.mean())
    close(agreement.worst, error.max())
    close(agreement.correlation, np.corrcoef(found.estimates.ravel(), found.effect.ravel())[0, 1])
    pair, site, head, token = agreement.worst_cell
    where = np.unravel_index(error.argmax(), error.shape)
    assert (pair, site, head) == (0, found.sites[where[1]].name, None)
    assert token == found.tokens[0][where[3]]
    assert all(parameter.requires_grad is not frozen for parameter in model.parameters())


def test_attribution_where_the_model_adds_to_the_value_in_place():
    model = build("falcon")
    clean, corrupt = prompts()
    found = sweep(model, clean, corrupt, "blocks[*].mlp.output", attribution=True, exact=False)
    for number, block in enumerate(blocks_of(model)):
        new = value_at(model, block.mlp, "output", clean)[0]
        own = value_at(model, block.mlp, "output", corrupt)[0]
        shift = torch.zeros_like(own).requires_grad_()
        with changing(block.mlp, "output", lambda tensor, shift=shift: tensor + shift):
            difference(model(**corrupt).logits[0, -1].float()).backward()
        close(found.estimates[0, number, 0], (shift.grad * (new - own)).sum(-1))


def test_attribution_of_heads_sums_to_that_of_their_site(llama):
    clean, corrupt = prompts()
    heads = sweep(llama, clean, corrupt, "blocks[*].attn.heads", heads=True, attribution=True, exact=False)
    whole = sweep(llama, clean, corrupt, "blocks[*].attn.heads", attribution=True, exact=False)
    close(heads.estimates.sum(2), whole.estimates.sum(2))
    assert not heads.exact
    assert np.isnan(heads.values).all()
    assert heads.agreement is None
    assert "attribution" in heads.top(3).columns
    assert "estimated" in heads.plot().axes[-1].get_ylabel()


def test_means_and_intervals_over_pairs_are_those_of_a_t_interval(llama):
    clean, corrupt = prompts(rows=4)
    found = sweep(llama, clean, corrupt)
    effects = found.effect
    close(found.mean(), effects.mean(0))
    low, high = found.interval()
    half = 3.182446 * effects.std(0, ddof=1) / 2  # t, 97.5 %, 3 degrees of freedom; √4
    close(low, effects.mean(0) - half)
    close(high, effects.mean(0) + half)
    assert found.pairs == 4
    assert "n = 4 pairs" in found.plot().get_suptitle().replace("\n", " ")
    frame = found.to_frame()
    assert len(frame) == effects.size
    line = frame.query("pair == 2 and block == 1 and position == 6").iloc[0]
    close(line["effect"], effects[2, 1, 0, 6])
    close(line["value"], found.values[2, 1, 0, 6])
    top = found.top(3)
    close(top["effect"].abs(), np.sort(np.abs(effects.mean(0)).ravel())[::-1][:3])
    assert (top["n"] == 4).all()


def test_one_pair_has_no_interval(llama):
    found = sweep(llama, *prompts())
    assert np.isnan(found.interval()[0]).all()
    assert "<img" in found._repr_html_()
    assert "1 pair" in repr(found)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"metric": None}, rl.DataError, r"metric=None: expected rl\.logit_diff"),
        ({"kind": "swap"}, rl.DataError, "kind='swap': expected 'patch' or 'ablate' or 'noise'"),
        ({"direction": "up"}, rl.DataError, "direction='up'"),
        ({"corrupt": None}, rl.DataError, "corrupt is None, and kind='patch'"),
        ({"sites": []}, rl.DataError, r"sites=\[\]"),
        (
            {"sites": ["blocks[0].output", "blocks[*].output"]},
            rl.DataError,
            r"model\.layers\.0\.output twice",
        ),
        ({"sites": "blocks[0].outputt"}, rl.AddressError, "outputt"),
        ({"sites": "blocks[0].attn.pattern"}, rl.RunError, "attention scores or patterns"),
        ({"heads": True}, rl.AddressError, "heads=True: the features of model.layers.0.output are not"),
        ({"positions": 40}, rl.PositionError, r"column '\[40\]', clean prompt: row 0: position 40"),
        ({"positions": []}, rl.PositionError, r"positions=\[\]"),
        ({"positions": ["last", "last"]}, rl.PositionError, "'last' twice"),
        ({"positions": {"a": ("last", "last(2)")}}, rl.PositionError, "1 tokens in clean prompt 0 and 2"),
        ({"batch_size": 0}, rl.DataError, "batch_size=0: expected a whole number of 1 or more"),
        ({"samples": 1.5}, rl.DataError, "samples=1.5"),
        ({"scale": float("nan")}, rl.DataError, "scale=nan"),
        ({"exact": False}, rl.DataError, "exact=False leaves attribution alone"),
        ({"attribution": True, "kind": "noise"}, rl.DataError, "noise of mean 0 does nothing"),
        ({"kind": "ablate", "fill": "nought"}, rl.DataError, "fill='nought'"),
        ({"kind": "ablate", "fill": torch.ones(5)}, rl.DataError, r"needs a vector of 32 numbers.*\(5,\)"),
        ({"kind": "ablate", "fill": {}}, rl.DataError, "fill: there is none for model.layers.0.output"),
        (
            {"kind": "ablate", "fill": "position mean"},
            rl.DataError,
            "is a mean over prompts, and there is one",
        ),
        ({"metric": rl.logit_diff(" Mary", 3)}, rl.DataError, "' Mary' is a text, and there is no tokenizer"),
        ({"metric": rl.logit_diff([1, 2], 3)}, rl.DataError, r"has 2 answers, \[?\(?1, 2.*1 pairs"),
        ({"metric": rl.answer_logit(9999)}, rl.DataError, "9999 is no token: the model has 200"),
        ({"metric": lambda logits: 3.0}, rl.DataError, r"returned 3\.0 for logits of shape \(1, 200\)"),
        (
            {"metric": lambda logits: logits.detach().sum(-1), "attribution": True},
            rl.DataError,
            "no gradient",
        ),
    ],
)
def test_what_cannot_be_done_is_told_before_it_is_tried(llama, users_call, arguments, error, says):
    clean, corrupt = prompts()
    arguments = {"clean": clean, "corrupt": corrupt, **arguments}
    with pytest.raises(error, match=says):
        sweep(llama, **arguments)


def test_prompts_that_do_not_match_are_shown(llama, tokenizer, users_call):
    with pytest.raises(rl.DataError, match=r"pair 0 has 3 and 2: clean \['the', 'cat', 'said'\], corrupt"):
        sweep(llama, "the cat said", "the cat", tokenizer=tokenizer)
    with pytest.raises(rl.DataError, match=r"the pairs have \[3, 2\] tokens"):
        sweep(llama, ["the cat said", "the cat"], ["the dog said", "the dog"], tokenizer=tokenizer)
    with pytest.raises(rl.DataError, match="clean has 2 prompts and corrupt 1"):
        sweep(llama, ["the cat", "the dog"], ["the book"], tokenizer=tokenizer)
    with pytest.raises(rl.DataError, match="there is no tokenizer"):
        sweep(llama, "the cat", "the dog")
    with pytest.raises(rl.DataError, match="corrupt=7: expected a text"):
        sweep(llama, "the cat", 7, tokenizer=tokenizer)
    with pytest.raises(rl.DataError, match=r"the answer 'catdog' is \d+ tokens"):
        sweep(llama, "the cat", "the dog", tokenizer=tokenizer, metric=rl.answer_logit("catdog"))
    with pytest.raises(rl.DataError, match="bound model or a torch module"):
        sweep("llama", "the cat", "the dog")
    swap = rl.Edit(
        "swap", at="blocks[0].output", positions="last", intervention=rl.Swap(), source=rl.Read(run="other")
    )
    bound = rl.InterventionGraph(rl.Source("other"), swap).bind(llama, tokenizer)
    with pytest.raises(rl.RunError, match="edit 'swap' takes values from run 'other'"):
        sweep(bound, "the cat", "the dog")
    assert sweep(bound.select(), "the cat", "the dog").pairs == 1


def test_a_site_inside_what_an_edit_is_folded_into_is_refused(llama):
    clean, corrupt = prompts()
    edit = rl.Edit(
        "low", at="blocks[1].mlp.output", positions="all", phase="both", intervention=rl.LoReFT(rank=2)
    )
    bound = rl.InterventionGraph(edit).bind(build("llama")).eval()
    wanted = sweep(bound, clean, corrupt, "blocks[*].output")
    with bound.folded():
        inside = "model.layers.1.mlp.down_proj.output"
        with pytest.raises(rl.RunError, match=r"down_proj.*before edit 'low'.*folded.*unfold\(\) first"):
            sweep(bound, clean, corrupt, inside)
        close(sweep(bound, clean, corrupt, "blocks[*].output").values, wanted.values, atol=1e-4)
    assert sweep(bound, clean, corrupt, inside).pairs == 1


WRONG = {
    "a metric that was not called": ({"metric": rl.logit_diff}, "call it, as in rl.logit_diff"),
    "no numbers": ({"metric": lambda logits: logits[:, 0] * float("nan")}, "not finite"),
    "complex numbers": ({"metric": lambda logits: logits[:, 0] * 1j}, "complex"),
    "no positions": ({"positions": {}}, "positions={}"),
    "a switch in words": ({"cone": "yes"}, "cone='yes'"),
    "a folder without a name": ({"folder": ""}, "folder=''"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_what_would_run_on_silently_is_refused(
    options: dict[str, Any], message: str, users_call: Any
) -> None:
    given = {"metric": rl.answer_logit(5), "progress": False, "sites": "blocks[1].output", **options}
    rows = {"input_ids": torch.tensor([[5, 6, 7]])}
    with pytest.raises(rl.DataError, match=re.escape(message)):
        rl.sweep(build("llama"), rows, {"input_ids": torch.tensor([[8, 6, 7]])}, **given)


def test_a_difference_of_one_answer_from_itself_is_refused() -> None:
    with pytest.raises(rl.DataError, match="always 0"):
        rl.logit_diff(" Mary", " Mary")
