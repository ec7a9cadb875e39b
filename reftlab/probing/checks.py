"""What the user hands over as vectors, labels and groups, as arrays that can be computed with."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from reftlab.errors import DataError
from reftlab.training.settings import whole

__all__ = ["as_classes", "as_groups", "as_numpy", "as_vectors", "check_level", "is_missing", "is_unordered"]
__all__ += ["seed_number"]

_LARGEST_SEED = 2**31 - 1
"""Of what numpy's older generators take, with room for those that are derived from it."""


def as_numpy(value: Any) -> np.ndarray:
    """A tensor, an array or a sequence as an array; bfloat16 becomes float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() and value.element_size() < 4 else value
        return np.asarray(value.numpy())
    return np.asarray(value)


def as_vectors(X: Any) -> Float[np.ndarray, "n width"]:  # noqa: N803
    """Vectors `(n, width)` as float32 or float64.

    Raises:
        DataError: not rows of finite numbers.
    """
    try:
        vectors = as_numpy(X)
        vectors = vectors if vectors.dtype in (np.float32, np.float64) else vectors.astype(np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(f"X: expected numbers (n, width): {error}") from error
    if vectors.ndim != 2 or 0 in vectors.shape:
        raise DataError(f"X has the shape {vectors.shape}; expected vectors (n, width)")
    unusable = int((~np.isfinite(vectors).all(1)).sum())
    if unusable:
        raise DataError(f"X: {unusable} of {len(vectors)} vectors hold NaN or infinity")
    return vectors


def as_classes(y: Any, n: int) -> tuple[list[Any], Int[np.ndarray, " n"]]:
    """Classes in their order, and the number of each example's class.

    Raises:
        DataError: not one class for each of `n` vectors, or fewer than two classes.
    """
    labels = as_numpy(y)
    if labels.shape != (n,):
        raise DataError(f"y has the shape {labels.shape}; {n} vectors need one class each, ({n},)")
    if labels.dtype.kind == "f" and not bool((labels == np.round(labels)).all()):
        raise DataError(
            f"y holds fractions such as {labels[labels != np.round(labels)][0]!r}; expected classes"
        )
    try:
        classes, numbers = np.unique(labels, return_inverse=True)
    except TypeError as error:
        raise DataError(f"y: expected classes of one kind, such as all strings: {error}") from error
    if len(classes) < 2:
        raise DataError(f"y holds only the class {classes.tolist()[0]!r}; expected at least two")
    return classes.tolist(), numbers.astype(np.int64)


def as_groups(
    groups: Sequence[Hashable] | Any | None, n: int, argument: str = "groups"
) -> Int[np.ndarray, " n"]:
    """Groups as numbers from 0 in the order in which they first come; each example its own for None.

    Args:
        groups: names, numbers or tuples of these.
        n: of how many vectors or examples.
        argument: what they are called in messages.

    Raises:
        DataError: not one group for each of `n` vectors, or one that is missing.
    """
    if groups is None:
        return np.arange(n)
    if is_unordered(groups):
        raise DataError(f"{argument}: a {type(groups).__name__} has no order of examples; give a list")
    named = as_numpy(groups).tolist() if hasattr(groups, "shape") else list(groups)
    if len(named) != n:
        raise DataError(f"{argument} has {len(named)} entries; {n} vectors need one each")
    missing = next((number for number, name in enumerate(named) if is_missing(name)), None)
    if missing is not None:
        raise DataError(f"{argument}: entry {missing} is {named[missing]!r}; give every example one")
    numbers: dict[Any, int] = {}
    try:
        return np.array([numbers.setdefault(name, len(numbers)) for name in named], dtype=np.int64)
    except TypeError as error:
        raise DataError(f"{argument}: {error}; expected names or numbers") from error


def check_level(level: Any, such_as: float) -> None:
    """Refuse what is no level of intervals or of a test.

    Raises:
        DataError: it is not.
    """
    number = isinstance(level, int | float | np.number) and not isinstance(level, bool)
    if not number or not 0 < level < 1:
        raise DataError(f"level={level!r}: expected a number between 0 and 1, such as {such_as:g}")


def seed_number(value: Any) -> int:
    """A seed that every generator takes.

    Raises:
        DataError: it is not one.
    """
    seed = whole("seed", value, 0)
    if seed > _LARGEST_SEED:
        raise DataError(f"seed={value!r}: expected a whole number from 0 to {_LARGEST_SEED}")
    return seed


def is_missing(value: Any) -> bool:
    """Whether an entry is None, NaN or what pandas has in their place."""
    return (
        value is None
        or (isinstance(value, float) and value != value)
        or type(value).__name__ in ("NAType", "NaTType")
    )


def is_unordered(values: Any) -> bool:
    """Whether entries cannot be counted off against examples: a mapping or a set."""
    return isinstance(values, Mapping | AbstractSet)
