"""Attention over cached tokens that stand still is the model's own attention, and copies nothing."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch.nn import functional

import reftlab as rl
from reftlab.runtime.attention import PREFIX, backend_of
from reftlab.runtime.cone import ConeRunner, PrefixAttention, prefix
from reftlab.runtime.cone.room import Room
from reftlab.runtime.hooks import marked
from tests.models import build

from .common import answered, assert_equal, bound, plainly, small_store

OWN = ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "gpt2", "gpt_neox")
"""Families that hand attention over to transformers' interface, and are loaded with sdpa."""


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many new tokens each attention of this file's own kind had."""
    tokens: list[int] = []
    own = prefix._attend

    def noting(query: Any, *args: Any) -> Any:
        tokens.append(query.shape[2])
        return own(query, *args)

    monkeypatch.setattr(prefix, "_attend", noting)
    return tokens


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("one_row", [True, False])
@pytest.mark.parametrize(("heads", "shared", "tokens"), [(4, 4, 3), (6, 2, 5), (6, 1, 1)])
def test_it_is_scaled_dot_product_attention(
    heads: int, shared: int, tokens: int, one_row: bool, masked: bool
) -> None:
    rows, before, width = 3, 7, 8
    query = torch.randn(rows, heads, tokens, width, requires_grad=True)
    new = [torch.randn(rows, shared, tokens, width, requires_grad=True) for _ in range(2)]
    old = [torch.randn(1 if one_row else rows, shared, before, width) for _ in range(2)]
    old = [value.expand(rows, -1, -1, -1) for value in old]
    mask = torch.ones(rows, 1, tokens, before + tokens, dtype=torch.bool).tril(before)
    if masked:
        mask[1, :, :, :2] = False
    got = prefix._attend(query * 0.3, *new, *old, mask if masked else None)
    key, value = (
        torch.cat(pair, 2).repeat_interleave(heads // shared, 1) for pair in zip(old, new, strict=True)
    )
    wanted = functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(got, wanted)
    weights, leaves = torch.randn_like(got), [query, *new]
    for own, plain in zip(
        torch.autograd.grad((got * weights).sum(), leaves),
        torch.autograd.grad((wanted * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(own, plain)


def test_a_token_that_sees_nothing_spoils_nothing() -> None:
    query, key = torch.randn(2, 1, 3, 4, 8, requires_grad=True)
    mask = torch.ones(1, 1, 4, 6, dtype=torch.bool)
    mask[:, :, 2] = False
    got = prefix._attend(query, key, key, *torch.randn(2, 1, 3, 2, 8), mask)
    (gradient,) = torch.autograd.grad(got.sum(), query)
    assert got.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", OWN)
def test_families_that_use_the_interface_train_with_it(family: str, side: str, attended: list[int]) -> None:
    runner = ConeRunner(bound(family), small_store())
    assert_equal(runner, answered(side=side))
    assert attended
    assert runner.why_plain == ()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_eager_attention_half_precision_and_autocast_are_left_alone(family: str, attended: list[int]) -> None:
    eager = bound(family)
    eager.model.set_attn_implementation("eager")
    assert_equal(ConeRunner(eager, small_store()), answered())
    half = bound(family)
    half.to(torch.bfloat16)
    assert ConeRunner(half, small_store()).loss(answered()) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert ConeRunner(bound(family), small_store()).loss(answered()) is not None
    assert not attended


def test_many_new_tokens_are_left_to_the_fused_kernel(
    attended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix, "_FEW", 3)
    runner = ConeRunner(bound("llama"), small_store())
    assert_equal(runner, answered(((9, 2), (6, 2))))
    assert set(attended) == {2}
    attended.clear()
    assert_equal(runner, answered(((9, 8), (6, 7))))
    assert not attended
    assert runner.why_plain == ()


def test_a_model_that_does_something_else_with_its_keys_keeps_its_own_attention(
    monkeypatch: pytest.MonkeyPatch, attended: list[int]
) -> None:
    from transformers.models.llama import modeling_llama

    own = modeling_llama.LlamaAttention.forward

    class Copying:
        """Hands on a cache whose keys come back as copies."""

        def __init__(self, cache: Any) -> None:
            self.cache = cache

        def update(self, *args: Any, **kwargs: Any) -> Any:
            return tuple(value.clone() for value in self.cache.update(*args, **kwargs))

    def forward(self: Any, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        cache = None if past_key_values is None else Copying(past_key_values)
        return own(self, *args, past_key_values=cache, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    runner = ConeRunner(bound("llama"), small_store())
    assert_equal(runner, answered())
    assert runner.why_plain == ()
    assert not attended
    ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(1))
    found = rl.sweep(
        runner.reft.model, {"input_ids": ids[:1]}, {"input_ids": ids[1:]}, sites="blocks[*].output", positions="all",
        metric=lambda logits: logits[:, 5], progress=False,
    )  # fmt: skip
    assert not found.why
    assert not attended


def test_another_threads_calls_and_later_ones_are_the_models_own() -> None:
    model, ids = build("llama"), torch.randint(3, 60, (2, 9))
    wanted = model(ids).logits.detach()
    attention = PrefixAttention(model, tuple(model.model.layers))
    found: list[Any] = []
    with attention.attending(torch.zeros(1)):
        assert model.config._attn_implementation != "sdpa"
        other = threading.Thread(target=lambda: found.append(model(ids).logits.detach()))
        other.start()
        other.join()
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(found[0], wanted)
    with pytest.raises(ZeroDivisionError), attention.attending(wanted):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"


def test_gradients_may_be_taken_after_later_batches_have_run() -> None:
    runner = ConeRunner(bound("llama"), small_store())
    batches = [answered(seed=seed) for seed in (1, 2, 3)]
    expected = [plainly(runner.reft, batch)[2] for batch in batches]
    losses = [runner.loss(batch) for batch in batches]
    for loss, gradients in zip(losses, expected, strict=True):
        runner.reft.interventions.zero_grad()
        loss.backward()
        for name, parameter in runner.reft.interventions.named_parameters():
            if name in gradients:
                torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_what_else_a_pass_computed_may_be_differentiated_after_later_batches_too() -> None:
    runner = ConeRunner(bound("llama"), small_store())
    kept: list[Any] = []
    block = runner.reft.model.model.layers[2]
    own = block.forward

    def keeping(*args: Any, **kwargs: Any) -> Any:
        found = own(*args, **kwargs)
        kept.append(found)
        return found

    block.forward = keeping
    gradients = []
    for later in (False, True):
        kept.clear()
        runner.loss(answered(seed=1))
        hidden = kept[-1]
        if later:
            runner.loss(answered(seed=2))
        runner.reft.interventions.zero_grad()
        hidden.square().sum().backward()
        gradients.append([p.grad for p in runner.reft.interventions.parameters() if p.grad is not None])
    assert gradients[0]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_memory_is_taken_again_only_when_nothing_needs_it() -> None:
    room, device = Room(), torch.device("cpu")
    first = room.take((2, 3), torch.float32, device)
    second = room.take((6,), torch.float32, device)
    assert second.values.data_ptr() != first.values.data_ptr()
    result, place = marked(torch.ones(3, requires_grad=True), second.mark), second.values
    del second
    third = room.take((1, 6), torch.float32, device).values
    assert third.data_ptr() != place.data_ptr()
    assert room.take((1, 4), torch.float32, device).values.data_ptr() == third.data_ptr()
    del result
    assert room.take((5,), torch.float32, device).values.data_ptr() == third.data_ptr()
    assert room.take((5,), torch.float64, device).values.dtype == torch.float64


def test_a_backend_chosen_in_the_middle_stays_chosen() -> None:
    model = build("llama")
    attention = PrefixAttention(model, tuple(model.model.layers))
    with attention.attending(torch.zeros(1)):
        model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    assert not attention.applies(torch.zeros(1))


def test_two_passes_at_once_switch_one_configuration_once() -> None:
    model = build("llama")
    one, other = (PrefixAttention(model, tuple(model.model.layers)) for _ in range(2))
    first, second = one.attending(torch.zeros(1)), other.attending(torch.zeros(1))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert other.applies(torch.zeros(1))
    assert backend_of(model.config) == "sdpa"
    assert model.config._attn_implementation == PREFIX
    second.__exit__(None, None, None)
    assert model.config._attn_implementation == "sdpa"
    assert not prefix._switched
