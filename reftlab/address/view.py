"""Views: some heads or some features of a site's last axis, instead of all of it."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from reftlab.errors import AddressError

__all__ = ["View", "head_size", "splits_by_heads"]


@dataclass(frozen=True)
class View:
    """Which part of the last axis an edit or a read acts on.

    Attributes:
        heads: numbers of attention heads; their vectors are joined, `(heads · d_head)`. The number
            of heads is the width of the site divided by the head size of the attention module
            around it, so that keys and values of grouped-query models have their own, fewer heads.
        features: numbers of features, or `(start, stop, step)` of a slice of them.

    At most one of the two is given; with neither the view is the whole axis.
    """

    heads: tuple[int, ...] | None = None
    features: tuple[int, ...] | None = None
    feature_slice: tuple[int | None, int | None, int | None] | None = None

    @classmethod
    def of(
        cls,
        heads: int | Iterable[int] | None = None,
        features: slice | int | Iterable[int] | None = None,
    ) -> View:
        """Build a view from what users write, `heads=[2, 5]` or `features=slice(0, 64)`."""
        if heads is not None and features is not None:
            raise AddressError("give heads= or features=, not both")
        if isinstance(features, slice):
            bounds = (features.start, features.stop, features.step)
            if not all(n is None or type(n) is int for n in bounds) or features.step == 0:
                raise AddressError(f"features={features!r}: expected whole numbers and a step other than 0")
            return cls(feature_slice=(features.start, features.stop, features.step))
        return cls(_numbers("heads", heads), _numbers("features", features))

    @property
    def whole(self) -> bool:
        return self == View()

    def __str__(self) -> str:
        if self.heads is not None:
            return f"heads {', '.join(map(str, self.heads))}"
        if self.feature_slice is not None:
            start, stop, step = ("" if n is None else str(n) for n in self.feature_slice)
            return f"features {start}:{stop}" + (f":{step}" if step else "")
        if self.features is not None:
            few = ", ".join(map(str, self.features[:6]))
            if len(self.features) <= 6:
                return f"features {few}"
            # Names of reads hold this text, and other features must have another name.
            told = zlib.crc32(repr(self.features).encode())
            return f"features {few} … {len(self.features)} in all, {told:08x}"
        return "all features"

    @property
    def suffix(self) -> str:
        """What stands behind the name of a site that is seen in this view; nothing where it is whole.

        >>> View.of(heads=3).suffix, View().suffix
        (' (heads 3)', '')
        """
        return "" if self.whole else f" ({self})"

    def index(self, width: int, site: str, head_size: int | None = None) -> Tensor | None:
        """The chosen features of an axis of `width`, `(k,)` int64; None for the whole axis.

        Raises:
            AddressError: a head or feature that the site does not have.
        """
        if self.whole:
            return None
        every = torch.arange(width)
        if self.feature_slice is not None:
            start, stop, step = self.feature_slice
            chosen = torch.tensor(range(width)[slice(start, stop, step)], dtype=torch.long)
            if chosen.numel() == 0:
                raise AddressError(f"{self} chooses nothing at {site}, which is {width} wide")
            return chosen
        if self.features is not None:
            _check("features", self.features, width, site)
            return every[list(self.features)]
        assert self.heads is not None
        if head_size is None:
            raise AddressError(
                f"heads={list(self.heads)} at {site}: no attention module with a head size is around "
                "this site; use features=slice(start, stop)"
            )
        if width % head_size:
            raise AddressError(
                f"heads={list(self.heads)} at {site}: its width {width} is not a whole number of "
                f"heads of {head_size}; use a site such as 'blocks[i].attn.heads'"
            )
        _check("heads", self.heads, width // head_size, site)
        by_head = rearrange(every, "(head d_head) -> head d_head", d_head=head_size)
        return rearrange(by_head[list(self.heads)], "head d_head -> (head d_head)")


_MADE_OF_HEADS = frozenset(
    ("q_proj", "k_proj", "v_proj", "q_lin", "k_lin", "v_lin", "query", "key", "value", "q", "k", "v")
)
_TAKES_HEADS = frozenset(("o_proj", "out_proj", "c_proj", "out_lin", "dense", "o", "Wo"))


def splits_by_heads(model: nn.Module, module: str, side: str) -> bool:
    """Whether the last axis of a module's input or output is one head after the other.

    So it is where queries, keys or values come out, where the output projection takes the heads'
    results in, and where an attention module without such a projection hands them on.
    """
    name = module.rpartition(".")[2]
    if side == "input":
        return name in _TAKES_HEADS
    owner = model.get_submodule(module)
    projects = any(child in _TAKES_HEADS for child, _ in owner.named_children())
    return name in _MADE_OF_HEADS or ("attention" in type(owner).__name__.lower() and not projects)


def head_size(model: nn.Module, module: str) -> int | None:
    """The head size of the nearest module at or above `module` that has one, or None."""
    names = module.split(".") if module else []
    for depth in range(len(names), 0, -1):
        owner = model.get_submodule(".".join(names[:depth]))
        owners = [owner]
        if "attention" in type(owner).__name__.lower():
            # BERT's attention keeps the size one level down, beside the output projection.
            owners += owner.children()
        for candidate in owners:
            size = _own_head_size(candidate)
            if size is not None:
                return size
    return None


def _own_head_size(module: nn.Module) -> int | None:
    for attribute in ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim"):
        size = getattr(module, attribute, None)
        if isinstance(size, int) and size > 0:
            return size
    count, width = getattr(module, "num_heads", None), getattr(module, "embed_dim", None)
    if isinstance(count, int) and isinstance(width, int) and count > 0:
        return width // count
    return None


def _numbers(name: str, value: int | Iterable[int] | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    several = (value,) if isinstance(value, int | np.integer) else tuple(value)
    numbers = tuple(n.item() if isinstance(n, np.integer) else n for n in several)
    if not numbers or not all(type(n) is int for n in numbers) or len(set(numbers)) < len(numbers):
        raise AddressError(f"{name} must be different whole numbers, one or more, not {value!r}")
    return numbers


def _check(name: str, numbers: tuple[int, ...], count: int, site: str) -> None:
    wrong = [n for n in numbers if not -count <= n < count]
    if wrong:
        raise AddressError(
            f"{name}={list(numbers)} at {site}: there are {count}, numbered 0 to {count - 1}; "
            f"{wrong[0]} is outside"
        )
    if len({n % count for n in numbers}) < len(numbers):
        raise AddressError(f"{name}={list(numbers)} at {site} names one of the {count} twice")
