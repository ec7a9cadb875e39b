"""Four of the five cases by which pyreft's README tells ReFT from LoRA and adapters, against plain hooks.

The README is that of pyreft 0.1.0, "What makes ReFT different from LoRA or PEFTs?" (Wu et al. 2024,
arXiv:2404.03592). Its cases I to IV compare counts of parameters; case V, in
`test_pyreft_fifth_study`, names four constructions.
Every count is checked in a model of the size that the README uses, Llama 7B, whose weights are left out
(torch's meta device), against the arithmetic written out here; those of cases I, II and IV in a tiny model too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reftlab as rl
from tests.contracts.studies import (
    LENGTHS,
    LLAMA_ALL,
    LLAMA_HIDDEN,
    LLAMA_WIDTH,
    adapter,
    all_of,
    assert_equals_hooks,
    bound,
    counted,
    edit,
    first_of,
    last_of,
    llama_7b,
    lora_count,
    nodireft,
    output_projection,
    sides,
)
from tests.models import WIDTH, batch_of, build, copy_of
from tests.oracle import (
    assert_close,
    loreft,
    plain_edit,
    raw_blocks,
)


class _LoRA(rl.Intervention):
    """`h + B A x` with the layer's input x as the source: LoRA, Hu et al. (2021, arXiv:2106.09685)."""

    takes_source = "required"

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def setup(self, width: int) -> None:
        self.a = nn.Parameter(torch.empty(self.rank, width))
        self.b = nn.Parameter(torch.empty(width, self.rank))

    def forward(self, base: Tensor, source: Tensor | None = None) -> Tensor:
        assert source is not None
        return base + source @ self.a.T @ self.b.T


def test_the_readmes_first_counts_come_out_on_the_model_that_it_uses() -> None:
    """LoReFT of rank 4 has 32,772 numbers and ConsReFT of rank 1 has 4,097; LoRA of rank 4 32,768."""
    reft = rl.InterventionGraph(edit("e", "model.layers[15].output", "last", rl.LoReFT(rank=4))).bind(
        llama_7b()
    )
    assert reft.plan().base_parameters == LLAMA_ALL
    assert reft.plan().parameters == 4 * LLAMA_WIDTH + 4 * LLAMA_WIDTH + 4 == 32_772
    assert counted(llama_7b(), edit("e", "model.layers[15].output", "last", rl.ConsReFT(rank=1))) == 4_097
    assert lora_count(4, LLAMA_WIDTH, LLAMA_WIDTH) == 32_768


class TestCaseOne:
    """LoRA on `o_proj`, ReFT on its output at every token, and at the first token alone."""

    @pytest.mark.parametrize("positions", ["all", "first"])
    def test_reft_has_loras_count_wherever_it_acts(self, positions: str) -> None:
        at = "model.layers[15].self_attn.o_proj.output"
        got = counted(llama_7b(), edit("e", at, positions, rl.NodiReFT(rank=4, bias=False)))
        assert got == lora_count(4, LLAMA_WIDTH, LLAMA_WIDTH)
        tiny = build("qwen2")
        got = counted(tiny, edit("e", "blocks[1].attn.output", positions, rl.NodiReFT(rank=3, bias=False)))
        weight = output_projection(tiny, 1).weight
        assert got == lora_count(3, weight.shape[1], weight.shape[0]) == 2 * 3 * WIDTH

    @torch.no_grad()
    @sides
    @pytest.mark.parametrize("choose", [all_of, first_of])
    def test_reft_acts_on_the_projections_output(self, any_model: Any, side: str, choose: Any) -> None:
        batch = batch_of(LENGTHS, side)
        positions = "all" if choose is all_of else "first"
        at = "blocks[1].attn.output"
        reft = bound(any_model, edit("e", at, positions, rl.NodiReFT(rank=3, bias=False)))
        built, mask = reft.interventions["e"], batch["attention_mask"]
        change = plain_edit(
            output_projection(any_model, 1), mask, choose(mask), lambda h, s, n: nodireft(built, h)
        )
        assert_equals_hooks(reft, batch, change)

    @torch.no_grad()
    @sides
    @pytest.mark.parametrize("family", ["gpt2", "qwen2", "bert"])
    def test_lora_is_an_edit_whose_source_is_the_projections_input(self, family: str, side: str) -> None:
        """Its oracle is what the README says of it: `(W + B A) x`, the weights merged."""
        model, batch = build(family), batch_of(LENGTHS, side)
        source = rl.Read("blocks[1].attn.heads")
        reft = bound(model, edit("lora", "blocks[1].attn.output", "all", _LoRA(3), source=source))
        lora, merged = reft.interventions["lora"], copy_of(model)
        weight = output_projection(merged, 1).weight
        update = lora.b @ lora.a
        weight += update.T if family == "gpt2" else update
        real = batch["attention_mask"].bool()
        assert_close(reft(**batch).logits[real], merged(**batch).logits[real], 1e-4)
        assert (merged(**batch).logits - model(**batch).logits).abs().max() > 1e-2
        assert reft.plan().parameters == lora_count(3, WIDTH, WIDTH)


