"""Tiny random models and a tokenizer made by hand: bytes, with a few pieces merged."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import reftlab as rl
from reftlab.runtime import BoundModel

WIDTH = 32
PAIRS = [("the sea", "blue"), ("a cat and a dog", "two"), ("snow on a hill", "cold ☃")]
MERGES = [("Ġ", "a"), ("Ġ", "b"), ("t", "h"), ("th", "e"), ("ð", "Ł"), ("Ġ", "ðŁ")]
CHAT = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    pieces = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    inner = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(pieces)}, merges=MERGES))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>", chat_template=CHAT
    )


def vocabulary() -> int:
    return 1 + 256 + len(MERGES)


@pytest.fixture
def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocabulary(), hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None,
        eos_token_id=0, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def small_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=vocabulary(), n_embd=WIDTH, n_layer=2, n_head=4, n_positions=128, bos_token_id=0,
        eos_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def small_bert() -> BertForMaskedLM:
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=vocabulary(), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=128,
    )  # fmt: skip
    return BertForMaskedLM(config).eval()


class TextMLP(nn.Module):
    """Token by token, without attention, norm or unembedding of any known name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.table = nn.Embedding(vocabulary(), WIDTH)
        self.hidden = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 8))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.hidden(self.table(input_ids))


def bound(model: nn.Module, tokenizer: PreTrainedTokenizerFast | None, *edits: rl.Edit) -> BoundModel:
    example = {"input_ids": torch.zeros(2, 5, dtype=torch.long)}
    return rl.InterventionGraph(*edits).bind(model, tokenizer, example=example)


def loreft(name: str = "shift", at: str = "blocks[1].output", rank: int = 2, **options: object) -> rl.Edit:
    return rl.Edit(name, at=at, positions="last", intervention=rl.LoReFT(rank=rank), **options)


def set_directions(
    built: rl.LoReFT, write: torch.Tensor, gains: torch.Tensor, read: torch.Tensor, bias: torch.Tensor
) -> None:
    """Make a LoReFT's linear part `Σ gain_k write_k read_kᵀ`; write and read have orthonormal rows."""
    with torch.no_grad():
        built.basis.weight.copy_(write.T)
        built.linear.weight.copy_(gains[:, None] * read + write)
        built.linear.bias.copy_(bias)


def orthonormal(count: int, seed: int, width: int = WIDTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, count, generator=generator)).Q.T.contiguous()
