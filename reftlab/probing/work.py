"""The work of a map: cell after cell, everything that a column's cells share done once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from tqdm.auto import tqdm

from reftlab.errors import DataError
from reftlab.probing.cells import Cell, Cells
from reftlab.probing.columns import STREAMED_SHUFFLES, Column, Settings, column_of, is_streamed
from reftlab.probing.description import default_coder, description_length
from reftlab.probing.estimators import Predictions, Probe, fit_on_all, out_of_fold
from reftlab.probing.fitted import FittedProbe
from reftlab.probing.held_out import HeldOut, held_out
from reftlab.probing.labels import Labels
from reftlab.probing.result import ProbeMap
from reftlab.probing.scoring import HEADLINE, METRICS, bootstrap_intervals, chance_levels, scores_of
from reftlab.probing.significance import (
    Shuffles,
    Statistics,
    adjusted_p_values,
    label_columns,
    linear_statistics,
    refitted_statistics,
    rotated,
)
from reftlab.probing.streaming import (
    EPOCHS,
    Stream,
    fit_on_all_streamed,
    out_of_fold_streamed,
    scaled_chunks,
)
from reftlab.runtime.sizes import in_words

__all__ = ["Work"]


@dataclass(frozen=True, eq=False)
class _Found:
    """What one cell gave."""

    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    control: dict[str, float]
    description: dict[str, float]
    statistics: Statistics | None
    alike: bool
    said: HeldOut


@dataclass(eq=False)
class Work:
    """A map in the making.

    Args:
        cells: the vectors.
        labels: of the examples.
        settings: everything else.
    """

    cells: Cells
    labels: Labels
    settings: Settings
    _columns: dict[tuple[int, str], Column] = field(default_factory=dict)
    _fitted: dict[tuple[int, int], FittedProbe] = field(default_factory=dict)
    _scores: Any = None

    def run(self) -> ProbeMap:
        """Probe all cells.

        Raises:
            DataError: see `probe`.
        """
        self._check()
        for (_, number), cell in self.cells.by_place.items():
            self._column(number, cell)
        found = {}
        places = sorted(self.cells.by_place)
        for place in tqdm(places, desc="probe", unit="cell", disable=not self.settings.progress):
            found[place] = self._cell(place)
        return self._result(found)

    def fit(self, row: int, column: int) -> FittedProbe:
        """The probe of a cell on all of its vectors."""
        if (row, column) not in self._fitted:
            cell, shared = (
                self.cells.by_place[row, column],
                self._column(column, self.cells.by_place[row, column]),
            )
            labels, probe = self.labels, self.settings.probe
            y = shared.y if labels.names is None else labels.names[shared.y]
            if is_streamed(cell, self.settings):
                stream = Stream.of(cell, self.settings.memory, self.settings.seed)
                estimator = fit_on_all_streamed(stream, shared.y, shared.splits, labels.kind)
                if labels.names is not None:
                    estimator[-1].classes_ = labels.names
            else:
                estimator = fit_on_all(probe, cell.take(dtype=torch.float64), y, shared.splits.whole)
            self._fitted[row, column] = FittedProbe(
                cell.name, cell.read, labels.kind, labels.classes, estimator, HEADLINE[labels.kind],
                float(self._scores[row, column]), len(shared.y),
            )  # fmt: skip
        return self._fitted[row, column]

    def _check(self) -> None:
        settings = self.settings
        for cell in self.cells.by_place.values():
            if not is_streamed(cell, self.settings):
                continue
            takes, given = in_words(cell.working_bytes), in_words(settings.memory)
            size = f"{cell.name} takes {takes} with the copies that a fit makes, and memory= is {given}"
            if settings.probe.name not in ("logistic", "ridge"):
                raise DataError(
                    f"{size}; chunk by chunk only 'logistic' and 'ridge' can be fitted, not "
                    f"estimator={settings.probe.name!r:.60}"
                )
            if settings.description or settings.null == "refit":
                what = "description=True" if settings.description else "null='refit'"
                raise DataError(f"{size}; {what} needs all of a cell's vectors at once")

    def _column(self, number: int, cell: Cell) -> Column:
        index = cell.values.index.contiguous().numpy()
        key = number, hashlib.blake2b(index.tobytes(), digest_size=16).hexdigest()
        if key not in self._columns:
            self._columns[key] = column_of(number, cell, self.cells, self.labels, self.settings)
        return self._columns[key]

    def _cell(self, place: tuple[int, int]) -> _Found:
        cell, settings = self.cells.by_place[place], self.settings
        shared, kind, classes = self._column(place[1], cell), self.labels.kind, len(self.labels.classes)
        stream = Stream.of(cell, settings.memory, settings.seed) if is_streamed(cell, self.settings) else None
        # In float32 the search for a logistic regression's weights ends in rounding errors, and says so.
        vectors: Any = cell.take(dtype=torch.float64) if stream is None else None

        def predicted(y: np.ndarray) -> Predictions:
            if stream is not None:
                return out_of_fold_streamed(stream, y, shared.splits, kind, classes)
            return out_of_fold(settings.probe, vectors, y, shared.splits.folds, classes)

        found = predicted(shared.y)
        control = (
            {}
            if shared.control is None
            else scores_of(shared.control, predicted(shared.control), kind, classes)
        )
        intervals = bootstrap_intervals(
            shared.y, found, kind, classes, shared.groups, settings.bootstrap, settings.level, settings.seed
        )
        statistics = None
        if shared.shuffles is not None:
            statistics = self._statistics(shared, shared.shuffles, vectors, stream)
        description = self._description(vectors, shared) if settings.description else {}
        return _Found(
            scores_of(shared.y, found, kind, classes), intervals, control, description, statistics,
            stream is None and _alike(vectors, cell.rounding),
            held_out(self.labels, np.asarray(cell.values.index.numpy()), shared.folds, shared.y, found),
        )  # fmt: skip

    def _statistics(
        self, shared: Column, shuffles: Shuffles, vectors: Any, stream: Stream | None
    ) -> Statistics:
        kind, classes = self.labels.kind, len(self.labels.classes)
        columns = label_columns(shared.y, kind, classes)
        if stream is not None:
            width = stream.cell.shape[1]
            return linear_statistics(
                scaled_chunks(stream), width, columns, shuffles, self.settings.memory // 16
            )
        if self.settings.null == "refit":
            return refitted_statistics(self.settings.probe, vectors, shared.y, classes, shuffles)
        turned = rotated(vectors.astype(np.float32))
        return linear_statistics(
            lambda: iter([(slice(0, len(turned)), turned)]), turned.shape[1], columns, shuffles
        )

    def _description(self, vectors: Any, shared: Column) -> dict[str, float]:
        probe = self.settings.probe
        if probe.own is not None:
            coder = clone(probe.own)
        elif probe.name == "logistic":
            coder = default_coder()
        else:
            coder = Probe(probe.name, None, "classification").build()
            if probe.name == "lda":
                coder.set_params(priors=None)
        found = description_length(vectors, shared.y, coder, shared.groups, seed=self.settings.seed)
        return {"bits": found.bits, "compression": found.compression, "gain": found.gain}

    def _result(self, found: dict[tuple[int, int], _Found]) -> ProbeMap:
        cells, settings, labels = self.cells, self.settings, self.labels
        shape, names = (len(cells.sites), len(cells.columns)), METRICS[labels.kind]

        def grids(part: str, names: Iterable[str], *more: int) -> dict[str, np.ndarray]:
            return {
                name: _grid(shape, {place: getattr(one, part)[name] for place, one in found.items()}, *more)
                for name in names
            }

        scores, intervals = grids("scores", names), grids("intervals", names, 2)
        control = None if settings.control is None else grids("control", names)
        bits = grids("description", next(iter(found.values())).description)
        statistics = [one.statistics for one in found.values() if one.statistics is not None]
        adjusted = dict(zip(found, adjusted_p_values(statistics), strict=True)) if statistics else {}
        first = [next(cell for _, cell in cells.of_column(number)) for number in range(shape[1])]
        shared = [self._column(number, cell) for number, cell in enumerate(first)]
        chances = [chance_levels(one.y, labels.kind, len(labels.classes)) for one in shared]
        streamed = np.zeros(shape, dtype=bool)
        for place, cell in cells.by_place.items():
            streamed[place] = is_streamed(cell, settings)
        headline = HEADLINE[labels.kind]
        self._scores = scores[headline]
        return ProbeMap(
            sites=cells.sites,
            columns=cells.columns,
            kind=labels.kind,
            classes=labels.classes,
            metric=headline,
            metrics=scores,
            intervals=intervals,
            level=settings.level,
            chance={name: np.array([one[name] for one in chances]) for name in names},
            p_values=_grid(shape, adjusted),
            p_values_of=settings.null,
            control=control,
            control_types=tuple(one.types for one in shared),
            description=bits or None,
            counts={
                "examples": np.array([len(np.unique(cell.examples)) for cell in first]),
                "vectors": np.array([len(one.y) for one in shared]),
                "groups": np.array([len(np.unique(one.groups)) for one in shared]),
            },
            class_counts=self._class_counts(),
            folds=settings.folds,
            estimator=settings.probe.name,
            estimator_name=settings.probe.short_name,
            streamed=streamed,
            settings={
                "permutations": 0 if shared[0].shuffles is None else shared[0].shuffles.count,
                "bootstrap": settings.bootstrap,
                "memory": settings.memory,
                "seed": settings.seed,
                "chat": self.cells.chat,
                "system": self.cells.system,
            },
            notes=self._notes(shared, streamed, [cells.by_place[at].name for at in found if found[at].alike]),
            held_out={place: one.said for place, one in found.items()},
            fit=self.fit,
        )

    def _class_counts(self) -> dict[Any, int]:
        labels = self.labels
        if labels.kind == "multilabel":
            return {name: int(labels.values[:, name].sum()) for name in labels.classes}
        if labels.kind == "regression":
            return {}
        counts = np.bincount(labels.values, minlength=len(labels.classes))
        return dict(zip(labels.classes, counts.tolist(), strict=True))

    def _notes(self, shared: list[Column], streamed: np.ndarray, alike: list[str]) -> tuple[str, ...]:
        notes = []
        settings = self.settings
        if self.cells.chat:
            system = self.cells.system
            notes.append(
                "Texts went through the chat template"
                + (f", with the system message {system!r:.80}." if system else ".")
            )
        if len(self.cells.by_place) > 1:
            notes.append(
                f"The best of {len(self.cells.by_place)} cells is partly luck; its score is optimistic."
            )
        if alike:
            shown = ", ".join(alike[:4]) + ", …" * (len(alike) > 4)
            notes.append(
                f"Vectors are the same but for rounding at {shown}; what a probe finds there may be how rows "
                "were padded."
            )
        if settings.copies:
            notes.append(
                f"{settings.copies} examples are copies of others; across a split a probe knows them "
                "by heart. Leave them out, or give groups=."
            )
        if streamed.any():
            notes.append(
                f"{int(streamed.sum())} cells do not fit into {in_words(settings.memory)} and were fitted "
                f"chunk by chunk, by stochastic gradients over {EPOCHS} epochs."
            )
            if settings.permutations > STREAMED_SHUFFLES:
                notes.append(f"{STREAMED_SHUFFLES} shuffles were made in place of {settings.permutations}.")
        if settings.probe.name in ("logistic", "ridge") and any(
            not split.inner for one in shared for split in one.splits.folds
        ):
            notes.append(
                "A class is in too few groups to choose regularisation; its strength is fixed there."
            )
        if any(one.types == "groups" for one in shared):
            notes.append(
                "Control labels are of groups, which no two folds share: at chance unless folds leak."
            )
        if any(one.shuffles is not None and not one.shuffles.whole for one in shared):
            notes.append("Labels differ inside groups and were shuffled inside them too.")
        return tuple(notes)


def _alike(vectors: np.ndarray, rounding: float) -> bool:
    """Whether vectors differ by no more than a share of their length, as after one and the same token."""
    spread, size = vectors.var(0).sum(), (vectors**2).mean(0).sum()
    return bool(spread <= rounding**2 * size)


def _grid(shape: tuple[int, int], values: Mapping[tuple[int, int], Any], *more: int) -> np.ndarray:
    """Values by place as an array, NaN elsewhere."""
    filled = np.full((*shape, *more), np.nan)
    for place, value in values.items():
        filled[place] = value
    return filled
