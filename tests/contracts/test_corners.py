"""Corners where an edit could silently do something else than it says."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, T5Config, T5ForConditionalGeneration

import reftlab as rl
from tests.models import PAD, batch_of, build_model, copy_of, hook_count, word_tokenizer
from tests.oracle import assert_close, columns_by_hand, plain_edit, raw_blocks

VECTOR = torch.linspace(-2.0, 2.0, 32)


def bound(model: Any, positions: str = "last", at: str = "blocks[1].output", **options: Any) -> rl.BoundModel:
    options.setdefault("intervention", rl.Add(VECTOR))
    return rl.InterventionGraph(rl.Edit("edit", at=at, positions=positions, **options)).bind(model)


@torch.no_grad()
def test_hidden_states_hold_what_the_edit_made_in_every_call(llama: Any) -> None:
    model, batch = copy_of(llama), batch_of((7, 7))
    columns = columns_by_hand(batch["attention_mask"], lambda real: real[-1:])
    reft = bound(model)
    calls = [reft(**batch, output_hidden_states=True).hidden_states for _ in range(3)]
    with plain_edit(raw_blocks(model)[1], batch["attention_mask"], columns, lambda h, s, n: h + VECTOR):
        expected = model(**batch, output_hidden_states=True).hidden_states[3]
    for hidden in calls:
        read = reft.read("blocks[1].output @ all", **batch)["blocks[1].output @ all"]
        assert_close(hidden[2], read)
        assert_close(hidden[3], expected)


@torch.no_grad()
def test_padding_named_in_the_call_or_a_config_of_its_own_is_not_mistaken_for_text(llama: Any) -> None:
    model, batch = copy_of(llama), batch_of((7, 4, 9), "left")
    model.generation_config.pad_token_id = model.config.pad_token_id = None
    ids, options = batch["input_ids"], {"max_new_tokens": 3, "do_sample": False}
    wanted = model.generate(ids, pad_token_id=PAD, **options)
    assert torch.equal(
        bound(model, intervention=rl.Scale(1.0)).generate(ids, pad_token_id=PAD, **options), wanted
    )
    reft = bound(model, "first")
    masked = reft.generate(**batch, pad_token_id=PAD, **options)
    assert torch.equal(reft.generate(ids, pad_token_id=PAD, **options), masked)
    own = copy.deepcopy(model.generation_config)
    own.pad_token_id = PAD
    assert torch.equal(reft.generate(ids, generation_config=own, **options), masked)


@torch.no_grad()
def test_generation_never_leaves_out_a_part_of_an_edit(llama: Any) -> None:
    batch = batch_of((6, 6))
    start = {name: tensor[:, :3] for name, tensor in batch.items()}
    foreign = llama(**start, use_cache=True).past_key_values
    with pytest.raises(rl.RunError, match="past_key_values hold already"):
        bound(llama, "all").generate(**batch, past_key_values=foreign, max_new_tokens=2)
    got = bound(llama, "last").generate(**batch, past_key_values=foreign, max_new_tokens=2, do_sample=False)
    assert torch.equal(got, bound(llama, "last").generate(**batch, max_new_tokens=2, do_sample=False))
    with pytest.raises(rl.RunError, match=r"guidance_scale=1\.5"):
        bound(llama).generate(**batch, guidance_scale=1.5, max_new_tokens=2)


@torch.no_grad()
def test_logits_can_be_edited_where_only_the_last_are_made(any_model: Any) -> None:
    if any_model.config.model_type == "bert":
        pytest.skip("BERT makes all of its logits")
    batch = batch_of((7, 4, 9), "left")
    reft = bound(any_model, at="unembed", intervention=rl.Function(lambda logits: -logits))
    assert_close(reft(**batch, logits_to_keep=1).logits, -any_model(**batch, logits_to_keep=1).logits)
    options = {"max_new_tokens": 1, "do_sample": False}
    bare = any_model.generate(**batch, **options, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(reft.generate(**batch, **options)[:, -1], bare.logits[0].argmin(-1))


@torch.no_grad()
def test_logits_that_generation_does_not_make_are_not_passed_over(llama: Any) -> None:
    reft = bound(llama, "first", at="unembed", intervention=rl.Zero())
    with pytest.raises(rl.RunError, match="edit 'edit' touched no token"):
        reft.generate(**batch_of((6, 6)), max_new_tokens=2)


@pytest.mark.parametrize("fused", [False, True])
def test_a_basis_is_never_older_than_its_weights(llama: Any, fused: bool) -> None:
    reft, batch = bound(copy_of(llama), intervention=rl.LoReFT(rank=2)), batch_of((6, 6))
    optimiser = torch.optim.AdamW(reft.interventions.parameters(), lr=0.3, fused=fused)
    for _ in range(2):
        reft(**batch, labels=batch["input_ids"].index_fill(1, torch.tensor([0]), -100)).loss.backward()
        with torch.no_grad():
            before = reft(**batch).logits
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            after = reft(**batch).logits
            assert_close(copy.deepcopy(reft)(**batch).logits, after)
        assert (after - before).abs().max() > 1e-3


def test_inference_mode_binds_and_runs(llama: Any) -> None:
    batch = batch_of((6, 6))
    with torch.inference_mode():
        reft = bound(llama, intervention=rl.LoReFT(rank=2))
        first = reft(**batch).logits
        assert torch.equal(reft(**batch).logits, first)


@torch.no_grad()
def test_the_mean_of_a_source_is_that_of_its_row_in_any_window(llama: Any) -> None:
    source = rl.Read(positions="all", run="other")
    edit = rl.Edit("mean", at="blocks[1].output", positions="all", intervention=rl.Mean(), source=source)
    reft = rl.InterventionGraph(rl.Source("other"), edit).bind(llama)
    batch, sources = batch_of((8, 8)), {"other": batch_of((3, 5), seed=9)}
    whole = reft(**batch, sources=sources, use_cache=True).logits
    half = {name: tensor[:, :5] for name, tensor in batch.items()}
    first = reft(**half, sources=sources, prompt=batch, use_cache=True)
    rest = reft(
        input_ids=batch["input_ids"][:, 5:],
        attention_mask=batch["attention_mask"],
        past_key_values=first.past_key_values,
        sources=sources,
        prompt=batch,
    )
    assert_close(torch.cat([first.logits, rest.logits], 1), whole)
    alone = {name: tensor[1:] for name, tensor in batch.items()}
    other = {name: tensor[1:] for name, tensor in sources["other"].items()}
    assert_close(reft(**alone, sources={"other": other}).logits, whole[1:])


@torch.no_grad()
def test_a_read_at_an_edits_own_site_sees_the_edits_before_it_in_the_list(llama: Any) -> None:
    nodes = [
        rl.Edit("one", at="blocks[1].output", positions="last", intervention=rl.Add(1.0)),
        rl.Edit("two", at="blocks[1].output", positions="last", intervention=rl.Add(), source=rl.Read()),
    ]
    batch, site = batch_of((6, 6)), "blocks[1].output @ last"
    bare = bound(llama, intervention=rl.Scale(1.0)).read(site, **batch)[site]
    assert_close(rl.InterventionGraph(*nodes).bind(llama).read(site, **batch)[site], 2 * (bare + 1))
    assert_close(rl.InterventionGraph(*nodes[::-1]).bind(llama).read(site, **batch)[site], 2 * bare + 1)


@pytest.mark.parametrize("site", ["blocks[1].attn.output", "blocks[1].output", "blocks[1].mlp.output"])
def test_heads_are_refused_where_the_features_are_not_one_head_after_the_other(site: str) -> None:
    # Widths of 32 and heads of 8, so that the numbers alone would fit.
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
        )
    )
    with pytest.raises(rl.AddressError, match="not one head after the other"):
        bound(model, at=site, heads=[1], intervention=rl.Zero())
    with pytest.raises(rl.AddressError, match="not one head after the other"):
        bound(model, at="model.layers[1].self_attn.q_proj.input", heads=[1], intervention=rl.Zero())
    for good in ("blocks[1].attn.heads", "model.layers[1].self_attn.q_proj.output"):
        assert bound(model, at=good, heads=[1], intervention=rl.Zero()).edits[0].width == 8


@torch.no_grad()
def test_an_encoder_decoders_two_stacks_are_edited_each_at_its_own_tokens() -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    batch = batch_of((7, 4), side="right")
    batch["input_ids"] = batch["input_ids"] % 60
    columns = columns_by_hand(batch["attention_mask"], lambda real: real[-1:])
    reft = bound(model, at="encoder.block[1].output")
    for width in (4, 7):
        labels = torch.randint(1, 60, (2, width))
        with plain_edit(model.encoder.block[1], batch["attention_mask"], columns, lambda h, s, n: h + VECTOR):
            expected = model(**batch, labels=labels).logits
        assert_close(reft(**batch, labels=labels).logits, expected)
    with plain_edit(model.encoder.block[1], batch["attention_mask"], columns, lambda h, s, n: h + VECTOR):
        wanted = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert torch.equal(reft.generate(**batch, max_new_tokens=4, do_sample=False), wanted)
    decoder, start = model.decoder.block[1], torch.ones(2, 1, dtype=torch.long)
    for phase, decode in (("prompt", False), ("both", True)):
        reft = bound(model, at="decoder.block[1].output", phase=phase)
        for beams in (1, 2):
            options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
            with plain_edit(decoder, start, [[0], [0]], lambda h, s, n: h + VECTOR, decode=decode):
                wanted = model.generate(**batch, **options)
            assert torch.equal(reft.generate(**batch, **options), wanted)
        labels = torch.tensor([[5, 6, 7, 8], [9, 10, -100, -100]])
        chosen = [[0, 1, 2, 3], [0, 1, 2]] if decode else [[0], [0]]
        with plain_edit(decoder, torch.ones(2, 4, dtype=torch.long), chosen, lambda h, s, n: h + VECTOR):
            expected = model(**batch, labels=labels).logits
        got = reft(**batch, labels=labels).logits
        assert_close(got[0], expected[0])
        assert_close(got[1, :3], expected[1, :3])


@pytest.mark.filterwarnings("ignore::reftlab.errors.UntouchedEditWarning")
@torch.no_grad()
def test_a_cache_returned_in_a_tuple_is_known_and_one_used_again_is_known_anew(llama: Any) -> None:
    from transformers import StaticCache

    batch = batch_of((5, 5))
    reft = bound(llama, "first", phase="decode")
    step = batch["input_ids"][:, :1]
    named = reft(**batch, use_cache=True)
    placed = reft(**batch, use_cache=True, return_dict=False)
    cache = next(part for part in placed if hasattr(part, "get_seq_length"))
    expected = reft(input_ids=step, past_key_values=named.past_key_values).logits
    assert_close(reft(input_ids=step, past_key_values=cache).logits, expected)
    used = StaticCache(config=llama.config, max_cache_len=32)
    reft(**batch_of((9, 9)), past_key_values=used)
    reft(input_ids=step, past_key_values=used)
    used.reset()
    reft(**batch, past_key_values=used)
    assert_close(reft(input_ids=step, past_key_values=used).logits, expected)


@torch.no_grad()
def test_tokens_after_a_prompt_that_no_edit_reaches_are_pointed_out(llama: Any) -> None:
    reft, batch = bound(llama, "all"), batch_of((5, 5))
    cache = reft(**batch, use_cache=True).past_key_values
    with pytest.warns(rl.UntouchedEditWarning, match="give all of it as prompt="):
        reft(input_ids=batch["input_ids"][:, :3], past_key_values=cache)


def test_casting_the_model_leaves_what_learns_in_float32(llama: Any) -> None:
    reft = bound(copy_of(llama), intervention=rl.LoReFT(rank=2)).to(torch.bfloat16)
    assert {p.dtype for p in reft.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in reft.interventions.parameters()} == {torch.float32}
    assert {p.dtype for p in reft.half().interventions.parameters()} == {torch.float32}


def test_a_built_intervention_is_refused_where_its_numbers_would_be_lost(llama: Any) -> None:
    built = bound(llama, intervention=rl.LoReFT(rank=2)).interventions["edit"]
    with pytest.raises(rl.GraphError, match=r"built already.*give LoReFT\(rank=2\)"):
        rl.Edit("again", at="blocks[1].output", intervention=built)


def test_gemma_3_with_its_vision_tower_has_the_same_portable_names() -> None:
    small = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    }  # fmt: skip
    text = {**small, "vocab_size": 60, "num_key_value_heads": 2, "head_dim": 8}
    vision = {**small, "image_size": 16, "patch_size": 8}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=59)
    model = Gemma3ForConditionalGeneration(config).eval()
    batch = {name: tensor % 50 for name, tensor in batch_of((5, 5)).items()}
    reft = bound(model)
    with torch.no_grad():
        assert not torch.equal(reft(**batch).logits, model(**batch).logits)
        read = reft.read("final_norm.output @ all", **batch)["final_norm.output @ all"]
        assert_close(reft.read("unembed @ all", **batch)["unembed @ all"], model.lm_head(read))


@torch.no_grad()
def test_threads_that_share_a_model_do_not_see_each_others_edits(llama: Any) -> None:
    batch = batch_of((8, 8))
    refts = [bound(llama, intervention=rl.Add(float(k))) for k in range(4)]
    expected = [reft(**batch).logits for reft in refts]
    wrong: list[int] = []

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(15):
                if not torch.allclose(refts[number](**batch).logits, expected[number], atol=1e-6):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert hook_count(llama) == 0


@torch.no_grad()
def test_a_function_that_calls_the_model_calls_the_bare_model(llama: Any) -> None:
    batch, other = batch_of((6, 6)), batch_of((4, 4, 4))
    bare, inside = llama(**other).logits, []

    def ask(base: Tensor) -> Tensor:
        inside.append(llama(**other).logits)
        return base + 1.0

    got = bound(llama, intervention=rl.Function(ask))(**batch).logits
    assert torch.equal(inside[0], bare)
    assert_close(got, bound(llama, intervention=rl.Add(1.0))(**batch).logits)


@torch.no_grad()
def test_a_function_may_write_in_place(llama: Any) -> None:
    batch = batch_of((6, 6))
    half = bound(llama, intervention=rl.Function(lambda h: h.mul_(0)), strength=0.5)
    assert_close(half(**batch).logits, bound(llama, intervention=rl.Scale(0.5))(**batch).logits)


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@torch.no_grad()
def test_inside_a_wrapper_labels_end_the_prompt_and_places_have_names(llama: Any) -> None:
    batch = batch_of((7, 4, 9))
    labels = batch["input_ids"].clone()
    labels[:, :3] = -100
    edit = rl.Edit("edit", at="module.model.layers[1].output", positions="last", intervention=rl.Add(VECTOR))
    wrapped = rl.InterventionGraph(edit).bind(Wrapper(llama), example=batch)
    expected = bound(llama)(**batch, labels=labels).logits
    assert_close(wrapped(**batch, labels=labels).logits, expected)
    unlabelled = bound(llama)(**batch).logits
    assert_close(wrapped(batch["input_ids"], batch["attention_mask"]).logits, unlabelled)


@torch.no_grad()
def test_a_module_that_runs_twice_only_sometimes_is_refused_when_it_does() -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, times: int = 1) -> Tensor:
            for _ in range(times):
                x = self.layer(x)
            return x

    model = Again()
    edit = rl.Edit("edit", at="layer.output", intervention=rl.Add(1.0))
    reft = rl.InterventionGraph(edit).bind(model, example=torch.zeros(2, 4))
    x = torch.ones(2, 4)
    assert_close(reft(x), model(x) + 1)
    with pytest.raises(rl.RunError, match="more than once"):
        reft(x, times=3)
    assert hook_count(model) == 0


def test_a_prompt_of_other_rows_and_values_of_other_kinds_are_refused(llama: Any, users_call: None) -> None:
    reft, batch = bound(llama), batch_of((5, 5, 5))
    with pytest.raises(rl.RunError, match="prompt= has 1 rows and this call 3"):
        reft(**batch, prompt=batch_of((5,)))
    with pytest.raises(rl.RunError, match="prompt= must be"):
        reft(**batch, prompt="the sea")
    with pytest.raises(rl.InterventionError, match=r"edit 'edit'.*torch\.complex64"):
        bound(llama, intervention=rl.Function(lambda h: h.to(torch.complex64)))(**batch)
    with pytest.raises(rl.InterventionError, match="value="):
        rl.Add(torch.ones(32, dtype=torch.complex64))
    with pytest.raises(rl.RunError, match="sources='corrupt'"):
        reft(**batch, sources="corrupt")
    with pytest.raises(rl.BindError, match="tokenizer='gpt2'"):
        reft.graph.bind(llama, "gpt2")
    with pytest.raises(rl.GraphError, match="no node None"):
        reft.graph[None]


def test_an_error_in_an_intervention_says_in_which_edit(llama: Any) -> None:
    def broken(base: Tensor) -> Tensor:
        raise ZeroDivisionError("oh")

    with pytest.raises(ZeroDivisionError) as caught:
        bound(llama, intervention=rl.Function(broken))(**batch_of((5,)))
    assert caught.value.__notes__ == ["in edit 'edit' at model.layers.1.output"]


@torch.no_grad()
def test_a_bound_model_can_be_pickled_and_copied() -> None:
    model, batch = build_model("llama"), batch_of((5,))
    reft = rl.InterventionGraph(
        rl.Edit("edit", at="blocks[1].output", positions="last", intervention=rl.LoReFT(rank=2))
    ).bind(model, word_tokenizer())
    reft(**batch, use_cache=True)
    again = pickle.loads(pickle.dumps(reft))
    assert torch.equal(again(**batch).logits, reft(**batch).logits)
