"""A network with a causal variable planted in known directions of a rotated space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.contracts.causal import Examples, causal_model, interchange

BATCH = 32


class Planted(nn.Module):
    """Rotates its input, and answers from the rotated vector by products of what it finds in it.

    The first `size` numbers of the input are one variable, a word of bits written as ±1; the others are
    another. Answer (i, j) is whether bit i of the word and bit j of the rest differ: the logit
    −3 wordᵢ restⱼ. After `mix` each bit lies along a column of `mix.weight` and along no axis.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.size, self.mix = size, nn.Linear(width, width, bias=False)
        with torch.no_grad():
            self.mix.weight.copy_(torch.linalg.qr(torch.randn(width, width)).Q)

    def forward(self, input: Tensor) -> Tensor:
        bits = self.mix(input) @ self.mix.weight
        return -3 * (bits[:, : self.size, None] * bits[:, None, self.size :]).flatten(1)

    @property
    def directions(self) -> Tensor:
        """The orthonormal directions of the word after `mix`, `(width, size)`."""
        return self.mix.weight.detach()[:, : self.size]


MODEL = causal_model(
    word=lambda given: given,
    answer=lambda word, rest: (word[:, :, None] != rest[:, None]).flatten(1),
)
"""The word is a variable of its own, so that another input's word can take its place."""


@dataclass(frozen=True)
class Bits:
    """Random inputs of a planted network, with the answers after an interchange of the word."""

    width: int
    size: int

    def draw(self, count: int = BATCH) -> Examples:
        base, source = (torch.rand(count, self.width) < 0.5 for _ in range(2))
        given = [{"given": bits[:, : self.size], "rest": bits[:, self.size :]} for bits in (base, source)]
        labels = interchange(MODEL, given[0], {"word": given[1]})["answer"]
        return Examples(2.0 * base - 1.0, {"source": 2.0 * source - 1.0}, labels)


def loss(answers: Tensor, labels: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(answers, labels.float())


def decide(answers: Tensor) -> Tensor:
    return answers > 0
