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


def _silent(reft: rl.BoundModel, *names: str) -> None:
    """Set the parameters that end in these names to zero."""
    with torch.no_grad():
        for name, parameter in reft.interventions.named_parameters():
            if name.endswith(names):
                parameter.zero_()


def _edits(make: Callable[[], rl.Intervention], *runs: rl.Source, **options: Any) -> rl.InterventionGraph:
    edits = (rl.Edit(f"edit{n}", at=site, intervention=make(), **options) for n, site in enumerate(SITES))
    return rl.InterventionGraph(*runs, *edits)


def _sourced(make: Callable[[], rl.Intervention], inputs: str | None = "base") -> rl.InterventionGraph:
    return _edits(make, rl.Source("same", inputs=inputs), source=rl.Read(run="same"))


def _all_scaled_to_nothing(model: Any) -> rl.BoundModel:
    reft = _edits(lambda: rl.Add(VECTOR)).bind(model)
    for number in range(len(SITES)):
        reft = reft.scale(f"edit{number}", 0.0)
    return reft


def _learned_to_nothing(model: Any) -> rl.BoundModel:
    """The paper's DiReFT, `h + W2ᵀ(W1 h + b)`, with W2 = 0: what it adds is a zero."""
    reft = _edits(lambda: rl.NodiReFT(rank=3)).bind(model)
    _silent(reft, "projection.weight")
    return reft


def _target_of_zero(model: Any) -> rl.BoundModel:
    """`h + Rᵀ b` with b = 0."""
    reft = _edits(lambda: rl.LobiReFT(rank=3)).bind(model)
    _silent(reft, "target")
    return reft


def _direft_of_zero(model: Any) -> rl.BoundModel:
    """`h + Rᵀ(W h + b)` with W = 0 and b = 0, in directions that are not zero."""
    reft = _edits(lambda: rl.DiReFT(rank=3)).bind(model)
    _silent(reft, "linear.weight", "linear.bias")
    return reft


NOTHING: dict[str, Callable[[Any], rl.BoundModel]] = {
    "Scale(1)": lambda m: _edits(lambda: rl.Scale(1.0)).bind(m),
    "Add(0)": lambda m: _edits(lambda: rl.Add(0.0)).bind(m),
    "Add(zeros)": lambda m: _edits(lambda: rl.Add(torch.zeros(WIDTH))).bind(m),
    "Subtract(0)": lambda m: _edits(lambda: rl.Subtract(0.0)).bind(m),
    "Noise(0)": lambda m: _edits(lambda: rl.Noise(0.0)).bind(m),
    "Clamp(wide)": lambda m: _edits(lambda: rl.Clamp(-1e9, 1e9)).bind(m),
    "Function(same)": lambda m: _edits(lambda: rl.Function(lambda h: h)).bind(m),
    "strength=0": lambda m: _edits(lambda: rl.Add(VECTOR), strength=0.0).bind(m),
    "scale(0)": _all_scaled_to_nothing,
    "LoReFT(scale=0)": lambda m: _edits(lambda: rl.LoReFT(rank=3, scale=0.0)).bind(m),
    "NodiReFT, W2=0": _learned_to_nothing,
    "LobiReFT, b=0": _target_of_zero,
    "DiReFT, W=b=0": _direft_of_zero,
    "Swap with itself": lambda m: _sourced(rl.Swap).bind(m),
    "RotatedSwap with itself": lambda m: _sourced(lambda: rl.RotatedSwap(rank=4)).bind(m),
    "BoundlessSwap with itself": lambda m: _sourced(rl.BoundlessSwap).bind(m),
    "MaskedSwap with itself": lambda m: _sourced(rl.MaskedSwap).bind(m),
    "a condition that never holds": lambda m: _edits(lambda: rl.Add(VECTOR), when=rl.norm("embed.output") > 1e9).bind(m),
}  # fmt: skip
"""Ways to change nothing; each makes a bound model of edits at all sites."""

CALLS: dict[str, tuple[Callable[[], rl.Intervention], dict[str, Any]]] = {
    "select=[]": (lambda: rl.Add(VECTOR), {"select": []}),
    "no tasks": (lambda: rl.Add(VECTOR), {"tasks": [None] * len(LENGTHS)}),
    "scale=0": (lambda: rl.Add(VECTOR), {"scale": {f"edit{n}": 0.0 for n in range(len(SITES))}}),
    "scale=0 in each row": (lambda: rl.Add(VECTOR), {"scale": {f"edit{n}": [0.0] * 3 for n in range(len(SITES))}}),
    "an empty subspace": (lambda: rl.LoReFT(rank=3), {"subspace": [[]] * len(LENGTHS)}),
    "no positions": (lambda: rl.Add(VECTOR), {"positions": {f"edit{n}": [[], [], []] for n in range(len(SITES))}}),
}  # fmt: skip
"""Edits that would change much, and what one call says so that they change nothing."""


@functools.cache
def model_in(family: str, dtype: torch.dtype) -> Any:
    return build_model(family).to(dtype)


in_each_model = pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
in_each_generator = pytest.mark.parametrize("family", ["llama", "gpt2"])
in_each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
each_nothing = pytest.mark.parametrize("nothing", NOTHING)
each_call = pytest.mark.parametrize("said", CALLS)


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
def test_an_edit_that_changes_nothing_is_the_identity(family: str, dtype: torch.dtype, nothing: str) -> None:
    model = model_in(family, dtype)
    check_forward(model, NOTHING[nothing](model))


@in_each_generator
@in_each_dtype
@each_nothing
def test_an_edit_that_changes_nothing_is_the_identity_in_generation(
    family: str, dtype: torch.dtype, nothing: str
) -> None:
    model = model_in(family, dtype)
    check_generate(model, NOTHING[nothing](model))


@in_each_model
@in_each_dtype
@each_call
def test_a_call_that_takes_every_edit_away_is_the_identity(
    family: str, dtype: torch.dtype, said: str
) -> None:
    model, (make, options) = model_in(family, dtype), CALLS[said]
    reft = _edits(make).bind(model)
    with torch.no_grad():
        batch = batch_of(LENGTHS)
        assert not torch.equal(reft(**batch).logits, model(**batch).logits)
    check_forward(model, reft, **options)


@in_each_generator
@in_each_dtype
@each_call
def test_a_call_that_takes_every_edit_away_is_the_identity_in_generation(
    family: str, dtype: torch.dtype, said: str
) -> None:
    model, (make, options) = model_in(family, dtype), CALLS[said]
    check_generate(model, _edits(make).bind(model), **options)


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
