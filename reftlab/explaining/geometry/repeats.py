"""Tokens that repeat an earlier example from its first token on, which are the same vectors once more."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reftlab.measuring.intervals import precision_of
from reftlab.runtime.calls import continues_texts

__all__ = ["counted_once", "likeness_in", "looks_back_only", "repeats_of"]

_SAME = 1e-3
_ROUNDINGS = 4
_KINDS = 64
"""With so many different vectors of one beginning, edits differ everywhere, and no more are compared."""


def repeats_of(
    rows: Int[Tensor, " token"],
    ids: Int[Tensor, " token"],
    vectors: Float[Tensor, "token width"] | None = None,
    *,
    causal: bool,
    likeness: float = _SAME,
) -> Bool[Tensor, " token"]:
    """Which tokens repeat an earlier one, so that they say nothing new.

    In a model whose tokens see only those before them, a token whose whole beginning stood in an earlier
    example has the very same vectors there: the first tokens of a chat template come back in every example.
    In other models the whole example has to be the same.

    Args:
        rows: `(token,)`, the example of each, ascending; earlier ones come first.
        ids: `(token,)`, in their order in each example; nothing is known of tokens below 0.
        vectors: what stands there, where edits act that may differ between examples: a token is a repeat
            only where its vector is the same but for rounding.
        causal: whether tokens see only those before them.
        likeness: how far vectors may be apart, as a share of their length; see `likeness_in`.
    """
    found = torch.zeros(len(rows), dtype=torch.bool)
    known: dict[Hashable, list[int]] = {}
    after: dict[tuple[int, int], int] = {}
    _, counts = rows.unique_consecutive(return_counts=True)
    place = 0
    for own in ids.split(counts.tolist()):
        for key in _keys(own.tolist(), causal, after):
            earlier = known.setdefault(key, [])
            found[place] = bool(earlier) and (vectors is None or _among(vectors, place, earlier, likeness))
            if not found[place] and len(earlier) < _KINDS:
                earlier.append(place)
            place += 1
    return found


def looks_back_only(model: nn.Module) -> bool:
    """Whether a token's vectors depend on no token after it."""
    config = getattr(model, "config", None)
    return continues_texts(model) and not getattr(config, "is_encoder_decoder", False)


def likeness_in(model: nn.Module) -> float:
    """How far apart two runs of a model may put the same vector, as a share of its length."""
    return max(_SAME, _ROUNDINGS * torch.finfo(precision_of(model)).eps)


def counted_once(count: int) -> str:
    """What leaving repeats out left out, in words, or an empty text."""
    if not count:
        return ""
    return (
        f"{count} token{'s that repeat' if count > 1 else ' that repeats'} an earlier example from its first "
        f"token on {'were' if count > 1 else 'was'} left out, so that each is counted once"
    )


def _keys(ids: Sequence[int], causal: bool, after: dict[tuple[int, int], int]) -> Iterator[Hashable]:
    """What a token shares with its repeats: everything up to it, or the whole example.

    `after` numbers beginnings: that of a beginning and one more token.
    """
    if any(number < 0 for number in ids):
        # Each is alone.
        yield from (object() for _ in ids)
    elif causal:
        beginning = 0
        for number in ids:
            beginning = after.setdefault((beginning, number), len(after) + 1)
            yield beginning
    else:
        yield from ((tuple(ids), place) for place in range(len(ids)))


def _among(
    vectors: Float[Tensor, "token width"], place: int, earlier: Sequence[int], likeness: float
) -> bool:
    others = vectors[list(earlier)]
    apart = (others - vectors[place]).norm(dim=1)
    return bool((apart <= likeness * others.norm(dim=1)).any())
