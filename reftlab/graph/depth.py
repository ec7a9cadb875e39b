"""Where the sites of a graph stand along the depth of a model, as far as their paths say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from reftlab.address import SitePath
from reftlab.address.path import Child, Entries, Every

__all__ = ["Column", "Depth", "DepthAxis"]

Column = int | str
"""A block by number, negative ones counted from the last block, or a place outside the blocks by name."""

_EARLY = ("embed", "wte", "wpe", "patch", "tok_")
_LATE = ("final", "norm", "ln_f", "unembed", "lm_head", "head", "classifier", "score", "pooler", "fc")
_LAST = ("", "ln_f", "norm", "head", "unembed")
_MOST = 128


@dataclass(frozen=True)
class Depth:
    """Where one path stands.

    Attributes:
        columns: the blocks or the place that the path names; first and last block of a band.
        band: what the path says where the number of its blocks is not known, such as `[*]`; else empty.
        inside: place in the block, from −0.5 (its input) to 0.5 (its output).
        tail: the path inside the block, or all of it where it names no block.
    """

    columns: tuple[Column, ...]
    band: str
    inside: float
    tail: str


@dataclass(frozen=True)
class DepthAxis:
    """Columns of the picture from left to right.

    Attributes:
        left: names of places before the blocks.
        blocks: block numbers from the front.
        open: whether blocks may follow whose numbers are not known.
        ends: block numbers from the end, negative.
        right: names of places behind the blocks.
    """

    left: tuple[str, ...]
    blocks: tuple[int, ...]
    open: bool
    ends: tuple[int, ...]
    right: tuple[str, ...]

    @classmethod
    def of(cls, paths: Iterable[SitePath], layers: int | None = None) -> DepthAxis:
        """The columns that `paths` need, in the order of the model; `layers` is its number of blocks."""
        left: dict[str, None] = {}
        right: dict[str, None] = {}
        numbers: set[int] = set(range(layers or 0))
        for path in paths:
            for column in depth_of(path, layers).columns:
                if isinstance(column, int):
                    numbers.add(column)
                else:
                    (right if _is_late(column, bool(numbers)) else left)[column] = None
        late = sorted(right, key=lambda name: max(i for i, word in enumerate(_LAST) if word in name))
        front, ends = [n for n in numbers if n >= 0], [n for n in numbers if n < 0]
        blocks = sorted(front) if front and max(front) > _MOST else range(max(front, default=-1) + 1)
        tail = sorted(ends) if ends and min(ends) < -_MOST else range(min(ends, default=0), 0)
        return cls(tuple(left), tuple(blocks), bool(numbers) and layers is None, tuple(tail), tuple(late))


def depth_of(path: SitePath, layers: int | None = None) -> Depth:
    """Where a path stands, from its first number, slice or `*`."""
    for place, step in enumerate(path.steps):
        every = Every() if step == Child("*") else step
        if isinstance(every, Child):
            continue
        numbers = every.numbers if isinstance(every, Entries) else _numbers(every, layers)
        rest = SitePath(path.steps[place + 1 :], path.side, path.leaf)
        tail, inside = str(rest).removeprefix("."), _inside(rest)
        if numbers is None and isinstance(every, Every):
            forwards = every.step is None or every.step > 0
            first = every.start if forwards and every.start is not None else 0
            last = every.stop - 1 if forwards and every.stop else -1
            return Depth((first, last), str(every), inside, tail)
        from_front = [n + layers if layers is not None and n < 0 else n for n in numbers or ()]
        return Depth(tuple(dict.fromkeys(from_front)), "", inside, tail)
    return Depth((path.module or str(path),), "", 0.0, str(path))


def _numbers(every: Every, layers: int | None) -> tuple[int, ...] | None:
    """The numbers that a slice stands for, or None where that depends on the number of blocks."""
    if layers is not None:
        chosen = range(layers)[slice(every.start, every.stop, every.step)]
    else:
        start, stop, step = every.start or 0, every.stop, every.step or 1
        from_front = start >= 0 and stop is not None and stop >= 0
        from_end = start < 0 and (stop is None or stop < 0)
        if step < 0 or not (from_front or from_end):
            return None
        chosen = range(start, stop or 0, step)
    return tuple(chosen) if 0 < len(chosen) <= _MOST else None


def _inside(rest: SitePath) -> float:
    """Place in a block by the usual order: attention before MLP, inputs before outputs."""
    text, entering = str(rest).lower(), rest.side == "input" or str(rest).endswith("heads")
    if not rest.steps:
        return -0.36 if entering else 0.36
    if "attn" in text or "attention" in text:
        return -0.22 if entering else -0.1
    if "mlp" in text or "ffn" in text or "feed_forward" in text:
        return 0.1 if entering else 0.2
    return 0.0


def _is_late(name: str, behind_blocks: bool) -> bool:
    """Whether a place outside the blocks stands behind them: by its name, else by the graph's order."""
    last = name.lower()
    if "unembed" in last:
        return True
    if any(word in last for word in _EARLY):
        return False
    return behind_blocks or any(word in last for word in _LATE)
