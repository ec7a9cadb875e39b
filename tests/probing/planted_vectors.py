"""Random vectors at several sites, with something written into one of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import reftlab as rl
from reftlab.collecting import SiteVectors

QUICK: dict[str, Any] = {"control": None, "permutations": 0, "bootstrap": 0, "progress": False}


def random_activations(
    generator: np.random.Generator,
    examples: int = 60,
    width: int = 8,
    sites: int = 3,
    tokens: int = 1,
    planted: dict[int, Any] | None = None,
    ids: Any = None,
    dtype: torch.dtype = torch.float32,
) -> rl.Activations:
    """Normal vectors at `blocks[i].output`, `tokens` an example; `planted[i]` is added at site i."""
    n = examples * tokens
    ids = generator.integers(0, 20, n) if ids is None else ids
    index = torch.tensor(
        np.stack([np.repeat(np.arange(examples), tokens), np.tile(np.arange(tokens), examples), ids], 1)
    )
    found = {}
    for site in range(sites):
        vectors = generator.normal(size=(n, width)) + (planted or {}).get(site, 0)
        position = "last" if tokens == 1 else f"last({tokens})"
        found[f"blocks[{site}].output @ {position}"] = SiteVectors(torch.tensor(vectors).to(dtype), index)
    return rl.Activations(found, examples)


def along(direction: Any, amounts: Any) -> np.ndarray:
    """The direction so many times, `(n, width)`."""
    return np.outer(np.asarray(amounts, dtype=float), np.asarray(direction, dtype=float))
