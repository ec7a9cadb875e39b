"""Sites inside blocks, heads and features, against plain hooks on the raw modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import reftlab as rl
from tests.models import HEAD_SIZE, WIDTH, batch_of
from tests.oracle import assert_close, raw_blocks

LENGTHS = (6, 6)


def _attention(block: nn.Module) -> nn.Module:
    """The module whose output is attention's result before the residual stream."""
    if hasattr(block, "self_attn"):
        return block.self_attn
    return block.attn if hasattr(block, "attn") else block.attention.output.dense


def _mlp(block: nn.Module) -> nn.Module:
    return block.mlp if hasattr(block, "mlp") else block.output.dense


def _projection(block: nn.Module) -> nn.Module:
    if hasattr(block, "self_attn"):
        return block.self_attn.o_proj
    return block.attn.c_proj if hasattr(block, "attn") else block.attention.output.dense


def _embedding(model: Any) -> nn.Module:
    kind = model.config.model_type
    if kind == "gpt2":
        return model.transformer.drop
    return model.bert.embeddings if kind == "bert" else model.model.embed_tokens


def _final_norm(model: Any) -> nn.Module:
    kind = model.config.model_type
    if kind == "gpt2":
        return model.transformer.ln_f
    return model.bert.encoder.layer[2].output.LayerNorm if kind == "bert" else model.model.norm


def _unembedding(model: Any) -> nn.Module:
    return model.cls.predictions.decoder if model.config.model_type == "bert" else model.lm_head


OUTPUTS: dict[str, Callable[[Any], nn.Module]] = {
    "blocks[1].output": lambda model: raw_blocks(model)[1],
    "blocks[-1].output": lambda model: raw_blocks(model)[2],
    "blocks[1].attn.output": lambda model: _attention(raw_blocks(model)[1]),
    "blocks[1].mlp.output": lambda model: _mlp(raw_blocks(model)[1]),
    "embed.output": _embedding,
    "final_norm.output": _final_norm,
    "unembed": _unembedding,
    "unembed.output": _unembedding,
}


def logits_with(model: Any, batch: dict[str, Tensor], register: Callable[[], Any]) -> Tensor:
    """Logits while a hook of the test's own stands on the model."""
    handle = register()
    try:
        with torch.no_grad():
            return model(**batch).logits
    finally:
        handle.remove()


def edited(model: Any, batch: dict[str, Tensor], **edit: Any) -> Tensor:
    graph = rl.InterventionGraph(rl.Edit("edit", positions="[1, -1]", **edit))
    with torch.no_grad():
        return graph.bind(model)(**batch).logits


def clipped(hidden: Tensor, features: Any = slice(None)) -> Tensor:
    """By hand: the second and the last token's chosen features, cut at −0.1 and 0.2.

    A norm behind the site would undo a plain scaling, and hide that nothing happened.
    """
    new = hidden.clone()
    for column in (1, hidden.shape[1] - 1):
        values = new[:, column, features]
        values = torch.where(values < -0.1, -0.1, values)
        new[:, column, features] = torch.where(values > 0.2, 0.2, values)
    return new


def output_hook(features: Any = slice(None)) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return clipped(output, features)
        return (clipped(output[0], features), *output[1:])

    return hook


@pytest.mark.parametrize("alias", OUTPUTS)
def test_an_alias_edits_the_raw_module_it_stands_for(any_model: PreTrainedModel, alias: str) -> None:
    batch = batch_of(LENGTHS)
    module = OUTPUTS[alias](any_model)
    got = edited(any_model, batch, at=alias, intervention=rl.Clamp(-0.1, 0.2))
    expected = logits_with(any_model, batch, lambda: module.register_forward_hook(output_hook()))
    assert_close(got, expected)
    with torch.no_grad():
        assert (got - any_model(**batch).logits).abs().max() > 1e-2


def head_features(heads: list[int], size: int) -> list[int]:
    return [head * size + feature for head in heads for feature in range(size)]


