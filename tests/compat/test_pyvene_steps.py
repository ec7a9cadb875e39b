"""pyvene's generations and trainings against plain hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reftlab.compat.pyvene as pv
from tests.compat.hooks import hooked
from tests.compat.tiny import BASE, SOURCE, WIDTH, tiny_gpt2, tiny_llama


def test_beams_and_several_sequences_carry_the_edit_of_the_prompt() -> None:
    llama = tiny_llama()
    vector = torch.linspace(-4, 4, WIDTH)
    entry = {"layer": 0, "component": "block_output", "intervention_type": pv.AdditionIntervention}
    model = pv.IntervenableModel({**entry, "source_representation": vector}, model=llama)
    how = {
        "max_new_tokens": 5,
        "num_beams": 3,
        "num_return_sequences": 2,
        "do_sample": False,
        "eos_token_id": 39,
    }
    _, got = model.generate(BASE, unit_locations={"base": 5}, intervene_on_prompt=True, **how)

    def moved(hidden: Tensor) -> Tensor:
        if hidden.shape[1] == 6:
            hidden[:, 5] += vector
        return hidden

    with hooked(llama.model.layers[0], moved):
        expected = llama.generate(**BASE, **how)
    assert torch.equal(got, expected)
    assert not torch.equal(got, llama.generate(**BASE, **how))


def test_without_locations_a_generation_is_edited_in_prompt_and_reply() -> None:
    llama = tiny_llama()
    vector = torch.linspace(-4, 4, WIDTH)
    entry = {"layer": 0, "component": "block_output", "intervention_type": pv.AdditionIntervention}
    model = pv.IntervenableModel({**entry, "source_representation": vector}, model=llama)
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 39}
    _, everywhere = model.generate(BASE, intervene_on_prompt=True, **how)
    with hooked(llama.model.layers[0], lambda hidden: hidden + vector):
        assert torch.equal(everywhere, llama.generate(**BASE, **how))
    _, reply = model.generate(BASE, **how)
    with hooked(llama.model.layers[0], lambda hidden: hidden + vector if hidden.shape[1] == 1 else hidden):
        assert torch.equal(reply, llama.generate(**BASE, **how))
    assert not torch.equal(everywhere, reply)


def test_the_program_of_boundless_das_trains_its_rotation_and_its_boundary() -> None:
    gpt2 = tiny_gpt2()
    entry = {
        "layer": 0,
        "component": "block_output",
        "intervention_type": pv.BoundlessRotatedSpaceIntervention,
    }
    model = pv.IntervenableModel(pv.IntervenableConfig(entry), gpt2)
    model.set_device("cpu")
    groups: list[dict[str, Any]] = []
    for own in model.interventions.values():
        groups += [{"params": own.rotate_layer.parameters()}]
        groups += [{"params": own.intervention_boundaries, "lr": 0.05}]
    optimizer = torch.optim.Adam(groups, lr=0.05)
    own = next(iter(model.interventions.values()))
    before, wanted = own.rotate_layer.weight.detach().clone(), torch.tensor([7])
    losses = []
    for temperature in torch.linspace(5.0, 0.1, 12):
        _, output = model(BASE, [SOURCE], {"sources->base": 5})
        loss = nn.functional.cross_entropy(output.logits[:, -1], wanted) + own.intervention_boundaries.sum()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        model.set_zero_grad()
        model.set_temperature(temperature)
    assert losses[-1] < losses[0]
    assert float(own.get_temperature()) == pytest.approx(0.1)
    assert own.intervention_boundaries.item() < 0.5
    after = own.rotate_layer.weight.detach()
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(after.T @ after, torch.eye(WIDTH), rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in gpt2.parameters())


def test_a_model_is_frozen_until_it_is_asked_to_learn() -> None:
    gpt2 = tiny_gpt2()
    entry = {"layer": 0, "component": "block_output", "intervention_type": pv.RotatedSpaceIntervention}
    model = pv.IntervenableModel(entry, gpt2)
    assert model.count_parameters() == model.count_parameters(include_model=True) == WIDTH * WIDTH
    model.enable_model_gradients()
    whole = sum(parameter.numel() for parameter in gpt2.parameters())
    assert model.count_parameters(include_model=True) == WIDTH * WIDTH + whole
    model.disable_model_gradients()
    assert [tuple(p.shape) for p in model.get_trainable_parameters()] == [(WIDTH, WIDTH)]
