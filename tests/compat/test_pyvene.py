"""pyvene's calls against plain hooks, where the tokens or rows are what pyvene itself gets wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPTNeoConfig, GPTNeoForCausalLM

import reftlab as rl
import reftlab.compat.pyvene as pv
from tests.compat.hooks import hooked, outputs
from tests.compat.tiny import BASE, OTHER, SOURCE, VOCABULARY, WIDTH, filled, ids, tiny_gpt2, tiny_llama
from tests.models import hook_count


def left_padded() -> dict[str, Tensor]:
    """Two rows, the second with three columns of padding before it."""
    batch = ids("5 6 7 8 9 10", "11 12 13")
    shifted = {name: torch.stack([rows[0], rows[1].roll(3)]) for name, rows in batch.items()}
    places = (shifted["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return {**shifted, "position_ids": places}


def test_columns_of_a_batch_padded_on_the_left_are_the_tokens_that_stand_there() -> None:
    llama = tiny_llama()
    model = pv.IntervenableModel({"component": "model.layers[0].output"}, model=llama)
    base = left_padded()
    source = {**base, "input_ids": (base["input_ids"] + 7) % VOCABULARY}
    _, got = model(base, [source], {"sources->base": ([[[5], [4]]], [[[2], [5]]])})
    there = outputs(llama, llama.model.layers[0], source)

    def swapped(hidden: Tensor) -> Tensor:
        hidden[0, 2], hidden[1, 5] = there[0, 5], there[1, 4]
        return hidden

    with hooked(llama.model.layers[0], swapped):
        expected = llama(**base).logits
    real = base["attention_mask"].bool()
    torch.testing.assert_close(got.logits[real], expected[real], rtol=1e-5, atol=1e-5)


def test_a_unit_on_padding_changes_no_real_token() -> None:
    llama = tiny_llama()
    model = pv.IntervenableModel(
        {"component": "model.layers[0].output", "intervention_type": pv.ZeroIntervention}, model=llama
    )
    base = left_padded()
    _, got = model(base, unit_locations={"sources->base": (None, [[[4], [1]]])})

    def cleared(hidden: Tensor) -> Tensor:
        hidden[0, 4] = 0
        return hidden

    with hooked(llama.model.layers[0], cleared):
        expected = llama(**base).logits
    real = base["attention_mask"].bool()
    torch.testing.assert_close(got.logits[real], expected[real], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got.logits[0, 5], llama(**base).logits[0, 5])


def test_each_row_keeps_to_its_own_subspace() -> None:
    gpt2 = tiny_gpt2()
    entry = {"layer": 0, "component": "block_output", "subspace_partition": [[0, 8], [8, 16]]}
    model = pv.IntervenableModel(entry, model=gpt2)
    base, source = ids("5 6 7 8", "11 12 13 14"), ids("15 16 17 18", "21 22 23 24")
    _, got = model(base, [source], {"sources->base": 2}, subspaces=[[[0], [1]]])
    there = outputs(gpt2, gpt2.transformer.h[0], source)

    def swapped(hidden: Tensor) -> Tensor:
        hidden[0, 2, :8], hidden[1, 2, 8:] = there[0, 2, :8], there[1, 2, 8:]
        return hidden

    with hooked(gpt2.transformer.h[0], swapped):
        expected = gpt2(**base).logits
    torch.testing.assert_close(got.logits, expected, rtol=1e-5, atol=1e-5)


def test_two_columns_for_the_base_are_both_meant() -> None:
    gpt2 = tiny_gpt2()
    zero = {"layer": 0, "component": "block_output", "intervention_type": pv.ZeroIntervention}
    _, got = pv.IntervenableModel(zero, model=gpt2)(BASE, unit_locations={"base": [1, 4]})

    def cleared(hidden: Tensor) -> Tensor:
        hidden[:, [1, 4]] = 0
        return hidden

    with hooked(gpt2.transformer.h[0], cleared):
        expected = gpt2(**BASE).logits
    torch.testing.assert_close(got.logits, expected, rtol=1e-5, atol=1e-5)


def test_without_locations_every_token_is_swapped() -> None:
    gpt2 = tiny_gpt2()
    _, got = pv.IntervenableModel({"layer": 0, "component": "block_output"}, model=gpt2)(BASE, [SOURCE])
    torch.testing.assert_close(got.logits, gpt2(**SOURCE).logits, rtol=1e-5, atol=1e-5)


def test_linked_interventions_share_weights_and_each_edits_its_own_layer() -> None:
    llama = tiny_llama()
    shift = torch.linspace(-1, 1, WIDTH)

    class Learned(
        pv.SourcelessIntervention, pv.TrainableIntervention, pv.DistributedRepresentationIntervention
    ):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs, keep_last_dim=True)
            self.shift = nn.Parameter(torch.zeros(int(self.embed_dim)))

        def forward(self, base: Any, source: Any = None, subspaces: Any = None) -> Any:
            return base + self.shift

    entries = [
        {
            "layer": layer,
            "component": "block_output",
            "intervention_type": Learned,
            "intervention_link_key": "one",
        }
        for layer in range(2)
    ]
    model = pv.IntervenableModel(entries, model=llama)
    first, second = model.interventions.values()
    assert first is second
    assert model.count_parameters() == WIDTH
    with torch.no_grad():
        first.shift.copy_(shift)
    _, got = model(BASE, unit_locations={"base": 3})

    def moved(hidden: Tensor) -> Tensor:
        hidden[:, 3] += shift
        return hidden

    with hooked(llama.model.layers[0], moved), hooked(llama.model.layers[1], moved):
        expected = llama(**BASE).logits
    torch.testing.assert_close(got.logits, expected, rtol=1e-5, atol=1e-5)
    got.logits.sum().backward()
    assert first.shift.grad is not None
    assert bool(first.shift.grad.any())


def test_collected_vectors_of_all_tokens_and_of_heads_are_the_modules_own() -> None:
    gpt2 = tiny_gpt2()
    every = pv.IntervenableModel(
        {"layer": 1, "component": "mlp_output", "intervention_type": pv.CollectIntervention}, model=gpt2
    )
    (_, seen), output = every(BASE)
    torch.testing.assert_close(seen[0], outputs(gpt2, gpt2.transformer.h[1].mlp, BASE))
    torch.testing.assert_close(output.logits, gpt2(**BASE).logits)
    entry = {"layer": 1, "component": "head_attention_value_output", "unit": "h.pos"}
    heads = pv.IntervenableModel({**entry, "intervention_type": pv.CollectIntervention}, model=gpt2)
    (_, few), _ = heads(BASE, unit_locations={"sources->base": (None, [[[[1, 3]], [[2, 4]]]])})
    kept: list[Tensor] = []
    handle = gpt2.transformer.h[1].attn.c_proj.register_forward_pre_hook(lambda m, args: kept.append(args[0]))
    gpt2(**BASE)
    handle.remove()
    split = kept[0].unflatten(-1, (4, 4)).transpose(1, 2)
    torch.testing.assert_close(few[0], split[:, [1, 3]][:, :, [2, 4]])


def test_return_dict_names_what_a_call_returns() -> None:
    gpt2 = tiny_gpt2()
    entries = [
        {"layer": 0, "component": "mlp_output", "intervention_type": pv.ZeroIntervention},
        {"layer": 1, "component": "mlp_output", "intervention_type": pv.CollectIntervention},
    ]
    found = pv.IntervenableModel(entries, model=gpt2)(
        BASE, unit_locations={"base": 2}, return_dict=True, output_original_output=True
    )
    torch.testing.assert_close(found.original_outputs.logits, gpt2(**BASE).logits)
    assert found.collected_activations[0].shape == (1, 1, WIDTH)
    assert not torch.allclose(found.intervened_outputs.logits, found.original_outputs.logits)


def test_no_hook_stays_on_the_model_after_a_call_that_fails() -> None:
    gpt2 = tiny_gpt2()

    def broken(base: Tensor, source: Any) -> Tensor:
        raise ZeroDivisionError

    model = pv.IntervenableModel(
        {"layer": 0, "component": "block_output", "intervention": broken}, model=gpt2
    )
    with pytest.raises(ZeroDivisionError):
        model(BASE, unit_locations={"base": 2})
    assert hook_count(gpt2) == 0


def test_the_bound_model_inside_is_a_native_one() -> None:
    gpt2 = tiny_gpt2()
    entries = [{"layer": 0, "component": "mlp_output"}, {"layer": 1, "component": "attention_output"}]
    model = pv.IntervenableModel(entries, model=gpt2)
    first, second = (edit.name for edit in model.reft.graph.edits)
    positions = {first: [[2]], f"{first}.source": [[1]], second: [[5]], f"{second}.source": [[4]]}
    native = model.reft(**BASE, sources={"source_0": SOURCE, "source_1": OTHER}, positions=positions)
    places = {"sources->base": ([[[1]], [[4]]], [[[2]], [[5]]])}
    torch.testing.assert_close(native.logits, model(BASE, [SOURCE, OTHER], places)[1].logits)
    assert rl.InterventionGraph.from_yaml(model.reft.graph.to_yaml()) == model.reft.graph


def test_given_tensors_for_heads_are_taken_head_by_head() -> None:
    gpt2 = tiny_gpt2()
    entry = {"layer": 1, "component": "head_attention_value_output", "unit": "h.pos"}
    model = pv.IntervenableModel(entry, model=gpt2)
    given = torch.linspace(-1, 1, 8).reshape(1, 1, 2, 4)
    (key,) = model.interventions
    place = {"sources->base": (None, [[[[2]], [[1, 3]]]])}
    _, got = model(BASE, source_representations={key: given}, unit_locations=place)

    def change(module: nn.Module, args: Any) -> Any:
        values = args[0].clone()
        values[:, 1, 8:12], values[:, 3, 8:12] = given[0, 0, 0], given[0, 0, 1]
        return (values,)

    handle = gpt2.transformer.h[1].attn.c_proj.register_forward_pre_hook(change)
    expected = gpt2(**BASE).logits
    handle.remove()
    torch.testing.assert_close(got.logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "component", ["mlp_output", "block_input", "mlp_activation", "head_attention_value_output"]
)
def test_gpt_neo_has_its_components_though_it_has_no_portable_names(component: str) -> None:
    config = GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_layers=2, num_heads=4, attention_types=[[["global"], 2]]
    )
    neo = filled(GPTNeoForCausalLM(config))
    unit = "h.pos" if component.startswith("head_") else "pos"
    model = pv.IntervenableModel({"layer": 1, "component": component, "unit": unit}, model=neo)
    place = pv.GET_LOC((2, 3)) if unit == "h.pos" else [[[3]]]
    _, got = model(BASE, [SOURCE], {"sources->base": (place, place)})
    block = neo.transformer.h[1]
    module, before, features = {
        "mlp_output": (block.mlp, False, slice(None)),
        "block_input": (block, True, slice(None)),
        "mlp_activation": (block.mlp.act, False, slice(None)),
        "head_attention_value_output": (block.attn.attention.out_proj, True, slice(8, 12)),
    }[component]
    kept: list[Tensor] = []

    def act(module: nn.Module, args: Any, output: Any = None) -> Any:
        whole = args[0] if before else output
        if not kept:
            kept.append(whole)
            return None
        new = whole.clone()
        new[:, 3, features] = kept[0][:, 3, features]
        return (new, *args[1:]) if before else new

    handle = (module.register_forward_pre_hook if before else module.register_forward_hook)(act)
    neo(**SOURCE)
    expected = neo(**BASE).logits
    handle.remove()
    torch.testing.assert_close(got.logits, expected, rtol=1e-5, atol=1e-5)


def test_a_vector_given_after_the_model_was_made_takes_the_sources_place() -> None:
    gpt2 = tiny_gpt2()
    vector = torch.linspace(-1, 1, WIDTH)
    model = pv.IntervenableModel({"layer": 0, "component": "block_output"}, model=gpt2)
    next(iter(model.interventions.values())).set_source_representation(vector)
    _, got = model(BASE, unit_locations={"base": 2})

    def replaced(hidden: Tensor) -> Tensor:
        hidden[:, 2] = vector
        return hidden

    with hooked(gpt2.transformer.h[0], replaced):
        expected = gpt2(**BASE).logits
    torch.testing.assert_close(got.logits, expected, rtol=1e-5, atol=1e-5)


def test_units_of_a_recurrent_cell_are_time_steps() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.GRUCell(4, 6), nn.Linear(6, 3)

        def forward(self, inputs_embeds: Tensor) -> Tensor:
            hidden = inputs_embeds.new_zeros(len(inputs_embeds), 6)
            for step in inputs_embeds.unbind(1):
                hidden = self.cell(step, hidden)
            return self.head(hidden)

    network = Recurrent()
    base, source = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    model = pv.IntervenableModel(
        {"component": "cell.output", "unit": "t"}, model=network, example={"inputs_embeds": base}
    )
    _, got = model({"inputs_embeds": base}, [{"inputs_embeds": source}], {"sources->base": (1, 3)})
    states: list[Tensor] = []
    hidden = base.new_zeros(2, 6)
    for step in source.unbind(1):
        hidden = network.cell(step, hidden)
        states.append(hidden)
    hidden = base.new_zeros(2, 6)
    for number, step in enumerate(base.unbind(1)):
        hidden = states[1] if number == 3 else network.cell(step, hidden)
    torch.testing.assert_close(got, network.head(hidden), rtol=1e-5, atol=1e-5)
