"""Attention scores and patterns, against attention computed by hand and transformers' own weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import reftlab as rl
from tests.models import HEADS, WIDTH, batch_of, build_model, hook_count
from tests.oracle import assert_close

LENGTHS = (7, 4, 9)
sides = pytest.mark.parametrize("side", ["left", "right"])
backends = pytest.mark.parametrize("backend", ["sdpa", "eager"])


def loaded(family: str, backend: str) -> Any:
    model = build_model(family)
    model.set_attn_implementation(backend)
    return model


def own_weights(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """What transformers itself says of layer 1's attention, `(row, head, query, key)`."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        weights = model(**batch, output_attentions=True).attentions[1]
    finally:
        model.set_attn_implementation(before)
    return weights


@torch.no_grad()
@backends
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bert"])
def test_patterns_are_those_of_transformers_whatever_the_backend(family: str, backend: str) -> None:
    model, batch = loaded(family, backend), batch_of((9, 9))
    weights = own_weights(model, batch)
    hooks = hook_count(model)  # transformers' own recorders stay on the model
    reft = rl.InterventionGraph().bind(model)
    read = reft.read("blocks[1].attn.pattern", "blocks[1].attn.scores", **batch)
    pattern, scores = read["blocks[1].attn.pattern @ all"], read["blocks[1].attn.scores @ all"]
    assert pattern.shape == (2, HEADS, 9, 9)
    assert_close(pattern, weights)
    assert_close(scores.softmax(dim=-1), weights)
    one = reft.read(rl.Read("blocks[1].attn.pattern @ last", heads=[2]), **batch)
    assert_close(next(iter(one.values())), weights[:, [2], -1:])
    assert model.config._attn_implementation == backend
    assert hook_count(model) == hooks


@torch.no_grad()
@sides
@backends
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_an_edited_pattern_weighs_the_values_anew(family: str, backend: str, side: str) -> None:
    """A head whose pattern is zero at some queries hands zeros on there, and nothing else changes."""
    model, batch = loaded(family, backend), batch_of(LENGTHS, side)
    graph = rl.InterventionGraph(
        rl.Edit("off", at="blocks[1].attn.pattern", positions="last(2)", intervention=rl.Zero(), heads=[1])
    )
    reft = graph.bind(model)
    site = "blocks[1].attn.heads"
    before = rl.InterventionGraph().bind(model).read(site, positions="all", **batch)[f"{site} @ all"]
    after = reft.read(site, positions="all", **batch)[f"{site} @ all"]
    expected, size = before.clone(), before.shape[-1] // HEADS
    for row, length in enumerate(LENGTHS):
        expected[row, length - 2 : length, size : 2 * size] = 0.0
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@torch.no_grad()
@backends
def test_a_knocked_out_edge_is_a_score_of_minus_infinity(backend: str) -> None:
    model, batch = loaded("llama", backend), batch_of((6, 6))

    def knock_out(scores: Tensor) -> Tensor:
        by_head = scores.reshape(len(scores), HEADS, -1).clone()
        by_head[..., 0] = -torch.inf
        return by_head.reshape(scores.shape)

    edit = rl.Edit("edge", at="blocks[0].attn.scores", positions="last", intervention=rl.Function(knock_out))
    reft = rl.InterventionGraph(edit).bind(model)
    pattern = reft.read("blocks[0].attn.pattern", **batch)["blocks[0].attn.pattern @ all"]
    bare = (
        rl.InterventionGraph()
        .bind(model)
        .read("blocks[0].attn.pattern", **batch)["blocks[0].attn.pattern @ all"]
    )
    expected = bare.clone()
    expected[:, :, -1, 0] = 0.0
    expected[:, :, -1] = expected[:, :, -1] / expected[:, :, -1].sum(-1, keepdim=True)
    assert_close(pattern, expected)


@torch.no_grad()
def test_patterns_are_swapped_between_runs_and_in_generation(llama: Any) -> None:
    batch, other = batch_of((6, 6)), batch_of((6, 6), seed=4)
    graph = rl.InterventionGraph(
        rl.Source("other"),
        rl.Edit("swap", at="blocks[1].attn.pattern", intervention=rl.Swap(), source=rl.Read(run="other")),
    )
    reft = graph.bind(llama)
    read = "blocks[1].attn.pattern"
    got = reft.read(read, sources={"other": other}, **batch)[f"{read} @ all"]
    assert_close(got, rl.InterventionGraph().bind(llama).read(read, **other)[f"{read} @ all"])
    with pytest.raises(rl.RunError, match="padded otherwise"):
        reft(
            **batch,
            sources={"other": batch_of((6, 8), seed=4)},
            positions={"swap": "last(3)", "swap.source": "last(3)"},
        )
    off = rl.InterventionGraph(
        rl.Edit("off", at="blocks[1].attn.pattern", phase="both", intervention=rl.Zero())
    ).bind(llama)
    zeroed = rl.InterventionGraph(
        rl.Edit("off", at="blocks[1].attn.heads", phase="both", intervention=rl.Zero())
    ).bind(llama)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(off.generate(**batch, **options), zeroed.generate(**batch, **options))
    assert not torch.equal(off.generate(**batch, **options), llama.generate(**batch, **options))


def test_what_cannot_be_done_to_a_pattern_is_said(llama: Any) -> None:
    def bind(intervention: Any, **options: Any) -> Any:
        edit = rl.Edit("e", at="blocks[1].attn.pattern", intervention=intervention, **options)
        return rl.InterventionGraph(edit).bind(llama)

    with pytest.raises(rl.BindError, match=r"LoReFT\(rank=2\) has numbers of a fixed width"):
        bind(rl.LoReFT(rank=2))
    with pytest.raises(rl.BindError, match="fixed width"):
        bind(rl.Add(torch.ones(WIDTH)))
    with pytest.raises(rl.AddressError, match="use heads="):
        bind(rl.Zero(), features=[0])
    with pytest.raises(rl.AddressError, match="numbered 0 to 3"):
        bind(rl.Zero(), heads=[4])
    with pytest.raises(rl.RunError, match="no softmax that can be watched"):
        rl.InterventionGraph(rl.Edit("e", at="model.layers[0].mlp.pattern", intervention=rl.Zero())).bind(
            llama
        )


def test_an_exception_gives_the_backend_back(llama: Any) -> None:
    def fail(pattern: Tensor) -> Tensor:
        raise ZeroDivisionError

    reft = rl.InterventionGraph(
        rl.Edit("e", at="blocks[1].attn.pattern", intervention=rl.Function(fail))
    ).bind(llama)
    before = llama.config._attn_implementation
    with pytest.raises(ZeroDivisionError):
        reft(**batch_of((6, 6)))
    assert llama.config._attn_implementation == before
    assert hook_count(llama) == 0
    assert torch._C._len_torch_function_stack() == 0
