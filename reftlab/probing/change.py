"""Before and after: the same probes on the base run and on the edited run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from reftlab.address import parse_path, resolve
from reftlab.errors import AddressError, DataError
from reftlab.graph import Read
from reftlab.probing.cells import Cells, cells_of_model
from reftlab.probing.change_result import ProbeChange
from reftlab.probing.checks import as_groups, check_level, seed_number
from reftlab.probing.estimators import Predictions, Probe, blank, predictions, probe_of
from reftlab.probing.folds import grouped_splits
from reftlab.probing.labels import Labels, parse_labels
from reftlab.probing.scoring import HEADLINE, chance_levels, weighted_scores
from reftlab.probing.significance import adjusted_p_values, label_columns
from reftlab.probing.sites import path_of
from reftlab.probing.swaps import Swaps, swap_statistics
from reftlab.runtime import BoundModel
from reftlab.runtime.cone import BlockStack
from reftlab.training.settings import whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["probe_change"]

_ROWS = ("base", "edited", "transfer", "difference", "transfer_difference")


def probe_change(
    reft: BoundModel,
    data: Any,
    labels: Any,
    sites: Any = None,
    positions: Any = None,
    *,
    estimator: Any = "auto",
    kind: str = "auto",
    groups: Sequence[Any] | Any | None = None,
    folds: int = 5,
    permutations: int = 199,
    bootstrap: int = 1000,
    level: float = 0.95,
    chat: bool | None = None,
    system: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tasks: str | Sequence[str | None] | None = None,
    select: str | Sequence[str] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> ProbeChange:
    """Probe for concepts without and with the edits: what do these make more decodable, and what less?

    Two questions, at every site and position. *Decodability*: how well do probes that are trained and
    tested on the edited run do, against probes that are trained and tested on the base run, on the same
    folds? *Transfer*: do probes that were trained on the base run still read the edited run? Where
    decodability stays and transfer falls, the concept is there, but no longer where it was.

    *p-values* say where decodability differs. Base and edited vectors of whole groups are swapped at random,
    and ridge regressions are refitted on both for every swap; a cell counts by how far the difference of
    their held-out correlations with the labels stands out from those of the swaps, in either direction. They
    are adjusted for all cells and concepts together by the maximum statistic (Westfall and Young 1993). A
    shift of all vectors alike is no difference.

    Scores below chance come where an edit was itself fitted on the very examples that are probed, such as
    an eraser: what it left in one fold it overdid in the others. Probe with other examples.

    Every cell's vectors are held in memory whole, those of both runs.

    Args:
        reft: a bound model with edits.
        data: as for `rl.collect`.
        labels: one concept's labels as for `rl.probe`, or those of several concepts by name.
        sites: a path, an `rl.Read` or several of both, as for `rl.probe`; unless given, each edit's own site
            and the outputs of the blocks from the first one edited on.
        positions: a position, several, or several by name, for sites that name none; `"last"` unless given.
        estimator, kind, groups, folds: as for `rl.probe`; `kind` is every concept's.
        permutations: number of swaps; 0 for no p-values.
        bootstrap: resamples of groups for the intervals; 0 for none.
        level: of the intervals.
        chat, system, tokenizer, tasks, select, batch_size: as for `rl.collect`; the base run has no
            edits whatever they say.
        seed: of folds, swaps and resamples.
        progress: whether to show progress bars.

    Returns:
        `ProbeChange`: by concept, site and position the scores, their differences and p-values.

    Raises:
        AddressError: a site that the model does not have.
        DataError: a model without edits, labels or arguments that cannot be used, or too few groups.

    >>> found = rl.probe_change(reft, texts, {"plural": plural, "tense": tense})     # doctest: +SKIP
    >>> found.lost(), found.plot()                                                  # doctest: +SKIP
    """
    if not isinstance(reft, BoundModel) or not reft.edits:
        raise DataError("reft has no edits, so nothing is before or after; take rl.probe for a bare model")
    seed = seed_number(seed)
    check_level(level, 0.95)
    folds, permutations = whole("folds", folds, 2), whole("permutations", permutations, 0)
    bootstrap = whole("bootstrap", bootstrap, 0)
    wanted = _default_sites(reft) if sites is None else sites
    options: dict[str, Any] = {"chat": chat, "system": system, "batch_size": batch_size, "progress": progress}
    edited = cells_of_model(
        reft, data, wanted, positions, tokenizer, None, tasks=tasks, select=select, **options
    )
    with reft.disabled():
        base = cells_of_model(reft, data, wanted, positions, tokenizer, None, **options)
    concepts = dict(labels) if isinstance(labels, Mapping) else {"labels": labels}
    if not concepts:
        raise DataError("labels={}: expected labels, or several concepts' labels by name")
    parsed = {str(name): _parsed(name, own, kind, edited.examples) for name, own in concepts.items()}
    work = _Work(
        base,
        edited,
        as_groups(groups, edited.examples),
        folds,
        permutations,
        bootstrap,
        level,
        seed,
        progress,
    )
    return work.run(parsed, {name: probe_of(estimator, own.kind) for name, own in parsed.items()}, reft)


def _parsed(name: Any, labels: Any, kind: str, examples: int) -> Labels:
    try:
        return parse_labels(labels, kind, examples)
    except DataError as error:
        raise DataError(f"concept {name!r}: {error}") from error


def _default_sites(reft: BoundModel) -> list[Read | str]:
    """Each edit's own site, and the output of each block from the first that is edited on."""
    stack = BlockStack.of(reft.model)
    # In the words of the edit, where these name one place.
    own: dict[str, Read | str] = {
        str(e.site): Read(e.edit.at if e.key == e.edit.name else path_of(e.site)) for e in reft.edits
    }
    if stack is None:
        return list(own.values())
    numbers = [stack.block_of(edit.site.module) for edit in reft.edits]
    # What is edited outside the blocks comes before them all, or behind them, where no block hears of it.
    before = {edit.site.module in stack.before for edit in reft.edits}
    inside = [number for number in numbers if number is not None]
    first = 0 if True in before else min(inside, default=len(stack))
    if first == len(stack):
        return list(own.values())
    blocks = [f"blocks[{number}].output" for number in range(first, len(stack))]
    try:
        names = {str(site) for path in blocks for site in resolve(parse_path(path), reft.model)}
    except AddressError:
        return list(own.values())
    return [*(path for site, path in own.items() if site not in names), *blocks]


