"""Control tasks: labels that a probe can only know by heart."""

from __future__ import annotations

import hashlib
import numbers
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from reftlab.errors import DataError
from reftlab.probing.checks import as_numpy
from reftlab.training.settings import whole

__all__ = ["control_labels"]


def control_labels(types: Sequence[Hashable] | Any, labels: Any, seed: int = 0) -> Any:
    """Give every type one random label, drawn from the labels that there are.

    A probe that is as good on these as on the real labels shows what probes can learn by heart, not
    what the vectors say. Selectivity is the real task's score minus this one's. The label of a type
    follows from the seed, the type and the distribution of the labels alone, so it is the same in
    whatever order, and beside whatever other types, it comes.

    The score means something only where types repeat, as token ids do. Where each example has a type of
    its own nothing that is learned on some carries over to others, and a control can only be at chance
    out of fold. With few types some labels may not be drawn at all.

    Hewitt and Liang, "Designing and Interpreting Probes with Control Tasks" (2019, arXiv:1909.03368).

    Args:
        types: n types, such as token ids or groups: numbers, texts, tuples of these, ….
        labels: n labels: classes, numbers `(n,)`, or rows `(n, k)`; a type gets one of these as a whole.
        seed: another seed, another control task.

    Returns:
        n labels: a list for a list, a tensor for a tensor, else an array.

    Raises:
        DataError: not as many types as labels, none at all, or a type that is not the same in every process.

    >>> control_labels(["the", "cat", "the"], ["A", "B", "A"], seed=1)
    ['A', 'B', 'A']
    """
    named = as_numpy(types).tolist() if hasattr(types, "shape") else list(types)
    if not len(named) or len(named) != len(labels):
        raise DataError(f"types has {len(named)} entries and labels {len(labels)}; expected one type a label")
    seed = whole("seed", seed, 0)
    order = _sorted(labels)
    drawn: dict[str, int] = {}
    picks = np.empty(len(named), dtype=np.int64)
    for row, name in enumerate(named):
        key = _key(name)
        if key not in drawn:
            digest = hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=8).digest()
            drawn[key] = int(order[int.from_bytes(digest, "big") * len(order) >> 64])
        picks[row] = drawn[key]
    if not hasattr(labels, "shape"):
        return [labels[pick] for pick in picks]
    return labels[picks] if hasattr(labels, "detach") else np.asarray(labels)[picks]


def _sorted(labels: Any) -> Int[np.ndarray, " n"]:
    """Numbers of the labels from the lowest up, so that a draw does not depend on the order of the rows."""
    if hasattr(labels, "shape"):
        values = as_numpy(labels)
        if values.dtype.kind != "O":
            return np.lexsort(values.reshape(len(values), -1).T[::-1])
        labels = values.tolist()
    keys = [_key(label, "labels") for label in labels]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)


def _key(value: Any, argument: str = "types") -> str:
    """A text that is the same for equal values, in every process."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, numbers.Real):
        # Equal numbers of different kinds, such as True, 1 and 1.0, are the same type.
        if isinstance(value, numbers.Integral) or float(value).is_integer():
            return f"number {int(value)}"  # type: ignore[call-overload]
        return f"number {float(value)!r}"
    if isinstance(value, tuple | list):
        return f"({', '.join(_key(part, argument) for part in value)})"
    if isinstance(value, frozenset):
        return f"{{{', '.join(sorted(_key(part, argument) for part in value))}}}"
    if "__repr__" not in {name for kind in type(value).__mro__[:-1] for name in vars(kind)}:
        raise DataError(f"{argument}: {value!r} has no text of its own; expected numbers, texts or tuples")
    return f"{type(value).__name__} {value!r}"
