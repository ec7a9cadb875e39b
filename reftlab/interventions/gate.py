"""A learned soft gate, and a mean that is kept for one forward pass."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftlab.errors import InterventionError

__all__ = ["PassMean", "SoftGate"]


class PassMean(nn.Module):
    """The mean of all numbers noted in one forward pass, with its gradient, for a term of the loss.

    An edit may be called several times in one pass (at several places, in several chunks), and
    what it is penalised for is the mean over all of them. Outside a pass, that is between
    `end_pass` and the next `start_pass`, each call stands alone.

    >>> mean = PassMean()
    >>> mean.start_pass()
    >>> mean.note(torch.tensor([1.0, 2.0])); mean.note(torch.tensor([6.0]))
    >>> mean.value()
    tensor(3.)
    """

    def __init__(self) -> None:
        super().__init__()
        self._total: Tensor | None = None
        self._count = 0
        self._in_pass = False

    def note(self, numbers: Float[Tensor, "..."]) -> None:
        """Take these numbers into the mean."""
        if not self._in_pass:
            self._total, self._count = None, 0
        if numbers.numel():
            self._total = numbers.sum() if self._total is None else self._total + numbers.sum()
            self._count += numbers.numel()

    def value(self) -> Float[Tensor, ""] | None:
        """The mean, or None where nothing was noted."""
        return None if self._total is None else self._total / self._count

    def start_pass(self) -> None:
        """Forget the last pass and gather from now on."""
        self._total, self._count, self._in_pass = None, 0, True

    def end_pass(self) -> None:
        """Gather no more; the mean stays until the next pass."""
        self._in_pass = False

    def __getstate__(self) -> dict[str, Any]:
        # A tensor in the middle of a graph can be neither copied nor pickled.
        return {**self.__dict__, "_total": None, "_count": 0}


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
        if type(width) is not int or width < 1:
            raise InterventionError(f"width={width!r}: expected a whole number of 1 or more")
        number = isinstance(sparsity, int | float) and not isinstance(sparsity, bool)
        if not number or not 0.0 <= sparsity < float("inf"):
            raise InterventionError(f"sparsity={sparsity!r}: expected a finite number from 0")
        self.width, self.sparsity = width, float(sparsity)
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
