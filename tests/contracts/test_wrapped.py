"""Models that bitsandbytes, torch.compile, accelerate or checkpointing has wrapped are edited as bare ones.

PEFT's are in `test_lora.py`.
"""

import contextlib
import copy
import logging
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

import reftlab as rl
from tests.contracts.wrapped import (
    RAW,
    VECTOR,
    assert_acts_as_a_hook,
    graph,
    hooked,
    last_columns,
    learner,
    with_lora,
)
from tests.models import batch_of, build_model, hook_count
from tests.oracle import assert_close, plain_edit, plain_read
from tests.training.conftest import PAIRS, make_model, make_tokenizer

IDS = torch.tensor([[3, 9, 5, 7, 2], [8, 4, 6, 11, 10]])
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def trained_alike(bare, wrapped, folder):
    """Train both to the same numbers, and save the second."""
    for reft in (bare, wrapped):
        rl.train(reft, PAIRS, epochs=3, learning_rate=0.02, progress=False)
    for name, tensor in bare.interventions.state_dict().items():
        assert_close(wrapped.interventions.state_dict()[name], tensor)
    wrapped.save(folder)


@contextlib.contextmanager
def without_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.fixture(autouse=True)
def _quiet():
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    yield
    transformers_logging.set_verbosity(level)
    if bars:
        transformers_logging.enable_progress_bar()


@pytest.fixture
def _forget_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# bitsandbytes


