"""Memory that one batch after the other uses."""

from __future__ import annotations

import math
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from reftlab.runtime.hooks import GraphMark

__all__ = ["Room", "Taken"]


class Taken(NamedTuple):
    """Memory for one batch.

    Attributes:
        values: a tensor in it.
        mark: the memory is not taken again as long as this lives.
    """

    values: Tensor
    mark: GraphMark


class Room:
    """Memory for one tensor at a time, not asked for anew with each batch."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)
        self._held: weakref.ref[GraphMark] | None = None

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Taken:
        """A tensor of that shape, whose numbers are whatever was there before."""
        count, kind = math.prod(shape), (self._memory.dtype, self._memory.device)
        held = self._held is not None and self._held() is not None
        if held or self._memory.numel() < count or kind != (dtype, device):
            # Kept for later calls, which may be ordinary ones.
            with torch.inference_mode(False):
                self._memory = torch.empty(count, dtype=dtype, device=device)
        mark = GraphMark()
        self._held = weakref.ref(mark)
        return Taken(self._memory[:count].view(shape), mark)
