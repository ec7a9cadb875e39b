"""Calls that continue a cache, in models whose caches do not say how long they are, and steps of two stacks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

import reftlab as rl
from tests.oracle import assert_close


class Noting(rl.Intervention):
    """Changes nothing, and notes the tokens that it is given."""

    counts_positions = True
    seen: list[list[int]]

    def forward(self, base: Tensor, source: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        assert positions is not None
        self.__dict__.setdefault("seen", []).append(positions.tolist())
        return base


@pytest.mark.parametrize("compiled", [False, True], ids=["bare", "compiled"])
@torch.no_grad()
def test_steps_of_a_state_space_model_cover_one_token_each(compiled: bool) -> None:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2)
    model: Any = MambaForCausalLM(config).eval()
    if compiled:
        model = torch.compile(model, backend="eager")
    edit = rl.Edit("e", at="blocks[0].output", positions="all", phase="both", intervention=Noting())
    reft = rl.InterventionGraph(edit).bind(model)
    ids = torch.randint(0, 50, (1, 9))
    cache = reft(input_ids=ids[:, :5], use_cache=True).cache_params
    for column in range(5, 9):
        reft(input_ids=ids[:, column : column + 1], cache_params=cache, use_cache=True)
    assert reft.interventions["e"].seen == [[0, 1, 2, 3, 4], [5], [6], [7], [8]]


@pytest.fixture
def t5() -> Any:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


@torch.no_grad()
def test_a_decoders_step_may_have_the_mask_of_the_whole_sequence(t5: Any) -> None:
    edit = rl.Edit(
        "e", at="decoder.blocks[0].output", positions="all", phase="both", intervention=rl.Scale(2.0)
    )
    reft = rl.InterventionGraph(edit).bind(t5)
    texts, answer = torch.randint(1, 50, (2, 6)), torch.randint(1, 50, (2, 4))
    whole = reft(
        input_ids=texts, decoder_input_ids=answer, decoder_attention_mask=torch.ones(2, 4, dtype=torch.long)
    ).logits
    first = reft(input_ids=texts, decoder_input_ids=answer[:, :3], use_cache=True)
    step = reft(
        input_ids=texts, decoder_input_ids=answer[:, 3:], past_key_values=first.past_key_values,
        decoder_attention_mask=torch.ones(2, 4, dtype=torch.long),
    ).logits  # fmt: skip
    assert_close(step[:, 0], whole[:, 3], 1e-4)


def test_attention_belongs_to_its_stack_though_both_have_as_many_tokens(t5: Any) -> None:
    example = {name: torch.zeros(2, 6, dtype=torch.long) for name in ("input_ids", "decoder_input_ids")}
    sites = ("encoder.blocks[0].attn.pattern", "decoder.blocks[0].attn.pattern", "decoder.blocks[0].output")
    edits = [rl.Edit(f"e{n}", at=site, intervention=rl.Scale(2.0)) for n, site in enumerate(sites)]
    bound = rl.InterventionGraph(*edits).bind(t5, example=example)
    streams = {edit.key: edit.place.stream for edit in bound.edits}
    assert streams == {"e0": "tokens", "e1": "decoder", "e2": "decoder"}


@torch.no_grad()
def test_a_call_in_which_nothing_acts_is_the_bare_models(llama: Any) -> None:
    edit = rl.Edit("e", at="blocks[0].output", positions="last", intervention=rl.Zero())
    reft, ids = rl.InterventionGraph(edit).bind(llama), torch.randint(1, 20, (2, 6))
    cache = llama(input_ids=ids[:, :5], use_cache=True).past_key_values
    step = {"input_ids": ids[:, 5:], "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    expected = llama(**step, past_key_values=copy.deepcopy(cache)).logits
    for options in ({}, {"tasks": [None, None]}):
        with reft.disabled():
            got = reft(**step, past_key_values=copy.deepcopy(cache), **options).logits
        assert torch.equal(got, expected)
    with reft.disabled(), pytest.raises(rl.RunError, match="tasks has 3 entries and the batch 2 rows"):
        reft(**step, past_key_values=cache, tasks=[None, None, None])


@torch.no_grad()
def test_a_read_of_a_recurrent_cell_waits_for_its_time_step_however_late() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(len(x), 4)
            for step in range(x.shape[1]):
                h = self.cell(x[:, step], h)
            return h

    torch.manual_seed(0)
    net, x = Cell(), torch.randn(2, 4600, 3)
    bound = rl.InterventionGraph(rl.Read("cell.output", [4500, 4599], name="r")).bind(net, example=x[:, :5])
    found = bound.read(x=x)["r"]
    assert_close(found[:, 0], net(x[:, :4501]))
    assert_close(found[:, 1], net(x))


def test_a_compiled_model_is_listed_with_its_widths(llama: Any) -> None:
    compiled = torch.compile(copy.deepcopy(llama), backend="eager")
    widths = {line.path.removeprefix("_orig_mod."): line.output_width for line in rl.inspect(compiled).lines}
    for line in rl.inspect(llama).lines:
        assert widths[line.path] == line.output_width
