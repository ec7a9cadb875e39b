"""What the portable names promise, checked by what a model says of itself and by definition."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import reftlab as rl
from tests.families.cells import answer_without_edits, bind, model_of, read_of
from tests.families.hand import answer_of, edit_by_hand, last_columns, plain_hook, read_by_hand
from tests.families.table import BLOCK, HEAD_SIZES, STACKS, TABLE
from tests.models import HEADS, KEY_VALUE_HEADS, LAYERS, build, inputs_of
from tests.oracle import assert_close

KNOWN = [name for name in TABLE if name not in ("gru", "mlp")]
STACKED = [(name, stack) for name in KNOWN for stack in STACKS[name]]
ATTENDING = [c for c in STACKED if c[0] not in ("mamba", "resnet")]
PROJECTING = [c for c in ATTENDING if c[0] != "xlnet"]
AFTER_NORM = {
    "bert": ("attention.output.LayerNorm", "output.LayerNorm"),
    "roberta": ("attention.output.LayerNorm", "output.LayerNorm"),
    "distilbert": ("sa_layer_norm", "output_layer_norm"),
    "bart": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
}
SHARED_KEYS = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"), KEY_VALUE_HEADS),
    **dict.fromkeys(("gemma2", "gemma3", "olmo2", "gpt_oss", "phi3", "falcon"), KEY_VALUE_HEADS),
    "falcon_multi_query": 1,
}
each_stack = pytest.mark.parametrize(("name", "stack"), STACKED)
each_attention = pytest.mark.parametrize(("name", "stack"), ATTENDING)
each_projection = pytest.mark.parametrize(("name", "stack"), PROJECTING)


def named(stack: str, site: str) -> str:
    return f"{stack}.{site}".removeprefix(".")


@functools.cache
def eager(name: str) -> Any:
    """The same model with attention that hands out its pattern."""
    model = build(name)
    # Falcon does not let itself be asked to, and T5's stacks have configurations of their own.
    for module in model.modules():
        if name not in ("mamba", "resnet") and hasattr(module, "config"):
            module.config._attn_implementation = "eager"
    return model


def told(name: str, stack: str, what: str) -> tuple[Tensor, ...]:
    """What the model itself hands out, its `hidden_states` or its `attentions`."""
    # transformers leaves recorders on a model that was asked for them, so it is not the one under test.
    model = eager(name) if what == "attentions" else build(name)
    with torch.no_grad():
        output = model(**inputs_of(name), **{f"output_{what}": True})
    if name == "clip":
        return output[f"{stack}_model_output"][what]
    return output[f"{stack}_{what}" if stack else what]


def read(name: str, *sites: str, edits: Any = (), inputs: Any = None) -> list[Tensor]:
    """Whole sites, `(row, token, feature)`; of a batch without padding unless inputs are given."""
    reft = bind(name, *(rl.Read(site, name=f"r{number}") for number, site in enumerate(sites)), *edits)
    reading = reft.read(**(inputs or unpadded(name)))
    return [reading[f"r{number}"] for number in range(len(sites))]


def unpadded(name: str) -> dict[str, Tensor]:
    return inputs_of(name, lengths=(6, 6))


@each_stack
def test_blocks_and_embeddings_are_the_models_own_hidden_states(name: str, stack: str) -> None:
    states = told(name, stack, "hidden_states")
    assert len(states) == LAYERS + 1
    inputs = inputs_of(name)
    sites = [named(stack, site) for site in ("embed.output", "blocks[0].output", "blocks[1].output")]
    if name == "mamba":
        sites = sites[1:]  # its first hidden state is already the first block's
    values = read(name, *sites, inputs=inputs)
    mask = inputs.get("attention_mask")
    masked = mask is not None and stack not in ("decoder", "vision")
    for value, state in zip(values, states, strict=False):
        state = state.flatten(2).transpose(1, 2) if name == "resnet" else state
        for row in range(state.shape[0]):
            expected = state[row][mask[row].bool()] if masked and mask is not None else state[row]
            assert_close(value[row, : len(expected)], expected)


@pytest.mark.parametrize("name", [name for name in KNOWN if "unembed" in TABLE[name]])
def test_unembed_is_the_logits(name: str) -> None:
    (logits,) = read(name, "unembed")
    with torch.no_grad():
        expected = model_of(name)(**unpadded(name)).logits
    cap = 30.0  # Gemma 2 bends its logits after the unembedding; BART shifts them, here by nothing
    assert_close(cap * (logits / cap).tanh() if name == "gemma2" else logits, expected)


@each_projection
def test_a_block_without_attention_and_mlp_hands_its_input_on(name: str, stack: str) -> None:
    block = named(stack, f"blocks[{BLOCK}]")
    parts = ["attn", "mlp", *(["cross_attn"] if stack == "decoder" else [])]
    edits = [
        rl.Edit(part, at=f"{block}.{part}.output", positions="all", intervention=rl.Zero()) for part in parts
    ]
    before, after = read(name, f"{block}.input", f"{block}.output", edits=edits)
    if name in AFTER_NORM:
        raw = model_of(name).get_submodule(TABLE[name][f"{block}.output"].module)
        norms = [norm for norm in AFTER_NORM[name] if stack == "decoder" or "encoder_attn" not in norm]
        for norm in norms:
            before = raw.get_submodule(norm)(before)
    assert_close(after, before)


@each_projection
def test_a_head_of_queries_makes_that_heads_result_and_no_other(name: str, stack: str) -> None:
    if name == "olmo2":
        pytest.skip("OLMo 2 normalises all queries together")
    assert changed_heads(name, stack, "q", 2) == [2]


@each_projection
@pytest.mark.parametrize("part", ["k", "v"])
def test_a_head_of_keys_or_values_makes_the_results_of_the_heads_that_share_it(
    name: str, stack: str, part: str
) -> None:
    if name == "olmo2" and part == "k":
        pytest.skip("OLMo 2 normalises all keys together")
    count = SHARED_KEYS.get(name, HEADS)
    number = count - 1
    assert changed_heads(name, stack, part, number) == list(range(HEADS - HEADS // count, HEADS))


def _ladder(width: int) -> Tensor:
    return torch.linspace(-2.0, 3.0, width)


def changed_heads(name: str, stack: str, part: str, head: int) -> list[int]:
    """Which heads' results another vector in one head of queries, keys or values changes."""
    attention = named(stack, f"blocks[{BLOCK}].attn")
    edit = rl.Edit(
        "head",
        at=f"{attention}.{part}",
        positions="last",
        heads=[head],
        intervention=rl.Add(_ladder(HEAD_SIZES[name])),
    )
    (bare,), (edited,) = read(name, f"{attention}.heads"), read(name, f"{attention}.heads", edits=[edit])
    change = (edited - bare).unflatten(-1, (HEADS, HEAD_SIZES[name])).abs().amax((0, 1, 3))
    return (change > 1e-6).nonzero().flatten().tolist()


