"""Tiny random models of five families, inputs for them, and a tokenizer of whole words."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "bert")
CAUSAL = tuple(family for family in FAMILIES if family != "bert")

VOCABULARY, WIDTH, LAYERS, HEADS, KEY_VALUE_HEADS, HEAD_SIZE = 200, 32, 3, 4, 2, 12
PAD = 0

_GROUPED: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KEY_VALUE_HEADS, "head_dim": HEAD_SIZE,
    "max_position_embeddings": 64, "initializer_range": 0.15, "pad_token_id": PAD, "bos_token_id": 1,
    "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip


def build_model(family: str) -> PreTrainedModel:
    """A new model in eval mode, the same numbers each time."""
    torch.manual_seed(11)
    if family == "llama":
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**_GROUPED))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**_GROUPED))
    elif family == "gemma3":
        kinds = ["sliding_attention", "sliding_attention", "full_attention"]
        extra = {"layer_types": kinds, "sliding_window": 8, "query_pre_attn_scalar": HEAD_SIZE}
        model = Gemma3ForCausalLM(Gemma3TextConfig(**_GROUPED, **extra))
    elif family == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=64,
                initializer_range=0.15, pad_token_id=PAD, bos_token_id=1, eos_token_id=None,
            )
        )  # fmt: skip
    else:
        model = BertForMaskedLM(
            BertConfig(
                vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS,
                num_attention_heads=HEADS, intermediate_size=48, max_position_embeddings=64,
                initializer_range=0.15, pad_token_id=PAD,
            )
        )  # fmt: skip
    return model.eval()


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own, for tests that change one."""
    return copy.deepcopy(model)


def batch_of(lengths: tuple[int, ...] = (7, 4, 9), side: str = "right", seed: int = 5) -> dict[str, Tensor]:
    """Random prompts of these lengths, padded to the longest on one side."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, place] = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def with_position_ids(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with positions counted from each row's first real token, as `generate` does."""
    places = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return {**batch, "position_ids": places}


def row_of(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of a batch alone and without its padding."""
    real = batch["attention_mask"][row].bool()
    return {key: value[row][real][None] for key, value in batch.items()}


def hook_count(model: torch.nn.Module) -> int:
    """How many forward hooks and pre-hooks stand on the model's modules, all together."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


WORDS = [
    "the",
    "Eiffel",
    "Tower",
    "is",
    "in",
    "Paris",
    "and",
    "London",
    "John",
    "Mary",
    "gave",
    "a",
    "book",
    "to",
    "friend",
    "said",
    "Question",
    "Answer",
    ":",
    ".",
    "where",
    "what",
    "who",
    "cat",
    "dog",
]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Tokens are words with the space before them; unknown words fall apart into letters."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["<pad>", "<s>", "</s>", "▁", *letters, *(f"▁{word}" for word in WORDS)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        grown = "▁"
        for letter in word:
            merges.append((grown, letter))
            grown += letter
            vocabulary.setdefault(grown, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(dict.fromkeys(merges))))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
