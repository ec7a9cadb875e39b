"""Facts about countries: their prompts, their answers, and pairs of them."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import reftlab as rl

__all__ = ["LANGUAGE", "TEMPLATES", "Facts", "Pair", "examples", "pairs_of", "read_facts"]

TEMPLATES = ("capital is", "visit", "question", "language")
LANGUAGE = TEMPLATES[-1]
Pair = tuple[int, int]


@dataclass(frozen=True)
class Facts:
    """Prompts of one template, all of one length, which differ in the country's token.

    Attributes:
        texts: one a country.
        ids: `(country, token)`.
        words: the answer of each country, with a space before it.
        answers: first token of each answer `(country,)`.
        subject: number of the country's token.
    """

    texts: tuple[str, ...]
    ids: Tensor
    words: tuple[str, ...]
    answers: Tensor
    subject: int

    @property
    def choices(self) -> list[str]:
        """One answer for each first token that answers begin with."""
        return list(dict(zip(self.answers.tolist(), self.words, strict=True)).values())


def read_facts(tokenizer: Any) -> tuple[list[dict[str, str]], dict[str, Facts]]:
    """The countries, and their prompts by template."""
    data = json.loads(Path(__file__).with_name("facts.json").read_text(encoding="utf-8"))
    countries, found = data["countries"], {}
    for name in TEMPLATES:
        texts = tuple(data["templates"][name].format(country=one["country"]) for one in countries)
        ids = torch.tensor([tokenizer(text).input_ids for text in texts])
        kind = "language" if name == LANGUAGE else "capital"
        words = tuple(" " + one[kind] for one in countries)
        firsts = torch.tensor([tokenizer(word, add_special_tokens=False).input_ids[0] for word in words])
        (differs,) = (ids != ids[0]).any(0).nonzero().T
        if len(differs) != 1:
            raise ValueError(f"template {name!r}: countries differ in tokens {differs.tolist()}, not in one")
        found[name] = Facts(texts, ids, words, firsts, int(differs[0]))
    return countries, found


def pairs_of(numbers: list[int], facts: Facts, count: int | None = None, seed: int = 1) -> list[Pair]:
    """Ordered pairs of countries whose answers differ, or `count` of them drawn at random."""
    pairs = [(a, b) for a, b in itertools.permutations(numbers, 2) if facts.answers[a] != facts.answers[b]]
    return pairs if count is None or count >= len(pairs) else random.Random(seed).sample(pairs, count)


def examples(facts: Facts, pairs: list[Pair]) -> list[rl.Example]:
    """Each pair as an interchange: the first country's prompt, and the answer of the second."""
    return [
        rl.Example(facts.texts[base], facts.words[other], sources={"other": facts.texts[other]})
        for base, other in pairs
    ]
