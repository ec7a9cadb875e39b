"""From paths to the modules of real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from reftlab import AddressError, parse_path, portable_names
from reftlab.address import Site, resolve
from reftlab.address.families import FAMILIES
from reftlab.address.parts import part_index
from tests.models import HEADS, KEY_VALUE_HEADS, WIDTH, ZOO, build


def modules(path: str, model: nn.Module) -> list[str]:
    return [site.module for site in resolve(parse_path(path), model)]


def test_one_entry_is_named_in_three_ways(llama: Any) -> None:
    expected = ["model.layers.2"]
    for path in ("model.layers[2].output", "model.layers.2.output", "model.layers[-1].output"):
        assert modules(path, llama) == expected


@pytest.mark.parametrize(
    ("written", "numbers"),
    [("[*]", [0, 1, 2]), ("[0:3:2]", [0, 2]), ("[1:]", [1, 2]), ("[:-1]", [0, 1]), ("[0,-1]", [0, 2])],
)
def test_several_entries_are_named_at_once(llama: Any, written: str, numbers: list[int]) -> None:
    found = resolve(parse_path(f"model.layers{written}.output"), llama)
    assert [site.module for site in found] == [f"model.layers.{n}" for n in numbers]
    assert [site.label for site in found] == [str(n) for n in numbers]


def test_a_glob_names_modules_as_file_names_do(llama: Any) -> None:
    found = resolve(parse_path("model.layers[0,2].self_attn.*_proj.input"), llama)
    names = [f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 2) for p in "qkvo"]
    assert sorted(site.module for site in found) == sorted(names)
    assert {site.label for site in found} == {f"{n},{p}_proj" for n in (0, 2) for p in "qkvo"}
    assert modules("model.layers[0].mlp.?p_proj.output", llama) == ["model.layers.0.mlp.up_proj"]


def test_one_place_named_twice_is_refused(llama: Any) -> None:
    with pytest.raises(AddressError, match=r"names model\.layers\.2 twice"):
        modules("model.layers[2,-1].output", llama)


def test_a_site_prints_as_a_path_that_leads_to_it(llama: Any) -> None:
    for path in ("model.layers[*].self_attn.output[0]", "output.logits", "model.norm.input"):
        for site in resolve(parse_path(path), llama):
            again = resolve(parse_path(str(site)), llama)[0]
            assert (again.module, again.side, again.leaf) == (site.module, site.side, site.leaf)


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("model.layers[0].self_atn.output", ["model.layers.0", "'self_atn'", "Did you mean 'self_attn'?"]),
        ("modell.layers[0].output", ["the model itself", "Did you mean 'model'?"]),
        ("block[0].output", ["Did you mean 'blocks'?"]),
        ("model.layers[3].output", ["model.layers has 3 entries, numbered 0 to 2", "[3]"]),
        ("model.layers[-4].output", ["or -3 to -1", "[-4]"]),
        ("model.norm[0].output", ["model.norm", "is not a list of modules"]),
        ("model.layers[0].mlp.*_attn.output", ["'*_attn'", "gate_proj"]),
        ("model.layers[5:9].output", ["3 entries", "[5:9]"]),
        ("model.layers[0].heads", ["add '.output' or '.input'"]),
    ],
)
def test_a_path_that_leads_nowhere_says_where_it_broke_and_what_is_near(
    llama: Any, path: str, parts: list[str]
) -> None:
    with pytest.raises(AddressError) as caught:
        modules(path, llama)
    assert repr(path) in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


TABLE = {
    "llama": {
        "blocks[1].output": "model.layers.1.output",
        "blocks[-1].input": "model.layers.2.input",
        "blocks[1].attn.output": "model.layers.1.self_attn.output",
        "blocks[1].attn.heads": "model.layers.1.self_attn.o_proj.input",
        "blocks[1].attn.q": "model.layers.1.self_attn.q_proj.output",
        "blocks[1].attn.k.output": "model.layers.1.self_attn.k_proj.output",
        "blocks[1].attn.v.input": "model.layers.1.self_attn.v_proj.input",
        "blocks[1].attn.scores": "model.layers.1.self_attn.scores",
        "blocks[1].attn.pattern": "model.layers.1.self_attn.pattern",
        "blocks[1].mlp.output": "model.layers.1.mlp.output",
        "embed.output": "model.embed_tokens.output",
        "final_norm.output": "model.norm.output",
        "unembed": "lm_head.output",
        "unembed.output": "lm_head.output",
        "unembed.input": "lm_head.input",
        "blocks[0].output[0]": "model.layers.0.output[0]",
    },
    "gpt2": {
        "blocks[1].output": "transformer.h.1.output",
        "blocks[1].attn.output": "transformer.h.1.attn.output",
        "blocks[1].attn.heads": "transformer.h.1.attn.c_proj.input",
        "blocks[1].attn.q": "transformer.h.1.attn.c_attn.output (q)",
        "blocks[1].attn.v.output": "transformer.h.1.attn.c_attn.output (v)",
        "blocks[1].attn.k.input": "transformer.h.1.attn.c_attn.input",
        "blocks[1].attn.pattern": "transformer.h.1.attn.pattern",
        "blocks[1].mlp.output": "transformer.h.1.mlp.output",
        "embed.output": "transformer.drop.output",
        "final_norm.output": "transformer.ln_f.output",
        "unembed": "lm_head.output",
    },
    "bert": {
        "blocks[1].output": "bert.encoder.layer.1.output",
        "blocks[1].attn.output": "bert.encoder.layer.1.attention.output.dense.output",
        "blocks[1].attn.heads": "bert.encoder.layer.1.attention.output.dense.input",
        "blocks[1].attn.k": "bert.encoder.layer.1.attention.self.key.output",
        "blocks[1].attn.scores": "bert.encoder.layer.1.attention.self.scores",
        "blocks[1].mlp.output": "bert.encoder.layer.1.output.dense.output",
        "embed.output": "bert.embeddings.output",
        "final_norm.output": "bert.encoder.layer.2.output.LayerNorm.output",
        "unembed": "cls.predictions.decoder.output",
    },
}
TABLE["qwen3"] = TABLE["gemma3"] = TABLE["llama"]


@pytest.mark.parametrize("family", TABLE)
def test_an_alias_stands_for_a_module_of_its_family(family: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(family)
    for alias, raw in TABLE[family].items():
        assert [str(site) for site in resolve(parse_path(alias), model)] == [raw]


def test_an_alias_reaches_the_same_modules_in_a_model_without_a_head(any_model: Any) -> None:
    backbone = any_model.base_model
    (with_head,) = resolve(parse_path("blocks[1].mlp.output"), any_model)
    (without,) = resolve(parse_path("blocks[1].mlp.output"), backbone)
    assert any_model.get_submodule(with_head.module) is backbone.get_submodule(without.module)


def test_a_model_without_an_unembedding_says_so(llama: Any) -> None:
    with pytest.raises(AddressError, match="LlamaModel has no unembedding"):
        resolve(parse_path("unembed"), llama.model)


def test_a_module_with_an_aliases_name_wins() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2)])})
    assert modules("blocks[0].output", model) == ["blocks.0"]


def test_an_alias_on_an_unknown_family_names_the_known_ones() -> None:
    with pytest.raises(AddressError, match=r"no entry for 'Linear'.*bart, bert, bloom, .*, whisper, xlnet"):
        resolve(parse_path("blocks[0].output"), nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("blocks[0].atn.output", "Did you mean 'attn'?"),
        ("blocks[0].attn.input", "say 'blocks[i].attn.output', 'blocks[i].attn.heads', 'blocks[i].attn.q'"),
        (
            "blocks[0].attn.o.output",
            "'blocks[i].attn.v', 'blocks[i].attn.scores' or 'blocks[i].attn.pattern'",
        ),
        ("blocks[0].mlp.heads", "say 'blocks[i].mlp.output'"),
        ("blocks[0].cross_attn.output", "'llama' has no such place. It has embed.output, final_norm.output"),
        ("encoder.blocks[0].output", "'llama' has no encoder; say 'blocks[0].output'"),
    ],
)
def test_an_alias_that_does_not_exist_says_which_do(llama: Any, path: str, hint: str) -> None:
    with pytest.raises(AddressError) as caught:
        resolve(parse_path(path), llama)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("name", "path", "hint"),
    [
        ("mamba", "blocks[0].attn.output", "a Mamba block has one mixer, 'layers[i].mixer'"),
        (
            "mamba",
            "blocks[0].attn.pattern",
            "It has embed.output, final_norm.output, blocks[*].output, unembed",
        ),
        ("xlnet", "blocks[0].attn.q", "XLNet's attention projects with parameters of its own"),
        ("resnet", "final_norm.output", "its blocks are the stages, made of convolutions"),
        ("resnet", "unembed", "ResNetForImageClassification has no unembedding"),
        ("clip", "unembed", "CLIPModel has no unembedding"),
        (
            "t5",
            "blocks[0].output",
            "has 2 stacks of blocks; say 'encoder.blocks[0].output' or 'decoder.blocks[0].output'",
        ),
        ("clip", "embed.output", "say 'text.embed.output' or 'vision.embed.output'"),
        (
            "clip",
            "encoder.blocks[0].output",
            "'clip' has no encoder; say 'text.blocks[0].output' or 'vision.blocks[0].output'",
        ),
        ("t5", "encoder.blocks[0].cross_attn.output", "'t5' has no such place"),
        ("xlnet", "embed.input", "say '.output' for what enters the first block"),
    ],
)
def test_a_place_that_a_family_lacks_is_refused_with_what_it_has(name: str, path: str, hint: str) -> None:
    with pytest.raises(AddressError) as caught:
        resolve(parse_path(path), build(name))
    assert hint in str(caught.value)
    assert repr(path) in str(caught.value)


@pytest.mark.parametrize("name", [name for name in ZOO if name not in ("gru", "mlp")])
def test_portable_names_are_listed_with_what_they_stand_for(name: str) -> None:
    model = build(name)
    names = portable_names(model)
    assert names
    for alias, raw in names.items():
        found = [str(site).partition(" (")[0] for site in resolve(parse_path(alias), model)]
        assert found == [str(site) for site in resolve(parse_path(raw), model)]


def test_a_model_that_is_no_transformer_has_no_portable_names() -> None:
    assert portable_names(nn.Linear(2, 2)) == {}


def test_every_entry_of_the_table_has_a_model_that_the_tests_know() -> None:
    kinds = {getattr(getattr(build(name), "config", None), "model_type", "") for name in ZOO}
    towers = {"clip_text_model", "clip_vision_model"}
    assert set(FAMILIES) - kinds == towers | {"gemma3"}
    clip = build("clip")
    for tower in (clip.text_model, clip.vision_model):
        assert set(portable_names(tower)) >= {"embed.output", "blocks[*].attn.q", "final_norm.output"}
        assert modules("blocks[1].mlp.output", tower) == ["encoder.layers.1.mlp"]


def test_one_stack_of_an_encoder_decoder_alone_has_its_own_names_only() -> None:
    from transformers import T5EncoderModel

    names = portable_names(T5EncoderModel(build("t5").config))
    assert names
    assert all(name.startswith("encoder.") for name in names)


@pytest.mark.parametrize(
    ("name", "path", "expected"),
    [
        ("t5", "encoder.blocks[2].mlp.output", "encoder.block.2.layer.1.DenseReluDense.output"),
        ("t5", "decoder.blocks[2].mlp.output", "decoder.block.2.layer.2.DenseReluDense.output"),
        ("t5", "decoder.blocks[0].cross_attn.k", "decoder.block.0.layer.1.EncDecAttention.k.output"),
        ("t5", "encoder.embed.output", "encoder.block.0.input"),
        ("bart", "decoder.blocks[-1].cross_attn.heads", "model.decoder.layers.2.encoder_attn.out_proj.input"),
        ("whisper", "encoder.final_norm.output", "model.encoder.layer_norm.output"),
        ("clip", "vision.blocks[0].attn.pattern", "vision_model.encoder.layers.0.self_attn.pattern"),
        ("t5", "encoder.block[0].output", "encoder.block.0.output"),
        ("resnet", "blocks[1].output", "resnet.encoder.stages.1.output"),
        ("falcon", "blocks[0].attn.k", "transformer.h.0.self_attention.query_key_value.output (k)"),
    ],
)
def test_a_stack_is_named_before_its_blocks(name: str, path: str, expected: str) -> None:
    assert [str(site) for site in resolve(parse_path(path), build(name))] == [expected]


class Forwarding(nn.Module):
    """Hands on every attribute of the model inside, as PEFT's wrappers do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.ModuleDict({"model": model})
        self.config = model.config

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model["model"], name)


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (nn.DataParallel, "module."),
        (torch.compile, "_orig_mod."),
        (Forwarding, "base_model.model."),
        (lambda model: nn.DataParallel(torch.compile(model)), "module._orig_mod."),
    ],
    ids=["DataParallel", "compile", "forwarding", "both"],
)
def test_aliases_look_through_wrappers(llama: Any, wrap: Any, prefix: str) -> None:
    wrapped = wrap(llama)
    assert portable_names(wrapped) == {a: prefix + raw for a, raw in portable_names(llama).items()}
    for alias, raw in TABLE["llama"].items():
        assert [str(site) for site in resolve(parse_path(alias), wrapped)] == [prefix + raw]


