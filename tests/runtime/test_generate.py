"""Generation in all its forms, against plain hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import reftlab as rl
from tests.models import CAUSAL, batch_of, hook_count
from tests.oracle import assert_close, columns_by_hand, plain_edit, raw_blocks

VECTOR = torch.linspace(-2.0, 2.0, 32)
LENGTHS = (6, 3, 8)

causal = pytest.mark.parametrize("any_model", CAUSAL, indirect=True)

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0, "temperature": 1.3},
    "beams": {"num_beams": 3, "do_sample": False},
    "several beams returned": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 3},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 2},
}


def change(base: Tensor, source: Tensor | None, numbers: list[int]) -> Tensor:
    return base + VECTOR


def bound(model: Any, positions: str = "f1+l2", phase: Any = "prompt") -> rl.BoundModel:
    edit = rl.Edit(
        "add", at="blocks[1].output", positions=positions, phase=phase, intervention=rl.Add(VECTOR)
    )
    return rl.InterventionGraph(edit).bind(model)


def oracle(
    model: Any,
    batch: dict[str, Tensor],
    choose: Callable[[list[int]], list[int]],
    decode: bool = False,
    **options: Any,
) -> Any:
    mask, cached = batch["attention_mask"], options.get("use_cache", True)
    columns = columns_by_hand(mask, choose)
    with plain_edit(raw_blocks(model)[1], mask, columns, change, decode=decode, cached=cached):
        torch.manual_seed(4)
        return model.generate(**batch, **options)


def ends(real: list[int]) -> list[int]:
    return real[:1] + real[-2:]


@causal
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_generate_equals_plain_hooks(any_model: Any, way: str, use_cache: bool) -> None:
    if not use_cache and way in ("static cache", "chunked prefill", "prompt lookup"):
        pytest.skip("needs a cache")
    if way == "prompt lookup" and any_model.config.model_type == "gemma3_text":
        pytest.skip("transformers cannot crop a sliding-window cache")
    batch = batch_of(LENGTHS if way != "prompt lookup" else (6,), "left")
    options = {**WAYS[way], "use_cache": use_cache, "max_new_tokens": 4}
    if way == "prompt lookup":
        # Its oracle is greedy search, which it must equal: plain counting of columns cannot follow it.
        expected = oracle(any_model, batch, ends, do_sample=False, max_new_tokens=4)
    else:
        expected = oracle(any_model, batch, ends, **options)
    before = hook_count(any_model)
    torch.manual_seed(4)
    got = bound(any_model).generate(**batch, **options)
    assert torch.equal(got, expected)
    assert hook_count(any_model) == before
    torch.manual_seed(4)
    assert not torch.equal(any_model.generate(**batch, **options), expected)


@causal
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("way", ["greedy", "beams", "several samples"])
@pytest.mark.parametrize("phase", ["prompt", "decode", "both"])
def test_each_phase_equals_plain_hooks(any_model: Any, phase: str, way: str, use_cache: bool) -> None:
    batch = batch_of(LENGTHS, "left")
    options = {
        **WAYS[way], "use_cache": use_cache, "max_new_tokens": 4, "output_scores": True, "return_dict_in_generate": True,
    }  # fmt: skip
    choose = (lambda real: []) if phase == "decode" else (lambda real: real)
    expected = oracle(any_model, batch, choose, decode=phase != "prompt", **options)
    torch.manual_seed(4)
    got = bound(any_model, "all", phase).generate(**batch, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert_close(torch.stack(got.scores), torch.stack(expected.scores))
    others = {"prompt", "decode", "both"} - {phase}
    for other in others:
        torch.manual_seed(4)
        scores = bound(any_model, "all", other).generate(**batch, **options).scores
        assert (torch.stack(scores) - torch.stack(expected.scores))[1:].nan_to_num().abs().max() > 1e-3


def test_decode_positions_count_generated_tokens(llama: Any) -> None:
    seen: list[tuple[int, int]] = []
    graph = rl.InterventionGraph(
        rl.Edit("watch", at="blocks[1].output", positions="[0, 2]", phase="decode",
                intervention=rl.Function(lambda base: seen.append(tuple(base.shape)) or base)),
    )  # fmt: skip
    graph.bind(llama).generate(**batch_of(LENGTHS, "left"), max_new_tokens=6, do_sample=False)
    assert seen == [(3, 32), (3, 32)]


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
def test_a_token_keeps_its_number_from_prompt_to_answer(llama: Any, use_cache: bool) -> None:
    class Numbers(rl.Intervention):
        counts_positions = True
        seen: list[list[int]] = []

        def forward(
            self, base: Tensor, source: Tensor | None = None, positions: Tensor | None = None
        ) -> Tensor:
            self.seen.append(positions.tolist())
            return base

    reft = rl.InterventionGraph(
        rl.Edit("watch", at="blocks[0].output", positions="last", phase="both", intervention=Numbers())
    ).bind(llama)
    reft.generate(**batch_of((4, 2), "left"), max_new_tokens=3, do_sample=False, use_cache=use_cache)
    cached = [[3, 1], [4, 2], [5, 3]]
    whole = [[3, 1], [3, 4, 1, 2], [3, 4, 5, 1, 2, 3]]
    assert reft.interventions["watch"].seen == (cached if use_cache else whole)


@causal
def test_a_decoding_loop_of_ones_own_equals_generate(any_model: Any) -> None:
    batch = batch_of(LENGTHS, "left")
    for phase in ("prompt", "both"):
        reft = bound(any_model, "last", phase)
        expected = reft.generate(**batch, max_new_tokens=5, do_sample=False)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        step, cache = ids, None
        with torch.no_grad():
            for _ in range(5):
                places = (mask.cumsum(1) - 1).clamp(min=0)[:, -step.shape[1] :]
                output = reft(
                    input_ids=step,
                    attention_mask=mask,
                    position_ids=places,
                    past_key_values=cache,
                    use_cache=True,
                )
                cache, step = output.past_key_values, output.logits[:, -1:].argmax(-1)
                ids, mask = torch.cat([ids, step], 1), torch.cat([mask, torch.ones_like(step)], 1)
        assert torch.equal(ids, expected)


def test_a_prompt_can_be_run_in_chunks(llama: Any) -> None:
    batch = batch_of((8, 5), "left")
    for positions in ("f2+l2", "last", "first"):
        reft = bound(llama, positions)
        cache, logits = None, []
        with torch.no_grad():
            whole = reft(**batch).logits
            for start in range(0, 8, 3):
                stop = min(start + 3, 8)
                output = reft(
                    input_ids=batch["input_ids"][:, start:stop], attention_mask=batch["attention_mask"][:, :stop],
                    past_key_values=cache, prompt=batch,
                )  # fmt: skip
                cache = output.past_key_values
                logits.append(output.logits)
        real = batch["attention_mask"].bool()
        assert_close(torch.cat(logits, 1)[real], whole[real])


def test_a_cache_made_elsewhere_needs_the_prompt(llama: Any) -> None:
    batch = batch_of((6,))
    reft = bound(llama, "last", "both")
    step = {"input_ids": torch.tensor([[7]]), "attention_mask": torch.ones(1, 7, dtype=torch.long)}
    with torch.no_grad():
        cache = llama(**batch, use_cache=True).past_key_values
        with pytest.raises(rl.RunError, match="give the tokenizer's output for the whole prompt as prompt="):
            reft(**step, past_key_values=cache)
        got = reft(**step, past_key_values=cache, prompt=batch).logits
        bare_cache = llama(**batch, use_cache=True).past_key_values
        bare = llama(**step, past_key_values=bare_cache).logits
    assert (got - bare).abs().max() > 1e-2


def test_generation_from_a_cache_that_holds_the_prompt_is_not_passed_over(llama: Any) -> None:
    batch = batch_of((6,))
    with torch.no_grad():
        cache = llama(input_ids=batch["input_ids"][:, :-1], use_cache=True).past_key_values
    with pytest.raises(rl.RunError, match="edit 'add' acts on tokens that past_key_values hold already"):
        bound(llama, "first").generate(**batch, past_key_values=cache, max_new_tokens=2)


def test_ids_may_be_given_by_place_and_padding_is_recognised_without_a_mask(llama: Any) -> None:
    batch = batch_of(LENGTHS, "left")
    reft, options = bound(llama), {"max_new_tokens": 4, "do_sample": False}
    expected = reft.generate(**batch, **options)
    assert torch.equal(reft.generate(batch["input_ids"], **options), expected)
    assert torch.equal(reft.generate(inputs=batch["input_ids"], **options), expected)


@causal
def test_generation_from_embeddings_equals_that_from_ids(any_model: Any) -> None:
    batch = batch_of(LENGTHS, "left")
    reft, options = bound(any_model), {"max_new_tokens": 4, "do_sample": False}
    embeddings = any_model.get_input_embeddings()(batch["input_ids"])
    got = reft.generate(inputs_embeds=embeddings, attention_mask=batch["attention_mask"], **options)
    assert torch.equal(got, reft.generate(**batch, **options)[:, -4:])


def test_a_model_that_cannot_generate_says_so() -> None:
    model = torch.nn.Linear(3, 3)
    edit = rl.Edit("zero", at="output", intervention=rl.Zero())
    reft = rl.InterventionGraph(edit).bind(model, example=torch.zeros(2, 3))
    with pytest.raises(rl.RunError, match="Linear has no generate"):
        reft.generate(torch.zeros(2, 3))
