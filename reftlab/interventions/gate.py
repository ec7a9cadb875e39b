"""A learned soft gate."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftlab.interventions.base import number, whole
from reftlab.interventions.passing import PassMean

__all__ = ["SoftGate"]


class SoftGate(nn.Module):
    """How far each vector opens a gate, learned.

        g = σ(w · h + b)

    `h` is a vector (width), `w` (width) and `b` a number, both learned and zero at first, so that
    every gate starts half open. The penalty `sparsity · mean(g)` asks it to stay shut where it is
    not needed; the mean is over all vectors of the last forward pass.

    Args:
        width: length of the vectors.
        sparsity: weight of the penalty, at least 0.

    Raises:
        InterventionError: `sparsity` is not a number of 0 or more, `width` not a whole number of 1
            or more.

    >>> gate = SoftGate(8, sparsity=0.1)
    >>> gate(torch.randn(3, 8))
    tensor([0.5000, 0.5000, 0.5000], grad_fn=<SigmoidBackward0>)
    >>> round(gate.penalty().item(), 3)
    0.05
    """

    def __init__(self, width: int, sparsity: float = 0.0) -> None:
        super().__init__()
        self.width, self.sparsity = whole(width, "width", 1), number(sparsity, "sparsity", 0.0)
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(()))
        self.opening = PassMean()

    def forward(self, vectors: Float[Tensor, "n width"]) -> Float[Tensor, " n"]:
        """How far each vector's gate is open, 0 to 1, in float32."""
        gates = torch.sigmoid(vectors.float() @ self.weight.float() + self.bias.float())
        self.opening.note(gates)
        return gates

    def penalty(self) -> Float[Tensor, ""] | None:
        """`sparsity · mean(g)` over the last pass; None without sparsity, or where nothing passed."""
        mean = self.opening.value()
        return None if mean is None or not self.sparsity else self.sparsity * mean

    def prepare(self) -> None:
        """Begin to gather openings for the penalty of the coming forward pass."""
        self.opening.start_pass()

    def finish(self) -> None:
        """Gather no more; the penalty stays until the next pass."""
        self.opening.end_pass()

    def extra_repr(self) -> str:
        return f"width={self.width}, sparsity={self.sparsity:g}"