def quantised(folder, bits):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    # Sizes that are multiples of 32, as the 4-bit kernel for CPUs needs them.
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    kind = (
        {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
        if bits == 4
        else {"load_in_8bit": True}
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**kind))
    assert type(model.model.layers[1].mlp.up_proj).__name__ == {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    return model.eval()


@pytest.mark.parametrize("bits", [4, 8])
def test_an_edit_on_a_quantised_model_equals_a_plain_hook_trains_and_loads(tmp_path, bits):
    model = quantised(tmp_path / "model", bits)
    vector = torch.linspace(-3.0, 3.0, 64)
    reft = graph(intervention=rl.Add(vector)).bind(model)
    with torch.no_grad():
        got, bare = reft(**BATCH).logits, model(**BATCH).logits
        with hooked(model.model.layers[1], BATCH, lambda base, source, numbers: base + vector):
            expected = model(**BATCH).logits
    assert_close(got, expected)
    assert not torch.allclose(got, bare, atol=1e-2)

    reft = learner(model, RAW)
    before = rl.answer_loss(reft, PAIRS)
    rl.train(reft, PAIRS, epochs=5, learning_rate=0.02, progress=False)
    after = rl.answer_loss(reft, PAIRS)
    assert after < before - 0.1
    reft.save(tmp_path / "edit")
    with without_warning():
        again = rl.load(tmp_path / "edit", quantised(tmp_path / "again", bits), make_tokenizer())
    assert rl.answer_loss(again, PAIRS) == pytest.approx(after, abs=1e-5)


# torch.compile


def compiled(model, how):
    """A model compiled in one of four ways; the backend `eager` traces as every backend does."""
    if how == "wrapped":
        return torch.compile(model, backend="eager")
    if how == "in place":
        model.compile(backend="eager")
    elif how == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        for block in model.model.layers:
            block.compile(backend="eager")
    return model


COMPILED = ("wrapped", "in place", "forward", "block by block")


@pytest.mark.usefixtures("_forget_compiled_code")
@pytest.mark.parametrize("how", COMPILED)
def test_an_edit_acts_on_a_compiled_model_whatever_was_traced_before(how):
    model, oracle = compiled(build_model("llama"), how), build_model("llama")
    at = f"_orig_mod.{RAW}" if how == "wrapped" else RAW
    batch = batch_of((5, 3))
    with torch.no_grad():
        traced = model(**batch).logits
    assert_acts_as_a_hook(model, oracle, oracle.model.layers[1], at)
    with torch.no_grad():
        # What was traced is still there, without a trace of the edits.
        assert_close(model(**batch).logits, traced)
        assert_close(traced, oracle(**batch).logits)
    read = graph(at).bind(model).read(f"{at} @ all", **batch)[f"{at} @ all"]
    edited = plain_read(oracle, oracle.model.layers[1], batch)
    for row, (column,) in enumerate(last_columns(batch)):
        edited[row, column] += VECTOR
    assert_close(read[0], edited[0])


@pytest.mark.usefixtures("_forget_compiled_code")
def test_edits_learn_on_a_compiled_model_as_on_the_bare_one(tmp_path):
    bare, wrapped = learner(make_model(), RAW), learner(compiled(make_model(), "in place"), RAW)
    trained_alike(bare, wrapped, tmp_path / "edit")
    with without_warning():
        rl.load(tmp_path / "edit", make_model(), make_tokenizer())


# accelerate


def placed(folder, how):
    accelerate = pytest.importorskip("accelerate")
    model = make_model()
    if how == "weights kept aside":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif how == "weights on disk":
        accelerate.disk_offload(model, str(folder / "weights"), execution_device="cpu")
    else:
        model.save_pretrained(folder / "model")
        places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "lm_head"), "cpu")
        places |= {"model.rotary_emb": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
        model = AutoModelForCausalLM.from_pretrained(
            folder / "model", device_map=places, offload_folder=folder / "weights"
        )
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    return model.eval()


PLACED = ("weights kept aside", "weights on disk", "device_map")


@pytest.mark.parametrize("how", PLACED)
def test_an_edit_on_a_model_split_by_a_device_map_equals_a_plain_hook(tmp_path, how):
    model, oracle = placed(tmp_path, how), make_model()
    reft = graph(intervention=rl.LoReFT(rank=2)).bind(model)
    assert {p.device.type for p in reft.interventions.parameters()} == {"cpu"} == {reft.device.type}
    built = copy.deepcopy(reft.interventions["edit"])
    with hooked(oracle.model.layers[1], BATCH, lambda base, source, numbers: built(base)):
        expected = oracle(**BATCH).logits
        expected.sum().backward()
    with hooked(oracle.model.layers[1], BATCH, lambda base, source, numbers: built(base)):
        tokens = oracle.generate(**BATCH, max_new_tokens=4, do_sample=False)
    got = reft(**BATCH).logits
    got.sum().backward()
    assert_close(got, expected)
    for name, parameter in reft.interventions["edit"].named_parameters():
        assert_close(parameter.grad, dict(built.named_parameters())[name].grad)
    assert reft.generate(**BATCH, max_new_tokens=4, do_sample=False).equal(tokens)
    assert model.model.layers[1].mlp.up_proj.weight.is_meta


@pytest.mark.parametrize("how", PLACED)
def test_edits_learn_on_a_split_model_as_on_the_whole_one_and_load_on_either(tmp_path, how):
    whole, split = learner(make_model(), RAW), learner(placed(tmp_path, how), RAW)
    trained_alike(whole, split, tmp_path / "edit")
    with without_warning():
        again = rl.load(tmp_path / "edit", make_model(), make_tokenizer())
    assert rl.answer_loss(again, PAIRS) == pytest.approx(rl.answer_loss(split, PAIRS), abs=1e-6)


# gradient checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_edit_under_gradient_checkpointing_has_the_gradients_of_a_plain_hook(reentrant):
    model, oracle = make_model().train(), make_model().train()
    answers = IDS.clone()
    answers[:, :3] = -100
    reft = graph(intervention=rl.LoReFT(rank=2), positions="[2]").bind(model)
    built = copy.deepcopy(reft.interventions["edit"])
    columns = [[2], [2]]
    with plain_edit(
        oracle.model.layers[1], BATCH["attention_mask"], columns, lambda base, source, numbers: built(base)
    ):
        oracle(**BATCH, labels=answers).loss.backward()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    ours = hook_count(model)
    reft(**BATCH, labels=answers, use_cache=False).loss.backward()
    for name, parameter in reft.interventions["edit"].named_parameters():
        assert_close(parameter.grad, dict(built.named_parameters())[name].grad)
    assert hook_count(model) == ours


# Attention


@pytest.mark.parametrize("how", ["lora", "wrapped", "block by block", "weights on disk"])
@pytest.mark.usefixtures("_forget_compiled_code")
def test_attention_patterns_are_read_in_wrapped_models(tmp_path, how):
    prefix = {"lora": "base_model.model.", "wrapped": "_orig_mod."}.get(how, "")
    model = {
        "lora": lambda: with_lora(make_model()).eval(),
        "weights on disk": lambda: placed(tmp_path, how),
    }.get(how, lambda: compiled(make_model(), how))()
    oracle = with_lora(make_model()).eval() if how == "lora" else make_model()
    (oracle.get_base_model() if how == "lora" else oracle).set_attn_implementation("eager")
    site = f"{prefix}model.layers[1].self_attn.pattern"
    got = graph(prefix + RAW).bind(model).read(f"{site} @ all", **BATCH)[f"{site} @ all"]
    with torch.no_grad():
        expected = oracle(**BATCH, output_attentions=True).attentions[1]
    assert_close(got, expected)
