"""pyvene's small helpers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reftlab.compat.model import IntervenableModel
from reftlab.errors import PositionError

__all__ = [
    "GET_LOC",
    "build_intervenable_model",
    "count_parameters",
    "embed_to_distrib",
    "format_token",
    "set_seed",
    "sigmoid_boundary",
    "top_vals",
]


def GET_LOC(LOC: Any, unit: str = "h.pos", batch_size: int = 1) -> list[Any]:  # noqa: N802, N803
    """One head and one position as nested `unit_locations`; natively `heads=` and `positions=`."""
    if unit != "h.pos":
        raise PositionError(f"GET_LOC(unit={unit!r}): only 'h.pos' is supported")
    return [[[[LOC[0]]] * batch_size, [[LOC[1]]] * batch_size]]


def build_intervenable_model(config: Any, model: nn.Module, **kwargs: Any) -> IntervenableModel:
    """An `IntervenableModel`; natively `graph.bind(model)`."""
    return IntervenableModel(config, model, **kwargs)


def count_parameters(model: nn.Module) -> int:
    """Number of numbers that learn; natively `reft.plan().parameters`."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def set_seed(seed: int) -> None:
    """Seed Python's, numpy's and torch's random numbers; natively `rl.train(seed=...)`."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def sigmoid_boundary(_input: Tensor, boundary_x: Any, boundary_y: Any, temperature: Any) -> Tensor:
    """Soft membership of an interval; natively `rl.BoundlessSwap`, whose `mask()` is such a membership."""
    return torch.sigmoid((_input - boundary_x) / temperature) * torch.sigmoid(
        (boundary_y - _input) / temperature
    )


def embed_to_distrib(model: Any, embed: Tensor, log: bool = False, logits: bool = False) -> Tensor:
    """Hidden vectors as a distribution over tokens; natively `reft.read("unembed @ last", **base)`, with the
    final norm, where this takes the input embeddings alone.
    """
    with torch.inference_mode():
        scores = embed @ model.get_input_embeddings().weight.T
        if logits:
            return scores
        return scores.log_softmax(-1) if log else scores.softmax(-1)


def format_token(tokenizer: Any, tok: Any) -> str:
    """A token as text, with spaces and line ends to be seen; natively `tokenizer.decode`."""
    return str(tokenizer.decode(tok)).replace(" ", "_").replace("\n", "\\n")


def top_vals(tokenizer: Any, res: Tensor, n: int = 10, return_results: bool = False) -> Any:
    """Print the tokens with the largest of `res`, `(vocabulary,)`, or return them as (token, value) pairs.

    That is, natively, `logits.topk(n)` and `tokenizer.batch_decode`.
    """
    values, places = torch.topk(res, n)
    pairs = [
        (format_token(tokenizer, place), value)
        for place, value in zip(places.tolist(), values.tolist(), strict=True)
    ]
    if return_results:
        return pairs
    for token, value in pairs:
        print(f"{token:<20} {value}")
    return None
