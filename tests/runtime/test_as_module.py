"""A bound model is an ordinary module: state, devices, checkpointing, copies, data-parallel wrapping."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import reftlab as rl
from tests.models import CAUSAL, batch_of, copy_of, hook_count
from tests.oracle import randomise, raw_blocks

causal = pytest.mark.parametrize("any_model", CAUSAL, indirect=True)


def graph(**more: Any) -> rl.InterventionGraph:
    more.setdefault("intervention", rl.LoReFT(3))
    return rl.InterventionGraph(
        rl.Edit("early", at="blocks[0].output", positions="f1+l1", **more),
        rl.Edit("inside", at="blocks[1].mlp.output", positions="last", intervention=rl.DiReFT(2)),
        rl.Edit("late", at="blocks[2].output", positions="all", intervention=rl.NoReFT(2)),
    )


def bound(model: Any) -> rl.BoundModel:
    reft = graph().bind(model)
    randomise(reft)
    return reft


def labelled() -> dict[str, Tensor]:
    batch = batch_of((7, 5), "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :3] = -100
    return {**batch, "labels": labels}


def gradients(module: Any, batch: dict[str, Tensor], root: Any = None) -> dict[str, Tensor]:
    module.zero_grad()
    module(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in (root or module).named_parameters() if p.grad is not None}


def frozen(model: Any) -> Any:
    return copy_of(model).requires_grad_(False)


def test_gradients_equal_finite_differences(llama: Any) -> None:
    model = frozen(llama).double()
    reft, batch = bound(model), labelled()
    # The bridge to the interventions is float32, which bounds how well the difference can be known.
    grads = gradients(reft, batch)
    for name in (
        "interventions.early.linear.bias",
        "interventions.inside.linear.bias",
        "interventions.late.linear.bias",
    ):
        parameter, step = reft.get_parameter(name), 1e-2
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[0] += sign * step
                losses.append(float(reft(**batch).loss))
                parameter[0] -= sign * step
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(
            float(grads[name][0]), rel=2e-2, abs=1e-4
        )


def test_a_frozen_model_has_gradients_in_every_intervention_and_nowhere_else(any_model: Any) -> None:
    model = frozen(any_model)
    reft = bound(model)
    grads = gradients(reft, labelled())
    assert set(grads) == {f"interventions.{name}" for name, _ in reft.interventions.named_parameters()}
    assert all(grad.abs().max() > 0 for grad in grads.values())


@causal
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize("base", ["frozen", "trained"])
def test_gradient_checkpointing_gives_the_same_gradients(any_model: Any, reentrant: bool, base: str) -> None:
    model = frozen(any_model) if base == "frozen" else copy_of(any_model)
    reft, batch = bound(model).train(), labelled()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected = gradients(reft, batch)
    if base == "frozen":
        model.enable_input_require_grads()
    reft.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    standing = hook_count(model)
    assert model.is_gradient_checkpointing
    ran: list[int] = []
    first = next(raw_blocks(model)[1].mlp.children())
    handle = first.register_forward_hook(lambda *_: ran.append(1))
    got = gradients(reft, batch)
    handle.remove()
    assert len(ran) == 2
    assert hook_count(model) == standing
    assert got.keys() >= expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-6)
    reft.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_checkpointed_passes_that_are_never_backpropagated_leave_no_hook(llama: Any, reentrant: bool) -> None:
    model = frozen(llama).train()
    model.enable_input_require_grads()
    reft = bound(model)
    reft.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    standing = hook_count(model)
    output = reft(**labelled())
    del output
    gc.collect()
    assert hook_count(model) == standing
    with torch.no_grad():
        reft(**labelled())
    assert hook_count(model) == standing


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_two_pending_checkpointed_passes_are_refused_rather_than_mixed(llama: Any, reentrant: bool) -> None:
    model = copy_of(llama).train()
    model.enable_input_require_grads()
    reft = bound(model)
    reft.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    losses = [reft(**labelled()).loss for _ in range(2)]
    with pytest.raises(rl.RunError, match="2 forward passes of this model are waiting"):
        losses[0].backward()


def test_two_forward_passes_then_two_backward_passes_add_their_gradients(llama: Any) -> None:
    reft, batch = bound(frozen(llama)), labelled()
    once = gradients(reft, batch)
    reft.zero_grad()
    losses = [reft(**batch).loss for _ in range(2)]
    for loss in losses:
        loss.backward()
    for name, grad in once.items():
        torch.testing.assert_close(reft.get_parameter(name).grad, 2 * grad, rtol=1e-4, atol=1e-6)


def test_the_state_is_the_models_and_the_interventions(llama: Any) -> None:
    reft, other = bound(llama), graph().bind(copy_of(llama))
    state = reft.state_dict()
    assert {key.split(".")[0] for key in state} == {"model", "interventions"}
    assert {key.removeprefix("model.") for key in state if key.startswith("model.")} == set(
        llama.state_dict()
    )
    batch = batch_of()
    with torch.no_grad():
        assert not torch.equal(other(**batch).logits, reft(**batch).logits)
        other.load_state_dict(state)
        assert torch.equal(other(**batch).logits, reft(**batch).logits)


def test_a_fixed_vector_is_part_of_the_state(llama: Any) -> None:
    edit = rl.Edit("add", at="blocks[0].output", intervention=rl.Add([1.0] * 32))
    state = rl.InterventionGraph(edit).bind(llama).state_dict()
    assert state["interventions.add.value"].tolist() == [1.0] * 32


def test_moving_and_casting_reach_model_and_interventions(llama: Any) -> None:
    reft = bound(copy_of(llama))
    assert reft.device == torch.device("cpu")
    reft.to(torch.float64)
    assert {p.dtype for p in reft.model.parameters()} == {torch.float64}
    assert {p.dtype for p in reft.interventions.parameters()} == {torch.float32}
    with torch.no_grad():
        assert reft(**batch_of()).logits.dtype == torch.float64
    assert {p.device.type for p in graph().bind(copy_of(llama)).to("meta").parameters()} == {"meta"}


def test_train_and_eval_reach_model_and_interventions(llama: Any) -> None:
    reft = bound(copy_of(llama))
    assert not any(module.training for module in reft.modules())
    assert all(module.training for module in reft.train().modules())
    assert not any(module.training for module in reft.eval().modules())


def test_the_models_attributes_are_at_hand(llama: Any) -> None:
    reft = bound(llama)
    assert reft.config is llama.config
    assert reft.model is llama


def test_a_copy_is_independent(llama: Any) -> None:
    reft, batch = bound(copy_of(llama)), batch_of()
    with torch.no_grad():
        expected = reft(**batch).logits
        other = copy.deepcopy(reft)
        assert torch.equal(other(**batch).logits, expected)
        for parameter in other.interventions.parameters():
            parameter.zero_().add_(0.1)
        assert not torch.equal(other(**batch).logits, expected)
        assert torch.equal(reft(**batch).logits, expected)


def test_optimisers_train_the_interventions(llama: Any) -> None:
    model = frozen(llama)
    reft, batch = graph().bind(model), labelled()
    optimizer = torch.optim.AdamW(reft.interventions.parameters(), lr=0.05)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = reft(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


def test_bfloat16_models_train_float32_interventions(llama: Any) -> None:
    reft = bound(frozen(llama).bfloat16())
    grads = gradients(reft, labelled())
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    assert all(grad.isfinite().all() and grad.abs().max() > 0 for grad in grads.values())


def test_autocast_leaves_the_mathematics_in_float32(llama: Any) -> None:
    seen: list[torch.dtype] = []
    edit = rl.Edit(
        "watch",
        at="blocks[1].mlp.output",
        intervention=rl.Function(lambda h: seen.append((h @ h.T).dtype) or h),
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rl.InterventionGraph(edit).bind(llama)(**batch_of())
    assert seen == [torch.float32]


@pytest.fixture
def process_group(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel_wraps_it_and_gradients_arrive(llama: Any) -> None:
    reft, batch = bound(frozen(llama)), labelled()
    expected = gradients(reft, batch)
    reft.zero_grad()
    parallel = DistributedDataParallel(reft)
    for _ in range(2):
        got = gradients(parallel, batch, root=reft)
        assert got.keys() == expected.keys()
        for name, grad in expected.items():
            torch.testing.assert_close(got[name], grad, rtol=1e-5, atol=1e-7)
    assert hook_count(reft.model) == 0
