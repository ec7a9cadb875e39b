"""A pass on the cone runs nothing else, and leaves nothing behind, however it ends."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reftlab as rl
from reftlab.interventions import Intervention
from reftlab.runtime.cone import BlockStack, ConeRunner, skipping
from tests.models import build, hook_count
from tests.oracle import raw_blocks

from .common import answered, assert_equal, bound, close, plainly, small_store

EDIT = rl.Edit("edit", at="blocks[1].output", positions="last", intervention=rl.LoReFT(3))


@contextlib.contextmanager
def counting(model: Any) -> Iterator[dict[str, list[int]]]:
    """How many tokens each module inside of blocks, and the head, are given, padding included."""
    seen: dict[str, list[int]] = {}
    watched = {
        f"{part} {number}": getattr(block, part).register_forward_pre_hook
        for number, block in enumerate(raw_blocks(model))
        for part in ("self_attn", "mlp", "input_layernorm")
    }
    watched["norm"] = model.model.norm.register_forward_pre_hook

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            seen.setdefault(name, []).append(hidden.shape[0] * hidden.shape[1])

        return hook

    def made(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.setdefault("head", []).append(output.shape[0] * output.shape[1])

    handles = [register(note(name), with_kwargs=True) for name, register in watched.items()]
    handles.append(model.lm_head.register_forward_hook(made))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def assert_untouched(model: Any) -> None:
    assert hook_count(model) == 0
    assert not any("forward" in vars(module) for module in model.modules())


def test_from_the_second_visit_on_only_the_cone_runs() -> None:
    reft = bound("llama", EDIT)
    runner = ConeRunner(reft, small_store())
    batch = answered()
    runner.loss(batch)
    with counting(reft.model) as seen:
        loss = runner.loss(batch)
    assert loss is not None
    # Four rows; the longest suffix has four tokens: the last of the prompt, and an answer but for its end.
    wanted = {"self_attn 2": [16], "mlp 2": [16], "input_layernorm 2": [16], "norm": [16]}
    # Two, four, one and three labels.
    assert seen == {**wanted, "head": [10]}
    with counting(reft.model) as seen:
        reft(**batch)
    assert seen["mlp 0"] == seen["mlp 2"] == seen["head"] == [4 * 13]


def test_the_first_visit_runs_the_bare_model_once_more() -> None:
    reft = bound("llama", EDIT)
    runner = ConeRunner(reft, small_store())
    runner.loss(answered(seed=1))
    with counting(reft.model) as seen:
        runner.loss(answered(seed=2))
    # No label follows a row's last token, so that nothing is wanted of it.
    assert seen["mlp 0"] == seen["mlp 1"] == [4 * 12]
    # The keys of block 2 are wanted, so it runs twice, and the head never on all tokens.
    assert seen["self_attn 2"] == seen["mlp 2"] == [4 * 12, 16]
    assert seen["head"] == [10]


def test_only_the_rows_that_are_missing_are_computed() -> None:
    reft = bound("llama", EDIT)
    runner = ConeRunner(reft, small_store())
    batch = answered()
    runner.loss({name: value[:3] for name, value in batch.items()})
    with counting(reft.model) as seen:
        runner.loss(batch)
    assert seen["mlp 0"] == [9]


def test_plain_calls_in_between_are_whole() -> None:
    reft = bound("llama", EDIT)
    runner = ConeRunner(reft, small_store())
    batch = answered()
    before = reft.model(**batch).logits
    runner.loss(batch)
    assert torch.equal(reft.model(**batch).logits, before)
    assert_untouched(reft.model)


class Raising(Intervention):
    """Raise on command.

    h
    """

    error: BaseException | None = None

    def setup(self, width: int) -> None:
        self.vector = nn.Parameter(torch.ones(width))

    def forward(self, base: Tensor, source: Tensor | None = None) -> Tensor:
        if Raising.error is not None:
            raise Raising.error
        return base + self.vector


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
@pytest.mark.parametrize("at", ["blocks[1].output", "blocks[2].mlp.output", "unembed"])
def test_what_ends_a_pass_in_the_middle_leaves_nothing_behind(error: BaseException, at: str) -> None:
    reft = bound("llama", rl.Edit("edit", at=at, positions="last", intervention=Raising()))
    runner = ConeRunner(reft, small_store())
    assert_equal(runner, answered())
    Raising.error = error
    try:
        with pytest.raises(type(error)):
            runner.loss(answered())
    finally:
        Raising.error = None
    assert_untouched(reft.model)
    assert_equal(runner, answered())
    assert runner.why_plain == ()


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=repr)
def test_what_ends_the_first_visit_leaves_nothing_behind(error: BaseException) -> None:
    reft = bound("llama", EDIT)
    runner = ConeRunner(reft, small_store())
    assert_equal(runner, answered(seed=1))
    kept = len(runner.store)

    def stop(module: nn.Module, args: Any) -> None:
        raise error

    handle = raw_blocks(reft.model)[1].mlp.register_forward_pre_hook(stop)
    with pytest.raises(type(error)):
        runner.loss(answered(seed=2))
    handle.remove()
    assert_untouched(reft.model)
    assert len(runner.store) == kept
    assert_equal(runner, answered(seed=2))


def test_an_error_in_the_plain_run_is_the_one_that_is_raised() -> None:
    """The first batch is run both ways, and a mistake in an edit is not taken for the cone's."""
    reft = bound("llama", rl.Edit("edit", at="blocks[1].output", positions="last", intervention=Raising()))
    Raising.error = ValueError("of the edit itself")
    try:
        with pytest.raises(ValueError, match="of the edit itself"):
            ConeRunner(reft, small_store()).loss(answered())
    finally:
        Raising.error = None
    assert_untouched(reft.model)


