"""Memory that one batch after the other uses."""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor

from reftlab.runtime.hooks import GraphMark, marked

__all__ = ["Room"]


class Room:
    """Memory for one tensor at a time, not asked for anew with each batch.

    The next batch overwrites it, so a batch whose gradients are yet to be taken has to `hold` it.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0)
        self._held: weakref.ref[GraphMark] | None = None

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of that shape; its numbers are whatever was there before."""
        count, kind = math.prod(shape), (self._memory.dtype, self._memory.device)
        held = self._held is not None and self._held() is not None
        if held or self._memory.numel() < count or kind != (dtype, device):
            # Kept for later calls, which may be ordinary ones.
            with torch.inference_mode(False):
                self._memory = torch.empty(count, dtype=dtype, device=device)
            self._held = None
        return self._memory[:count].view(shape)

    def hold(self, result: Tensor) -> Tensor:
        """The result of a batch; its memory is not taken again while the result may be differentiated."""
        mark = GraphMark()
        self._held = weakref.ref(mark)
        return marked(result, mark)
