"""Amnesic probing: does a behaviour survive when a concept is erased?

Elazar et al., "Amnesic Probing: Behavioral Explanation with Amnesic Counterfactuals" (2021,
arXiv:2006.00995).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from reftlab.errors import DataError
from reftlab.measuring import Estimate
from reftlab.probing.amnesic_result import Amnesic, Erasure
from reftlab.probing.amnesic_runs import ErasedRuns, with_place
from reftlab.probing.cells import Cell, cells_of_model
from reftlab.probing.checks import as_groups, check_level, seed_number
from reftlab.probing.erasing import Draws, Eraser, Method, Vectors, erasers, methods_of
from reftlab.probing.estimators import Predictions, Probe, blank, out_of_fold, probe_of
from reftlab.probing.folds import fold_numbers, grouped_splits
from reftlab.probing.labels import Labels, parse_labels
from reftlab.probing.scoring import HEADLINE, bootstrap_intervals, chance_levels, scores_of
from reftlab.probing.significance import adjusted_p_values
from reftlab.probing.sites import ProbedSite
from reftlab.runtime import BoundModel
from reftlab.sweeping.metric import Metric
from reftlab.training import read_examples
from reftlab.training.settings import whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["amnesic"]

_INNER_FOLDS = 5


def amnesic(
    model: BoundModel | nn.Module,
    data: Any,
    labels: Any,
    site: Any,
    positions: Any = None,
    *,
    examples: Any = None,
    metric: Metric | Callable[[Tensor], Tensor] | None = None,
    methods: str | Sequence[str] = ("leace", "inlp"),
    draws: int = 20,
    folds: int = 2,
    groups: Sequence[Any] | Any | None = None,
    kind: str = "auto",
    estimator: Any = "auto",
    bootstrap: int = 1000,
    level: float = 0.95,
    chat: bool | None = None,
    system: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 64,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Amnesic:
    """Erase a concept from the vectors at a site, and see what becomes of the model's behaviour.

    What a probe can find need not be what the model uses. Here the concept is removed from the vectors
    while the model runs. If the behaviour stays as it was, the model did not depend on what was removed
    there.

    The data are split into `folds` parts. The behaviour of each part's examples is measured with an
    eraser that was fitted on the other parts; with `examples`, it is measured on these, and the eraser is
    fitted on all data. Whether the concept is gone is asked of new probes, trained and tested by
    cross-validation inside a part that the eraser has not seen: LEACE promises that no linear probe finds
    the concept in the vectors that it was fitted on, and with few vectors for their width much can be left
    in others. A concept that a probe still finds was not erased, and the behaviour says nothing of it.

    Two controls say what removing anything at all does. `draws` random subspaces of the same rank as the
    eraser's (the number of independent label differences for LEACE, all removed directions for INLP) are
    projected out around the same mean. Random directions hold less of the vectors' variance than most
    others do, so that the second control is stricter: erasers fitted in the same way on shuffled labels,
    for LEACE, which make the p-value exact where labels are exchangeable between groups.

    A concept that is erased at some tokens may still be read at others, and in later blocks be computed
    anew. Several sites are erased one at a time, and so are several positions; the several tokens of one
    position, such as `last(3)` or `first+last`, are erased together, by one eraser that is fitted on the
    vectors of them all, each with its example's label.

    `significant` and `p_adjusted` hold for all erasures together: the p-values are those of step-down maxima
    over draws that all erasures share (Westfall and Young, "Resampling-Based Multiple Testing", 1993,
    algorithm 2.8). For shuffled labels the chance of any false one among all is thereby at most the level,
    where labels are exchangeable between groups; for random subspaces this is a comparison, not a proof.

    LEACE: Belrose et al., "LEACE: Perfect linear concept erasure in closed form" (2023, arXiv:2306.03819).
    INLP: Ravfogel et al., "Null It Out" (2020, arXiv:2004.07667).

    Args:
        model: a model, or a bound one, whose edits stay in force; the erasure comes after them at the same
            site, and the result also says what is left of their effect where the concept is erased from the
            vectors with the edits and, by an eraser of their own, from those without.
        data: texts, (prompt, answer) pairs or whatever else `rl.read_examples` takes.
        labels: the concept, one label for each example: classes; 0 and 1 `(example, label)`; or numbers,
            as for `rl.probe`, the latter two for LEACE alone.
        site: a path such as `"blocks[5].output"`, an `rl.Read`, or several; `"blocks[*].output"` for each
            block in turn, `"blocks[5].attn.heads"` for each head.
        positions: at which tokens the concept is erased, and its vectors are taken, in the prompt, `"last"`
            unless given; or several positions in a list, each in turn.
        examples: what the behaviour is measured on, if not on `data`.
        metric: as for `rl.behaviour_of`: without it, the loss on the answers, or, where there are none, how
            far the next token's distribution moves from that without erasure.
        methods: `"leace"`, `"inlp"` or both.
        draws: how many random subspaces, and how many shuffles; p-values go down to 1 / (1 + draws).
        folds: into how many parts the data are split.
        groups: one entry for each example; those of a group are in one part, and are resampled together.
        kind, estimator: of the probes, as for `rl.probe`.
        bootstrap: resamples for the probes' intervals.
        level: of all intervals.
        chat, system, tokenizer, batch_size, folder: as for `rl.collect`.
        seed: of folds, draws and resamples.
        progress: whether to show progress bars.

    Returns:
        `Amnesic`: for each site and method the behaviour, its change with interval, both controls with
        p-values, and what probes find before and after.

    Raises:
        AddressError: a site that the model does not have.
        DataError: data, labels or an argument that cannot be used, or too few groups for the folds.
        InterventionError: labels that no linear eraser can tell from noise.

    >>> found = rl.amnesic(model, pairs, is_plural, "blocks[*].output", tokenizer=tokenizer)  # doctest: +SKIP
    >>> found.of("blocks[5].output", "leace").change, found.significant()                   # doctest: +SKIP
    """
    draws, folds = whole("draws", draws, 1), whole("folds", folds, 2)
    seed, bootstrap = seed_number(seed), whole("bootstrap", bootstrap, 0)
    check_level(level, 0.95)
    rows = read_examples(data)
    parsed = parse_labels(labels, kind, len(rows))
    chosen = methods_of(methods, parsed.kind)
    judge = _Judge(probe_of(estimator, parsed.kind), parsed, bootstrap, level, seed)
    own, form = as_groups(groups, len(rows)), {"chat": chat, "system": system}
    cells = cells_of_model(
        model, rows, site, positions, tokenizer, folder, **form, batch_size=batch_size, progress=progress
    )
    plain = None
    if isinstance(model, BoundModel) and model.graph.edits:
        # Without its edits the model's vectors are others, and their concept has another eraser.
        with model.disabled():
            plain = cells_of_model(
                model,
                rows,
                site,
                positions,
                tokenizer,
                None,
                **form,
                batch_size=batch_size,
                progress=progress,
            )
    # Cells of a column that were chosen in one way have the same tokens, and so the same parts.
    fold_of: dict[int, np.ndarray] = {}
    made: list[tuple[ErasedRuns, list[Erasure]]] = []
    steps = len(cells.by_place) * sum(1 + draws * (1 + (method == "leace")) for method in chosen)
    with tqdm(total=steps, desc="amnesic", unit="run", disable=not progress) as bar:
        for (number, column), cell in sorted(cells.by_place.items()):
            assert cell.read is not None
            assert cell.read.positions is not None
            place = with_place(model, cells.sites[number], cell.read.positions, tokenizer)
            if column not in fold_of:
                fold_of[column] = _folds(cell, parsed, own, folds, seed)
            part_of = fold_of[column]
            if examples is None:
                runs = ErasedRuns.of_folds(place, rows, part_of, own, metric, form)
            else:
                runs = ErasedRuns.of_examples(place, examples, metric, form)
            y, parts = parsed.of_vectors(cell.values, cell.name, cell.to_end), part_of[cell.examples]
            vectors = Vectors(cell.take(dtype=torch.float64), y, own[cell.examples], parsed.kind)
            bare = None
            if plain is not None:
                bare = replace(vectors, X=plain.by_place[number, column].take(dtype=torch.float64))
            found, before = [], judge.score(vectors, parts, None)
            for method in chosen:
                fitted = partial(_fitted, method, parts=parts, folds=folds, draws=draws, seed=seed)
                split = fitted(vectors) if examples is None else fitted(vectors, draws=0)
                used = split if examples is None else fitted(vectors, whole=True)
                without = None if bare is None else fitted(bare, whole=examples is not None)
                after = judge.score(vectors, parts, [one.real for one in split])
                found.append(
                    _erasure(
                        runs,
                        cells.sites[number],
                        cells.columns[column],
                        method,
                        used,
                        without,
                        (before, after),
                        judge,
                        bar.update,
                    )
                )
            made.append((runs, found))
    return _result(made, judge, vectors, draws, folds, examples is None, len(rows))


def _folds(
    cell: Cell, labels: Labels, groups: np.ndarray, folds: int, seed: int
) -> Int[np.ndarray, " example"]:
    """The part of each example, so that every class is in each of them often enough to probe for."""
    held = cell.examples
    lost = np.setdiff1d(np.arange(len(groups)), held)
    if len(lost):
        raise DataError(f"example {lost[0]} has no token at {cell.name}, so nothing can be erased from it")
    y = labels.of_vectors(cell.values, cell.name, cell.to_end)
    grouped_splits(y, groups[held], labels, folds, seed)
    parts = np.empty(len(groups), dtype=np.int64)
    parts[held] = fold_numbers(y, groups[held], labels.kind, folds, seed)
    for number, name in enumerate(labels.classes if labels.kind == "classification" else ()):
        for fold in range(folds):
            count = len(np.unique(groups[held][(parts[held] == fold) & (y == number)]))
            if count < 2:
                raise DataError(
                    f"class {name!r} is in {count} group{'s' * (count != 1)} of one of {folds} parts, in "
                    "which a probe is trained and tested; give more groups with it, or fewer folds"
                )
    return parts


def _fitted(
    method: Method,
    data: Vectors,
    *,
    parts: np.ndarray,
    folds: int,
    draws: int,
    seed: int,
    whole: bool = False,
) -> list[Draws]:
    """Erasers for the vectors of each part, fitted on all others; with `whole` one, fitted on all."""
    if whole:
        return [erasers(method, data, draws, seed)]
    return [erasers(method, _rows(data, parts != fold), draws, seed) for fold in range(folds)]


def _rows(data: Vectors, chosen: np.ndarray) -> Vectors:
    return Vectors(data.X[chosen], data.y[chosen], data.groups[chosen], data.kind)


@dataclass(frozen=True, eq=False)
class _Judge:
    """Says whether a concept can be found."""

    probe: Probe
    labels: Labels
    bootstrap: int
    level: float
    seed: int

    def score(self, data: Vectors, parts: np.ndarray, by_fold: Sequence[Eraser] | None) -> Estimate:
        """The probe's score, cross-validated inside each part after its eraser, if there is one."""
        classes = len(self.labels.classes)
        found = blank(len(data.y), data.y, data.kind, classes)
        for fold in range(int(parts.max()) + 1):
            own = np.flatnonzero(parts == fold)
            part = _rows(data, own)
            splits = grouped_splits(part.y, part.groups, self.labels, self._inner(part), self.seed).folds
            seen = part.X if by_fold is None else by_fold[fold](part.X)
            said = out_of_fold(self.probe, seen, part.y, splits, classes)
            found.predicted[own], found.scores[own] = said.predicted, said.scores
        return self._estimate(data, found)

    def _inner(self, part: Vectors) -> int:
        columns = part.y[:, None] if part.y.ndim == 1 else part.y
        counts = [len(np.unique(part.groups))]
        if part.kind != "regression":
            counts += [
                len(np.unique(part.groups[column == value]))
                for column in columns.T
                for value in np.unique(column)
            ]
        return min(_INNER_FOLDS, *counts)

    def _estimate(self, data: Vectors, found: Predictions) -> Estimate:
        classes, name = len(self.labels.classes), HEADLINE[data.kind]
        value = scores_of(data.y, found, data.kind, classes)[name]
        low, high = bootstrap_intervals(
            data.y, found, data.kind, classes, data.groups, self.bootstrap, self.level, self.seed
        )[name]
        return Estimate(value, low, high, self.level)


