"""What `inspect` says of a model."""

from __future__ import annotations

import pytest
import transformers as hf
from torch import nn

import reftlab as rl
from tests.models import HEADS, WIDTH, ZOO, build, inputs_of


def lines_of(name: str, **options: object) -> dict[str, rl.ModuleLine]:
    return {line.path: line for line in rl.inspect(build(name), **options).lines}


def test_every_portable_name_stands_beside_its_module() -> None:
    lines = lines_of("gpt_neox")
    fused = lines["gpt_neox.layers[*].attention.query_key_value"]
    assert fused.aliases == ("blocks[*].attn.q", "blocks[*].attn.k", "blocks[*].attn.v")
    assert (fused.input_width, fused.output_width) == (WIDTH, 3 * WIDTH)
    attention = lines["gpt_neox.layers[*].attention"]
    assert attention.aliases == (
        "blocks[*].attn.output",
        "blocks[*].attn.scores",
        "blocks[*].attn.pattern",
    )
    assert lines["lm_head"].aliases == ("unembed",)


@pytest.mark.parametrize("name", [name for name in ZOO if name not in ("gru", "mlp")])
def test_no_portable_name_is_left_out(name: str) -> None:
    inspection = rl.inspect(build(name), example=inputs_of(name))
    said = {alias.partition(" at ")[0] for line in inspection.lines for alias in line.aliases}
    assert said == set(rl.portable_names(build(name)))
    assert inspection.found == ""


def test_a_name_for_one_of_several_equal_modules_says_which() -> None:
    norm = lines_of("bert")["bert.encoder.layer[*].output.LayerNorm"]
    assert norm.aliases == ("final_norm.output at [2]",)
    each = lines_of("bert", every=True)
    assert each["bert.encoder.layer[2].output.LayerNorm"].aliases == ("final_norm.output",)
    assert each["bert.encoder.layer[1].output.LayerNorm"].aliases == ()


def test_the_width_of_a_feature_map_is_its_number_of_channels() -> None:
    assert lines_of("resnet")["resnet.encoder.stages[1]"].output_width == 16


def test_what_holds_no_tokens_of_the_row_has_no_width() -> None:
    assert lines_of("llama")["model.rotary_emb"].output_width is None


def test_a_model_without_an_entry_says_what_its_blocks_seem_to_be() -> None:
    config = hf.StableLmConfig(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=HEADS, num_key_value_heads=2,
    )  # fmt: skip
    inspection = rl.inspect(hf.StableLmForCausalLM(config))
    assert "no portable names for StableLmForCausalLM" in inspection.found
    assert "model.layers[*].output, 3 of StableLmDecoderLayer" in inspection.found
    assert inspection.found in str(inspection)
    assert inspection.found in inspection._repr_html_()
    edit = rl.Edit("zero", at="model.layers[*].output", positions="last", intervention=rl.Zero())
    assert len(rl.InterventionGraph(edit).bind(hf.StableLmForCausalLM(config)).edits) == 3


def test_a_model_whose_inputs_nobody_knows_is_listed_without_widths() -> None:
    inspection = rl.inspect(nn.Sequential(nn.Linear(3, 5), nn.ReLU()))
    assert [line.path for line in inspection.lines] == ["[0]", "[1]"]
    assert inspection.lines[0].output_width is None
    assert "Give example=" in inspection.found
    known = rl.inspect(build("mlp"), example=inputs_of("mlp"))
    assert known.lines[0].output_width == 48
    assert "example" not in known.found
