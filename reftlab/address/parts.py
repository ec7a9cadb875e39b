"""Queries, keys and values inside one projection that makes all three."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor, nn

from reftlab.address.alias import family_of, inner_model
from reftlab.address.resolve import Site
from reftlab.address.view import head_size
from reftlab.errors import AddressError

__all__ = ["part_index"]


def part_index(model: nn.Module, site: Site) -> tuple[Int[Tensor, " k"], int]:
    """The features of a fused projection that are a site's queries, keys or values.

    Args:
        model: the model, wrapped or not.
        site: a site whose `part` is `q`, `k` or `v`.

    Returns:
        The features `(heads · d_head,)` int64, head after head in the order in which the heads' results
        enter the output projection, and the size of a head.

    Raises:
        AddressError: the model's family has no fused projection, or its size cannot be found.
    """
    family, found, size = family_of(model), inner_model(model), head_size(model, site.module)
    layouts = {stack.fused for stack in family.stacks.values()} if family is not None else set()
    if site.part not in ("q", "k", "v") or found is None or size is None or layouts <= {""}:
        raise AddressError(
            f"{site}: part={site.part!r} stands for the queries, keys or values of a fused projection of "
            "a family that reftlab knows; use the projection's own path and features="
        )
    queries, keys = _head_counts(found[1], model.get_submodule(site.module.rpartition(".")[0]))
    # A head's own axes first, then d_head: [q, k, v] of every head, or of every group of heads.
    if "joined" in layouts:
        first = {"q": 0, "k": queries, "v": queries + keys}[site.part]
        count = queries if site.part == "q" else keys
        return torch.arange(first * size, (first + count) * size), size
    grouped = torch.arange((queries + 2 * keys) * size)
    by_group = rearrange(grouped, "(group slot d_head) -> group slot d_head", group=keys, d_head=size)
    chosen = {"q": by_group[:, :-2], "k": by_group[:, -2:-1], "v": by_group[:, -1:]}[site.part]
    return rearrange(chosen, "group slot d_head -> (group slot d_head)"), size


def _head_counts(inner: Any, attention: Any) -> tuple[int, int]:
    """How many heads of queries, and of keys and values, an attention module has."""
    config = inner.config
    queries = config.num_attention_heads
    # Falcon's module knows which of its configuration's three forms it follows.
    keys = getattr(attention, "num_kv_heads", None) or getattr(config, "num_key_value_heads", None)
    return queries, keys or queries
