"""What all cells of a column share: labels, groups, folds, control labels and shuffles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from reftlab.errors import DataError
from reftlab.probing.cells import Cell, Cells
from reftlab.probing.control import control_labels
from reftlab.probing.estimators import Probe
from reftlab.probing.folds import Splits, fold_of, grouped_splits
from reftlab.probing.labels import Labels
from reftlab.probing.significance import Shuffles

__all__ = ["STREAMED_SHUFFLES", "Column", "Settings", "column_of", "is_streamed"]

_CONTROL_DRAWS = 20

STREAMED_SHUFFLES = 199
"""Most shuffles of a map in which a cell does not fit into memory, since each needs the vectors anew."""


@dataclass(frozen=True, eq=False)
class Settings:
    """What `probe` was told, checked; see there.

    `groups` has a number for each example; `copies` says how many examples stand in the data before.
    """

    probe: Probe
    folds: int
    groups: np.ndarray
    control: Any
    description: bool
    permutations: int
    null: str
    bootstrap: int
    level: float
    memory: int
    seed: int
    progress: bool
    copies: int = 0


@dataclass(frozen=True, eq=False)
class Column:
    """What all cells with the same tokens share.

    Attributes:
        y: label of each vector, as a number.
        groups: group of each vector.
        splits: the folds.
        folds: the fold that each vector is held out in.
        control: control labels, as numbers; or None.
        types: what has one control label each.
        shuffles: the shuffled orders, or None.
    """

    y: np.ndarray
    groups: np.ndarray
    splits: Splits
    folds: np.ndarray
    control: np.ndarray | None
    types: str
    shuffles: Shuffles | None


def is_streamed(cell: Cell, settings: Settings) -> bool:
    """Whether a cell is fitted chunk by chunk."""
    return cell.working_bytes > settings.memory


def column_of(number: int, cell: Cell, cells: Cells, labels: Labels, settings: Settings) -> Column:
    """What the cells with a cell's tokens share.

    Args:
        number: of the column.
        cell: one of them.
        cells, labels, settings: of the map.

    Raises:
        DataError: labels that do not fit, or classes that cannot be split.
    """
    y = labels.of_vectors(cell.values, cell.name, cell.to_end)
    if labels.kind == "classification" and len(np.unique(y)) < len(labels.classes):
        missing = labels.classes[int(np.setdiff1d(np.arange(len(labels.classes)), y)[0])]
        raise DataError(f"{cell.name}: no vector has the label {missing!r}")
    groups = settings.groups[cell.examples]
    splits = grouped_splits(y, groups, labels, settings.folds, settings.seed)
    of_tokens = labels.starts is not None or cells.per_token[number]
    types, name = _types(settings.control, cell, groups, of_tokens)
    shuffles = None
    if settings.permutations:
        count = settings.permutations
        if any(is_streamed(one, settings) for one in cells.by_place.values()):
            count = min(count, STREAMED_SHUFFLES)
        shuffles = Shuffles.of(y, groups, count, settings.seed)
    folds = fold_of(splits.folds, len(y))
    return Column(y, groups, splits, folds, _control(types, y, settings.seed), name, shuffles)


def _types(control: Any, cell: Cell, groups: np.ndarray, of_tokens: bool) -> tuple[np.ndarray | None, str]:
    """What has one control label each."""
    if control is None:
        return None, ""
    if isinstance(control, np.ndarray):
        return control[cell.examples], "given"
    ids = np.asarray(cell.values.token_ids.numpy())
    if of_tokens and (ids >= 0).all() and 1 < len(np.unique(ids)) < len(ids):
        return ids, "token ids"
    return groups, "groups"


def _control(types: np.ndarray | None, y: np.ndarray, seed: int) -> np.ndarray | None:
    """Control labels with at least two classes, which a draw for few types need not have."""
    if types is None:
        return None
    for draw in range(_CONTROL_DRAWS):
        labels = np.asarray(control_labels(types, y, seed=seed + draw))
        columns = labels[:, None] if labels.ndim == 1 else labels
        if (columns.min(0) < columns.max(0)).all():
            return labels
    raise DataError(
        f"control: {len(np.unique(types))} types are too few to draw labels for; give other types, or "
        "control=None"
    )
