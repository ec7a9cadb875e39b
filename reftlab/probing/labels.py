"""Labels as arrays: classes, several yes-or-no labels, or numbers; one for each example or each token."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from reftlab.collecting import SiteVectors
from reftlab.errors import DataError
from reftlab.probing.checks import as_numpy, is_missing, is_unordered

__all__ = ["KINDS", "Kind", "Labels", "parse_labels"]

Kind = Literal["classification", "multilabel", "regression"]
KINDS = ("auto", "classification", "multilabel", "regression")

_FEW = 10
"""So many different floats, all whole, may well be classes."""


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels in the form that probes are fitted on.

    Attributes:
        kind: `classification`, `multilabel` or `regression`.
        values: numbers of classes `(n,)`, 0 and 1 `(n, k)`, or numbers `(n,)` float64.
        classes: the classes in the order of their numbers; of multi-label ones the numbers of the labels;
            empty for numbers.
        starts: for labels of tokens, where those of each example begin and at last all end; else None.
    """

    kind: Kind
    values: np.ndarray
    classes: tuple[Any, ...]
    starts: np.ndarray | None = None

    def of_vectors(self, values: SiteVectors, name: str, to_end: bool = False) -> np.ndarray:
        """The label of each vector.

        Args:
            values: the vectors with their index.
            name: what they are called in messages.
            to_end: whether the last chosen token of each example is its last.

        Raises:
            DataError: labels of tokens that fit neither the chosen tokens nor all of an example.
        """
        examples = np.asarray(values.examples.numpy())
        if self.starts is None:
            return np.asarray(self.values[examples])
        tokens = np.asarray(values.positions.numpy())
        given = np.diff(self.starts)
        chosen = np.bincount(examples, minlength=len(given))
        if (given == chosen).all():
            first = np.concatenate([[0], chosen.cumsum()])
            return np.asarray(self.values[self.starts[examples] + np.arange(len(examples)) - first[examples]])
        short = tokens >= given[examples]
        if short.any():
            bad = int(examples[short][0])
            raise DataError(
                f"labels: example {bad} has {given[bad]} labels, and {name} chooses {chosen[bad]} of its "
                f"tokens, up to number {int(tokens[examples == bad].max())}; give one label for each chosen "
                "token, or for each token of the prompt"
            )
        ends = np.zeros(len(given), dtype=np.int64)
        np.maximum.at(ends, examples, tokens + 1)
        if to_end and ((ends > 0) & (given > ends)).any():
            bad = int(np.flatnonzero((ends > 0) & (given > ends))[0])
            raise DataError(
                f"labels: example {bad} has {given[bad]} labels, and its prompt {ends[bad]} tokens; give one "
                "label for each token, those that the tokenizer adds included"
            )
        return np.asarray(self.values[self.starts[examples] + tokens])

    @property
    def names(self) -> np.ndarray | None:
        """The classes as an array that estimators take as labels; None where only numbers will do."""
        plain = all(isinstance(one, str) for one in self.classes) or all(
            isinstance(one, bool | int) for one in self.classes
        )
        found = np.array(self.classes) if self.kind == "classification" and plain else None
        # Whole numbers of more than 64 bits are no numbers to numpy.
        return None if found is None or found.dtype.kind == "O" else found


def parse_labels(labels: Any, kind: str, examples: int) -> Labels:
    """Read labels.

    Args:
        labels: one for each example: anything hashable are classes, fractions are numbers, and a 2-D array
            or table of 0 and 1 has a column for each of several labels; or a list for each example with
            one label for each of its tokens.
        kind: what they are, or `auto`.
        examples: number of examples.

    Raises:
        DataError: they are none of these, too many or too few, or all the same.
    """
    if kind not in KINDS:
        raise DataError(f"kind={kind!r}: expected one of {', '.join(map(repr, KINDS))}")
    if labels is None or isinstance(labels, str | bytes) or not isinstance(labels, Iterable):
        raise DataError(f"labels={labels!r:.80}: expected one label for each example")
    if is_unordered(labels):
        raise DataError(f"labels: a {type(labels).__name__} has no order of examples; give a list of labels")
    table = _table(labels, kind)
    if table is not None:
        return _multilabel(table, kind, examples)
    entries = as_numpy(labels).tolist() if hasattr(labels, "shape") else list(labels)
    if len(entries) != examples:
        raise DataError(f"labels has {len(entries)} entries and data {examples} examples; give one each")
    starts = None
    nested = [isinstance(one, list) or (hasattr(one, "shape") and one.shape != ()) for one in entries]
    if any(nested):
        if not all(nested):
            lone = nested.index(False)
            raise DataError(f"labels: example {lone} has {entries[lone]!r:.60}, and others a list of labels")
        rows = [as_numpy(one).tolist() if hasattr(one, "shape") else one for one in entries]
        starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
        entries = [label for row in rows for label in row]
    entries = [_plain(one, number) for number, one in enumerate(entries)]
    if not entries:
        raise DataError("labels: no token has a label")
    if kind == "regression" or (kind == "auto" and any(isinstance(one, float) for one in entries)):
        return _regression(entries, kind, starts)
    return _classification(entries, starts)


