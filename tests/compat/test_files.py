"""Folders of pyreft and pyvene: what is read, what is refused, and that nothing in them ever runs."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import reftlab as rl
import reftlab.compat.pyreft as pyreft
import reftlab.compat.pyvene as pv
from reftlab.errors import ArtifactError, BindError, GraphError
from tests.compat.tiny import WIDTH, tiny_gpt2, tiny_llama

DATA = Path(__file__).parent / "data"
FILE = "intkey_layer_1_comp_block_output_unit_pos_nunit_1#0.bin"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return shutil.copytree(DATA / "LoreftIntervention", tmp_path / "saved")


def test_safetensors_are_read_as_well(saved: Path) -> None:
    tensors = {k: v.contiguous() for k, v in torch.load(saved / FILE, weights_only=True).items()}
    save_file(tensors, saved / FILE.replace(".bin", ".safetensors"))
    (saved / FILE).unlink()
    one, other = (
        pyreft.load_artifact(folder, tiny_llama()) for folder in (saved, DATA / "LoreftIntervention")
    )
    mine, theirs = one.interventions.state_dict(), other.interventions.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_code_in_a_file_never_runs(saved: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (mark,))

    torch.save({"weight": Trap()}, saved / FILE, pickle_module=pickle)
    with pytest.raises(ArtifactError, match="holds more than tensors, which is never loaded"):
        pyreft.load_artifact(saved, tiny_llama())
    assert not mark.exists()


def test_a_damaged_or_missing_file_is_named(saved: Path) -> None:
    (saved / FILE).write_bytes((saved / FILE).read_bytes()[:300])
    with pytest.raises(ArtifactError, match=f"{FILE} cannot be read"):
        pyreft.load_artifact(saved, tiny_llama())
    (saved / FILE).unlink()
    with pytest.raises(ArtifactError, match=f"lacks {FILE}, the numbers of"):
        pyreft.load_artifact(saved, tiny_llama())
    (saved / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"config.json is damaged"):
        pyreft.load_artifact(saved, tiny_llama())
    (saved / FILE).write_bytes(b"")
    (saved / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"there is no config.json in .* reft_model.load_intervention"):
        pyreft.load_artifact(saved, tiny_llama())


def test_tensors_of_another_class_are_refused(saved: Path) -> None:
    shutil.copy(DATA / "NoreftIntervention" / FILE, saved / FILE)
    with pytest.raises(ArtifactError, match=r"LoreftIntervention cannot be read from .*proj_layer.weight"):
        pyreft.load_artifact(saved, tiny_llama())


@pytest.mark.parametrize("name", ["__main__.Mine", "os.system", "pyreft.interventions.Unheard"])
def test_a_class_that_is_not_known_is_never_imported(name: str, saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["intervention_types"] = [f"<class '{name}'>"]
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=f"is a {name}, which reftlab does not know and never imports"):
        pyreft.load_artifact(saved, tiny_llama())


def test_other_folders_are_told_apart(saved: Path, tmp_path: Path) -> None:
    (saved / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(
        ArtifactError, match=r"has no representations, so pyreft or pyvene 0.1 did not write it"
    ):
        pyreft.load_artifact(saved, tiny_llama())
    llama = tiny_llama()
    edit = rl.Edit("one", at="blocks[0].output", positions="last", intervention=rl.LoReFT(rank=2))
    rl.InterventionGraph(edit).bind(llama).save(tmp_path / "native")
    with pytest.raises(ArtifactError, match=r"was saved by reft.save\(\); load it with rl.load"):
        pyreft.ReftModel.load(tmp_path / "native", llama)


def test_an_artifact_for_a_wider_model_is_refused() -> None:
    config = transformers.LlamaConfig(**tiny_llama().config.to_dict() | {"hidden_size": 32, "head_dim": 8})
    with pytest.raises(BindError, match=r"embed_dim=16, and vectors at model.layers.1.output are 32 wide"):
        pyreft.load_artifact(DATA / "LoreftIntervention", transformers.LlamaForCausalLM(config))


def test_a_saved_bias_beside_an_activation_cannot_be_one_bias() -> None:
    with pytest.raises(ArtifactError, match="the two biases are one only without an activation"):
        pyreft.load_artifact(DATA / "NoreftIntervention", tiny_llama(), act_fn="relu")


def test_the_activation_that_pyreft_does_not_save_can_be_given() -> None:
    (built,) = pyreft.load_artifact(
        DATA / "LoreftIntervention", tiny_llama(), act_fn="relu"
    ).interventions.values()
    saved = torch.load(next((DATA / "LoreftIntervention").glob("*.bin")), weights_only=True)
    vectors = torch.randn(4, WIDTH)
    inner = (vectors @ saved["weight"].T + saved["bias"]).clamp(min=0)
    by_hand = vectors + (inner - vectors @ saved["rotate_layer"]) @ saved["rotate_layer"].T
    torch.testing.assert_close(built(vectors), by_hand, rtol=1e-5, atol=1e-5)


def test_what_was_saved_of_the_model_is_loaded_only_when_asked(saved: Path) -> None:
    llama = tiny_llama()
    head = llama.lm_head.weight.detach().clone()
    torch.save({"lm_head.weight": head + 1}, saved / "pytorch_model.bin")
    pyreft.ReftModel.load(saved, llama)
    assert torch.equal(llama.lm_head.weight, head)
    pyreft.ReftModel.load(saved, llama, include_model=True)
    assert torch.equal(llama.lm_head.weight, head + 1)
    torch.save({"other.weight": head}, saved / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match=r"has 'other.weight', which this LlamaForCausalLM lacks"):
        pyreft.ReftModel.load(saved, llama, include_model=True)


def test_code_of_the_users_own_cannot_be_saved(tmp_path: Path) -> None:
    entry = {"layer": 0, "component": "block_output", "intervention": lambda base, source: base}
    model = pv.IntervenableModel(entry, model=tiny_gpt2())
    with pytest.raises(GraphError):
        model.save(tmp_path / "x")


def test_numbers_alone_are_loaded_into_a_model_that_is_there(saved: Path) -> None:
    (saved / "config.json").unlink()
    llama = tiny_llama()
    own = pyreft.LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=3)
    entry = {"layer": 1, "component": "block_output", "intervention": own}
    model = pyreft.get_reft_model(llama, pyreft.ReftConfig(representations=[entry]))
    model.load_intervention(saved)
    loaded = pyreft.load_artifact(DATA / "LoreftIntervention", llama).interventions.state_dict()
    mine = model.reft.interventions.state_dict()
    assert all(torch.equal(mine[name], loaded[name]) for name in loaded)
    model.save_intervention(saved.parent / "native")
    with torch.no_grad():
        own.learned_source.weight.zero_()
    model.load_intervention(saved.parent / "native")
    assert torch.equal(own.learned_source.weight, loaded[next(n for n in loaded if "linear.weight" in n)])
    (saved / FILE).unlink()
    with pytest.raises(ArtifactError, match="lacks intkey_"):
        model.load_intervention(saved)