def test_a_forward_that_somebody_has_put_there_comes_back() -> None:
    reft = bound("llama", EDIT)
    block = raw_blocks(reft.model)[0]
    whole, calls = block.forward, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return whole(*args, **kwargs)

    block.forward = counted
    runner = ConeRunner(reft, small_store())
    assert_equal(runner, answered())
    before = len(calls)
    runner.loss(answered())
    assert len(calls) == before
    assert vars(block)["forward"] is counted
    reft(**answered())
    assert len(calls) == before + 1


def test_another_threads_call_of_the_bare_model_is_whole() -> None:
    model = build("llama")
    stack = BlockStack.of(model)
    assert stack is not None
    batch = answered()
    expected = model(**batch).logits
    found: list[Tensor] = []
    with skipping(stack, 2, torch.zeros(4, 13, 32), [-1, -1]):
        thread = threading.Thread(target=lambda: found.append(model(**batch).logits))
        thread.start()
        thread.join()
        here = model(**batch).logits
    assert torch.equal(found[0], expected)
    assert not torch.allclose(here, expected)
    assert torch.equal(model(**batch).logits, expected)


def test_threads_train_on_one_model_side_by_side() -> None:
    model, store = build("llama"), small_store()
    other = rl.Edit("b", at="blocks[0].output", positions="last(2)", intervention=rl.DiReFT(2))
    refts = [bound(model, EDIT), bound(model, other), bound(model, EDIT)]
    batches = [answered(seed=seed) for seed in range(3)]
    expected = [[plainly(reft, batch)[0] for batch in batches] for reft in refts]
    got: dict[int, list[Tensor]] = {}
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            runner = ConeRunner(refts[number], store)
            losses = [runner.loss(batch) for batch in batches * 3]
            got[number] = [loss.detach() for loss in losses if loss is not None]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for number, losses in got.items():
        assert len(losses) == 9
        for loss, wanted in zip(losses, expected[number] * 3, strict=True):
            assert close(loss, wanted, 1e-5)
    assert_untouched(model)


def test_a_pass_leaves_no_gradients_in_the_model_and_changes_no_weight() -> None:
    reft = bound("llama", EDIT)
    reft.model.requires_grad_(True)
    before = {name: value.clone() for name, value in reft.model.state_dict().items()}
    runner = ConeRunner(reft, small_store())
    loss = runner.loss(answered())
    assert loss is not None
    assert all(torch.equal(value, before[name]) for name, value in reft.model.state_dict().items())
    assert all(value.grad_fn is None and not value.requires_grad for value in runner.store._held.values())
    assert reft.model.training is False


def test_reads_and_generation_after_a_pass_are_as_before() -> None:
    reft = bound("llama", EDIT)
    inputs = {name: answered()[name] for name in ("input_ids", "attention_mask")}
    left = {name: answered(side="left")[name] for name in inputs}
    read = reft.read("blocks[2].output @ last", **inputs)
    text = reft.generate(**left, max_new_tokens=3, do_sample=False)
    runner = ConeRunner(reft, small_store())
    runner.loss(answered())
    again = reft.read("blocks[2].output @ last", **inputs)
    for name in read:
        assert torch.equal(again[name], read[name])
    assert torch.equal(reft.generate(**left, max_new_tokens=3, do_sample=False), text)