@pytest.mark.parametrize("heads", [None, [2], [3, 0], [-1]], ids=["all", "one", "two", "last"])
def test_heads_are_slices_of_what_enters_the_output_projection(
    any_model: PreTrainedModel, heads: list[int] | None
) -> None:
    batch = batch_of(LENGTHS)
    projection = _projection(raw_blocks(any_model)[1])
    size = WIDTH // 4 if any_model.config.model_type in ("gpt2", "bert") else HEAD_SIZE
    features: Any = slice(None) if heads is None else head_features([h % 4 for h in heads], size)

    def hook(module: nn.Module, args: Any) -> Any:
        return (clipped(args[0], features), *args[1:])

    got = edited(any_model, batch, at="blocks[1].attn.heads", heads=heads, intervention=rl.Clamp(-0.1, 0.2))
    expected = logits_with(any_model, batch, lambda: projection.register_forward_pre_hook(hook))
    assert_close(got, expected)
    with torch.no_grad():
        assert (got - any_model(**batch).logits).abs().max() > 1e-3


@pytest.mark.parametrize("part", ["k_proj", "v_proj"])
def test_keys_and_values_of_grouped_attention_have_their_own_fewer_heads(qwen3: Any, part: str) -> None:
    batch = batch_of(LENGTHS)
    module = getattr(qwen3.model.layers[1].self_attn, part)
    hook = output_hook(head_features([1], HEAD_SIZE))
    at = f"model.layers[1].self_attn.{part}.output"
    expected = logits_with(qwen3, batch, lambda: module.register_forward_hook(hook))
    if part == "v_proj":
        assert_close(edited(qwen3, batch, at=at, heads=1, intervention=rl.Clamp(-0.1, 0.2)), expected)
    with pytest.raises(rl.AddressError, match="there are 2, numbered 0 to 1; 2 is outside"):
        edited(qwen3, batch, at=at, heads=2, intervention=rl.Clamp(-0.1, 0.2))


@pytest.mark.parametrize(
    ("features", "by_hand"),
    [(slice(0, 8), slice(0, 8)), (slice(1, None, 4), slice(1, None, 4)), ([5, 2, 31], [5, 2, 31]), (7, [7])],
    ids=["slice", "strided", "list", "one"],
)
def test_features_are_edited_and_the_others_left(
    any_model: PreTrainedModel, features: Any, by_hand: Any
) -> None:
    batch = batch_of(LENGTHS)
    got = edited(any_model, batch, at="blocks[1].output", features=features, intervention=rl.Clamp(-0.1, 0.2))
    module = raw_blocks(any_model)[1]
    expected = logits_with(any_model, batch, lambda: module.register_forward_hook(output_hook(by_hand)))
    assert_close(got, expected)


def test_features_reach_the_intervention_in_the_order_they_were_named(llama: Any) -> None:
    seen = []
    graph = rl.InterventionGraph(
        rl.Edit(
            "edit", at="blocks[1].output", features=[5, 2],
            intervention=rl.Function(lambda base: seen.append(base.clone()) or base),
        )
    )  # fmt: skip
    reft = graph.bind(llama)
    batch = batch_of((4,))
    with torch.no_grad():
        reft(**batch)
    whole = reft.read("blocks[1].output", **batch)["blocks[1].output @ all"]
    assert torch.equal(seen[0], whole[0][:, [5, 2]])


def test_interventions_take_their_width_from_the_view(llama: Any) -> None:
    def width(**edit: Any) -> int:
        graph = rl.InterventionGraph(rl.Edit("edit", intervention=rl.LoReFT(2), **edit))
        return graph.bind(llama).interventions["edit"].width

    assert width(at="blocks[0].output") == WIDTH
    assert width(at="blocks[0].attn.heads") == 4 * HEAD_SIZE
    assert width(at="blocks[0].attn.heads", heads=[0, 2]) == 2 * HEAD_SIZE
    assert width(at="blocks[0].output", features=slice(0, 5)) == 5
    assert width(at="model.layers[0].mlp.down_proj.input") == 48
