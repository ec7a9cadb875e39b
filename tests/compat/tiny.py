"""Two tiny models whose numbers come from a formula, so that other libraries can have the same ones."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WIDTH, LAYERS, HEADS, VOCABULARY = 16, 2, 4, 40


def filled(model: nn.Module) -> Any:
    """The model with every parameter set by a formula; norms stay near 1."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
            wave = torch.sin(torch.arange(parameter.numel()).double() * (0.7 + 0.013 * number) + number)
            norm = parameter.dim() == 1 and "weight" in name
            parameter.copy_((0.2 * wave + 1.0 if norm else 0.35 * wave).reshape(parameter.shape))
    return model.eval()


def tiny_gpt2() -> Any:
    """GPT-2 with two blocks of four heads."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 32,
    }  # fmt: skip
    return filled(GPT2LMHeadModel(GPT2Config(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)))


def tiny_llama() -> Any:
    """Llama with two blocks of four heads, two of them for keys and values."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": 2, "intermediate_size": 24,
    }  # fmt: skip
    extra = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 32}
    return filled(LlamaForCausalLM(LlamaConfig(**sizes, **extra, tie_word_embeddings=False)))


def ids(*rows: str) -> dict[str, Tensor]:
    """A batch of rows such as `"5 6 7"`, padded with 0 on the right."""
    lists = [[int(token) for token in row.split()] for row in rows]
    width = max(map(len, lists))
    padded = [row + [0] * (width - len(row)) for row in lists]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in lists]
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}


def tiny_tokenizer(padding_side: str = "right") -> Any:
    """A tokenizer whose tokens are the words `a` to `z` and their doubles, `aa` to `jj`."""
    letters = [chr(code) for code in range(97, 123)]
    pieces = ["<pad>", "<s>", "</s>", *letters, *(letter * 2 for letter in letters[:10])]
    tokenizer = Tokenizer(models.WordLevel({piece: n for n, piece in enumerate(pieces)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side=padding_side,
        model_max_length=32,
    )


BASE = ids("5 6 7 8 9 10")
SOURCE = ids("15 16 17 18 19 20")
OTHER = ids("25 3 27 4 29 30")
PAIR = ids("5 6 7 8 9 10", "11 12 13")
PAIR_SOURCE = ids("15 16 17 18 19 20", "21 22 23")
