"""What the tests of pyreft's five cases share: counts on Llama 7B, and formulas and hooks by hand."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import reftlab as rl
from tests.oracle import assert_close, columns_by_hand, randomise, raw_blocks

LENGTHS = (7, 4, 9)
LLAMA_WIDTH, LLAMA_HIDDEN, LLAMA_ALL = 4096, 11008, 6_738_415_616
"""Of Llama 7B: Touvron et al. (2023, arXiv:2302.13971), and the README's own count of parameters."""

sides = pytest.mark.parametrize("side", ["left", "right"])


@functools.cache
def llama_7b() -> Any:
    """Llama 7B's shapes without its numbers."""
    with torch.device("meta"):
        return hf.LlamaForCausalLM(hf.LlamaConfig())


def counted(model: Any, *edits: rl.Edit) -> int:
    return rl.InterventionGraph(*edits).bind(model).plan().parameters


def edit(name: str, at: str, positions: Any, intervention: rl.Intervention, **options: Any) -> rl.Edit:
    return rl.Edit(name, at=at, positions=positions, intervention=intervention, **options)


def bound(model: Any, *edits: rl.Edit) -> rl.BoundModel:
    reft = rl.InterventionGraph(*edits).bind(model)
    randomise(reft)
    return reft


def lora_count(rank: int, into: int, out: int) -> int:
    """Numbers in LoRA's two matrices, A `(rank, into)` and B `(out, rank)`."""
    return rank * into + out * rank


def output_projection(model: Any, block: int) -> nn.Module:
    """What the README calls `o_proj`, by the model's own name."""
    raw = raw_blocks(model)[block]
    kind = model.config.model_type
    if kind == "gpt2":
        return raw.attn.c_proj
    return raw.attention.output.dense if kind == "bert" else raw.self_attn.o_proj


def all_of(mask: Tensor) -> list[list[int]]:
    return columns_by_hand(mask, lambda real: real)


def first_of(mask: Tensor, count: int = 1) -> list[list[int]]:
    return columns_by_hand(mask, lambda real: real[:count])


def last_of(mask: Tensor, count: int = 1) -> list[list[int]]:
    return columns_by_hand(mask, lambda real: real[-count:])


def nodireft(built: Any, h: Tensor) -> Tensor:
    return h + h @ built.linear.weight.T @ built.projection.weight


def adapter(built: Any, h: Tensor) -> Tensor:
    inner = (h @ built.down.weight.T + built.down.bias).clamp(min=0)
    return h + inner @ built.up.weight.T + built.up.bias


@torch.no_grad()
def assert_equals_hooks(reft: rl.BoundModel, batch: dict[str, Tensor], *hooks: Any) -> Tensor:
    """Compare with the bare model under plain hooks, at real tokens, and return what they make of it."""
    real, bare = batch["attention_mask"].bool(), reft.model(**batch).logits
    with contextlib.ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(hook)
        expected = reft.model(**batch).logits
    assert_close(reft(**batch).logits[real], expected[real], 1e-4)
    assert (expected - bare)[real].abs().max() > 1e-2
    return expected
