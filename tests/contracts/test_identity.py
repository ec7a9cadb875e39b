"""Edits that say that nothing is to change leave every number as it is, bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import reftlab as rl
from tests.models import WIDTH, batch_of, build_model
from tests.oracle import VECTOR

LENGTHS = (7, 4, 9)
SITES = ("embed.output", "blocks[1].output", "blocks[0].attn.output", "blocks[2].mlp.output")
NAMES = [f"edit{number}" for number in range(len(SITES))]


def _edits(make: Callable[[], rl.Intervention], *runs: rl.Source, **options: Any) -> rl.InterventionGraph:
    pairs = zip(NAMES, SITES, strict=True)
    edits = (rl.Edit(name, at=site, intervention=make(), **options) for name, site in pairs)
    return rl.InterventionGraph(*runs, *edits)


def _sourced(make: Callable[[], rl.Intervention], inputs: str | None = "base") -> rl.InterventionGraph:
    return _edits(make, rl.Source("same", inputs=inputs), source=rl.Read(run="same"))


def _without(make: Callable[[], rl.Intervention], *names: str) -> Callable[[Any], rl.BoundModel]:
    """Edits whose parameters that end in these names are zero."""

    def bind(model: Any) -> rl.BoundModel:
        reft = _edits(make).bind(model)
        with torch.no_grad():
            for name, parameter in reft.interventions.named_parameters():
                if name.endswith(names):
                    parameter.zero_()
        return reft

    return bind


def _all_scaled_to_nothing(model: Any) -> rl.BoundModel:
    reft = _adding(model)
    for name in NAMES:
        reft = reft.scale(name, 0.0)
    return reft


def _adding(model: Any) -> rl.BoundModel:
    return _edits(lambda: rl.Add(VECTOR)).bind(model)


NOTHING: dict[str, tuple[Callable[[Any], rl.BoundModel], dict[str, Any]]] = {
    "Scale(1)": (lambda m: _edits(lambda: rl.Scale(1.0)).bind(m), {}),
    "Add(0)": (lambda m: _edits(lambda: rl.Add(0.0)).bind(m), {}),
    "Add(zeros)": (lambda m: _edits(lambda: rl.Add(torch.zeros(WIDTH))).bind(m), {}),
    "Subtract(0)": (lambda m: _edits(lambda: rl.Subtract(0.0)).bind(m), {}),
    "Noise(0)": (lambda m: _edits(lambda: rl.Noise(0.0)).bind(m), {}),
    "Clamp(wide)": (lambda m: _edits(lambda: rl.Clamp(-1e9, 1e9)).bind(m), {}),
    "Function(same)": (lambda m: _edits(lambda: rl.Function(lambda h: h)).bind(m), {}),
    "strength=0": (lambda m: _edits(lambda: rl.Add(VECTOR), strength=0.0).bind(m), {}),
    "scale(0)": (_all_scaled_to_nothing, {}),
    "LoReFT(scale=0)": (lambda m: _edits(lambda: rl.LoReFT(rank=3, scale=0.0)).bind(m), {}),
    # The paper's DiReFT, h + W2ᵀ(W1 h + b), with W2 = 0.
    "NodiReFT, W2=0": (_without(lambda: rl.NodiReFT(rank=3), "projection.weight"), {}),
    # h + Rᵀ b with b = 0.
    "LobiReFT, b=0": (_without(lambda: rl.LobiReFT(rank=3), "target"), {}),
    # h + Rᵀ(W h + b) with W = 0 and b = 0, in directions that are not zero.
    "DiReFT, W=b=0": (_without(lambda: rl.DiReFT(rank=3), "linear.weight", "linear.bias"), {}),
    "Swap with itself": (lambda m: _sourced(rl.Swap).bind(m), {}),
    "RotatedSwap with itself": (lambda m: _sourced(lambda: rl.RotatedSwap(rank=4)).bind(m), {}),
    "BoundlessSwap with itself": (lambda m: _sourced(rl.BoundlessSwap).bind(m), {}),
    "MaskedSwap with itself": (lambda m: _sourced(rl.MaskedSwap).bind(m), {}),
    "a condition that never holds": (lambda m: _edits(lambda: rl.Add(VECTOR), when=rl.norm("embed.output") > 1e9).bind(m), {}),
    "select=[]": (_adding, {"select": []}),
    "no tasks": (_adding, {"tasks": [None] * len(LENGTHS)}),
    "scale=0": (_adding, {"scale": dict.fromkeys(NAMES, 0.0)}),
    "scale=0 in each row": (_adding, {"scale": {name: [0.0] * len(LENGTHS) for name in NAMES}}),
    "an empty subspace": (lambda m: _edits(lambda: rl.LoReFT(rank=3)).bind(m), {"subspace": [[]] * len(LENGTHS)}),
    "no positions": (_adding, {"positions": {name: [[], [], []] for name in NAMES}}),
}  # fmt: skip
"""Ways to change nothing: what binds edits at all sites, and what the call says, where it is the call that
takes away what they would do."""


@functools.cache
def model_in(family: str, dtype: torch.dtype) -> Any:
    return build_model(family).to(dtype)


in_each_model = pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
in_each_generator = pytest.mark.parametrize("family", ["llama", "gpt2"])
in_each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
each_nothing = pytest.mark.parametrize("nothing", NOTHING)


@torch.no_grad()
def check_forward(model: Any, reft: rl.BoundModel, **options: Any) -> None:
    for side in ("left", "right"):
        batch = {**batch_of(LENGTHS, side), "output_hidden_states": True}
        expected, got = model(**batch), reft(**batch, **options)
        assert torch.equal(got.logits, expected.logits)
        assert all(map(torch.equal, got.hidden_states, expected.hidden_states))


def check_generate(model: Any, reft: rl.BoundModel, **options: Any) -> None:
    asked: dict[str, Any] = {
        **batch_of(LENGTHS, "left"), "max_new_tokens": 4, "do_sample": False, "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    expected, got = model.generate(**asked), reft.generate(**asked, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert all(map(torch.equal, got.logits, expected.logits))


@in_each_model
@in_each_dtype
@each_nothing
def test_edits_that_change_nothing_are_the_identity(family: str, dtype: torch.dtype, nothing: str) -> None:
    model, (bind, options) = model_in(family, dtype), NOTHING[nothing]
    reft = bind(model)
    if options:
        with torch.no_grad():
            batch = batch_of(LENGTHS)
            assert not torch.equal(reft(**batch).logits, model(**batch).logits)
    check_forward(model, reft, **options)


@in_each_generator
@in_each_dtype
@each_nothing
def test_edits_that_change_nothing_are_the_identity_in_generation(
    family: str, dtype: torch.dtype, nothing: str
) -> None:
    model, (bind, options) = model_in(family, dtype), NOTHING[nothing]
    check_generate(model, bind(model), **options)


@in_each_model
@in_each_dtype
def test_a_swap_with_another_run_is_not_the_identity(family: str, dtype: torch.dtype) -> None:
    """The same graphs as above with other inputs in the source: so the equality above says something."""
    model, batch, other = model_in(family, dtype), batch_of(LENGTHS), batch_of(LENGTHS, seed=9)
    for make in (rl.Swap, rl.BoundlessSwap, lambda: rl.RotatedSwap(rank=4)):
        reft = _sourced(make, inputs=None).bind(model)
        with torch.no_grad():
            assert not torch.equal(reft(**batch, sources={"same": other}).logits, model(**batch).logits)


@in_each_model
@in_each_dtype
def test_an_edit_leaves_the_tokens_before_it_and_the_other_rows_bit_for_bit(
    family: str, dtype: torch.dtype
) -> None:
    model, batch = model_in(family, dtype), batch_of(LENGTHS)
    edit = rl.Edit("edit", at="blocks[1].output", positions=[3], intervention=rl.Add(VECTOR), tasks="mine")
    reft = rl.InterventionGraph(edit).bind(model)
    with torch.no_grad():
        bare = model(**batch).logits
        got: Tensor = reft(**batch, tasks=[None, "mine", None]).logits
    assert torch.equal(got[0], bare[0])
    assert torch.equal(got[2], bare[2])
    assert not torch.equal(got[1, 3], bare[1, 3])
    if family != "bert":
        assert torch.equal(got[1, :3], bare[1, :3])
