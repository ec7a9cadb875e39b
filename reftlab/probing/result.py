"""What `rl.probe` returns."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from reftlab.errors import DataError, did_you_mean
from reftlab.graph import Read
from reftlab.probing.checks import check_level
from reftlab.probing.fitted import FittedProbe
from reftlab.probing.held_out import HeldOut
from reftlab.probing.labels import Kind
from reftlab.probing.sites import ProbedSite

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["ProbeMap"]

Values = Float[np.ndarray, "site column"]


@dataclass(frozen=True, eq=False)
class ProbeMap:
    """How well probes tell the labels from the vectors of each site and position.

    Every score is of pooled out-of-fold predictions. NaN stands where a site has no vectors at a position,
    and where an estimator gives no scores to rank by.

    Attributes:
        sites: the rows.
        columns: the positions.
        kind: `classification`, `multilabel` or `regression`.
        classes: the classes; numbers of the labels for several; empty for numbers.
        metric: the headline metric: `balanced_accuracy` or `r2`.
        metrics: each metric `(site, column)`; all from 0 to 1, but `r2`, which is below 0 where the
            labels' mean predicts better. Of several labels the mean over labels.
        intervals: lower and upper ends `(site, column, 2)` of each metric's bootstrap intervals, over
            resampled groups, the predictions staying what they are. One of no width says that no resample
            held a wrong prediction, not that none will come.
        level: of the intervals.
        chance: by metric `(column,)`, what the commonest class, or the mean, gives.
        p_values: of each cell, adjusted for the whole map `(site, column)`; NaN without shuffles.
        p_values_of: what was refitted for each shuffle: `linear` for ridge regression, or `refit`.
        control: each metric on control labels `(site, column)`, or None.
        control_types: what has one control label each, by column.
        description: `bits`, `compression` and `gain` of the online code `(site, column)`, or None.
        counts: by column `(column,)`, `examples`, `vectors` and `groups`.
        class_counts: examples, or tokens where these have labels, of each class.
        folds: number of folds.
        estimator: what was fitted: a name, or the text of one's own estimator.
        estimator_name: the same in a word or two: of one's own the class of its last step.
        streamed: cells fitted chunk by chunk `(site, column)`.
        settings: the further arguments, and whether texts went through the chat template (`chat`, `system`).
        notes: what a reader should know of how it was done.
        held_out: each cell's out-of-fold predictions by number of site and column; see `predictions`.
        fit: gives the fitted probe of a cell by number of site and column.
    """

    sites: tuple[ProbedSite, ...]
    columns: tuple[str, ...]
    kind: Kind
    classes: tuple[Any, ...]
    metric: str
    metrics: Mapping[str, Values]
    intervals: Mapping[str, Float[np.ndarray, "site column 2"]]
    level: float
    chance: Mapping[str, Float[np.ndarray, " column"]]
    p_values: Values
    p_values_of: str
    control: Mapping[str, Values] | None
    control_types: tuple[str, ...]
    description: Mapping[str, Values] | None
    counts: Mapping[str, Int[np.ndarray, " column"]]
    class_counts: Mapping[Any, int]
    folds: int
    estimator: str
    estimator_name: str
    streamed: Bool[np.ndarray, "site column"]
    settings: Mapping[str, Any]
    notes: tuple[str, ...]
    held_out: Mapping[tuple[int, int], HeldOut] = field(repr=False)
    fit: Callable[[int, int], FittedProbe] = field(repr=False)

    @property
    def score(self) -> Values:
        """The headline metric."""
        return self.metrics[self.metric]

    @property
    def selectivity(self) -> Values | None:
        """Headline metric minus that on control labels; low where the probe could have learned by heart.

        Hewitt and Liang, "Designing and Interpreting Probes with Control Tasks" (2019, arXiv:1909.03368).
        """
        return None if self.control is None else self.score - self.control[self.metric]

    @property
    def best(self) -> tuple[str, str]:
        """Site and position of the highest score.

        The best of many cells is partly luck: its score is higher than what new data will give. For an
        honest number choose the cell on one part of the data, and probe it alone on another.
        """
        if not np.isfinite(self.score).any():
            raise DataError("no cell has a score")
        site, column = np.unravel_index(int(np.nanargmax(self.score)), self.score.shape)
        return self.sites[int(site)].name, self.columns[int(column)]

    def significant(self, level: float = 0.05) -> Bool[np.ndarray, "site column"]:
        """Which cells are above chance, with a chance of at most `level` of any false one in the map.

        Raises:
            DataError: a level outside 0 to 1, or a map without shuffles.
        """
        check_level(level, 0.05)
        if not np.isfinite(self.p_values).any():
            raise DataError("there are no p-values; probe with permutations=1000")
        return np.asarray(np.nan_to_num(self.p_values, nan=1.0) <= level)

    def __getitem__(self, name: str | tuple[str, str] | Read) -> FittedProbe:
        """The probe of one cell, fitted on all of its vectors.

        Args:
            name: `"site @ position"`, a pair of both such as `best`, or a read with positions, such as
                `rl.Read("blocks[2].attn.heads @ last", heads=3)`.

        Raises:
            KeyError: there is no such cell.
        """
        return self.fit(*self._place(name))

    def predictions(self, site: str | tuple[str, str] | Read, position: str | None = None) -> pd.DataFrame:
        """What the probes of one cell said of each vector that they had not seen: which are wrong?

        The map's scores are those of these predictions. One line a vector: example after example, and
        of an example with several tokens these in ascending order. Columns are `example` and `token`,
        numbers from 0 in the data and in the prompt, the `fold` in which it was held out, `label`,
        `predicted` and, of classes, scores; see `HeldOut`.

        Args:
            site: the site, or as for `[...]` the cell.
            position: the position, where `site` does not say it.

        Raises:
            KeyError: there is no such cell.

        >>> said = found.predictions(found.best)                                   # doctest: +SKIP
        >>> [texts[n] for n in said.example[said.label != said.predicted]]         # doctest: +SKIP
        """
        name = site if position is None or not isinstance(site, str) else (site, position)
        return self.held_out[self._place(name)].to_frame()

    def by_head(self, metric: str | None = None, position: str | None = None) -> pd.DataFrame:
        """A metric of attention heads, a row for each block and a column for each head.

        Args:
            metric: as for `plot`.
            position: which, where there are several.

        Raises:
            DataError: not all sites are heads of blocks, or there are several positions.

        >>> heads = rl.probe(model, texts, labels, sites="blocks[*].attn.heads")    # doctest: +SKIP
        >>> heads.by_head().stack().nlargest(5)                                     # doctest: +SKIP
        """
        from reftlab.probing.drawing import by_head

        if position is None and len(self.columns) > 1:
            raise DataError(f"position=None: there are {list(self.columns)}; say which")
        if position is not None and position not in self.columns:
            raise DataError(f"position={position!r}: there are {list(self.columns)}")
        return by_head(self, metric, 0 if position is None else self.columns.index(position))

    def _place(self, name: str | tuple[str, str] | Read) -> tuple[int, int]:
        if isinstance(name, Read):
            name = name.label
        if isinstance(name, tuple) and len(name) == 2:
            name = f"{name[0]} @ {name[1]}" if name[1] else name[0]
        known = {}
        for row, site in enumerate(self.sites):
            for column, position in enumerate(self.columns):
                for spelled in (site.name, site.raw):
                    known[f"{spelled} @ {position}" if position else spelled] = row, column
        if not isinstance(name, str) or name not in known:
            shown = ", ".join(map(repr, list(known)[:3]))
            hint = did_you_mean(name, known) if isinstance(name, str) else ""
            raise KeyError(f"{name!r} was not probed; there is {shown}, ….{hint}")
        row, column = known[name]
        if not np.isfinite(self.score[row, column]):
            raise KeyError(f"{name!r} has no vectors, or no score")
        return row, column

    def to_frame(self) -> pd.DataFrame:
        """One line a cell: where it is, each metric with its interval and chance, and what it is worth."""
        import pandas as pd

        site, column = (index.ravel() for index in np.indices(self.score.shape))
        frame = pd.DataFrame(
            {
                "site": np.array([one.name for one in self.sites], dtype=object)[site],
                "block": pd.array([self.sites[number].block for number in site], dtype="Int64"),
                "head": pd.array([self.sites[number].head for number in site], dtype="Int64"),
                "position": np.array(self.columns, dtype=object)[column],
            }
        )
        for name, values in self.metrics.items():
            frame[name] = values.ravel()
            frame[f"{name}_low"], frame[f"{name}_high"] = self.intervals[name].reshape(-1, 2).T
            frame[f"{name}_chance"] = self.chance[name][column]
        frame["p_value"] = self.p_values.ravel()
        if self.control is not None and self.selectivity is not None:
            frame["control"] = self.control[self.metric].ravel()
            frame["selectivity"] = self.selectivity.ravel()
        for name, values in (self.description or {}).items():
            frame[name] = values.ravel()
        for name, values in self.counts.items():
            frame[name] = values[column]
        frame["streamed"] = self.streamed.ravel()
        return frame

    def plot(self, metric: str | None = None) -> Figure:
        """A heat map of sites × positions; for one position a line over depth with its interval.

        Heads of blocks at one position are a heat map of blocks × heads.

        Args:
            metric: one of `metrics`, `selectivity`, or one of `description`; the headline unless given.

        Raises:
            DataError: there is no such metric.
        """
        from reftlab.probing.drawing import draw

        return draw(self, metric)

    def __repr__(self) -> str:
        cells = int(np.isfinite(self.score).sum())
        parts = [
            f"{len(self.sites)} site{'s' * (len(self.sites) != 1)} × {len(self.columns)} position"
            f"{'s' * (len(self.columns) != 1)}",
            self.estimator_name,
        ]
        if self.settings["chat"]:
            parts.append("chat template")
        if cells:
            site, column = self.best
            where = f"{site} @ {column}" if column else site
            parts.append(f"best {self.metric.replace('_', ' ')} {np.nanmax(self.score):.3f} at {where}")
            parts.append(f"chance {np.max(self.chance[self.metric]):.3g}")
        if np.isfinite(self.p_values).any():
            parts.append(f"{int(self.significant().sum())} of {cells} cells above chance at 0.05")
        return f"ProbeMap({'; '.join(parts)})"

    def _repr_html_(self) -> str:
        from reftlab.sweeping.drawing import inline

        frame = self.to_frame().sort_values(self.metric, ascending=False, kind="stable")[:10]
        empty = {"streamed", *(["head"] if frame["head"].isna().all() else [])}
        kept = [name for name in frame if not str(name).endswith("_chance") and name not in empty]
        table = frame[kept].to_html(index=False, float_format="{:.3g}".format, na_rep="–")
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return f"<div><p>{html.escape(repr(self))}</p>{inline(self.plot())}{table}<ul>{notes}</ul></div>"
