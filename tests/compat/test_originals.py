"""Whole programs of pyreft's and pyvene's users, against what the real libraries computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import reftlab as rl
import reftlab.compat.pyreft as pyreft
import reftlab.compat.pyvene as pv
from reftlab.compat.foreign_files import known_class
from tests.compat.programs import PROGRAMS, REFT_KINDS, SWAP_KINDS
from tests.compat.tiny import BASE, PAIR, PAIR_SOURCE, SOURCE, tiny_gpt2, tiny_llama
from tests.models import hook_count

DATA = Path(__file__).parent / "data"
EXPECTED = load_file(DATA / "expected.safetensors") | load_file(DATA / "expected_dotted.safetensors")
TWO_TOKENS = {"sources->base": (None, [[[2, 5]]])}
DOTTED = ("dotted_LoreftIntervention", "dotted_ConsreftIntervention")


def _same(got: torch.Tensor, name: str) -> None:
    # The Trainer of the older transformers rounded the losses that it logged.
    tolerance = 1e-4 if name == "training.losses" else 1e-5
    torch.testing.assert_close(
        got.detach().float(),
        EXPECTED[name].float(),
        rtol=tolerance,
        atol=tolerance,
        msg=lambda m: f"{name}: {m}",
    )


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_program_computes_what_it_did_with_pyreft_and_pyvene(program: Any) -> None:
    found = program(pyreft, pv)
    assert found
    for name, tensor in found.items():
        _same(tensor, name)


def _loaded(name: str) -> Any:
    if "reft" in name:
        return pyreft.ReftModel.load(DATA / name, tiny_llama())
    return pv.IntervenableModel.load(DATA / name, tiny_gpt2())


def _logits(name: str, model: Any) -> torch.Tensor:
    if "reft" in name:
        return model(BASE, unit_locations=TWO_TOKENS)[1].logits
    return model(BASE, [SOURCE], {"sources->base": 4})[1].logits


@pytest.mark.parametrize("name", [*REFT_KINDS, *DOTTED, *SWAP_KINDS])
def test_an_artifact_of_theirs_does_here_what_it_did_there(name: str) -> None:
    model = _loaded(name)
    _same(_logits(name, model), name)
    assert hook_count(model.model) == 0


@pytest.mark.parametrize("name", [*REFT_KINDS, *SWAP_KINDS])
def test_an_artifact_of_theirs_can_be_saved_here_and_loaded_again(name: str, tmp_path: Path) -> None:
    model = _loaded(name)
    model.save(save_directory=tmp_path / "kept")
    again = type(model).load(tmp_path / "kept", model.model)
    assert torch.equal(_logits(name, again), _logits(name, model))
    native = rl.load(tmp_path / "kept", model.model)
    assert list(native.interventions.state_dict()) == list(model.reft.interventions.state_dict())


def test_a_rotation_of_two_joined_tokens_is_imported() -> None:
    model = pv.IntervenableModel.load(DATA / "joined", tiny_gpt2())
    output = model(BASE, [SOURCE], {"sources->base": ([[[1, 3]]], [[[2, 5]]])})[1]
    _same(output.logits, "joined")
    assert model.count_parameters() == 2 * 16 * 4


def test_each_row_of_a_rotation_in_parts_has_its_own_part() -> None:
    model = pv.IntervenableModel.load(DATA / "parts", tiny_gpt2())
    places = {"sources->base": ([[[2], [2]]], [[[2], [1]]])}
    output = model(PAIR, [PAIR_SOURCE], places, subspaces=[[[0], [1]]])[1]
    _same(output.logits[:, :3], "parts")


@pytest.mark.parametrize("name", ["LoreftIntervention", "dotted_LoreftIntervention"])
def test_an_imported_loreft_is_its_formula_on_the_saved_numbers(name: str) -> None:
    file = next((DATA / name).glob("*.bin"))
    saved = torch.load(file, weights_only=True)
    rotation, weight, bias = (saved[key].double() for key in ("rotate_layer", "weight", "bias"))
    vectors = torch.randn(5, 16)
    by_hand = vectors.double() + (vectors.double() @ (weight.T - rotation) + bias) @ rotation.T
    (built,) = pyreft.load_artifact(DATA / name, tiny_llama()).interventions.values()
    torch.testing.assert_close(built(vectors).double(), by_hand, rtol=1e-5, atol=1e-5)
    compat = known_class("LoreftIntervention")(embed_dim=16, low_rank_dimension=3)
    compat.load_state_dict(saved)
    torch.testing.assert_close(compat(vectors[None])[0].double(), by_hand, rtol=1e-5, atol=1e-5)


def test_an_imported_artifact_is_a_native_bound_model_with_positions() -> None:
    llama = tiny_llama()
    reft = pyreft.load_artifact(DATA / "LoreftIntervention", llama, positions=[2, 5])
    _same(reft(**BASE).logits, "LoreftIntervention")
    assert isinstance(reft, rl.BoundModel)
    (edit,) = reft.graph.edits
    assert (str(edit.at), str(edit.positions)) == ("blocks[1].output", "[2, 5]")
    assert edit.intervention.describe() == "LoReFT(rank=3)"
