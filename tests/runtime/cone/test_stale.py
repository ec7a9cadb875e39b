"""What was kept is never served for a model that has changed, or for another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import reftlab as rl
from reftlab.runtime.cone import ConeRunner
from tests.models import build
from tests.oracle import raw_blocks

from .common import answered, assert_equal, bound, close, on_the_cone, plainly, small_store


def weight_of(model: Any) -> torch.nn.Parameter:
    return raw_blocks(model)[0].mlp.down_proj.weight


@torch.no_grad()
def in_place(model: Any) -> None:
    weight_of(model).mul_(2.0)


def through_data(model: Any) -> None:
    weight_of(model).data.mul_(2.0)


def new_data(model: Any) -> None:
    weight_of(model).data = weight_of(model).data * 2.0


def loaded(model: Any) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["model.layers.0.mlp.down_proj.weight"] *= 2.0
    model.load_state_dict(state)


def assigned(model: Any) -> None:
    state = dict(model.state_dict())
    state["model.layers.0.mlp.down_proj.weight"] = 2.0 * state["model.layers.0.mlp.down_proj.weight"]
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False)


def exchanged(model: Any) -> None:
    other = torch.nn.Linear(48, 32, bias=False).requires_grad_(False)
    raw_blocks(model)[0].mlp.down_proj = other


def another_block(model: Any) -> None:
    block = build("llama").model.layers[0].requires_grad_(False)
    block.self_attn.layer_idx = 1
    model.model.layers[1] = block


def rows_swapped(model: Any) -> None:
    weight_of(model).data = weight_of(model).data.flip(0).contiguous()


def in_another_type(model: Any) -> None:
    model.double()


CHANGES = [
    in_place, through_data, new_data, loaded, assigned, exchanged, another_block, rows_swapped, in_another_type,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("same", [True, False], ids=["one runner", "another runner of the same store"])
def test_a_changed_model_is_computed_anew(change: Callable[[Any], None], same: bool) -> None:
    reft = bound("llama")
    store = small_store()
    runner = ConeRunner(reft, store)
    assert_equal(runner, answered())
    before = plainly(reft, answered())[0]
    change(reft.model)
    runner = runner if same else ConeRunner(reft, store)
    assert_equal(runner, answered(), 1e-5)
    assert runner.why_plain == ()
    if change is not in_another_type:
        assert not close(plainly(reft, answered())[0], before, 1e-4)


def test_a_changed_buffer_is_noticed() -> None:
    reft = bound("llama")
    runner = ConeRunner(reft, small_store())
    assert_equal(runner, answered())
    reft.model.model.rotary_emb.inv_freq.mul_(3.0)
    assert_equal(runner, answered())


def test_an_edits_own_training_throws_nothing_away() -> None:
    reft = bound("llama")
    runner = ConeRunner(reft, small_store())
    assert_equal(runner, answered())
    kept = len(runner.store)
    with torch.no_grad():
        for parameter in reft.interventions.parameters():
            parameter.add_(0.1)
    assert_equal(runner, answered())
    assert len(runner.store) == kept


def test_models_that_share_a_store_do_not_mix() -> None:
    store = small_store()
    runners = []
    for change in (None, in_place, in_another_type):
        reft = bound("llama")
        if change is not None:
            change(reft.model)
        runners.append(ConeRunner(reft, store))
    runners.append(ConeRunner(bound("qwen3"), store))
    runners.append(
        ConeRunner(
            bound("llama", rl.Edit("b", at="blocks[0].output", positions="last", intervention=rl.DiReFT(2))),
            store,
        )
    )
    for _ in range(2):
        for runner in runners:
            assert_equal(runner, answered())
    assert all(runner.why_plain == () for runner in runners)


def test_kinds_of_attention_do_not_mix() -> None:
    reft = bound("llama")
    runner = ConeRunner(reft, small_store())
    sizes = []
    for attention in ("sdpa", "eager", "sdpa"):
        reft.model.set_attn_implementation(attention)
        assert_equal(runner, answered())
        sizes.append(len(runner.store))
    assert sizes[1] == 2 * sizes[0] == sizes[2]


def test_autocast_does_not_mix_with_full_precision() -> None:
    reft = bound("llama")
    runner = ConeRunner(reft, small_store())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        runner.loss(answered())
    coarse = len(runner.store)
    fresh = ConeRunner(reft, runner.store)
    assert_equal(fresh, answered())
    assert len(fresh.store) == 2 * coarse > 0


def test_two_bound_graphs_of_one_model_share_what_is_kept() -> None:
    model, store = build("llama"), small_store()
    one, other = (
        bound(model),
        bound(model, rl.Edit("b", at="blocks[1].output", positions="last", intervention=rl.DiReFT(2))),
    )
    assert_equal(ConeRunner(one, store), answered())
    kept = len(store)
    runner = ConeRunner(other, store)
    assert_equal(runner, answered())
    assert len(store) == kept
    # Filled by another graph's runner, a fresh one has seen no block return anything.
    assert on_the_cone(ConeRunner(other, store), answered())[0] == on_the_cone(runner, answered())[0]


@pytest.mark.parametrize("same", [True, False], ids=["one runner", "another runner of the same store"])
def test_another_active_lora_is_another_model(same: bool) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build("llama"), config).eval()
    model.add_adapter("other", config)
    reft = bound(model)
    store = small_store()
    runner = ConeRunner(reft, store)
    losses = []
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        model.requires_grad_(False)
        runner = runner if same else ConeRunner(reft, store)
        assert_equal(runner, answered())
        losses.append(float(plainly(reft, answered())[0]))
    with model.disable_adapter():
        assert_equal(runner if same else ConeRunner(reft, store), answered())
    assert losses[0] == losses[2] != losses[1]