class TestCaseTwo:
    """LoRA on the MLP's second matrix, ReFT on the residual stream at every token."""

    def test_lora_has_more_parameters(self) -> None:
        at, intervention = "model.layers[15].output", rl.NodiReFT(rank=4, bias=False)
        reft, lora = (
            counted(llama_7b(), edit("e", at, "all", intervention)),
            lora_count(4, LLAMA_HIDDEN, LLAMA_WIDTH),
        )
        assert (reft, lora) == (4 * 2 * 4096, 4 * (11008 + 4096))
        assert reft < lora
        tiny = build("llama")
        down = raw_blocks(tiny)[1].mlp.down_proj.weight
        got = counted(tiny, edit("e", "blocks[1].output", "all", rl.NodiReFT(rank=4, bias=False)))
        assert got == 4 * 2 * WIDTH
        assert lora_count(4, down.shape[1], down.shape[0]) - got == 4 * (48 - WIDTH)

    @torch.no_grad()
    @sides
    def test_before_and_behind_the_residual_sum_are_two_places(self, any_model: Any, side: str) -> None:
        """LoRA's place is what the MLP adds; that of the edit is the sum, which the MLP's change enters."""
        batch = batch_of(LENGTHS, side)
        mask = batch["attention_mask"]
        intervention = rl.NodiReFT(rank=3, bias=False)
        behind = bound(any_model, edit("e", "blocks[1].output", "all", intervention))
        built = behind.interventions["e"]
        change = plain_edit(raw_blocks(any_model)[1], mask, all_of(mask), lambda h, s, n: nodireft(built, h))
        assert_equals_hooks(behind, batch, change)
        before = bound(any_model, edit("e", "blocks[1].mlp.output", "all", intervention))
        before.interventions["e"].load_state_dict(built.state_dict())
        assert (before(**batch).logits - behind(**batch).logits)[mask.bool()].abs().max() > 1e-2


class TestCaseThree:
    """An adapter on the residual stream at every token, and ReFT at the first token alone."""

    def test_the_counts_are_the_same(self) -> None:
        everywhere, first = (
            counted(llama_7b(), edit("e", "model.layers[15].output", positions, rl.Adapter(bottleneck=4)))
            for positions in ("all", "first")
        )
        assert everywhere == first == (4 * LLAMA_WIDTH + 4) + (LLAMA_WIDTH * 4 + LLAMA_WIDTH)
        bare = (
            nn.Linear(LLAMA_WIDTH, 4, bias=False, device="meta"),
            nn.Linear(4, LLAMA_WIDTH, False, device="meta"),
        )
        without_biases = edit("e", "model.layers[15].output", "first", rl.NodiReFT(rank=4, bias=False))
        assert counted(llama_7b(), without_biases) == sum(layer.weight.numel() for layer in bare)

    @torch.no_grad()
    @sides
    @pytest.mark.parametrize("choose", [all_of, first_of])
    def test_each_acts_at_its_tokens(self, any_model: Any, side: str, choose: Any) -> None:
        batch = batch_of(LENGTHS, side)
        mask, positions = batch["attention_mask"], "all" if choose is all_of else "first"
        reft = bound(any_model, edit("e", "blocks[1].output", positions, rl.Adapter(bottleneck=3)))
        built = reft.interventions["e"]
        assert_equals_hooks(
            reft,
            batch,
            plain_edit(raw_blocks(any_model)[1], mask, choose(mask), lambda h, s, n: adapter(built, h)),
        )


class TestCaseFour:
    """One edit for the first token and another for the last, and an adapter for all tokens alike."""

    @staticmethod
    def edits(at: str, make: Any) -> tuple[rl.Edit, rl.Edit]:
        return edit("first", at, "first", make()), edit("last", at, "last", make())

    @pytest.mark.parametrize(
        "make",
        [
            lambda: rl.Adapter(bottleneck=4),
            lambda: rl.LoReFT(rank=4),
            lambda: rl.NodiReFT(rank=4, bias=False),
        ],
    )
    def test_two_edits_have_twice_the_count(self, make: Any) -> None:
        for model, at in ((llama_7b(), "model.layers[15].output"), (build("gpt2"), "blocks[1].output")):
            assert counted(model, *self.edits(at, make)) == 2 * counted(model, edit("e", at, "all", make()))

    @torch.no_grad()
    @sides
    def test_each_token_has_its_own_edit(self, any_model: Any, side: str) -> None:
        batch = batch_of(LENGTHS, side)
        mask, block = batch["attention_mask"], raw_blocks(any_model)[1]
        reft = bound(any_model, *self.edits("blocks[1].output", lambda: rl.LoReFT(rank=3)))
        first, last = reft.interventions["first"], reft.interventions["last"]
        assert not torch.equal(first.basis.weight, last.basis.weight)
        expected = assert_equals_hooks(
            reft,
            batch,
            plain_edit(block, mask, first_of(mask), lambda h, s, n: loreft(first, h)),
            plain_edit(block, mask, last_of(mask), lambda h, s, n: loreft(last, h)),
        )
        with plain_edit(block, mask, all_of(mask), lambda h, s, n: loreft(first, h)):
            alike = any_model(**batch).logits
        assert (alike - expected)[mask.bool()].abs().max() > 1e-2
