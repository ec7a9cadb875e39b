"""Where skipping would be wrong, everything runs, and the reason is said in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import reftlab as rl
from reftlab.errors import RunError
from reftlab.runtime.cone import ConeRunner, cone_of
from tests.models import HEADS, LAYERS, VOCABULARY, WIDTH, build, inputs_of
from tests.oracle import raw_blocks

from .common import answered, assert_equal, bound, close, plainly, small_store

EDIT = rl.Edit("edit", at="blocks[1].output", positions="last", intervention=rl.LoReFT(3))


def refused(reft: rl.BoundModel, batch: dict[str, Any], reason: str) -> None:
    """The runner hands the batch back, and both it and the plan say why."""
    runner = ConeRunner(reft, small_store())
    assert runner.loss(batch) is None
    assert runner.predictions(batch) is None
    assert reason in "; ".join(runner.why_plain), runner.why_plain
    cone = runner.cone(batch)
    assert cone.why
    assert cone.share == 1.0


def hook(*args: Any) -> None:
    return None


def in_train_mode() -> rl.BoundModel:
    return bound("gpt2").train()


def with_jitter() -> rl.BoundModel:
    model = build("mixtral")
    for block in raw_blocks(model):
        block.mlp.jitter_noise = 0.1
    return bound(model).train()


def with_hook(register: str) -> Callable[[], rl.BoundModel]:
    def make() -> rl.BoundModel:
        reft = bound("llama")
        getattr(raw_blocks(reft.model)[0].mlp, register)(hook)
        return reft

    return make


def with_checkpointing() -> rl.BoundModel:
    reft = bound("llama").train()
    reft.gradient_checkpointing_enable()
    return reft


def of_a_long_rope(kind: str) -> Callable[[], rl.BoundModel]:
    def make() -> rl.BoundModel:
        config = build("llama").config
        config.max_position_embeddings = 8
        config.rope_parameters = {"rope_type": kind, "rope_theta": 100.0, "factor": 4.0}
        if kind == "longrope":
            config.rope_parameters |= {
                "short_factor": [1.0] * 6, "long_factor": [3.0] * 6, "original_max_position_embeddings": 8,
            }  # fmt: skip
        return bound(hf.LlamaForCausalLM(config).eval())

    return make


def with_one_block_twice() -> rl.BoundModel:
    model = build("llama")
    model.model.layers[2] = model.model.layers[0]
    edit = rl.Edit("edit", at="blocks[1].output", positions="last", intervention=rl.LoReFT(3))
    return bound(model, edit)


def compiled_in_place() -> rl.BoundModel:
    reft = bound("llama")
    raw_blocks(reft.model)[0].compile()
    return reft


def looking_at_all_tokens() -> rl.BoundModel:
    config = hf.BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=48, initializer_range=0.15, is_decoder=False,
    )  # fmt: skip
    return bound(hf.BertLMHeadModel(config).eval())


def edited(at: str, positions: str = "last", **options: Any) -> Callable[[], rl.BoundModel]:
    options.setdefault("intervention", rl.LoReFT(3))
    return lambda: bound("llama", rl.Edit("edit", at=at, positions=positions, **options))


def at_attention() -> rl.BoundModel:
    zero = rl.Edit("zero", at="blocks[2].attn.pattern", positions="last", intervention=rl.Zero())
    return bound("llama", EDIT, zero)


REASONS: dict[str, tuple[Callable[[], rl.BoundModel], str]] = {
    "a model that carries a state": (lambda: bound("mamba"), "recurrent state"),
    "dropout in the base": (in_train_mode, "dropout in the base model"),
    "jitter of routers": (with_jitter, "jitter_noise"),
    "a foreign hook": (with_hook("register_forward_hook"), "carries a hook of its own"),
    "a foreign hook on inputs": (with_hook("register_forward_pre_hook"), "carries a hook of its own"),
    "a foreign hook on gradients": (with_hook("register_full_backward_hook"), "carries a hook of its own"),
    "gradient checkpointing": (with_checkpointing, "gradient checkpointing"),
    "rotary frequencies by length": (of_a_long_rope("dynamic"), "longest row"),
    "rotary frequencies of long texts": (of_a_long_rope("longrope"), "longest row"),
    "one block twice": (with_one_block_twice, "more than once"),
    "compiled code": (compiled_in_place, "compiled"),
    "attention to later tokens": (looking_at_all_tokens, "BertLMHeadModel"),
    "an edit of a pattern": (at_attention, "whose tokens look at keys of all tokens"),
    "the first token before the first block": (edited("embed.output", "first"), "acts before block 0"),
    "all tokens from the first block on": (edited("blocks[0].mlp.output", "all"), "acts before block 0"),
}


@pytest.mark.parametrize(("make", "reason"), REASONS.values(), ids=REASONS)
def test_everything_runs_and_the_reason_is_said(make: Callable[[], rl.BoundModel], reason: str) -> None:
    reft = make()
    refused(reft, answered(), reason)
    if reft.model.training and "dropout" not in reason:
        assert reason in str(reft.plan(answered()))


def test_tokens_that_peft_puts_before_each_text_are_a_reason() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    refused(bound(peft.get_peft_model(build("llama"), config).eval()), answered(), "tokens of its own")


def test_a_bidirectional_model_has_no_cone() -> None:
    reft = bound("bert")
    batch = inputs_of("bert")
    cone = cone_of(reft, batch)
    assert "bidirectional attention" in cone.why[0]
    assert "bidirectional attention" in str(reft.plan(batch))


def test_a_chain_of_blocks_that_is_not_known_is_no_error() -> None:
    model = build("llama")
    model.config.model_type = "llama_of_mine"
    model.config.num_hidden_layers = 7
    edit = rl.Edit("edit", at="model.layers[1].output", positions="last", intervention=rl.LoReFT(3))
    reft = bound(model, edit)
    model.config.num_hidden_layers = 7
    refused(reft, answered(), "chain of blocks of LlamaForCausalLM is not known")
    assert reft.plan(answered()).cone is not None
    with pytest.raises(RunError, match="no figure of blocks that are not known: the chain of blocks"):
        reft.plan(answered()).plot()


def test_a_family_without_an_entry_is_right_by_its_one_list_of_blocks() -> None:
    model = build("llama")
    model.config.model_type = "llama_of_mine"
    edit = rl.Edit("edit", at="model.layers[1].output", positions="last", intervention=rl.LoReFT(3))
    runner = ConeRunner(bound(model, edit), small_store())
    assert_equal(runner, answered())
    assert runner.why_plain == ()


def test_hooks_of_all_modules_are_a_reason() -> None:
    reft = bound("llama")
    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        refused(reft, answered(), "hooks of all modules")
    finally:
        handle.remove()


def test_interchange_is_run_plainly() -> None:
    swap = rl.Edit(
        "swap", at="blocks[1].output", positions="last", intervention=rl.Swap(), source=rl.Read(run="other")
    )
    reft = bound("llama", rl.Source("other"), swap, EDIT)
    batch = answered()
    other = {name: batch[name].flip(0) for name in ("input_ids", "attention_mask", "position_ids")}
    refused(reft, {**batch, "sources": {"other": other}}, "source runs")
    refused(reft, batch, "belongs to run 'other'")


def test_a_site_outside_the_chain_is_run_plainly() -> None:
    reft = bound(
        "gpt2", rl.Edit("edit", at="transformer.wte.output", positions="last", intervention=rl.LoReFT(3))
    )
    refused(reft, answered(), "outside the chain of blocks")


def batch_with(**more: Any) -> dict[str, Any]:
    return {**answered(), **more}


def padded_without_position_ids() -> dict[str, Any]:
    batch = answered(side="left")
    del batch["position_ids"]
    return batch


def with_a_gap() -> dict[str, Any]:
    batch = answered()
    batch["attention_mask"][0, 3] = 0
    return batch


def with_labels_on_padding() -> dict[str, Any]:
    batch = answered()
    batch["labels"][1, -1] = 5
    return batch


def with_a_label_on_the_first_token() -> dict[str, Any]:
    batch = answered(side="left")
    batch["labels"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    return batch


BATCHES: dict[str, tuple[str, Callable[[], dict[str, Any]], str]] = {
    "padding that is counted": ("llama", padded_without_position_ids, "padded on the left"),
    "a mask with gaps": ("llama", with_a_gap, "gaps"),
    "positions of one's own": (
        "llama", lambda: batch_with(position_ids=answered()["position_ids"] + 1), "position_ids do not count",
    ),
    "labels on padding": ("llama", with_labels_on_padding, "labels stand on padding"),
    "token types": (
        "gpt2", lambda: batch_with(token_type_ids=torch.ones_like(answered()["input_ids"])), "token_type_ids",
    ),
    "a number of labels": ("llama", lambda: batch_with(num_items_in_batch=3), "num_items_in_batch"),
    "logits of some tokens": ("llama", lambda: batch_with(logits_to_keep=4), "logits_to_keep"),
}  # fmt: skip


@pytest.mark.parametrize(("family", "make", "reason"), BATCHES.values(), ids=BATCHES)
def test_batches_that_would_come_out_otherwise_are_run_plainly(
    family: str, make: Callable[[], dict[str, Any]], reason: str
) -> None:
    reft = bound(family)
    refused(reft, make(), reason)
    runner = ConeRunner(reft, small_store())
    assert_equal(runner, answered())
    assert runner.loss(make()) is None
    assert_equal(runner, answered())


def test_a_label_on_a_first_token_after_padding_is_counted_as_the_plain_run_does() -> None:
    both = rl.Edit("edit", at="blocks[1].output", positions="all", phase="decode", intervention=rl.LoReFT(3))
    refused(bound("llama", both), with_a_label_on_the_first_token(), "labels stand on padding")
    batch = with_a_label_on_the_first_token()
    batch["labels"][:, 0] = -100
    unpadded = {name: value[2:3] for name, value in batch.items()}
    assert_equal(ConeRunner(bound("llama", both), small_store()), unpadded)


def test_vectors_in_place_of_tokens_are_run_plainly() -> None:
    reft = bound("llama")
    batch = answered()
    vectors = reft.model.get_input_embeddings()(batch.pop("input_ids"))
    cone = cone_of(reft, {**batch, "inputs_embeds": vectors})
    assert cone.why == ("the batch gives vectors in place of token ids",)
    assert "vectors in place of token ids" in str(reft.plan({**batch, "inputs_embeds": vectors}))


def test_a_model_whose_own_numbers_learn_has_no_cone() -> None:
    cone = cone_of(bound("llama"), answered(), train_model=True)
    assert "train_model=True" in cone.why[0]
    assert cone.share == 1.0


def test_a_batch_without_tokens_is_refused() -> None:
    with pytest.raises(RunError, match="no input_ids"):
        cone_of(bound("llama"), {"labels": torch.ones(1, 2)})


def test_a_batch_without_any_label_is_run_plainly() -> None:
    batch = answered()
    batch["labels"][:] = -100
    runner = ConeRunner(bound("llama"), small_store())
    assert runner.loss(batch) is None


def test_a_cone_of_almost_everything_is_run_plainly() -> None:
    edit = rl.Edit("edit", at="embed.output", positions="[1]", intervention=rl.LoReFT(3))
    runner = ConeRunner(bound("llama", edit), small_store())
    assert runner.loss(answered(((30, 1),))) is None
    assert runner.why_plain == ("the cone is 94% of everything",)


def test_checkpointing_that_is_turned_on_later_is_noticed() -> None:
    reft = bound("llama").train()
    runner = ConeRunner(reft, small_store())
    assert_equal(runner, answered())
    reft.gradient_checkpointing_enable()
    assert runner.loss(answered()) is None
    assert "gradient checkpointing" in runner.why_plain[0]
    reft.gradient_checkpointing_disable()
    assert_equal(runner, answered())


def test_dropout_counts_in_train_mode_alone() -> None:
    reft = bound("gpt2")
    runner = ConeRunner(reft, small_store())
    assert_equal(runner, answered())
    reft.train()
    assert runner.loss(answered()) is None
    reft.eval()
    assert_equal(runner, answered())


def test_who_watches_the_edits_is_shown_one_plain_pass() -> None:
    reft = bound("llama")
    runner = ConeRunner(reft, small_store())
    seen: list[Any] = []
    with reft.watching(lambda edit, tokens, *rest: seen.append(tokens.columns.tolist())):
        assert runner.loss(answered()) is None
        reft(**answered())
    assert seen == [[8, 4, 11, 6]]
    assert_equal(runner, answered())


class Lopsided(nn.Module):
    """A block's own attention, and besides it something that looks back over all columns, padding too."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        out, weights = self.attention(hidden_states=hidden_states, **kwargs)
        return out + 0.5 * hidden_states.cumsum(1), weights


def test_a_model_that_gives_other_numbers_when_entered_in_the_middle_is_found_out() -> None:
    """Its sum over earlier tokens is in no cache, so the first batch comes out otherwise."""
    model = build("llama")
    model.model.layers[2].self_attn = Lopsided(model.model.layers[2].self_attn)
    reft = bound(model)
    runner = ConeRunner(reft, small_store())
    assert runner.loss(answered()) is None
    assert "gives other logits when it is entered in the middle" in runner.why_plain[0]
    assert runner.why == runner.why_plain
    assert not close(plainly(reft, answered())[0], plainly(bound("llama"), answered())[0], 1e-2)
