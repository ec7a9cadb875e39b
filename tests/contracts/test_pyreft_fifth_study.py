"""Case V of pyreft's README: what is easily said with representation edits alone, against plain hooks.

See `test_pyreft_studies` for the source.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import reftlab as rl
from tests.contracts.studies import (
    LENGTHS,
    LLAMA_WIDTH,
    assert_equals_hooks,
    bound,
    counted,
    edit,
    first_of,
    last_of,
    llama_7b,
    lora_count,
    sides,
)
from tests.models import WIDTH, batch_of
from tests.oracle import (
    assert_close,
    columns_by_hand,
    gathered,
    loreft,
    orthonormal,
    plain_edit,
    plain_read,
    raw_blocks,
)


def test_one_edit_of_two_joined_tokens_has_twice_the_width() -> None:
    joined = edit("e", "model.layers[15].output", "joined(last(2))", rl.LoReFT(rank=4))
    assert counted(llama_7b(), joined) == 2 * (4 * 2 * LLAMA_WIDTH) + 4 == 65_540


@torch.no_grad()
@sides
def test_one_edit_of_two_joined_tokens_writes_both_from_both(any_model: Any, side: str) -> None:
    batch = batch_of(LENGTHS, side)
    mask = batch["attention_mask"]
    reft = bound(any_model, edit("e", "blocks[1].output", "joined(last(2))", rl.LoReFT(rank=3)))
    built = reft.interventions["e"]

    def change(h: Tensor, source: Tensor | None, numbers: list[int]) -> Tensor:
        rows = [torch.cat([h[2 * row], h[2 * row + 1]]) for row in range(len(h) // 2)]
        halves = [vector.split(WIDTH) for vector in loreft(built, torch.stack(rows))]
        return torch.stack([half for row in halves for half in row])

    assert_equals_hooks(reft, batch, plain_edit(raw_blocks(any_model)[1], mask, last_of(mask, 2), change))
    assert reft.plan().parameters == 3 * 2 * WIDTH * 2 + 3


def test_two_edits_of_rank_4_have_the_count_of_one_of_rank_8() -> None:
    at = "model.layers[15].output"
    halves = [edit(name, at, f"{name}(3)", rl.NodiReFT(rank=4, bias=False)) for name in ("first", "last")]
    assert counted(llama_7b(), *halves) == lora_count(8, LLAMA_WIDTH, LLAMA_WIDTH) == 65_536


@torch.no_grad()
@sides
def test_a_rank_8_update_is_split_between_two_groups_of_tokens(any_model: Any, side: str) -> None:
    """The halves of one pair of LoRA matrices, `B A x = B₁ A₁ x + B₂ A₂ x`, each at its own tokens."""
    batch = batch_of(LENGTHS, side)
    mask, block = batch["attention_mask"], raw_blocks(any_model)[1]
    reft = bound(
        any_model,
        edit("first", "blocks[1].output", "first(2)", rl.NodiReFT(rank=4, bias=False)),
        edit("last", "blocks[1].output", "last(2)", rl.NodiReFT(rank=4, bias=False)),
    )
    a, b = torch.randn(8, WIDTH) * 0.5, torch.randn(WIDTH, 8) * 0.5
    for name, own in (("first", slice(0, 4)), ("last", slice(4, 8))):
        reft.interventions[name].linear.weight.copy_(a[own])
        reft.interventions[name].projection.weight.copy_(b[:, own].T)

    def part(own: list[int]) -> Any:
        chosen = torch.zeros(8)
        chosen[own] = 1.0
        return lambda h, s, n: h + (h @ a.T * chosen) @ b.T

    assert_equals_hooks(
        reft,
        batch,
        plain_edit(block, mask, first_of(mask, 2), part([0, 1, 2, 3])),
        plain_edit(block, mask, last_of(mask, 2), part([4, 5, 6, 7])),
    )


@torch.no_grad()
@sides
def test_one_intervention_of_rank_8_acts_in_half_of_its_basis_at_each_group(
    any_model: Any, side: str
) -> None:
    batch = batch_of(LENGTHS, side)
    mask, block = batch["attention_mask"], raw_blocks(any_model)[1]
    groups = {"first": [0, 1, 2, 3], "last": [4, 5, 6, 7]}
    reft = bound(
        any_model,
        *(
            edit(name, "blocks[1].output", f"{name}(2)", rl.LoReFT(rank=8), share="rank8", subspace=half)
            for name, half in groups.items()
        ),
    )
    built = reft.interventions["rank8"]
    assert list(reft.interventions) == ["rank8"]
    assert sum(p.numel() for p in reft.interventions.parameters()) == 8 * 2 * WIDTH + 8
    assert_equals_hooks(
        reft,
        batch,
        plain_edit(block, mask, first_of(mask, 2), lambda h, s, n: loreft(built, h, groups["first"])),
        plain_edit(block, mask, last_of(mask, 2), lambda h, s, n: loreft(built, h, groups["last"])),
    )


@torch.no_grad()
@sides
def test_one_edit_hangs_on_the_similarity_of_two_other_representations(any_model: Any, side: str) -> None:
    batch = batch_of(LENGTHS, side)
    mask = batch["attention_mask"]
    hidden = plain_read(any_model, raw_blocks(any_model)[0], batch)
    a, b = (
        gathered(hidden, first_of(mask)),
        gathered(hidden, columns_by_hand(mask, lambda real: real[1:2])),
    )
    cosines = torch.stack([u @ v / (u.norm() * v.norm()) for u, v in zip(a, b, strict=True)])
    limit = float(cosines.sort().values[:2].mean())
    when = rl.cosine("blocks[0].output @ first", "blocks[0].output @ [1]") > limit
    reft = bound(any_model, edit("e", "blocks[1].output", "last", rl.LoReFT(rank=3), when=when))
    built = reft.interventions["e"]
    chosen = [c if bool(keep) else [] for c, keep in zip(last_of(mask), cosines > limit, strict=True)]
    assert 0 < sum(map(len, chosen)) < len(chosen)
    assert_equals_hooks(
        reft, batch, plain_edit(raw_blocks(any_model)[1], mask, chosen, lambda h, s, n: loreft(built, h))
    )


def test_a_condition_costs_no_parameter() -> None:
    similar = rl.cosine("model.layers[10].output @ first", "model.layers[10].output @ last") > 0.5
    conditional = edit("e", "model.layers[15].output", "last", rl.LoReFT(rank=4), when=similar)
    assert counted(llama_7b(), conditional) == 32_772


@torch.no_grad()
@sides
def test_one_edit_stays_in_a_linear_subspace_of_the_last_token(any_model: Any, side: str) -> None:
    batch, keep = batch_of(LENGTHS, side), [0, 2]
    mask = batch["attention_mask"]
    reft = bound(any_model, edit("e", "blocks[1].output", "last", rl.LoReFT(rank=4), subspace=keep))
    built = reft.interventions["e"]
    change = plain_edit(raw_blocks(any_model)[1], mask, last_of(mask), lambda h, s, n: loreft(built, h, keep))
    assert_equals_hooks(reft, batch, change)
    site = "blocks[1].output @ last"
    with reft.disabled():
        bare = reft.read(site, **batch)[site][:, 0]
    moved = reft.read(site, **batch)[site][:, 0] - bare
    inside = orthonormal(built.basis.weight)[:, keep]
    outside = torch.linalg.qr(inside, mode="complete").Q[:, len(keep) :]
    assert_close(moved @ outside, torch.zeros(len(moved), WIDTH - len(keep)))
    assert (moved @ inside).abs().min() > 1e-3


def test_a_subspace_leaves_the_count_as_it_is() -> None:
    whole, half = (
        counted(llama_7b(), edit("e", "model.layers[15].output", "last", rl.LoReFT(rank=4), subspace=chosen))
        for chosen in (None, [0, 2])
    )
    assert whole == half == 32_772