@each_projection
def test_heads_of_zero_values_are_zero(name: str, stack: str) -> None:
    attention = named(stack, f"blocks[{BLOCK}].attn")
    edit = rl.Edit("values", at=f"{attention}.v", positions="all", intervention=rl.Zero())
    (heads,) = read(name, f"{attention}.heads", edits=[edit])
    assert torch.equal(heads, torch.zeros_like(heads))


@each_attention
def test_a_pattern_is_what_the_model_itself_hands_out(name: str, stack: str) -> None:
    attention, inputs = named(stack, f"blocks[{BLOCK}].attn"), inputs_of(name)
    expected = told(name, stack, "attentions")[BLOCK]
    pattern, scores = read(name, f"{attention}.pattern", f"{attention}.scores", inputs=inputs)
    for row, columns in enumerate(real_of(name, stack, expected.shape[2])):
        got = pattern[row, :, : len(columns)]
        assert_close(got[..., : expected.shape[3]], expected[row][:, columns])
        assert_close(got.sum(-1), torch.ones_like(got[..., 0]))
        assert_close(scores[row, :, : len(columns)].softmax(-1), got)


def real_of(name: str, stack: str, tokens: int) -> list[list[int]]:
    inputs = inputs_of(name)
    rows = next(iter(inputs.values())).shape[0]
    if "attention_mask" not in inputs or stack in ("decoder", "vision"):
        return [list(range(tokens))] * rows
    return [row.nonzero().flatten().tolist() for row in inputs["attention_mask"]]


@each_projection
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_pattern_of_zeros_takes_a_heads_result_away(name: str, stack: str, side: str) -> None:
    attention, head = named(stack, f"blocks[{BLOCK}].attn"), 1
    inputs, raw = inputs_of(name, side), TABLE[name][f"{attention}.heads"]
    edit = rl.Edit(
        "silence", at=f"{attention}.pattern", positions="last", heads=[head], intervention=rl.Zero()
    )
    columns = last_columns(raw, inputs, read_of(name, f"{attention}.heads", side).shape[1])
    place = slice(head * HEAD_SIZES[name], (head + 1) * HEAD_SIZES[name])

    def without_the_head(vector: Tensor) -> Tensor:
        new = vector.clone()
        new[:, place] = 0
        return new

    with torch.no_grad():
        with plain_hook(eager(name), raw, edit_by_hand(raw, columns, without_the_head)):
            expected = answer_of(eager(name)(**inputs))
        got = answer_of(bind(name, edit)(**inputs))
    assert_close(got, expected)
    if name != "vit" and stack != "vision":
        assert (got - answer_without_edits(name, side)).abs().max() > 1e-5


@each_projection
@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_of_zeros_make_a_head_the_mean_of_all_values(name: str, stack: str, side: str) -> None:
    attention, head = named(stack, f"blocks[{BLOCK}].attn"), 1
    inputs, raw, size = inputs_of(name, side), TABLE[name][f"{attention}.heads"], HEAD_SIZES[name]
    edit = rl.Edit("even", at=f"{attention}.scores", positions="last", heads=[head], intervention=rl.Zero())
    values = read_by_hand(eager(name), TABLE[name][f"{attention}.v"], inputs).unflatten(-1, (-1, size))
    shared = HEADS // values.shape[2]
    # GPT-OSS shares attention with a sink besides the keys, which has no value.
    keys = values.shape[1] + (1 if name == "gpt_oss" else 0)
    means = values[:, :, head // shared].sum(1) / keys
    columns = last_columns(raw, inputs, values.shape[1])

    def evened(heads: Tensor) -> Tensor:
        new = heads.clone()
        for row, chosen in enumerate(columns):
            new[row, chosen, head * size : (head + 1) * size] = means[row]
        return new

    with torch.no_grad():
        with plain_hook(eager(name), raw, evened):
            expected = answer_of(eager(name)(**inputs))
        got = answer_of(bind(name, edit)(**inputs))
    assert_close(got, expected)
