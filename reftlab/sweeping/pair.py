"""One pair of prompts: its cells, computed, skipped, or found on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch

from reftlab.sweeping.attribution import estimated, gradients
from reftlab.sweeping.changes import Changes
from reftlab.sweeping.engine import Engine
from reftlab.sweeping.metric import Measured, Metric, References
from reftlab.sweeping.passes import Passes, Patch, Recorded
from reftlab.sweeping.prompts import Columns, Pair
from reftlab.sweeping.sites import SweptSite
from reftlab.sweeping.store import CellStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Map", "Work"]

COMPUTED, FOUND = "cells computed", "cells found on disk"
EQUAL = "cells not run, as the vectors are the run's own"
BEYOND = "cells not run, as nothing of them reaches the last token"


@dataclass(frozen=True)
class Map:
    """One pair's cells.

    Attributes:
        values: the metric of each cell.
        clean, corrupt: the metric of the unpatched runs; NaN where there is none.
        estimates: attribution's effects, or None.
        counts: how many cells were computed, found and not run.
    """

    values: Sequence[float]
    clean: float
    corrupt: float
    estimates: Sequence[float] | None
    counts: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Work:
    """What is done with every pair."""

    engine: Engine
    sites: tuple[SweptSite, ...]
    columns: Columns
    changes: Changes
    metric: Metric
    tokenizer: PreTrainedTokenizerBase | None
    attribution: bool
    exact: bool
    batch_size: int | None
    store: CellStore | None

    @property
    def cells(self) -> list[tuple[int, int, int]]:
        """Each cell's site, head and column, in the order of their numbers."""
        heads, columns = len(self.sites[0].parts), len(self.columns.names)
        return list(product(range(len(self.sites)), range(heads), range(columns)))

    def run(self, number: int, pair: Pair, advance: Callable[[int], object]) -> Map:
        """Everything that is asked of one pair."""
        done = {} if self.store is None or not self.exact else self.store.cells(number)
        kept = None if self.store is None else self.store.get(f"pair{number:05d}-runs")
        wanted = len(self.cells) if self.exact else 0
        advance(len(done))
        if kept is not None and len(done) >= wanted and not (self.attribution and "estimates" not in kept):
            estimates = kept["estimates"].tolist() if self.attribution else None
            counts = {FOUND: len(done)}
            return Map(self._in_order(done), float(kept["clean"]), float(kept["corrupt"]), estimates, counts)
        return self._made(number, pair, done, advance)

    def _made(self, number: int, pair: Pair, done: dict[int, float], advance: Callable[[int], object]) -> Map:
        row = pair.corrupt if self.changes.into_corrupt and pair.corrupt is not None else pair.clean
        other = pair.clean if row is pair.corrupt else pair.corrupt
        passes, base = self.engine.start(row, self.sites)
        source = None if other is None else Passes(self.engine.reft, other, None).record(self.sites)
        clean, corrupt = (source, base) if row is pair.corrupt else (base, source)
        assert clean is not None
        references = References(clean.logits, None if corrupt is None else corrupt.logits)
        measured = self.metric.finite(number, self.tokenizer, references)
        runs = {
            "clean": float(measured(clean.logits[None])[0].detach()),
            "corrupt": float("nan") if corrupt is None else float(measured(corrupt.logits[None])[0].detach()),
        }
        mine = runs["corrupt" if row is pair.corrupt else "clean"]
        same = self.engine.unchanged(row, other)
        patches = [self._patches(number, cell, base, source, same) for cell in range(len(self.cells))]
        estimates = self._estimated(passes, base, patches, measured) if self.attribution else None
        if self.store is not None:
            tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in runs.items()}
            if estimates is not None:
                tensors["estimates"] = torch.tensor(estimates, dtype=torch.float64)
            self.store.put(f"pair{number:05d}-runs", tensors)
        counts = {FOUND: len(done)} if done else {}
        if self.exact:
            done = self._computed(number, passes, patches, mine, measured, done, counts, advance)
        return Map(self._in_order(done), runs["clean"], runs["corrupt"], estimates, counts)

    def _computed(
        self,
        number: int,
        passes: Passes,
        patches: Sequence[list[Patch] | None],
        base: float,
        measured: Measured,
        done: dict[int, float],
        counts: dict[str, int],
        advance: Callable[[int], object],
    ) -> dict[int, float]:
        """Run those cells that are not done; the metric of all by number."""
        done = dict(done)
        jobs, rows, skipped = [], {}, []
        for cell, own in enumerate(patches):
            if cell in done:
                continue
            job = None
            if own is not None:
                rows[cell] = [[patch] for patch in own]
                job = self.engine.job(cell, rows[cell], passes)
            if job is None:
                name = EQUAL if own is None else BEYOND
                counts[name] = counts.get(name, 0) + 1
                skipped.append(cell)
            else:
                jobs.append(job)
        done.update(dict.fromkeys(skipped, base))
        if self.store is not None and skipped:
            self.store.add_cells(number, skipped, [base] * len(skipped))
        advance(len(skipped))
        tokens = self.metric.tokens(number, self.tokenizer)
        for batch in self.engine.batches(jobs, passes, self.batch_size):
            together = [row for job in batch.jobs for row in rows[job.cell]]
            values = measured(self.engine.logits(passes, together, batch.start, tokens)).double().cpu()
            means = [float(part.mean()) for part in values.split([job.rows for job in batch.jobs])]
            numbers = [job.cell for job in batch.jobs]
            done.update(zip(numbers, means, strict=True))
            if self.store is not None:
                self.store.add_cells(number, numbers, means)
            counts[COMPUTED] = counts.get(COMPUTED, 0) + len(numbers)
            advance(len(numbers))
        return done

    def _patches(
        self, number: int, cell: int, base: Recorded, source: Recorded | None, same: int
    ) -> list[Patch] | None:
        site, head, column = self.cells[cell]
        where = self.columns.of_pairs[number][column]
        name = f"{number} {self.sites[site].name} {head} {column}"
        return self.changes.patches(self.sites[site], head, column, where, base, source, name, same)

    def _estimated(
        self, passes: Passes, base: Recorded, patches: Sequence[list[Patch] | None], measured: Measured
    ) -> list[float]:
        slopes = gradients(passes, self.sites, measured)
        found = []
        for (site, _, _), own in zip(self.cells, patches, strict=True):
            name = self.sites[site].name
            found.append(estimated(slopes[name], base.values[name], None if own is None else own[0]))
        return found

    def _in_order(self, done: Mapping[int, float]) -> list[float]:
        return np.array([done.get(cell, float("nan")) for cell in range(len(self.cells))]).tolist()
