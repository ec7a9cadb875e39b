"""Runs with explanations in the edits' place, and with random ones: the work of `faithfulness`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from reftlab.explaining.altering import Change, altered, nothing, sharing
from reftlab.explaining.budget import Budget
from reftlab.explaining.evidence.faithfulness import ALL_EDITS, Faithfulness, Headline, Kept
from reftlab.explaining.evidence.substitutes import (
    Claim,
    Control,
    Fit,
    Pool,
    What,
    claimed,
    control_for,
    control_of,
    fit,
    pools,
)
from reftlab.measuring import Behaviour, Estimate, change_of, mean_of, rounding_in, share_kept

if TYPE_CHECKING:
    from reftlab.explaining.geometry.record import Recorded
    from reftlab.runtime import BoundModel

__all__ = ["Settings", "substituted"]

_FOLDED, _HALVED = 4, 12
"""From how many examples on explanations are fitted apart, and headlines chosen apart."""
_SINGLE_DRAWS, _MOST_DRAWS = 5, 20
_OWN_SEED = 0x5EED
_PLAINEST: tuple[What, ...] = (
    "constant", "directions", "mean per position", "linearised", "steering", "norm-matched steering",
    "reading",
)  # fmt: skip
_ALWAYS = (Claim("constant"), Claim("directions", 1))

Fits = dict[str, Fit]


class Settings(NamedTuple):
    """Arguments of `faithfulness`."""

    top: int | None
    draws: int
    folds: int
    enough: float
    max_edits: int
    budget: Budget
    progress: bool
    seed: int
    runs: int | None = None


@dataclass(eq=False)
class _Runs:
    """Runs of the behaviour until the time is up."""

    reft: BoundModel
    behaviour: Behaviour
    bar: tqdm[Any]
    budget: Budget
    done: int = 0
    left_out: int = 0

    def __call__(self, changes: Mapping[str, Change]) -> Tensor | None:
        """The behaviour with these changes, by intervention; None where the time is up, but for the first."""
        if self.done and self.budget.used_up:
            self.left_out += 1
            return None
        at = {key: change for one, change in changes.items() for key in sharing(self.reft, one)}
        with altered(self.reft, at):
            values = self.behaviour()
        self.done += 1
        self.bar.update()
        return values


@dataclass(eq=False)
class _Subject:
    """Edits that are replaced together, and what the effect is that explanations are to keep.

    `fits` has what is fitted for each part of the examples on the others, `whole` on all of them.
    """

    name: str
    bare: Tensor
    full: Tensor
    weights: Tensor
    fold_of: Tensor
    fits: Sequence[Fits]
    whole: Fits
    values: dict[Claim, Tensor] = field(default_factory=dict)
    drawn: dict[Control, list[Tensor]] = field(default_factory=dict)

    def explain(self, claim: Claim, runs: _Runs) -> None:
        """Measure what is left when a claim takes the edits' place."""
        found = torch.zeros_like(self.full)
        for fold, fits in enumerate(self.fits):
            values = runs({module: claimed(claim, one) for module, one in fits.items()})
            if values is None:
                runs.left_out += len(self.fits) - fold - 1
                return
            found = torch.where(self.fold_of == fold, values, found)
        self.values[claim] = found

    def draw(self, control: Control, generator: torch.Generator, runs: _Runs) -> None:
        """Measure what is left when a random explanation takes the edits' place."""
        # Fitted on all examples, which favours the control.
        changes = {module: control_of(control, one, generator) for module, one in self.whole.items()}
        values = runs(changes)
        if values is not None:
            self.drawn.setdefault(control, []).append(values)

    def kept(self, seed: int) -> list[Kept]:
        return [self._line(claim, values, seed) for claim, values in self.values.items()]

    def _line(self, claim: Claim, values: Tensor, seed: int) -> Kept:
        control = control_for(claim, list(self.whole.values()))
        drawn = self.drawn.get(control, [])
        weights = self.weights.double()
        missed, effect = (weights * (part - self.full).square() for part in (values, self.bare))
        return Kept(
            self.name,
            claim.what,
            claim.k,
            sum(one.numbers(claim) for one in self.whole.values()),
            share_kept(values, self.bare, self.full, self.weights, seed=seed),
            float(1 - missed.sum() / effect.sum().clamp(min=1e-30)),
            values,
            control.kind,
            tuple(_ratio(one, self.bare, self.full, self.weights) for one in drawn),
            torch.stack(drawn) if drawn else self.full.new_zeros(0, len(self.full)),
        )


