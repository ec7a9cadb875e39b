"""Swaps that learn what to swap: a boundary among rotated directions, or a mask.

Symbols, for a vector `h` and the source's vector `s` of `width` numbers:
`R` (width × width) is a learned rotation; `σ` the sigmoid; `T` the temperature; `⊙` multiplies
number by number.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reftlab.interventions.base import Intervention, flag, number
from reftlab.interventions.basis import OrthonormalBasis
from reftlab.interventions.rotate import swapped

__all__ = ["BoundlessSwap", "MaskedSwap"]


class _Scheduled(Intervention):
    """Swaps whose softness falls in a straight line from one temperature to another during training."""

    temperature: Tensor

    def __init__(self, temperature_start: float, temperature_end: float, sparsity: float) -> None:
        super().__init__()
        tiny = 1e-6
        self.temperature_start = number(temperature_start, "temperature_start", tiny)
        self.temperature_end = number(temperature_end, "temperature_end", tiny)
        self.sparsity = number(sparsity, "sparsity", 0.0)

    def setup(self, width: int) -> None:
        # A buffer, so that a saved edit is as sharp as the training left it.
        self.register_buffer("temperature", torch.tensor(self.temperature_start))

    def schedule(self, progress: float) -> None:
        """Set the temperature to its place between start and end; `progress` is from 0 to 1."""
        progress = number(progress, "progress", 0.0, 1.0)
        start, end = self.temperature_start, self.temperature_end
        self.temperature.fill_((1.0 - progress) * start + progress * end)


class BoundlessSwap(_Scheduled):
    """Boundless distributed alignment search: learn the rotation and how many directions to swap.

        h + Rᵀ(m ⊙ (R s − R h)),   mᵢ = σ((β width − i − ½)/T)

    `R` is a full rotation; direction i = 0, 1, … is swapped as far as it lies left of a learned
    boundary, the share `β` of all directions, from 0 to 1 and a half at first. The temperature `T`
    makes the boundary soft at first and sharp at the end of training. The penalty `sparsity · β`
    asks for few directions.

    Wu et al., "Interpretability at Scale: Identifying Causal Mechanisms in Alpaca" (2023,
    arXiv:2305.08809), its boundary mask. Three details differ from the authors' code: the mask has no
    lower boundary at 0, which nothing lies below, and which would swap the first directions by half
    while T is high; directions are taken at i + ½, the middle of their places; and `β` is a sigmoid
    of what is learned, where clamping would end its gradient at the limits.

    Args:
        temperature_start: T before training, in directions. The default is the authors', for vectors of
            thousands of numbers; for narrow ones take a small part of their width.
        temperature_end: T after training.
        sparsity: weight of the penalty on `β`, in the units of the training loss.

    >>> swap = BoundlessSwap().build(width=8)
    >>> swap.learned_width
    4.0
    """

    takes_source = "required"
    takes_subspace = "basis"

    def __init__(
        self, temperature_start: float = 50.0, temperature_end: float = 0.1, sparsity: float = 1.0
    ) -> None:
        super().__init__(temperature_start, temperature_end, sparsity)

    def setup(self, width: int) -> None:
        super().setup(width)
        self.basis = OrthonormalBasis(width, width)
        self.boundary = nn.Parameter(torch.zeros(()))

    @property
    def learned_width(self) -> float:
        """How many directions lie left of the boundary, β width; a fraction where it lies inside one."""
        return float(torch.sigmoid(self.boundary.detach().float())) * float(self.width or 0)

    def mask(self) -> Float[Tensor, " width"]:
        """How far each direction is swapped, m, at the present temperature."""
        assert self.width is not None
        share = torch.sigmoid(self.boundary.float())
        places = torch.arange(self.width, device=share.device) + 0.5
        return torch.sigmoid((share * self.width - places) / self.temperature)

    def forward(
        self,
        base: Float[Tensor, "n width"],
        source: Float[Tensor, "n width"] | None = None,
        *,
        subspace: Bool[Tensor, "n width"] | None = None,
    ) -> Float[Tensor, "n width"]:
        assert source is not None
        mask = self.mask()
        return swapped(base, source, self.basis(), mask if subspace is None else mask * subspace)

    def penalty(self) -> Float[Tensor, ""] | None:
        """`sparsity · β`, None without sparsity."""
        return self.sparsity * torch.sigmoid(self.boundary.float()) if self.sparsity else None


class MaskedSwap(_Scheduled):
    """Swap as far as a learned mask says, feature by feature or along rotated directions.

        h + m ⊙ (s − h)        or        h + Rᵀ(m ⊙ (R s − R h)),   m = σ(a/T)

    `a` (width) is learned and 0 at first: every number is swapped by half, and may go either way.
    The falling temperature `T` makes it all or nothing. The penalty `sparsity · mean(m)` asks for
    few swaps.

    A mask over plain features is De Cao et al., "Sparse Interventions in Language Models with
    Differentiable Masking" (2021, arXiv:2112.06837), with a sigmoid in place of their hard
    concrete distribution; over rotated directions it is the sigmoid mask of pyvene (Wu et al.
    2024, arXiv:2403.07809).

    Args:
        rotated: whether the mask is over directions of a learned rotation `R`, not over features.
        temperature_start: T before training.
        temperature_end: T after training.
        sparsity: weight of the penalty on the mean of `m`, in the units of the training loss.

    >>> swap = MaskedSwap().build(width=4)
    >>> swap(torch.zeros(1, 4), torch.ones(1, 4)).tolist()
    [[0.5, 0.5, 0.5, 0.5]]
    """

    takes_source = "required"
    takes_subspace = "basis"

    def __init__(
        self,
        rotated: bool = False,
        *,
        temperature_start: float = 1.0,
        temperature_end: float = 0.01,
        sparsity: float = 0.0,
    ) -> None:
        super().__init__(temperature_start, temperature_end, sparsity)
        self.rotated = flag(rotated, "rotated")

    def setup(self, width: int) -> None:
        super().setup(width)
        self.logits = nn.Parameter(torch.zeros(width))
        if self.rotated:
            self.basis = OrthonormalBasis(width, width)

    def mask(self) -> Float[Tensor, " width"]:
        """How far each feature or direction is swapped, m, at the present temperature."""
        return torch.sigmoid(self.logits.float() / self.temperature)

    def forward(
        self,
        base: Float[Tensor, "n width"],
        source: Float[Tensor, "n width"] | None = None,
        *,
        subspace: Bool[Tensor, "n width"] | None = None,
    ) -> Float[Tensor, "n width"]:
        assert source is not None
        mask = self.mask() if subspace is None else self.mask() * subspace
        return swapped(base, source, self.basis(), mask) if self.rotated else base + mask * (source - base)

    def penalty(self) -> Float[Tensor, ""] | None:
        """`sparsity · mean(m)`, None without sparsity."""
        return self.sparsity * self.mask().mean() if self.sparsity else None