def test_aliases_look_through_peft() -> None:
    peft = pytest.importorskip("peft")
    gpt2 = build("gpt2")
    wrapped = peft.get_peft_model(gpt2, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    (site,) = resolve(parse_path("blocks[1].attn.v"), wrapped)
    assert str(site) == "base_model.model.transformer.h.1.attn.c_attn.output (v)"
    features, size = part_index(wrapped, site)
    assert (features.tolist(), size) == (list(range(2 * WIDTH, 3 * WIDTH)), WIDTH // HEADS)


def test_two_models_side_by_side_have_no_common_portable_names(llama: Any, gpt2: Any) -> None:
    both = nn.ModuleDict({"one": llama, "two": gpt2})
    assert portable_names(both) == {}
    with pytest.raises(AddressError, match="no entry for 'ModuleDict'"):
        resolve(parse_path("blocks[0].output"), both)


@pytest.mark.parametrize(
    ("name", "part", "first", "count"),
    [
        ("gpt2", "k", [32, 33, 34], HEADS),
        ("phi3", "v", [48, 49, 50], KEY_VALUE_HEADS),
        ("gpt_neox", "q", [0, 1, 2], HEADS),
        ("gpt_neox", "k", [8, 9, 10], HEADS),
        ("falcon", "v", [24, 25, 26], KEY_VALUE_HEADS),
        ("falcon_multi_query", "k", [32, 33, 34], 1),
        ("falcon_alibi", "v", [16, 17, 18], HEADS),
    ],
)
def test_a_part_of_a_fused_projection_is_its_features_head_after_head(
    name: str, part: str, first: list[int], count: int
) -> None:
    model = build(name)
    (site,) = resolve(parse_path(f"blocks[0].attn.{part}"), model)
    features, size = part_index(model, site)
    assert size == WIDTH // HEADS
    assert features.tolist()[:3] == first
    assert len(features) == count * size
    others = [part_index(model, Site(site.module, "output", part=p))[0] for p in "qkv"]
    width = model.get_submodule(site.module).weight.numel() // WIDTH
    assert sorted(torch.cat(others).tolist()) == list(range(width))


def test_a_part_where_nothing_is_fused_is_refused(llama: Any) -> None:
    with pytest.raises(AddressError, match="part='q' stands for the queries"):
        part_index(llama, Site("model.layers.0.self_attn.q_proj", "output", part="q"))
