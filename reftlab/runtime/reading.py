"""What reads return."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reftlab.errors import RunError, did_you_mean
from reftlab.graph import Read
from reftlab.runtime.supply import Supply

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ReadValues", "Reading", "placed"]


def placed(read: str | Read, positions: Any) -> Read:
    """A read as an object, at the shared positions where it names none.

    Raises:
        RunError: it is no read.
    """
    node = Read(read) if isinstance(read, str) else read
    if not isinstance(node, Read):
        raise RunError(f"read({read!r}): expected a site such as 'blocks[5].output @ last', or a Read")
    return node if node.positions is not None or positions is None else node.with_positions(positions)


@dataclass(frozen=True, eq=False)
class ReadValues:
    """The vectors of one read, one after the other.

    Attributes:
        vectors: `(n, width)`, in the model's dtype.
        rows: `(n,)`, the row of the batch that each vector comes from.
        positions: `(n,)`, its token's number among the real tokens of the row; the first one's
            where several are joined.
        heads: for attention scores and patterns, how many heads' keys a vector holds; else None.
    """

    vectors: Float[Tensor, "n width"]
    rows: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]
    heads: int | None = None

    @classmethod
    def of(cls, supply: Supply, heads: int | None = None) -> ReadValues:
        assert supply.tokens is not None
        return cls(supply.vectors, supply.tokens.rows, supply.tokens.numbers, heads)


@dataclass(frozen=True, eq=False)
class Reading(Mapping[str, Tensor]):
    """Named tensors `(row, token, width)`, by the name of the read or `"path @ positions"`.

    Attention scores and patterns are `(row, head, token, key)`, their keys the columns of the batch.

    Where rows have different numbers of tokens, the missing places hold NaN and are False in
    `mask(name)`; `flat(name)` has the vectors without padding.
    """

    values_by_name: dict[str, ReadValues]
    rows: int

    def __getitem__(self, name: str) -> Float[Tensor, "..."]:
        read, mask = self.flat(name), self.mask(name)
        if bool(mask.all()):
            found = read.vectors.reshape(*mask.shape, -1)
        else:
            padded = read.vectors.new_full((*mask.shape, read.vectors.shape[1]), float("nan"))
            found = padded.masked_scatter(mask[..., None].to(padded.device), read.vectors)
        if read.heads is None:
            return found
        return rearrange(found, "row token (head key) -> row head token key", head=read.heads)

    def flat(self, name: str) -> ReadValues:
        """The vectors of one read without padding."""
        if name not in self.values_by_name:
            known = ", ".join(map(repr, self.values_by_name))
            raise KeyError(
                f"{name!r} was not read; there is {known}.{did_you_mean(name, self.values_by_name)}"
            )
        return self.values_by_name[name]

    def mask(self, name: str) -> Bool[Tensor, "row token"]:
        """Which places of `self[name]` hold a vector."""
        counts = torch.bincount(self.flat(name).rows, minlength=self.rows)
        width = int(counts.max()) if len(counts) else 0
        return torch.arange(width)[None, :] < counts[:, None]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)

    def to_frame(self) -> pd.DataFrame:
        """One line a vector: read, row, position, and the vector's numbers."""
        import pandas as pd

        parts = []
        for name, read in self.values_by_name.items():
            part = pd.DataFrame(read.vectors.detach().float().cpu().numpy())
            part.insert(0, "position", read.positions.numpy())
            part.insert(0, "row", read.rows.numpy())
            part.insert(0, "read", name)
            parts.append(part)
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td><code>{html.escape(name)}</code></td><td>{tuple(self[name].shape)}</td>"
            f"<td>{float(read.vectors.float().norm(dim=-1).mean()):.3g}</td></tr>"
            for name, read in self.values_by_name.items()
        )
        head = "<tr><th>read</th><th>shape (row, token, width)</th><th>mean length of a vector</th></tr>"
        return f"<table>{head}{rows}</table>"

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name!r}: {tuple(self[name].shape)}" for name in self)
        return f"Reading({shapes})"
