"""The README's programs run as they stand there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import reftlab as rl
from tests.compat.tiny import tiny_llama

README = Path(__file__).parent.parent / "README.md"
THINGS = ["sea", "dog", "cake", "city", "song", "book", "game", "hill"]
SAVED_BY_PYREFT = Path(__file__).parent / "compat" / "data" / "LoreftIntervention"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.S)


def test_the_programs_run_one_after_the_other(tmp_path: Path, monkeypatch: Any, users_call: None) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    ten_lines, interchange, together = blocks("python")[:3]
    # The report with as few runs as may be: its sections have tests of their own.
    quick = ten_lines.replace('🌊🐠🐚")]).save', '🌊🐠🐚")], runs=8, max_edits=1, draws=1).save')
    assert quick != ten_lines
    exec(quick, names)
    check_ten_lines(names)
    check_mistake(names["model"])
    tokenizer = names["tokenizer"]
    names["clean"], names["corrupt"] = (
        tokenizer(f"The capital of {place} is", return_tensors="pt") for place in ("France", "Italy")
    )
    emoji = names["reft"]
    exec(interchange, names)
    check_interchange(names)
    graph = rl.InterventionGraph(
        rl.Edit("formal", at="blocks[20].output", positions="last", intervention=rl.LoReFT(rank=2))
    )
    prompts = ["What is the sea like?", "Tell me about cats.", "Who are you?"]
    names |= {"emoji": emoji, "formal": graph.bind(names["model"], tokenizer), "prompts": prompts}
    exec(together, names | {"batch": tokenizer(prompts, return_tensors="pt", padding=True)})
    cone, patching = blocks("python")[3:5]
    exec(cone, names | {"reft": emoji, "examples": [("What is the sea like?", "🌊🐠🐚")]})
    check_patching(names["model"], patching, {"rl": rl, "model": names["model"], "tokenizer": tokenizer})
    check_probing(blocks("python")[5], {"rl": rl, "model": names["model"], "tokenizer": tokenizer})


def check_probing(program: str, names: dict[str, Any]) -> None:
    names["texts"] = [f"I {verb} the {thing}" for verb in ("love", "hate") for thing in THINGS]
    names["labels"] = ["good"] * len(THINGS) + ["bad"] * len(THINGS)
    exec(program, names)
    assert names["found"].significant(0.05).any()
    assert names["steer"].vector.shape == (576,)


def check_patching(model: Any, program: str, names: dict[str, Any]) -> None:
    exec(program, names)
    logits = model(**names["tokenizer"](names["clean"], return_tensors="pt")).logits[0, -1]
    mary, john = (names["tokenizer"].encode(name)[0] for name in (" Mary", " John"))
    assert names["found"].clean[0] == pytest.approx(float(logits[mary] - logits[john]), abs=1e-3)
    assert names["vectors"]["blocks[5].output @ last"].shape == (2, model.config.hidden_size)


def check_ten_lines(names: dict[str, Any]) -> None:
    assert len([line for line in blocks("python")[0].splitlines() if line]) <= 11
    assert names["reft"].facts["training"]["loss"] < 0.5
    assert "emoji" in Path("report.html").read_text(encoding="utf-8")
    again = rl.load("emoji", names["model"], names["tokenizer"])
    assert rl.reply(again, "What is summer like?") == rl.reply(names["reft"], "What is summer like?")


def check_mistake(model: Any) -> None:
    [shown] = re.findall(r"```\n(AddressError.*?)```", README.read_text(encoding="utf-8"), re.S)
    graph = rl.InterventionGraph(rl.Edit("x", at="model.layers[8].self_atn.output", intervention=rl.Zero()))
    with pytest.raises(rl.AddressError) as told:
        graph.bind(model)
    assert f"AddressError: {told.value}".split() == shown.split()


def check_interchange(names: dict[str, Any]) -> None:
    bare = names["model"](**names["clean"]).logits
    assert not torch.allclose(names["logits"][0, -1], bare[0, -1], atol=1e-2)
    assert torch.allclose(names["logits"][0, :-1], bare[0, :-1], atol=1e-4)


def test_what_pyreft_saved_loads(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SAVED_BY_PYREFT, "saved_by_pyreft")
    names: dict[str, Any] = {"rl": rl, "model": tiny_llama()}
    exec(blocks("python")[-1], names)
    assert isinstance(names["reft_model"].reft, rl.BoundModel)


def test_every_program_is_run_here() -> None:
    assert len(blocks("python")) == 7


def test_the_configuration_is_a_configuration(tmp_path: Path) -> None:
    [text] = blocks("yaml")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"question": "What is the sea like?", "reply": "🌊"}\n', encoding="utf-8")
    config = yaml.safe_load(text)
    config["data"]["path"] = str(pairs)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    experiment = rl.Experiment.from_yaml(tmp_path / "config.yaml")
    assert experiment.training["epochs"] == 60
    assert len(experiment.graph.edits) == 1
