"""Splits that keep a group together and every class in each training part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from sklearn.model_selection import KFold, StratifiedGroupKFold, StratifiedKFold

from reftlab.errors import DataError
from reftlab.probing.labels import Kind, Labels

__all__ = ["Split", "Splits", "constant_in_groups", "fold_numbers", "fold_of", "grouped_folds"]
__all__ += ["grouped_splits"]

_INNER = 3

_MANY = 10
_NUMBERS = "; if labels are amounts, say kind='regression'"


@dataclass(frozen=True, eq=False)
class Split:
    """One fold.

    Attributes:
        train, test: row numbers.
        inner: splits of `train`, in numbers that count within it, for choosing regularisation; empty
            where a class is in too few groups.
    """

    train: Int[np.ndarray, " n"]
    test: Int[np.ndarray, " m"]
    inner: tuple[tuple[np.ndarray, np.ndarray], ...]


@dataclass(frozen=True, eq=False)
class Splits:
    """All folds, and the inner splits of all rows together, for the final fit."""

    folds: tuple[Split, ...]
    whole: tuple[tuple[np.ndarray, np.ndarray], ...]


def grouped_splits(y: np.ndarray, groups: np.ndarray, labels: Labels, folds: int, seed: int) -> Splits:
    """Folds in which no group is on both sides.

    Args:
        y: labels of the vectors, as numbers.
        groups: group of each vector, as a number.
        labels: what the labels are, for messages.
        folds: how many.
        seed: which of the possible splits.

    Raises:
        DataError: fewer groups than folds, or a class in fewer groups than folds.
    """
    found = [
        Split(train, test, _inner(y[train], groups[train], labels.kind, seed + 1 + fold))
        for fold, (train, test) in enumerate(grouped_folds(y, groups, labels, folds, seed))
    ]
    return Splits(tuple(found), _inner(y, groups, labels.kind, seed))


def grouped_folds(
    y: np.ndarray, groups: np.ndarray, labels: Labels, folds: int, seed: int
) -> list[tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]]:
    """The same folds without inner splits: for each the rows to train and to test on."""
    count = len(np.unique(groups))
    if count < folds:
        raise DataError(
            f"folds={folds}: there are {count} groups, and a group is never split; give "
            + (f"folds={count} or fewer, or " if count >= 2 else "")
            + "more groups"
        )
    _check_classes(y, groups, labels, folds)
    numbers = fold_numbers(y, groups, labels.kind, folds, seed)
    found = [(np.flatnonzero(numbers != fold), np.flatnonzero(numbers == fold)) for fold in range(folds)]
    for fold, (train, _) in enumerate(found):
        _check_training(y[train], y, labels, fold, folds)
    return found


def fold_of(folds: Sequence[Split], n: int) -> Int[np.ndarray, " n"]:
    """The fold that each of `n` rows is held out in."""
    numbers = np.empty(n, dtype=np.int64)
    for number, split in enumerate(folds):
        numbers[split.test] = number
    return numbers


def fold_numbers(
    y: np.ndarray | None, groups: np.ndarray, kind: Kind, folds: int, seed: int
) -> Int[np.ndarray, " n"]:
    """The fold of each row; without `y`, and for labels without classes, drawn blindly by group."""
    _, first, own = np.unique(groups, return_index=True, return_inverse=True)
    numbers = np.empty(len(first), dtype=np.int64)
    if y is None or kind != "classification":
        splitter: Any = KFold(folds, shuffle=True, random_state=seed).split(first)
    elif constant_in_groups(y, groups):
        splitter = StratifiedKFold(folds, shuffle=True, random_state=seed).split(first, y[first])
    else:
        rows = np.empty(len(y), dtype=np.int64)
        mixed = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        for fold, (_, test) in enumerate(mixed.split(y, y, groups)):
            rows[test] = fold
        return rows
    for fold, (_, test) in enumerate(splitter):
        numbers[test] = fold
    return np.asarray(numbers[own])


def constant_in_groups(y: np.ndarray, groups: np.ndarray) -> bool:
    """Whether all vectors of a group have one label."""
    _, first, own = np.unique(groups, return_index=True, return_inverse=True)
    return bool((y == y[first][own]).all())


def _are_numbers(classes: Sequence[Any]) -> bool:
    return all(isinstance(one, int) and not isinstance(one, bool) for one in classes)


def _groups_with(y: np.ndarray, groups: np.ndarray, number: int) -> int:
    return len(np.unique(groups[y == number]))


def _check_classes(y: np.ndarray, groups: np.ndarray, labels: Labels, folds: int) -> None:
    if labels.kind == "regression":
        return
    columns: Sequence[tuple[str, np.ndarray, Sequence[Any]]] = [("", y, labels.classes)]
    if labels.kind == "multilabel":
        columns = [(f"label {number}: ", y[:, number], (0, 1)) for number in range(y.shape[1])]
    for of, column, classes in columns:
        for number, name in enumerate(classes):
            held = _groups_with(column, groups, number)
            if held < folds:
                raise DataError(
                    f"{of}class {name!r} is in {held} group{'s' * (held != 1)} and folds={folds}: each fold "
                    "needs one of its own to test on; "
                    + (f"give folds={held}, or " if held >= 2 else "give ")
                    + f"more groups with {name!r}"
                    + _NUMBERS * (len(labels.classes) > _MANY and _are_numbers(labels.classes))
                )


def _check_training(train: np.ndarray, y: np.ndarray, labels: Labels, fold: int, folds: int) -> None:
    """Whole groups can crowd a class into one fold, whatever the number of groups."""
    if labels.kind == "regression":
        return
    columns = [(train, y)] if y.ndim == 1 else list(zip(train.T, y.T, strict=True))
    for number, (own, every) in enumerate(columns):
        missing = np.setdiff1d(every, own)
        if len(missing):
            name = labels.classes[int(missing[0])] if y.ndim == 1 else int(missing[0])
            of = "" if y.ndim == 1 else f"label {number}: "
            raise DataError(
                f"{of}class {name!r} is in no group outside fold {fold} of {folds}, so that nothing can be "
                "learned of it there; give another folds= or seed=, or more groups with it"
            )


def _inner(
    y: np.ndarray, groups: np.ndarray, kind: Kind, seed: int
) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Splits for choosing regularisation, of as many parts as the rarest class allows, three at most."""
    folds = min(_INNER, len(np.unique(groups)))
    if kind == "classification":
        folds = min(folds, *(_groups_with(y, groups, number) for number in np.unique(y).tolist()))
    if folds < 2:
        return ()
    numbers = fold_numbers(y, groups, kind, folds, seed)
    splits = [(np.flatnonzero(numbers != fold), np.flatnonzero(numbers == fold)) for fold in range(folds)]
    columns = y[:, None] if y.ndim == 1 else y
    if kind != "regression":
        for train, _ in splits:
            if any(
                len(np.unique(columns[train, n])) < len(np.unique(columns[:, n]))
                for n in range(columns.shape[1])
            ):
                return ()
    return tuple(splits)