def _erasure(
    runs: ErasedRuns,
    site: ProbedSite,
    position: str,
    method: Method,
    parts: Sequence[Draws],
    without: Sequence[Draws] | None,
    scores: tuple[Estimate, Estimate],
    judge: _Judge,
    tick: Callable[[], Any],
) -> Erasure:
    """Measure an eraser and its controls.

    Args:
        runs, site, position, method, judge: what they say.
        parts: the erasers of each fold.
        without: the same for the model without its own edits; None where it has none.
        scores: of probes before and after.
        tick: called after each run.
    """
    level, seed = judge.level, judge.seed

    def values_of(kind: str, number: int) -> np.ndarray:
        found = runs.measure([getattr(part, kind)[number] for part in parts])
        tick()
        return found

    def effect_of(values: np.ndarray, kind: str, number: int) -> np.ndarray:
        return values - runs.measure([getattr(part, kind)[number] for part in without or ()], bare=True)

    draws = range(len(parts[0].random))
    values, random = values_of("reals", 0), [values_of("random", n) for n in draws]
    shuffled = [values_of("shuffled", n) for n in range(len(parts[0].shuffled))]
    shifts, shuffled_shifts = (np.array([runs.shift(one) for one in kind]) for kind in (random, shuffled))
    effect, random_effects, p_effect = None, np.zeros(0), float("nan")
    if runs.bare is not None:
        whole, effect = (
            runs.mean(runs.before - runs.bare),
            runs.estimate(effect_of(values, "reals", 0), level, seed),
        )
        random_effects = np.array([runs.mean(effect_of(random[n], "random", n)) for n in draws])
        p_effect = _share(abs(effect.value - whole), np.abs(random_effects - whole))
    shift = runs.estimate(np.abs(values - runs.before), level, seed)
    return Erasure(
        site.name, site.block, position, method, tuple(part.real.rank for part in parts), values,
        runs.estimate(values - runs.before, level, seed), shift, shifts, shuffled_shifts, *scores, effect,
        random_effects, _share(shift.value, shifts), _share(shift.value, shuffled_shifts), p_effect,
        float("nan"),
    )  # fmt: skip


