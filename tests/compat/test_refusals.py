"""What is refused, and that each refusal quotes what was given and says what would be right."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch

import reftlab as rl
import reftlab.compat.pyreft as pyreft
import reftlab.compat.pyvene as pv
from reftlab.compat.components import COMPONENTS, site_of
from reftlab.compat.locations import read_locations, read_subspaces
from reftlab.errors import (
    AddressError,
    BindError,
    ConfigError,
    InterventionError,
    PositionError,
    RunError,
)
from tests.compat.tiny import BASE, PAIR, SOURCE, WIDTH, tiny_gpt2, tiny_llama


def swap(**entry: Any) -> Any:
    return pv.IntervenableModel({"layer": 0, "component": "block_output", **entry}, model=tiny_gpt2())


# Names.


@pytest.mark.parametrize("module", ["pyreft", "pyvene"])
def test_every_name_says_its_native_way(module: str) -> None:
    home = importlib.import_module(f"reftlab.compat.{module}")
    marks = {"InterventionOutput", "load_artifact"}
    for name in set(home.__all__) - marks:
        assert "native" in (getattr(home, name).__doc__ or ""), name


@pytest.mark.parametrize(
    ("home", "name", "way"),
    [
        (pv, "create_gpt2", "load the model and its tokenizer with rl.load_model"),
        (pv, "CausalModel", "networkx.DiGraph"),
        (pv, "harmonic_sigmoid_boundary", "rl.BoundlessSwap"),
        (pv, "get_type_from_string", "name the class itself"),
        (pyreft, "ReftSupervisedDataset", "give rl.train"),
        (pyreft, "ReftRewardCollator", "a Trainer of your own"),
    ],
)
def test_a_name_that_is_not_here_says_the_native_way(home: Any, name: str, way: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is not supported; the native way: .*{way}"):
        getattr(home, name)
    with pytest.raises(ConfigError, match=name):
        exec(f"from {home.__name__} import {name}")


def test_an_unknown_name_is_an_attribute_error_as_in_any_module() -> None:
    assert not hasattr(pv, "nothing")
    assert not hasattr(pyreft, "nothing")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: m.train_alignment(None, None, None, None), RunError, "rl.train for prompts"),
        (lambda m: m.get_cached_activations(), RunError, "reft.read"),
        (lambda m: m.get_cached_hot_activations(), RunError, "reft.watching"),
        (lambda m: m.disable_intervention_gradients(), RunError, "requires_grad_"),
        (lambda m: m.eval_alignment(None, None, None), RunError, "a loop over reft"),
        (lambda m: m.save("x", save_to_hf_hub=True), RunError, "huggingface_hub.upload_folder"),
        (lambda m: m(BASE, intervention_additional_kwargs={"a": 1}), RunError, "rl.Intervention"),
    ],
)
def test_a_method_that_is_not_supported_says_the_native_way(call: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        call(swap())


def test_as_adaptor_is_not_supported() -> None:
    with pytest.raises(ConfigError, match=r"as_adaptor=...\) is not supported; the native way"):
        pv.IntervenableModel({"component": "block_output"}, tiny_gpt2(), as_adaptor=True)


# Configurations.


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ([3], ConfigError, "representations has 3: expected a RepresentationConfig"),
        ({"layers": 3}, ConfigError, "a representation has no 'layers'; .* Did you mean 'layer'"),
        ({"unit": "dim"}, ConfigError, "unit='dim': expected one of pos"),
        ({"moe_key": 2}, ConfigError, "moe_key=2 is not supported; the native way is a path"),
        ({"component": "mlp_ouput"}, AddressError, "component 'mlp_ouput': .* Did you mean 'mlp_output'"),
        ({"component": "h[7].output"}, AddressError, "h\\[7\\].output"),
        ({"intervention": 3}, InterventionError, "intervention=3: expected one such as VanillaIntervention"),
        ({"intervention_type": pyreft.LoreftIntervention}, InterventionError, "needs low_rank_dimension"),
        ([{"group_key": 1}, {"layer": 1}], ConfigError, "group_key is given for some"),
        ([{"group_key": 1}, {"layer": 1, "group_key": 0}], ConfigError, "group_key must ascend"),
        (
            [{"intervention_type": pv.ZeroIntervention}, {"layer": 1}],
            ConfigError,
            "representation 1 names no",
        ),
        ([], ConfigError, "representations is empty"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_quoted(given: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        pv.IntervenableModel(given, model=tiny_gpt2())


def test_a_width_that_the_site_does_not_have_is_refused_when_the_model_is_made() -> None:
    own = pyreft.LoreftIntervention(embed_dim=8, low_rank_dimension=2)
    with pytest.raises(BindError, match=r"embed_dim=8, and vectors at transformer.h.0.output are 16 wide"):
        swap(intervention=own)


def test_modes_and_types_are_checked() -> None:
    with pytest.raises(ConfigError, match="mode='both'"):
        pv.IntervenableConfig({}, mode="both")
    with pytest.raises(ConfigError, match="intervention_types has 2 entries and there are 1"):
        pv.IntervenableConfig({}, intervention_types=[pv.VanillaIntervention] * 2)
    config = pv.IntervenableConfig({"intervention_type": pv.ZeroIntervention})
    with pytest.raises(ConfigError, match="add_intervention: intervention_type="):
        config.add_intervention({"layer": 1})
    config.add_intervention({"layer": 1, "intervention_type": pv.ZeroIntervention})
    assert len(pv.IntervenableModel(config, tiny_gpt2()).interventions) == 2


# Locations.


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([[3]], "expected {'sources->base'"),
        ({"source->base": 3}, "expected 'sources->base' or 'base'"),
        ({"sources->base": "3"}, "expected a column, columns, or"),
        ({"sources->base": ([[[1]], [[2]]], [[[1]], [[2]]])}, "places for 2 interventions and there are 1"),
        ({"sources->base": (None, [[[1]]])}, "lists for 1 rows and the base has 2"),
        ({"sources->base": (None, [[["a"], [1]]])}, "expected whole numbers"),
    ],
)
def test_locations_that_cannot_be_read_are_quoted(given: Any, words: str) -> None:
    with pytest.raises(PositionError, match=words):
        read_locations(given, ["pos"], 2)


@pytest.mark.parametrize(
    ("given", "source", "base"),
    [
        ({"base": 3}, None, ((3,), (3,))),
        ({"sources->base": 3}, ((3,), (3,)), ((3,), (3,))),
        ({"sources->base": (4, 3)}, ((4,), (4,)), ((3,), (3,))),
        ({"sources->base": (None, 0)}, None, ((0,), (0,))),
        ({"base": [0, 1]}, None, ((0, 1), (0, 1))),
        ({"sources->base": [0, 1, 2]}, ((0, 1, 2),) * 2, ((0, 1, 2),) * 2),
        ({"sources->base": (None, [[[1, 2], [0, 3]]])}, None, ((1, 2), (0, 3))),
        ({"sources->base": (None, torch.tensor([[[1], [0]]]))}, None, ((1,), (0,))),
        ({"sources->base": (None, [[np.array([1]), [np.int64(0)]]])}, None, ((1,), (0,))),
        (None, None, None),
    ],
)
def test_every_form_of_locations_means_what_pyvene_documents(given: Any, source: Any, base: Any) -> None:
    ((there, here),) = read_locations(given, ["pos"], 2)
    assert (there.columns, here.columns) == (source, base)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, [None, None]),
        (1, [[[1], [1]]] * 2),
        ([0, 2], [[[0, 2], [0, 2]]] * 2),
        ([[[0], [1]], None], [[[0], [1]], None]),
    ],
)
def test_every_form_of_subspaces_means_what_pyvene_documents(given: Any, expected: Any) -> None:
    assert read_subspaces(given, 2, 2) == expected


def test_subspaces_that_cannot_be_read_are_quoted() -> None:
    with pytest.raises(PositionError, match="subspaces has 1 entries and there are 2"):
        read_subspaces([[[1], [1]]], 2, 2)
    with pytest.raises(PositionError, match="expected directions for each of 2 rows"):
        read_subspaces([[[1]]], 1, 2)
    with pytest.raises(InterventionError, match="subspaces has 2, and subspace_partition has 2 parts"):
        swap(subspace_partition=[[0, 8], [8, 16]])(BASE, [SOURCE], {"base": 2}, subspaces=2)


@pytest.mark.parametrize(
    ("base", "places", "words"),
    [
        (BASE, {"sources->base": 6}, "row 0 has column 6, and the batch has columns 0 to 5"),
        (BASE, {"sources->base": ([[[1]]], [[[-1]]])}, "has column -1"),
        (BASE, {"sources->base": ([[[1]]], [[[1, 2]]])}, "row 0 has 2 units and its source 1"),
        (BASE, {"sources->base": ([[[4, 1]]], [[[1, 2]]])}, "the native way is one rl.Edit for each"),
        (BASE, {"sources->base": ([[[1, 1]]], [[[1, 2]]])}, "the native way is one rl.Edit for each"),
    ],
)
def test_units_that_no_token_answers_to_are_named(base: Any, places: Any, words: str) -> None:
    with pytest.raises(PositionError, match=words):
        swap()(base, [SOURCE], places)


def test_a_source_on_padding_is_refused() -> None:
    places = {"sources->base": ([[[1], [5]]], [[[1], [2]]])}
    with pytest.raises(PositionError, match="row 1 takes its source's vector from padding"):
        swap()(PAIR, [PAIR], places)


def test_heads_that_differ_between_rows_are_refused() -> None:
    model = swap(component="head_attention_value_output", unit="h.pos", intervention_type=pv.ZeroIntervention)
    with pytest.raises(PositionError, match=r"other heads in other rows, .* which is not supported"):
        model(PAIR, unit_locations={"sources->base": (None, [[[[1], [2]], [[0], [0]]]])})
    plain = swap(component="head_attention_value_output", intervention_type=pv.ZeroIntervention)
    with pytest.raises(PositionError, match=r"is made of heads; give unit='h.pos'"):
        plain(BASE, unit_locations={"base": 2})


def test_sources_are_counted_and_are_inputs() -> None:
    entries = [{"layer": layer, "component": "block_output"} for layer in range(2)]
    model = pv.IntervenableModel(entries, model=tiny_gpt2())
    with pytest.raises(RunError, match="sources has 3 entries and there are 2"):
        model(BASE, [SOURCE] * 3, {"sources->base": 2})
    with pytest.raises(RunError, match="sources\\[0\\]='text': expected the tokenizer's output"):
        model(BASE, ["text"], {"sources->base": 2})
    with pytest.raises(RunError, match="source_representations has 'x'; the interventions are"):
        model(BASE, source_representations={"x": torch.ones(WIDTH)}, unit_locations={"base": 2})


def test_a_source_for_generated_tokens_is_refused() -> None:
    with pytest.raises(RunError, match="a source has no tokens that belong to generated ones"):
        swap().generate(BASE, [SOURCE], max_new_tokens=2)
    with pytest.raises(PositionError, match="positions='generated\\(0:5\\)'"):
        swap(intervention_type=pv.ZeroIntervention).generate(
            BASE, unit_locations={"base": 2}, max_new_tokens=2
        )
    with pytest.raises(ConfigError, match="takes no constant vector while tokens are generated"):
        swap(intervention_type=pv.RotatedSpaceIntervention).generate(
            BASE, source_representations=torch.ones(WIDTH), max_new_tokens=2
        )


def test_every_component_of_the_table_is_a_site_of_both_families() -> None:
    for model in (tiny_gpt2(), tiny_llama()):
        for component in COMPONENTS:
            place = site_of(component, 1, model)
            assert place.heads == component.startswith("head_")
            assert rl.InterventionGraph(rl.Read(place.at)).bind(model)._bound_reads
    assert site_of("mlp_activation", 1, tiny_llama()).at == "model.layers.1.mlp.act_fn.output"
    assert site_of("attention_input", 0, tiny_gpt2()).at == "transformer.h.0.attn.input"


def test_an_argument_of_a_configuration_that_is_misspelt_is_named() -> None:
    with pytest.raises(ConfigError, match=r"representation=.*Did you mean 'representations'"):
        pv.IntervenableConfig(representation=[{"layer": 1, "component": "block_output"}])
    assert pv.IntervenableConfig({"layer": 1, "component": "block_output"}, architectures=["x"]).kwargs
