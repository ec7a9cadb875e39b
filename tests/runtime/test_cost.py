"""A forward pass with edits does little more than the bare one."""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import reftlab as rl
from reftlab.runtime.window import Layout


def test_thirty_edits_of_one_position_look_it_up_once(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    select = Layout.select

    def counted(self: Layout, position: Any, *rest: Any) -> Any:
        looked.append(str(position))
        return select(self, position, *rest)

    monkeypatch.setattr(Layout, "select", counted)
    edits = [
        rl.Edit(f"e{k}", at="blocks[*].output", positions="last", intervention=rl.Add(0.1)) for k in range(10)
    ]
    reft = rl.InterventionGraph(*edits).bind(llama)
    reft(input_ids=torch.ones(2, 5, dtype=torch.long))
    assert looked == ["last"]


@torch.inference_mode()
def test_edits_cost_a_small_share_of_a_forward_pass(users_call: None) -> None:
    """The benchmark measures the ratio; this only notices when it is out of all proportion."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2000, hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8
    )
    model = LlamaForCausalLM(config).eval()
    edit = rl.Edit("edit", at="blocks[*].output", positions="last", intervention=rl.LoReFT(rank=4))
    reft = rl.InterventionGraph(edit).bind(model)
    inputs = {"input_ids": torch.randint(0, 2000, (8, 128))}
    ratios = []
    for _ in range(9):
        times = []
        for call in (model, reft):
            started = time.perf_counter()
            call(**inputs)
            times.append(time.perf_counter() - started)
        ratios.append(times[1] / times[0])
    assert statistics.median(ratios) < 1.3