def _share(value: float, control: Float[np.ndarray, " draw"]) -> float:
    """Share of the draws, the value counted among them, that are as large; NaN without draws."""
    if not len(control):
        return float("nan")
    # Draws that do the same are not to lose by the last bit.
    return float(1 + (control >= value * (1 - 1e-6)).sum()) / (1 + len(control))


def _adjusted(erasures: Sequence[Erasure]) -> tuple[Erasure, ...]:
    """The erasures with p-values that hold for all of them together, against both controls."""
    found = np.full((2, len(erasures)), np.nan)
    for row, kind in zip(found, ("random_shifts", "shuffled_shifts"), strict=True):
        held = [number for number, one in enumerate(erasures) if len(getattr(one, kind))]
        if held:
            drawn = [np.array([erasures[n].shift.value, *getattr(erasures[n], kind)]) for n in held]
            # Draws that do the same are not to lose by the last bit.
            row[held] = adjusted_p_values([(one / (one.max() or 1.0)).round(6)[None] for one in drawn])
    adjusted = np.nanmax(found, 0).tolist()
    return tuple(replace(one, p_adjusted=p) for one, p in zip(erasures, adjusted, strict=True))


def _result(
    made: list[tuple[ErasedRuns, list[Erasure]]],
    judge: _Judge,
    data: Vectors,
    draws: int,
    folds: int,
    held_out: bool,
    rows: int,
) -> Amnesic:
    # Without erasure the runs of all sites are the same.
    runs = made[0][0]
    erasures = _adjusted([erasure for _, found in made for erasure in found])
    score = HEADLINE[data.kind]
    chance = chance_levels(data.y, data.kind, len(judge.labels.classes))[score]
    effect = None if runs.bare is None else runs.estimate(runs.before - runs.bare, judge.level, judge.seed)
    return Amnesic(
        runs.name, runs.unit, runs.examples, runs.weights, runs.before, effect, erasures, score, chance,
        draws, folds, held_out, rows,
    )  # fmt: skip