def substituted(
    reft: BoundModel, behaviour: Behaviour, recorded: Recorded, settings: Settings
) -> Faithfulness:
    """Measure every explanation of all edits, then its controls, then the edits one by one."""
    found = pools(reft, recorded)
    if not found:
        return Faithfulness.unavailable("no edit acts on any of the examples")
    effect, count = _effect(reft, behaviour, behaviour.bare, settings.seed), len(behaviour.full)
    if not _is_there(effect, count):
        return Faithfulness(
            behaviour.name, behaviour.unit, count, effect, (), None, 1, _either_way(behaviour)
        )
    fold_of, notes = _folds(count, settings), list[str]()
    if int(fold_of.max()) == 0 and settings.folds > 1:
        notes.append(f"with {count} examples, explanations were fitted on those they are measured on")
    fits, whole = _fitted(found, behaviour, fold_of, notes), {m: fit(pool) for m, pool in found.items()}
    bar: tqdm[Any]
    with tqdm(disable=not settings.progress, desc="faithfulness", total=0) as bar:
        runs = _Runs(reft, behaviour, bar, settings.budget)
        together = _Subject(
            ALL_EDITS, behaviour.bare, behaviour.full, behaviour.weights, fold_of, fits, whole
        )
        _measure(together, runs, settings, settings.draws, settings.runs, notes)
        kept = together.kept(settings.seed)
        if len(found) > 1:
            kept += _one_by_one(together, runs, settings, notes)
        bar.total = bar.n
    if runs.left_out:
        notes.append(
            f"the budget of {settings.budget.seconds:g} s was used up: {runs.done} runs were made, "
            f"{runs.left_out} were left out"
        )
    headline = _headline(together.kept(settings.seed), behaviour, settings, notes)
    note = "; ".join(notes)
    return Faithfulness(behaviour.name, behaviour.unit, count, effect, tuple(kept), headline, len(fits), note)


def _measure(
    subject: _Subject, runs: _Runs, settings: Settings, draws: int, limit: int | None, notes: list[str]
) -> None:
    """All claims first, then draw by draw every control, so that a budget leaves the fewest gaps."""
    whole = list(subject.whole.values())
    claims = _claims(whole, settings.top)
    if limit is not None:
        every = len(claims)
        claims, draws = _afforded(claims, whole, len(subject.fits), draws, limit)
        if len(claims) < every:
            notes.append(
                f"{every - len(claims)} of {every} explanations of {subject.name} were not tried, to have "
                "enough random ones beside the others"
            )
    controls = list(dict.fromkeys(control_for(claim, whole) for claim in claims))
    further = len(claims) * len(subject.fits) + len(controls) * draws
    runs.bar.total = (runs.bar.total or 0) + further
    for claim in claims:
        subject.explain(claim, runs)
    # Numbers of their own, so that no vector that the caller drew from the same seed comes back as random.
    generator = torch.Generator().manual_seed(settings.seed + _OWN_SEED)
    for _ in range(draws):
        for control in controls:
            subject.draw(control, generator, runs)


def _afforded(
    claims: Sequence[Claim], fits: Sequence[Fit], folds: int, draws: int, limit: int
) -> tuple[list[Claim], int]:
    """The claims that so many runs are enough for, the plainest first, and the draws of each control.

    Every control has `draws` at least, and more where runs are left over.
    """
    kept: list[Claim] = []
    controls: set[Control] = set()
    for claim in sorted(claims, key=lambda claim: (max(1, claim.k), _PLAINEST.index(claim.what))):
        with_it = controls | {control_for(claim, fits)}
        if claim in _ALWAYS or (len(kept) + 1) * folds + len(with_it) * draws <= limit:
            kept.append(claim)
            controls = with_it
    spare = (limit - len(kept) * folds) // max(1, len(controls))
    return [claim for claim in claims if claim in kept], max(draws, min(_MOST_DRAWS, spare))


def _one_by_one(together: _Subject, runs: _Runs, settings: Settings, notes: list[str]) -> list[Kept]:
    """Replace one edit alone, the others as they are."""
    modules = list(together.whole)
    if len(modules) > settings.max_edits:
        notes.append(
            f"the {len(modules)} edits were replaced all at once only, since there are more than "
            f"{settings.max_edits} (max_edits)"
        )
        return []
    kept: list[Kept] = []
    for module in modules:
        without = runs({module: nothing})
        if without is None:
            continue
        effect = _effect(runs.reft, runs.behaviour, without, settings.seed)
        if not _is_there(effect, len(without)):
            notes.append(
                f"{module!r} was not replaced alone: what it adds to the others, {effect} "
                f"{runs.behaviour.unit}, cannot be told from nothing"
            )
            continue
        alone = _Subject(
            module, without, together.full, together.weights, together.fold_of,
            [{module: fits[module]} for fits in together.fits], {module: together.whole[module]},
        )  # fmt: skip
        limit = None if settings.runs is None else settings.runs // (2 * len(modules))
        _measure(alone, runs, settings, min(settings.draws, _SINGLE_DRAWS), limit, notes)
        kept += alone.kept(settings.seed)
    return kept


