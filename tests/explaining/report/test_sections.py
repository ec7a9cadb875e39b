"""The sections of an explanation: which there are, what they cost, and what they say where they are missing."""

import html
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import reftlab as rl
from reftlab.errors import DataError
from reftlab.explaining import explain
from reftlab.explaining.answers import NAMES
from reftlab.explaining.section import QUESTIONS
from tests.explaining.conftest import PAIRS, bound, loreft, vocabulary

QUIET = {"chat": False, "max_new_tokens": 0, "max_edits": 0, "progress": False, "runs": 8}


@pytest.fixture
def pushed(small_llama, byte_tokenizer):
    """An edit after the last block that always adds the unembedding of the token z."""
    push = small_llama.get_output_embeddings().weight[byte_tokenizer.convert_tokens_to_ids("z")].detach()
    edit = rl.Edit(
        "push", at="blocks[2].output", positions="last", intervention=rl.Add(20 * push / push.norm())
    )
    return bound(small_llama, byte_tokenizer, edit)


def prompts(count):
    return [f"{PAIRS[number % 3][0]} {number}" for number in range(count)]


def test_the_page_leads_with_how_far_the_explanation_holds(pushed, tmp_path):
    metric = rl.answer_log_probability("z")
    found = explain(pushed, prompts(16), metric=metric, only=["faithfulness", "direct"], **QUIET)
    assert [section.name for section in found.sections] == ["faithfulness", "direct"]
    result = found.section("faithfulness").result
    assert result.headline.what == "constant"
    assert result.headline.share.value == pytest.approx(1, abs=1e-3)
    assert found.summary[0] == result.sentence
    page = found.save(tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.index("Always adding the mean change") < page.index("What does it do?")
    direct = found.section("direct").result["push"]
    assert direct.share.value == pytest.approx(1, abs=1e-3)
    assert "metric= of the next token" in found.removal.missing


def test_sections_come_in_the_order_in_which_a_reader_asks(pushed):
    found = explain(pushed, prompts(6), **QUIET)
    order = [list(QUESTIONS).index(section.question) for section in found.sections]
    assert order == sorted(order)
    assert {section.name for section in found.sections} == set(NAMES)
    for section in found.sections:
        assert (section.missing is None) == (section.result is not None)
        assert section.plot().axes or section.plot().subfigs
        assert len(section.to_frame()) > 0 or section.missing is not None
        assert html.escape(section.title) in section._repr_html_()
    assert "there are no labels=" in found.section("probes").missing
    assert found.section("composition").missing == "there is one edit"
    with pytest.raises(KeyError, match="there is no section 'shaply'"):
        found.section("shaply")


def test_labels_are_probed_before_and_after(small_llama, byte_tokenizer):
    reft = bound(small_llama, byte_tokenizer, loreft("a", "blocks[1].output"))
    labels = [number % 2 == 0 for number in range(20)]
    texts = [f"the sea {number}" if label else f"a dog {number}" for number, label in enumerate(labels)]
    found = explain(reft, texts, labels=labels, only="probes", **QUIET)
    (section,) = found.sections
    assert section.missing is None, section.missing
    assert "decodable" in section.says[0]
    assert float(section.result.base.max()) > 0.9


def test_a_budget_that_is_used_up_leaves_sections_out_and_says_so(pushed, tmp_path):
    found = explain(pushed, prompts(6), budget=1e-6, **QUIET)
    assert all("time budget of 1e-06 s was used up" in section.missing for section in found.sections)
    page = found.save(tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("time budget of 1e-06 s was used up") == len(NAMES)
    assert page.count("time budget of 1e−06 s was used up") == len(NAMES)


def test_many_layers_are_joined_until_all_combinations_can_be_measured(small_llama, byte_tokenizer):
    edits = [loreft("a", "blocks[0,1,2].output"), loreft("b", "blocks[0,1,2].mlp.output")]
    for edit, count in ((edits[0], 3), (edits[1], 3)):
        reft = bound(small_llama, byte_tokenizer, edit)
        with torch.no_grad():
            for built in reft.interventions.values():
                built.linear.bias.add_(3.0)
        (section,) = explain(reft, prompts(6), only="shapley", **{**QUIET, "runs": 8}).sections
        assert len(section.result.labels) == count
        (joined,) = explain(reft, prompts(6), only="shapley", **{**QUIET, "runs": 32}).sections
        total = float(section.result.values.sum())
        assert total == pytest.approx(float((section.result.full - section.result.none).sum()), abs=1e-4)
        assert joined.result.exact
        assert not math.isnan(total)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"only": ["shaply"]}, "only='shaply'.*Did you mean 'shapley'"),
        ({"budget": -1}, "budget=-1"),
        ({"runs": 2}, "runs=2: expected a whole number of 8 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(pushed, arguments, message, users_call):
    with pytest.raises(DataError, match=message):
        explain(pushed, prompts(4), progress=False, **arguments)


def test_a_question_that_does_not_arise_is_told_apart_from_one_that_failed(pushed, tmp_path):
    found = explain(pushed, prompts(6), only=["composition", "probes", "dose"], budget=None, **QUIET)
    idle = {section.name: section for section in found.sections if not section.applies}
    assert set(idle) == {"composition", "probes"}
    assert repr(idle["composition"]).startswith("Section('composition': does not apply")
    assert "Does not apply" in idle["probes"]._repr_html_()
    page = found.save(tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'id="composition"' not in page
    assert 'id="dose"' in page
    (told,) = [line for line in found.doubts if line.startswith("Not asked")]
    assert "labels=" in told
    assert "one edit" in told
    spent = explain(pushed, prompts(6), only=["composition", "dose"], budget=1e-6, **QUIET)
    assert all(section.applies for section in spent.sections)


def test_doubts_name_few_examples_and_few_random_draws(pushed):
    few = explain(pushed, prompts(6), only="faithfulness", **QUIET).doubts
    assert any("6 examples" in line for line in few)
    assert any("Few random controls" in line and "edits' place" in line for line in few)
    many = explain(pushed, prompts(24), only="faithfulness", **{**QUIET, "runs": 400}).doubts
    assert not any("Few random controls" in line or "24 examples" in line for line in many)


def test_texts_with_marked_tokens_reach_the_page(small_llama, byte_tokenizer, tmp_path):
    reft = bound(small_llama, byte_tokenizer, loreft("a", "blocks[1].output"))
    found = explain(reft, prompts(6), only="contexts", **QUIET)
    result = found.section("contexts").result
    page = found.save(tmp_path / "report.html").read_text(encoding="utf-8")
    assert result.inline_html() in page
    assert page.count('<div class="drive">') == sum(len(d.most) + len(d.least) for d in result.directions)


def test_the_summary_speaks_of_pushes_on_tokens_only_where_they_are_direct(
    small_llama, byte_tokenizer, pushed
):
    metric = rl.answer_log_probability("z")
    late = explain(pushed, prompts(6), metric=metric, only="direct", **QUIET)
    assert any("strongest direct push" in line for line in late.summary)
    early = rl.InterventionGraph(
        rl.Edit("first", at="blocks[0].output", positions="first", intervention=rl.Add(torch.ones(32)))
    ).bind(small_llama, byte_tokenizer)
    found = explain(early, prompts(6), metric=metric, only="direct", **QUIET)
    assert found.section("direct").result["first"].logit_share.value == 0
    assert not any("strongest direct push" in line for line in found.summary)
    assert any("next to nothing of its change of the logits is direct" in line for line in found.summary)


@pytest.mark.parametrize(("at", "wanted"), [("blocks[2].output", {2, 7}), ("blocks[*].output", {0, 7})])
def test_the_effect_is_followed_through_the_edits_own_sites_and_the_last_block(byte_tokenizer, at, wanted):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocabulary(), hidden_size=32, intermediate_size=48, num_hidden_layers=8,
        num_attention_heads=4, eos_token_id=0, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    push = model.lm_head.weight[byte_tokenizer.convert_tokens_to_ids("z")].detach()
    added = rl.Add(40 * push / push.norm())
    reft = bound(model, byte_tokenizer, rl.Edit("a", at=at, positions="last", intervention=added))
    metric = rl.answer_logit("z")
    found = explain(reft, prompts(4), metric=metric, only="mediation", **QUIET).section("mediation")
    assert found.missing is None, found.missing
    blocks = {site.block for site in found.result.sites}
    assert wanted <= blocks
    assert len(blocks) == 3
