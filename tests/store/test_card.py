from __future__ import annotations

import re

import pytest
import yaml

from reftlab.runtime.saving import save
from reftlab.store import model_card
from tests.store import cases


def front_matter(card):
    matter = re.match(r"---\n(.*?)\n---\n\n", card, re.DOTALL)
    assert matter is not None
    return yaml.safe_load(matter[1])


@pytest.fixture
def card(bound, tmp_path):
    return (save(bound, tmp_path / "a") / "README.md").read_text()


def test_the_card_tells_what_the_artifact_is(card):
    for needed in (
        "# Interventions on LlamaForCausalLM",
        "## Base model",
        "- hidden size: 24",
        "- num hidden layers: 3",
        "## Edits",
        "| edit | `blocks[1].output` | `span('Tower')` | `LoReFT(rank=2)` | h + s Rᵀ(f(W h + b) − R h) |",
        "| zero | `blocks[0].mlp.output` | `first` | `Zero(), strength 0.25` | 0 |",
        "| steer | `blocks[2].output` | `all` | `Add(value=tensor(24,))` | h + value",
        "98 trainable numbers",
        "## Training",
        "- epochs: 30",
        "- learning rate: 0.004",
        "- examples: 10",
        "## Use",
        "rl.load_model('LlamaForCausalLM')",
        "chat=True",
    ):
        assert needed in card, needed


def test_the_front_matter_is_yaml(card):
    matter = front_matter(card)
    assert matter["library_name"] == "reftlab"
    assert matter["base_model"] == "LlamaForCausalLM"
    assert "reft" in matter["tags"]


@pytest.mark.parametrize("name", ["a/b", "it's", 'say "so"', "C:\\models\\x", "yes", "a: b # c", "模型 🦊"])
def test_any_model_name_makes_valid_front_matter_and_code(name):
    card = model_card(cases.InterventionGraph(), {"base_model": {"name": name}}, 0)
    assert front_matter(card)["base_model"] == name
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    compile(code, "card", "exec")
    assert repr(name) in code


def test_without_training_the_card_has_no_training_section():
    card = model_card(cases.InterventionGraph(), {}, 0)
    assert "## Training" not in card
    assert "the base model" in card


@pytest.mark.parametrize("text", ["a|b", "`code`", "``", "<script>", "*bold*"])
def test_text_in_positions_stays_inside_its_cell(text):
    graph = cases.one(cases.Zero(), positions=f"span({text!r})")
    row = next(line for line in model_card(graph, {}, 0).splitlines() if line.startswith("| edit | `"))
    assert len(re.split(r"(?<!\\)\|", row)) == 7
    shown = row.replace("\\|", "|")
    assert f"span({text!r})" in shown
    ticks = max((len(run) for run in re.findall("`+", text)), default=0) + 1
    assert "`" * ticks in row.split("span(")[0].rpartition("|")[2]


def test_sources_phases_and_views_are_on_the_card():
    swap = cases.one(cases.Swap(), "blocks[1].attn.heads", heads=[1], source=cases.Read(run="other"))
    graph = swap + cases.InterventionGraph(
        cases.Edit("late", at="blocks[0].output", positions="all", intervention=cases.Zero(), phase="decode")
    )
    card = model_card(graph, {}, 0)
    assert "blocks[1].attn.heads, heads 1" in card
    assert "source Read(run='other')" in card
    assert "all, phase decode" in card
