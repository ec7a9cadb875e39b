"""On every family of models the cone gives the plain run's loss, logits and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import reftlab as rl
from reftlab.runtime.cone import ConeRunner

from .common import LENGTHS, answered, assert_equal, bound, on_the_cone, plainly, small_store

EXACT = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3", "phi3", "olmo2", "gpt2",
    "gpt_neox", "gpt_oss", "falcon", "falcon_multi_query", "falcon_alibi", "bloom",
)  # fmt: skip
FIVE = ("llama", "gemma3", "gpt2", "bloom", "gpt_oss")
LONG = ((20, 2), (11, 4), (17, 1))
"""Longer than the sliding window of 8 tokens, before the cone and inside of it."""


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", EXACT)
def test_loss_logits_and_gradients_are_the_plain_runs(family: str, side: str) -> None:
    reft = bound(family)
    runner = ConeRunner(reft, small_store())
    batch = answered(side=side)
    assert_equal(runner, batch)
    assert_equal(runner, batch)
    assert_equal(runner, {name: value[1:2] for name, value in batch.items()})
    assert runner.why_plain == ()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt_oss"])
def test_prompts_longer_than_the_sliding_window_are_right(family: str, side: str) -> None:
    runner = ConeRunner(bound(family), small_store())
    batch = answered(LONG, side)
    assert runner.reft.config.sliding_window < min(sum(one) for one in LONG)
    assert_equal(runner, batch)
    # Of another make-up: each row alone, from the values that the three filled together.
    for row in range(3):
        assert_equal(runner, {name: value[row : row + 1] for name, value in batch.items()})
    assert runner.why_plain == ()


@pytest.mark.parametrize("family", FIVE)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_kinds_of_attention_are_right(family: str, attention: str) -> None:
    reft = bound(family)
    if family == "gpt_oss" and attention == "sdpa":
        pytest.skip("gpt_oss has eager attention alone")
    reft.model.set_attn_implementation(attention)
    runner = ConeRunner(reft, small_store())
    for side in ("left", "right"):
        assert_equal(runner, answered(side=side))
    assert runner.why_plain == ()


@pytest.mark.parametrize("family", ["llama", "gemma3", "falcon", "bloom"])
def test_train_mode_is_right_where_the_base_has_no_dropout(family: str) -> None:
    reft = bound(family).train()
    runner = ConeRunner(reft, small_store())
    assert_equal(runner, answered())
    assert runner.why_plain == ()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "falcon_alibi"])
def test_bfloat16_is_no_further_from_float32_than_the_plain_run(family: str) -> None:
    batch = answered(((9, 2), (5, 4), (12, 3), (7, 3), (14, 4), (11, 2)))
    exact = plainly(bound(family), batch)
    reft = bound(family)
    reft.to(torch.bfloat16)
    runner = ConeRunner(reft, small_store())
    plain, cone = plainly(reft, batch), on_the_cone(runner, batch)
    assert runner.why_plain == ()
    # Both round at random, so that one of them is now and then the luckier one.
    for number in (0, 1):
        allowed = 1.5 * float((plain[number].float() - exact[number]).norm()) + 2e-3
        assert float((cone[number].float() - exact[number]).norm()) <= allowed
    for name, gradient in exact[2].items():
        allowed = 1.5 * float((plain[2][name] - gradient).norm()) + 1e-2 * float(gradient.norm())
        assert float((cone[2][name] - gradient).norm()) <= allowed


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_in_float64_is_right_to_its_own_precision(family: str) -> None:
    reft = bound(family)
    reft.model.double()
    assert_equal(ConeRunner(reft, small_store()), answered(), tolerance=1e-6)


def test_a_model_without_a_cache_of_its_own_is_right() -> None:
    model = bound("llama").model
    model.config.use_cache = False
    assert_equal(ConeRunner(bound(model), small_store()), answered())


def test_a_vocabulary_that_was_extended_is_right() -> None:
    reft = bound("llama")
    reft.model.resize_token_embeddings(230, mean_resizing=False)
    runner = ConeRunner(reft, small_store())
    assert_equal(runner, answered(vocabulary=230))
    # Also where it happens in the middle of a runner's life.
    reft.model.resize_token_embeddings(240, mean_resizing=False)
    reft.model.requires_grad_(False)
    assert_equal(runner, answered(vocabulary=240))


def test_soft_capped_logits_are_right() -> None:
    reft = bound("gemma2")
    assert reft.config.final_logit_softcapping
    reft.config.final_logit_softcapping = 0.5
    runner = ConeRunner(reft, small_store())
    assert_equal(runner, answered())
    with torch.no_grad():
        found = runner.predictions(answered())
    assert found is not None
    assert float(found.logits.abs().max()) <= 0.5


def test_a_model_that_peft_has_wrapped_is_right() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(bound("llama").model, config).eval()
    reft = bound(model)
    runner = ConeRunner(reft, small_store())
    assert_equal(runner, answered())
    assert runner.why_plain == ()
    plain = bound("llama")
    assert not torch.allclose(plainly(reft, answered())[0], plainly(plain, answered())[0])


def test_transformers_own_recorders_do_not_stand_in_the_way() -> None:
    reft = bound("llama")
    reft.model(**answered(), output_hidden_states=True, output_attentions=False)
    runner = ConeRunner(reft, small_store())
    assert_equal(runner, answered())
    reft.config.output_hidden_states = True
    assert_equal(runner, answered())
    assert runner.why_plain == ()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_batch_of_many_rows_is_right(family: str) -> None:
    lengths = [(3 + number % 11, 1 + number % 5) for number in range(64)]
    assert_equal(ConeRunner(bound(family), small_store()), answered(lengths))


def test_batches_without_mask_or_position_ids_are_right() -> None:
    runner = ConeRunner(bound("gpt2"), small_store())
    batch = answered(((8, 2), (7, 3), (6, 4)))
    assert_equal(runner, {name: batch[name] for name in ("input_ids", "labels")})
    assert_equal(runner, {name: batch[name] for name in ("input_ids", "labels", "attention_mask")})
    assert_equal(runner, {**batch, "position_ids": batch["position_ids"][:1]})
    right = answered(LENGTHS, "right")
    assert_equal(runner, {name: right[name] for name in ("input_ids", "labels", "attention_mask")})
    assert runner.why_plain == ()


def test_the_loss_divided_by_other_labels_is_the_models_own() -> None:
    reft = bound("llama")
    batch: dict[str, Any] = answered()
    expected = reft(**batch, num_items_in_batch=torch.tensor(37)).loss
    loss = ConeRunner(reft, small_store()).loss(batch, torch.tensor(37))
    assert loss is not None
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_a_model_that_is_a_copy_has_a_cone_of_its_own() -> None:
    reft = bound("llama")
    store = small_store()
    runner = ConeRunner(reft, store)
    assert_equal(runner, answered())
    other = bound(copy.deepcopy(reft.model))
    with torch.no_grad():
        other.model.model.layers[0].mlp.down_proj.weight.mul_(3.0)
    assert_equal(ConeRunner(other, store), answered())
    assert_equal(runner, answered())


def test_edits_nowhere_leave_the_bare_models_loss() -> None:
    reft = bound(
        "llama", rl.Edit("a", at="blocks[1].output", positions="last", intervention=rl.LoReFT(2), tasks=["x"])
    )
    batch = {**answered(), "tasks": [None] * 4}
    loss = ConeRunner(reft, small_store()).loss(batch)
    assert loss is not None
    expected = reft.model(**answered()).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
