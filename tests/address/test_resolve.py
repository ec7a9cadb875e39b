"""From paths to the modules of real models."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from reftlab import AddressError, parse_path, portable_names
from reftlab.address import resolve


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
        "blocks[1].mlp.output": "transformer.h.1.mlp.output",
        "embed.output": "transformer.drop.output",
        "final_norm.output": "transformer.ln_f.output",
        "unembed": "lm_head.output",
    },
    "bert": {
        "blocks[1].output": "bert.encoder.layer.1.output",
        "blocks[1].attn.output": "bert.encoder.layer.1.attention.output.dense.output",
        "blocks[1].attn.heads": "bert.encoder.layer.1.attention.output.dense.input",
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
    with pytest.raises(
        AddressError, match=r"no entry for 'Linear'.*bert, gemma3, gemma3_text, gpt2, llama, qwen3"
    ):
        resolve(parse_path("blocks[0].output"), nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("blocks[0].atn.output", "Did you mean 'attn'?"),
        ("blocks[0].attn.input", "say 'blocks[i].attn.output' or 'blocks[i].attn.heads'"),
        ("blocks[0].mlp.heads", "say 'blocks[i].mlp.output'"),
    ],
)
def test_an_alias_that_does_not_exist_says_which_do(llama: Any, path: str, hint: str) -> None:
    with pytest.raises(AddressError) as caught:
        resolve(parse_path(path), llama)
    assert hint in str(caught.value)


def test_portable_names_are_listed_with_what_they_stand_for(any_model: Any) -> None:
    names = portable_names(any_model)
    assert set(names) == {
        "blocks[*].output", "blocks[*].attn.output", "blocks[*].mlp.output", "blocks[*].attn.heads",
        "embed.output", "final_norm.output", "unembed",
    }  # fmt: skip
    for alias, raw in names.items():
        found = [str(site) for site in resolve(parse_path(alias), any_model)]
        assert found == [str(site) for site in resolve(parse_path(raw), any_model)]
    assert portable_names(nn.Linear(2, 2)) == {}
