"""Tiny models in which two concepts stand in each word's embedding, and one of them decides the answer."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import reftlab as rl
from tests.models import VOCABULARY, WIDTH, WORDS, build, copy_of, word_tokenizer

YES, NO = 5, 6
"""Tokens whose logits answer."""

FRAME = torch.linalg.qr(torch.randn(WIDTH, 6, generator=torch.Generator().manual_seed(0))).Q.T
"""Orthonormal directions `(6, width)`; the first two carry the concepts."""


@dataclass(frozen=True)
class PlantedTexts:
    """A model, its texts of two words, and for the last word of each both concepts.

    Attributes:
        used, unused: the concept that decides the answer, and one as plain to see that does not.
        words: the last word of each text.
    """

    model: Any
    tokenizer: PreTrainedTokenizerFast
    texts: list[str]
    used: list[bool]
    unused: list[bool]
    words: list[str]


class WordReader(nn.Module):
    """Reads the last token alone: its embedding, and logits in which one direction decides the answer."""

    def __init__(self, gain: float = 3.0) -> None:
        super().__init__()
        self.table, self.read = nn.Embedding(VOCABULARY, WIDTH), nn.Identity()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        with torch.no_grad():
            self.head.weight.mul_(0.1)
            self.head.weight[YES], self.head.weight[NO] = gain * FRAME[0], -gain * FRAME[0]

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.read(self.table(input_ids)))


def vocabulary() -> list[str]:
    """Words and characters, each with a last token of its own; a multiple of four."""
    tokenizer = word_tokenizer()
    by_token = {tokenizer(word)["input_ids"][-1]: word for word in [*map(chr, range(33, 127)), *WORDS]}
    words = list(by_token.values())
    return words[: len(words) // 4 * 4]


def planted(family: str, strength: float = 0.8, copies: int = 1) -> PlantedTexts:
    """A planted model: `reader`, or one of the families of language models.

    Args:
        family: which.
        strength: how far the concepts move an embedding.
        copies: how many texts end with each word.
    """
    torch.manual_seed(5)
    model = WordReader() if family == "reader" else copy_of(build(family))
    tokenizer, words, generator = word_tokenizer(), vocabulary(), random.Random(3)
    concepts = {word: (number % 2 == 0, number % 4 < 2) for number, word in enumerate(words)}
    table = model.table.weight if family == "reader" else model.get_input_embeddings().weight
    with torch.no_grad():
        if family == "reader":
            table.mul_(0.3)
        for word, signs in concepts.items():
            row = tokenizer(word)["input_ids"][-1]
            for sign, direction in zip(signs, FRAME, strict=False):
                table[row] += strength * (1.0 if sign else -1.0) * direction
    texts = [f"{generator.choice(WORDS)} {word}" for word in words for _ in range(copies)]
    last = [text.split(" ")[1] for text in texts]
    used, unused = ([concepts[word][which] for word in last] for which in (0, 1))
    if family != "reader":
        _read_concept(model, tokenizer, texts, used)
    return PlantedTexts(model, tokenizer, texts, used, unused, last)


def _read_concept(model: Any, tokenizer: Any, texts: list[str], labels: list[bool]) -> None:
    """Let the answer's logits be a linear regression of the concept on the final vectors."""
    found = rl.collect(model, texts, "final_norm.output @ last", tokenizer=tokenizer, progress=False)
    (vectors,) = found.values()
    centred = vectors - vectors.mean(0)
    targets = torch.tensor(labels).float() * 2 - 1
    gram = centred.T @ centred + 20 * torch.eye(vectors.shape[1])
    weights = torch.linalg.solve(gram, centred.T @ targets)
    with torch.no_grad():
        model.lm_head.weight[YES], model.lm_head.weight[NO] = 3 * weights, -3 * weights