@dataclass(frozen=True, eq=False)
class _Work:
    """Everything but the concepts; see `probe_change`."""

    base: Cells
    edited: Cells
    groups: np.ndarray
    folds: int
    swaps: int
    bootstrap: int
    level: float
    seed: int
    progress: bool

    def run(
        self, concepts: Mapping[str, Labels], probes: Mapping[str, Probe], reft: BoundModel
    ) -> ProbeChange:
        """Probe every cell of both runs for every concept."""
        shape = (len(concepts), len(self.base.sites), len(self.base.columns))
        values = {name: np.full(shape, np.nan) for name in _ROWS}
        ends = {name: np.full((*shape, 2), np.nan) for name in _ROWS}
        p_values, places, statistics = np.full(shape, np.nan), [], []
        steps = [(n, name, place) for n, name in enumerate(concepts) for place in sorted(self.base.by_place)]
        for number, name, place in tqdm(steps, desc="probe change", unit="cell", disable=not self.progress):
            before, after = self.base.by_place[place], self.edited.by_place[place]
            y = concepts[name].of_vectors(before.values, before.name, before.to_end)
            own, vectors = (
                self.groups[before.examples],
                (before.take(dtype=torch.float64), after.take(dtype=torch.float64)),
            )
            found = self._scored(vectors, y, own, concepts[name], probes[name])
            for row, drawn in found.items():
                values[row][number][place] = drawn[0]
                if self.bootstrap:
                    tails = [(1 - self.level) / 2, (1 + self.level) / 2]
                    ends[row][number][place] = np.nanquantile(drawn[1:], tails)
            if self.swaps:
                columns = label_columns(y, concepts[name].kind, len(concepts[name].classes))
                swaps = Swaps(own, self.swaps, self.seed)
                statistics.append(swap_statistics(*vectors, columns, swaps))
                places.append((number, *place))
        if statistics:
            p_values[tuple(np.array(places).T)] = adjusted_p_values(statistics)
        return ProbeChange(
            tuple(concepts),
            self.base.sites,
            self.base.columns,
            tuple(HEADLINE[own.kind] for own in concepts.values()),
            self._chance(concepts),
            values["base"],
            values["edited"],
            values["transfer"],
            ends["base"],
            ends["edited"],
            ends["transfer"],
            values["difference"],
            ends["difference"],
            ends["transfer_difference"],
            p_values,
            self.level,
            self.folds,
            self.swaps,
            len(np.unique(self.groups)),
            tuple(edit.key for edit in reft.edits),
            next(iter(probes.values())).name,
        )

    def _chance(self, concepts: Mapping[str, Labels]) -> np.ndarray:
        return np.array(
            [
                chance_levels(own.values, own.kind, len(own.classes))[HEADLINE[own.kind]]
                for own in concepts.values()
            ]
        )

    def _scored(
        self,
        vectors: tuple[np.ndarray, np.ndarray],
        y: np.ndarray,
        groups: np.ndarray,
        labels: Labels,
        probe: Probe,
    ) -> dict[str, np.ndarray]:
        """Each score for all groups, and then for each resample of them, the same for all scores."""
        classes = len(labels.classes)
        found = self._predicted(vectors, y, groups, labels, probe)
        held, own = np.unique(groups, return_inverse=True)
        drawn = np.random.default_rng(self.seed).multinomial(
            len(held), np.full(len(held), 1 / len(held)), self.bootstrap
        )
        weights = np.concatenate([np.ones((1, len(held))), drawn])[:, own]
        rows = {
            name: weighted_scores(y, said, labels.kind, classes, weights)[HEADLINE[labels.kind]]
            for name, said in zip(("base", "edited", "transfer"), found, strict=True)
        }
        rows["difference"] = rows["edited"] - rows["base"]
        rows["transfer_difference"] = rows["transfer"] - rows["base"]
        return rows

    def _predicted(
        self,
        vectors: tuple[np.ndarray, np.ndarray],
        y: np.ndarray,
        groups: np.ndarray,
        labels: Labels,
        probe: Probe,
    ) -> tuple[Predictions, Predictions, Predictions]:
        """Out of fold: base probes on the base run, edited ones on the edited run, base ones on that."""
        base, edited = vectors
        classes, same = len(labels.classes), bool(np.array_equal(base, edited))
        found = tuple(blank(len(y), y, labels.kind, classes) for _ in range(3))
        for split in grouped_splits(y, groups, labels, self.folds, self.seed).folds:
            train, test = split.train, split.test
            before = probe.build(split.inner, classes).fit(base[train], y[train])
            after = before if same else probe.build(split.inner, classes).fit(edited[train], y[train])
            for into, fitted, run in zip(found, (before, after, before), (base, edited, edited), strict=True):
                said = predictions(fitted, run[test], labels.kind, classes)
                into.predicted[test], into.scores[test] = said.predicted, said.scores
        return found[0], found[1], found[2]
