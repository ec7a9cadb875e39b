"""An orthonormal basis as a trainable module, computed once per step."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftlab.errors import InterventionError

__all__ = ["OrthonormalBasis"]


class OrthonormalBasis(nn.Module):
    """`rank` orthonormal directions in a space of `width`, free to turn during training.

    The parameter `weight` is an unconstrained `(width, rank)` matrix; the basis is the Q of its
    reduced QR decomposition with the signs that make R's diagonal positive, in float32. It is
    computed once for each forward pass, however often it is asked for. A basis that carries a
    gradient is kept until the backward pass has used it up, so that a checkpoint finds it again;
    one without is not kept beyond its pass, since fused optimisers change `weight` unnoticed.

    Args:
        width: dimension of the space.
        rank: number of directions, at most `width`.

    Raises:
        InterventionError: `rank` is not from 1 to `width`.

    >>> basis = OrthonormalBasis(8, 2)()
    >>> bool((basis.T @ basis - torch.eye(2)).abs().max() < 1e-6)
    True
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        if type(rank) is not int or not 1 <= rank <= width:
            raise InterventionError(
                f"rank={rank!r}: an orthonormal basis of vectors {width} wide needs a rank from 1 to {width}"
            )
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(width, rank)).Q)
        self.computed = 0
        self._cached: tuple[tuple[Any, ...], Tensor] | None = None
        self._in_pass = False

    def forward(self) -> Float[Tensor, "width rank"]:
        """The basis, one direction a column."""
        wants_grad = torch.is_grad_enabled() and self.weight.requires_grad
        version = 0 if self.weight.is_inference() else self.weight._version
        mode = (wants_grad, torch.is_inference_mode_enabled())
        state = (self.weight.data_ptr(), version, self.weight.dtype, *mode)
        if self._cached is not None and self._cached[0] == state:
            return self._cached[1]
        basis = _orthonormalise(self.weight)
        self.computed += 1
        if wants_grad:
            basis.register_hook(self._forget)
        if wants_grad or self._in_pass:
            self._cached = (state, basis)
        return basis

    def start_pass(self) -> None:
        """Compute the basis for the coming forward pass, so that its backward pass is its own."""
        self._cached, self._in_pass = None, True
        self()

    def end_pass(self) -> None:
        """Keep the basis only where a backward pass may still need it."""
        self._in_pass = False
        if self._cached is not None and not self._cached[1].requires_grad:
            self._cached = None

    def _forget(self, gradient: Tensor) -> None:
        self._cached = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}


def _orthonormalise(weight: Float[Tensor, "width rank"]) -> Float[Tensor, "width rank"]:
    # Autocast would lower the products of the backward pass, and QR exists in float32 only.
    with torch.autocast(weight.device.type, enabled=False):
        q, r = torch.linalg.qr(weight.float())
        diagonal = r.diagonal()
        return q * torch.where(diagonal < 0, -1.0, 1.0)
