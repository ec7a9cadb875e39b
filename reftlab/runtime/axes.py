"""Which axis of a site's tensor is what, and back and forth to (row, token, feature).

Most sites are (row, token, feature). Others are token-first (XLNet, `nn.GRU`), flat (experts), split
into heads, or images; the shapes of the pass at binding time tell which, because its example has
other numbers of rows, tokens and decoder tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from einops import rearrange
from torch import Tensor, nn

__all__ = ["ATTENTION", "PLAIN", "Axes", "Stream", "axes_of"]

Stream = str
"""Whose tokens a site's token axis holds: `tokens` or `decoder` (of the call's inputs, with padding
and cache), `own` (the site's own, such as image patches), `calls` (one for each call of a recurrent
cell) or `row` (there is no token axis)."""


@dataclass(frozen=True)
class Axes:
    """How a tensor's axes become (row, token, feature), in einops' notation.

    Attributes:
        given: the tensor's axes.
        standard: the same axes as (row, token, feature), or (row, feature).
    """

    given: str
    standard: str

    def width(self, shape: tuple[int, ...]) -> int:
        """Number of features of each token of a tensor of this shape."""
        if "(" in self.given:
            return shape[-1]
        sizes = dict(zip(self.given.split(), shape, strict=True))
        joined = self.standard.endswith(")")
        last = self.standard.rpartition("(")[2].rstrip(")") if joined else self.standard.split()[-1]
        return math.prod(sizes[name] for name in last.split())

    def arrange(self, tensor: Tensor, rows: int) -> Tensor:
        """The tensor as (row, token, feature) or (row, feature)."""
        if self.given == self.standard:
            return tensor
        sizes = {"row": rows} if "(row" in self.given else {}
        return rearrange(tensor, f"{self.given} -> {self.standard}", **sizes)

    def restore(self, tensor: Tensor, like: Tensor) -> Tensor:
        """The contrary of `arrange`, to the shape of `like`."""
        if self.given == self.standard:
            return tensor
        names = [] if "(" in self.given else self.given.split()
        sizes = {name: size for name, size in zip(names, like.shape, strict=False) if name != "row"}
        inside = self.standard.replace("(", " ").replace(")", " ").split()
        restored = rearrange(
            tensor, f"{self.standard} -> {self.given}", **{n: s for n, s in sizes.items() if n in inside}
        )
        # Some models go on with `view`, which wants their own order in memory.
        return restored.contiguous()


PLAIN = Axes("row token feature", "row token feature")
ROWS = Axes("row feature", "row feature")
TOKEN_FIRST = Axes("token row feature", "row token feature")
FLAT = Axes("(row token) feature", "row token feature")
ATTENTION = Axes("row head token key", "row token (head key)")
_HEADS_LAST = Axes("row token head feature", "row token (head feature)")
_HEADS_FIRST = Axes("row head token feature", "row token (head feature)")
_CHANNELS_FIRST = {
    3: Axes("row channel token", "row token channel"),
    4: Axes("row channel height width", "row (height width) channel"),
    5: Axes("row channel depth height width", "row (depth height width) channel"),
}
_CONVOLVING = (
    nn.Conv1d,
    nn.BatchNorm1d,
    nn.MaxPool1d,
    nn.AvgPool1d,
    nn.AdaptiveAvgPool1d,
    nn.ConvTranspose1d,
)


def stream_of(size: int, tokens: Mapping[Stream, int], name: str) -> Stream:
    """Whose tokens an axis of a site holds, by its size in the example pass; see `axes_of`."""
    found = [stream for stream, count in tokens.items() if count == size]
    return "own" if not found else found[-1 if "decoder" in name.split(".") else 0]


def axes_of(
    shape: tuple[int, ...],
    module: nn.Module,
    rows: int | None,
    tokens: Mapping[Stream, int],
    calls: int,
    name: str = "",
) -> tuple[Axes, Stream] | None:
    """Work out a site's axes from its shape in the example pass; None where they make no sense.

    Args:
        shape: the site's shape.
        module: the module that returns or takes it.
        rows: the example's number of rows, or None where it is not known.
        tokens: the example's numbers of tokens by stream.
        calls: how often the module ran.
        name: the module's path, which tells encoder from decoder where their tokens are as many.
    """
    rows = shape[0] if rows is None and shape else rows

    def stream(size: int) -> Stream:
        return stream_of(size, tokens, name)

    if len(shape) == 2 and calls > 1 and shape[0] == rows:
        return ROWS, "calls"
    if calls > 1:
        return None
    if len(shape) == 2:
        if shape[0] == rows:
            return ROWS, "row"
        flat = [name for name, count in tokens.items() if shape[0] == (rows or 0) * count]
        return (FLAT, flat[0]) if flat else None
    if len(shape) == 3:
        return _three(shape, module, rows, stream)
    if len(shape) == 4 and shape[0] == rows:
        if stream(shape[1]) != "own":
            return _HEADS_LAST, stream(shape[1])
        if stream(shape[2]) != "own":
            square = stream(shape[3]) != "own"
            return (ATTENTION if square else _HEADS_FIRST), stream(shape[2])
    return (_CHANNELS_FIRST[len(shape)], "own") if len(shape) in (4, 5) and shape[0] == rows else None


def _three(
    shape: tuple[int, ...], module: nn.Module, rows: int | None, stream: Callable[[int], Stream]
) -> tuple[Axes, Stream] | None:
    if isinstance(module, nn.RNNBase) and not module.batch_first:
        return TOKEN_FIRST, "own"
    if isinstance(module, _CONVOLVING) and shape[0] == rows:
        return _CHANNELS_FIRST[3], stream(shape[2])
    if shape[0] == rows:
        if stream(shape[1]) == "own" and stream(shape[2]) != "own":
            return _CHANNELS_FIRST[3], stream(shape[2])
        return PLAIN, stream(shape[1])
    if shape[1] == rows and stream(shape[0]) != "own":
        return TOKEN_FIRST, stream(shape[0])
    return None
