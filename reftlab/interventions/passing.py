"""A mean that is kept for one forward pass."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["PassMean"]


class PassMean(nn.Module):
    """The mean of all numbers noted in one forward pass, with its gradient, for a term of the loss.

    An edit may be called several times in one pass (at several places, in several chunks), and
    what it is penalised for is the mean over all of them. Outside a pass, that is between
    `end_pass` and the next `start_pass`, each call stands alone.

    >>> import torch
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