def _table(labels: Any, kind: str) -> np.ndarray | None:
    """Labels with two axes, as an array or a table."""
    if hasattr(labels, "shape") and len(labels.shape) == 2:
        return as_numpy(labels.to_numpy() if hasattr(labels, "to_numpy") else labels)
    if kind == "multilabel" and not hasattr(labels, "shape"):
        rows = [list(row) if isinstance(row, Iterable) and not isinstance(row, str) else [] for row in labels]
        if not rows or len({len(row) for row in rows}) != 1 or not rows[0]:
            raise DataError(
                "labels: kind='multilabel' takes rows of equal length of 0 and 1, (example, label)"
            )
        return np.array(rows)
    if kind == "multilabel":
        raise DataError(
            f"labels has the shape {tuple(labels.shape)}; kind='multilabel' takes (example, label)"
        )
    return None


def _multilabel(table: np.ndarray, kind: str, examples: int) -> Labels:
    if kind not in ("auto", "multilabel"):
        raise DataError(
            f"labels has the shape {table.shape}, and kind={kind!r} takes one label for each example"
        )
    if table.shape[0] != examples:
        raise DataError(f"labels has {len(table)} rows and data {examples} examples; give one each")
    if table.shape[1] == 0 or table.dtype.kind not in "biuf" or not np.isin(table, (0, 1)).all():
        raise DataError(
            "labels with two axes are several yes-or-no labels, 0 and 1, (example, label); labels of tokens "
            "are a list for each example"
        )
    values = table.astype(np.int64)
    same = np.flatnonzero(values.min(0) == values.max(0))
    if len(same):
        raise DataError(f"labels: column {same[0]} is {values[0, same[0]]} for all examples; leave it out")
    return Labels("multilabel", values, tuple(range(values.shape[1])))


def _regression(entries: Sequence[Any], kind: str, starts: np.ndarray | None) -> Labels:
    wrong = [one for one in entries if isinstance(one, bool) or not isinstance(one, int | float)]
    if wrong:
        raise DataError(f"labels: {wrong[0]!r:.60} is no number, and kind={kind!r} found numbers beside it")
    values = np.array(entries, dtype=np.float64)
    if not np.isfinite(values).all():
        raise DataError("labels hold NaN or infinity; leave these examples out")
    found = np.unique(values)
    if len(found) == 1:
        raise DataError(f"labels are all {found[0]:g}; there is nothing to tell apart")
    if kind == "auto" and len(found) <= _FEW and bool((found == np.round(found)).all()):
        shown = ", ".join(f"{one:.1f}" for one in found.tolist())
        raise DataError(
            f"labels are {shown} alone, which may be classes or numbers; say kind='classification' or "
            "kind='regression'"
        )
    return Labels("regression", values, (), starts)


def _classification(entries: Sequence[Any], starts: np.ndarray | None) -> Labels:
    kinds = {type(one) for one in entries}
    if bool in kinds and kinds & {int, float}:
        raise DataError("labels mix True or False with numbers, which are equal to them; use one of the two")
    found = set(entries)
    if len(found) < 2:
        raise DataError(f"labels are all {entries[0]!r:.60}; there is nothing to tell apart")
    try:
        classes = sorted(found)
    except TypeError:
        classes = sorted(found, key=lambda one: (type(one).__name__, repr(one)))
    numbers = {one: number for number, one in enumerate(classes)}
    return Labels("classification", np.array([numbers[one] for one in entries]), tuple(classes), starts)


def _plain(label: Any, number: int) -> Hashable:
    """A label as Python has it."""
    value = label.item() if hasattr(label, "item") and getattr(label, "shape", None) == () else label
    value = value.as_py() if hasattr(value, "as_py") else value
    if is_missing(value):
        raise DataError(f"labels: entry {number} is {value!r}; leave examples without a label out")
    if not isinstance(value, Hashable):
        raise DataError(f"labels: entry {number} is {value!r:.60}, which is no label; labels are hashable")
    return value