def _claims(fits: Sequence[Fit], top: int | None) -> list[Claim]:
    claims = [Claim("constant")]
    slots = [0 if one.means is None else len(one.means) for one in fits]
    claims += [Claim("mean per position")] if min(slots) > 0 and max(slots) > 1 else []
    claims += [Claim("directions", k) for k in _sizes(max(len(one.largest) for one in fits), top)]
    claims += [Claim("linearised"), Claim("steering"), Claim("norm-matched steering")]
    return claims + [Claim("reading", k) for k in _sizes(max(len(one.reading) for one in fits), top)]


def _sizes(most: int, top: int | None) -> list[int]:
    """1 to 4, then in steps that grow with them, up to all; `top` at most."""
    most = most if top is None else min(most, top)
    return sorted({k for k in (1, 2, 3, 4, 6, 8, 12, 16, most) if 0 < k <= most})


def _folds(count: int, settings: Settings) -> Tensor:
    """The part that each example belongs to, `(example,)`."""
    folds = min(settings.folds, count) if count >= _FOLDED else 1
    order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed))
    return order.argsort() % folds


def _fitted(found: Mapping[str, Pool], behaviour: Behaviour, fold_of: Tensor, notes: list[str]) -> list[Fits]:
    """For each part of the examples, what is fitted on all vectors but its own."""
    if int(fold_of.max()) == 0:
        return [{module: fit(pool) for module, pool in found.items()}]
    part_of = torch.full((max(behaviour.examples) + 1,), -1)
    part_of[list(behaviour.examples)] = fold_of
    fits: list[Fits] = []
    for fold in range(int(fold_of.max()) + 1):
        fits.append({})
        for module, pool in found.items():
            rows = pool.vectors.rows
            known = rows < len(part_of)
            other = ~known | (part_of[rows.where(known, 0)] != fold)
            apart = pool.by_example and bool(other.any())
            fits[-1][module] = fit(pool, other if apart else None)
            note = f"what explains {module!r} was fitted on the examples that it is measured on"
            if not apart and note not in notes:
                notes.append(note)
    return fits


def _headline(
    kept: list[Kept], behaviour: Behaviour, settings: Settings, notes: list[str]
) -> Headline | None:
    if not kept:
        return None
    count = len(behaviour.full)
    everything = torch.arange(count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed + 1))
    choose, report = order[: count // 2], order[count // 2 :]
    held_out = count >= _HALVED
    if held_out and not all(_tells(behaviour, half, settings.seed) for half in (choose, report)):
        held_out = False
        notes.append("one half of the examples alone does not show the effect, so the headline uses all")
    if not held_out:
        choose = report = everything

    def share(values: Tensor, some: Tensor) -> float:
        parts = (values, behaviour.bare, behaviour.full, behaviour.weights)
        return _ratio(*(part[some] for part in parts))

    shares = [share(one.values, choose) for one in kept]
    # Beyond 1 an explanation does something else than the edits, and no less so.
    reached = [n for n, value in enumerate(shares) if settings.enough <= value <= 2 - settings.enough]
    if reached:
        # Of equally small ones the nearest, and of those the one named first.
        best = min(reached, key=lambda n: (kept[n].numbers, round(abs(1 - shares[n]), 2)))
    else:
        best = min(range(len(kept)), key=lambda n: abs(1 - shares[n]))
    one = kept[best]
    parts = (one.values, behaviour.bare, behaviour.full, behaviour.weights)
    return Headline(
        one.what, one.k, one.numbers, share_kept(*(part[report] for part in parts), seed=settings.seed),
        settings.enough, bool(reached), one.control,
        tuple(share(drawn, report) for drawn in one.control_values), len(choose), len(report), held_out,
    )  # fmt: skip


def _tells(behaviour: Behaviour, some: Tensor, seed: int) -> bool:
    effect = mean_of((behaviour.full - behaviour.bare)[some], behaviour.weights[some], seed=seed)
    return effect.excludes(0.0)


def _effect(reft: BoundModel, behaviour: Behaviour, bare: Tensor, seed: int) -> Estimate:
    runs, step = torch.stack([behaviour.full, bare]), rounding_in(reft.model)
    return change_of(behaviour.full - bare, behaviour.weights, runs, step=step, seed=seed)


def _is_there(effect: Estimate, count: int) -> bool:
    return effect.value != 0 and (count < 2 or effect.excludes(0.0))


def _either_way(behaviour: Behaviour) -> str:
    """A word on effects that cancel in the mean over examples."""
    change = behaviour.full - behaviour.bare
    typical, mean = float(change.abs().mean()), abs(float(change.mean()))
    if not typical > max(4 * mean, 1e-6):
        return ""
    return (
        f"single examples change by {typical:.3g} {behaviour.unit}, some up and some down; a metric with an "
        "answer for each example may show what the mean does not"
    )


def _ratio(values: Tensor, bare: Tensor, full: Tensor, weights: Tensor) -> float:
    weights = weights.double()
    whole = float((weights * (full - bare)).sum())
    return float((weights * (values - bare)).sum()) / whole if whole else math.nan
