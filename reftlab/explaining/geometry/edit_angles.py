"""Where an edit's subspaces lie: against other edits, the site's own variance, and what labels say."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import false_discovery_control  # type: ignore[import-untyped]
from torch import Tensor
from tqdm.auto import tqdm

from reftlab.errors import DataError
from reftlab.explaining.geometry.angles import (
    Null,
    Spread,
    SubspaceAngles,
    compared,
    cosines_at_random,
    cosines_of,
    span,
)
from reftlab.explaining.geometry.directions import Directions, directions_of
from reftlab.explaining.geometry.label_spans import METHODS, LabelSpans, SpanMethod
from reftlab.explaining.geometry.sites import Seen, see_sites
from reftlab.explaining.subject import Subject
from reftlab.runtime.modes import evaluating
from reftlab.training.settings import whole

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from reftlab.runtime import BoundModel
    from reftlab.runtime.places import BoundEdit

__all__ = ["EditAngle", "EditAngles", "angles_among", "angles_of", "edit_angles"]

Side = Literal["write", "read"]


@dataclass(frozen=True)
class EditAngle:
    """One subspace of an edit against another.

    Attributes:
        edit: key of the edit.
        side: its `write` or its `read` subspace.
        against: the other subspace in words.
        kind: `edit` for another edit's, `own` for the edit's other side, `pca`, or one of `METHODS`.
        angles: the angles, with their null; the subspace `against` is the one that chance puts elsewhere.
        q: the p-value of the smallest angle, with the false discovery rate over all lines controlled. No p is
            below 1 / (1 + draws), so that one close line among many cannot have a small q: more draws and
            shuffles can show it.
    """

    edit: str
    side: Side
    against: str
    kind: str
    angles: SubspaceAngles
    q: float


@dataclass(frozen=True)
class EditAngles:
    """Principal angles between edits' subspaces and others, each against random ones.

    An edit writes in the span of its write directions and reads in that of its read directions, see
    `Directions`. Compared with

    - the subspaces of other edits at the same site, and the edit's own other one, which are close by
      construction where an edit overwrites what it reads, as LoReFT does;
    - the first principal components of the vectors at the site, at all tokens;
    - where there are labels, for the vectors that the edit is given: the differences of the classes'
      means (which is also what LEACE removes), the linear discriminant, a logistic regression's weights,
      and what LEACE reads to remove them.

    A small angle to a direction found from few examples can be chance; the nulls say how often.
    Benjamini and Hochberg (1995) keep the share of false findings among those of q ≤ 0.05 below 5%.

    Attributes:
        lines: every comparison.
        sites: by edit, its site.
        examples: number of examples.
        vectors: by edit, how many it was given.
        missing: by edit, why it is not here.
        note: what was left out, or an empty text.
    """

    lines: tuple[EditAngle, ...]
    sites: dict[str, str]
    examples: int
    vectors: dict[str, int]
    missing: dict[str, str]
    note: str = ""

    def of(self, edit: str, side: Side | None = None, kind: str | None = None) -> tuple[EditAngle, ...]:
        """The comparisons of one edit."""
        return tuple(
            line
            for line in self.lines
            if line.edit == edit and side in (None, line.side) and kind in (None, line.kind)
        )

    @property
    def sentence(self) -> str:
        """The finding in plain words."""
        from reftlab.explaining.geometry.saying import of_angles

        return of_angles(self)

    def to_frame(self) -> pd.DataFrame:
        """One line a comparison: its two sides, smallest angle, overlap, what chance gives, p and q."""
        import pandas as pd

        lines = [
            {
                "edit": line.edit,
                "side": line.side,
                "against": line.against,
                "kind": line.kind,
                "dimensions": "{} and {}".format(*line.angles.dimensions),
                "smallest angle (degrees)": line.angles.smallest,
                "at random": line.angles.band[0][1],
                "overlap": line.angles.overlap,
                "overlap at random": line.angles.chance[1],
                "null": line.angles.null,
                "p": line.angles.p_angle,
                "q": line.q,
                "p of the overlap": line.angles.p_overlap,
            }
            for line in self.lines
        ]
        return pd.DataFrame(lines)

    def plot(self, edit: str | None = None, most: int = 16) -> Figure:
        """The angles, with the band that holds 95% of the smallest ones at random.

        Args:
            edit: whose; all edits' unless given.
            most: how many comparisons at most; those of the smallest p-values where there are more.
        """
        from reftlab.plotting.angles import angles_figure

        lines = self.lines if edit is None else self.of(edit)
        shown = sorted(range(len(lines)), key=lambda n: (lines[n].angles.p_angle, lines[n].angles.smallest))
        return angles_figure(
            [
                (
                    f"{line.edit}, {line.side} subspace", f"{line.against} ({line.angles.null})",
                    line.angles.angles, (line.angles.band[0][0], line.angles.band[0][2]),
                    line.angles.p_angle, line.q,
                )
                for line in (lines[n] for n in sorted(shown[:most]))
            ],
            len(lines),
        )  # fmt: skip

    def _repr_html_(self) -> str:
        table = self.to_frame().to_html(index=False, float_format="{:.3g}".format, na_rep="–")
        left = "".join(f"<p>{html.escape(f'{key}: {why}')}</p>" for key, why in self.missing.items())
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        return f"<p>{html.escape(repr(self))}</p>{table}{left}{note}"

    def __repr__(self) -> str:
        close = [line for line in self.lines if line.angles.p_angle <= 0.05]
        found = sum(line.q <= 0.05 for line in self.lines)
        shown = "; ".join(
            f"{line.edit} {line.side} and {line.against} {line.angles.smallest:.3g}°"
            for line in sorted(close, key=lambda line: (line.q, line.angles.smallest))[:3]
        )
        listed = f": {shown}" if shown else ""
        return (
            f"EditAngles({len(self.lines)} comparisons, {len(close)} with p ≤ 0.05 where chance gives "
            f"{0.05 * len(self.lines):.2g}, {found} with q ≤ 0.05{listed})"
        )


def edit_angles(
    reft: BoundModel,
    examples: Any,
    labels: Any = None,
    *,
    components: int = 4,
    methods: Sequence[SpanMethod] = METHODS,
    draws: int = 1000,
    shuffles: int = 100,
    chat: bool | None = None,
    system: str | None = None,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    progress: bool = True,
    seed: int = 0,
) -> EditAngles:
    """Measure the angles between edits' subspaces and others at their sites.

    Args:
        reft: a bound model with its tokenizer.
        examples: anything that `rl.train` takes.
        labels: a class for each example, of at least two kinds; None leaves the classes out.
        components: how many principal components of the site's vectors to compare with.
        methods: what to fit to the labels.
        draws: how many random subspaces.
        shuffles: how many times the labels are shuffled and everything fitted to them again.
        chat, system: as for `rl.reply`.
        sources: inputs of each source run for all examples, as for `reft(...)`.
        progress: whether to show a progress bar.
        seed: of all random numbers.

    Returns:
        An `EditAngles`.

    Raises:
        DataError: examples, labels or numbers that cannot be used.

    >>> rl.edit_angles(emoji + formal, examples, labels=["sea", "hill", "sea"])    # doctest: +SKIP
    EditAngles(40 comparisons, 3 with p ≤ 0.05 where chance gives 2, 1 with q ≤ 0.05: emoji read and …)
    """
    subject = Subject.of("edit_angles", reft, examples, chat=chat, system=system, sources=sources)
    with tqdm(disable=not progress, desc="edit_angles") as bar:
        return angles_among(
            subject, None, labels, components=components, methods=methods, draws=draws, shuffles=shuffles,
            seed=seed, tick=bar.update,
        )  # fmt: skip


def angles_among(
    subject: Subject,
    seen: Seen | None = None,
    labels: Any = None,
    *,
    components: int = 4,
    methods: Sequence[SpanMethod] = METHODS,
    draws: int = 1000,
    shuffles: int = 100,
    seed: int = 0,
    tick: Callable[[], Any] = lambda: None,
) -> EditAngles:
    """`edit_angles` of what is prepared already; see there.

    Args:
        subject: what is explained.
        seen: what reaches the edits' sites, where that is known.
        labels, components, methods, draws, shuffles, seed: as for `edit_angles`.
        tick: called after each batch and each edit.
    """
    for name, value in (("components", components), ("draws", draws), ("shuffles", shuffles)):
        whole(name, value, 1)
    for method in methods:
        if method not in METHODS:
            raise DataError(f"methods: {method!r} is none of {', '.join(map(repr, METHODS))}")
    reft, count = subject.reft, len(subject.rows)
    spans = None if labels is None else LabelSpans.of(labels, count, methods, shuffles, seed)
    with evaluating(reft), torch.no_grad():
        seen = see_sites(reft, subject.texts, subject.accepts, tick=tick) if seen is None else seen
        return angles_of(
            reft, directions_of(reft, seen.vectors), seen, spans, components=components, draws=draws,
            seed=seed, examples=count, tick=tick,
        )  # fmt: skip


def angles_of(
    reft: BoundModel,
    directions: Mapping[str, Directions],
    seen: Seen,
    labels: LabelSpans | None = None,
    *,
    examples: int,
    components: int = 4,
    draws: int = 1000,
    seed: int = 0,
    tick: Callable[[], Any] = lambda: None,
) -> EditAngles:
    """Compare the subspaces of edits that have been seen; see `edit_angles`.

    Args:
        reft: the bound model.
        directions: of each edit, by key.
        seen: what reaches the edits' sites.
        labels: what to fit to the classes, or None.
        examples: number of examples.
        components, draws, seed: as for `edit_angles`.
        tick: called after each edit.
    """
    bounds = [bound for bound in reft.edits if bound.key in directions and bound.key in seen.tokens]
    sides = {bound.key: _sides(directions[bound.key]) for bound in bounds}
    found: list[tuple[str, Side, str, str, SubspaceAngles]] = []
    notes: list[str] = []
    for bound in bounds:
        one = _One(bound, sides, seen, draws, seed)
        others = [other for other in bounds if other is not bound and bound.shares_place(other)]
        found += [*one.against_edits(others), *one.against_variance(components)]
        if labels is not None:
            lines, note = one.against_labels(labels)
            found += lines
            notes.append(note)
        notes.append(seen.tokens[bound.key].note)
        tick()
    order = {bound.key: place for place, bound in enumerate(bounds)}
    found.sort(key=lambda line: (order[line[0]], line[1] == "read"))
    q = false_discovery_control([angles.p_angle for *_, angles in found]) if found else []
    return EditAngles(
        tuple(EditAngle(*line, q=float(value)) for line, value in zip(found, q, strict=True)),
        {bound.key: str(bound.site) for bound in bounds},
        examples,
        {bound.key: len(seen.vectors[bound.key].base) for bound in bounds},
        dict(seen.missing),
        "; ".join(dict.fromkeys(note for note in notes if note)),
    )


Line = tuple[str, Side, str, str, SubspaceAngles]


class _One:
    """The comparisons of one edit's two subspaces."""

    def __init__(
        self, bound: BoundEdit, sides: Mapping[str, dict[Side, Tensor]], seen: Seen, draws: int, seed: int
    ) -> None:
        self.key, self.sides, self.all_sides = bound.key, sides[bound.key], sides
        self.tokens, self.given = seen.tokens[bound.key], seen.vectors[bound.key]
        self.draws, self.seed = draws, seed
        self.spread = Spread.of_vectors(self.tokens.usual)
        self._known: dict[tuple[Side, int, Null], Float[np.ndarray, "draw k"]] = {}

    def _at_random(self, side: Side, size: int, null: Null) -> Float[np.ndarray, "draw k"]:
        if (side, size, null) not in self._known:
            spread = self.spread if null == "data" else None
            self._known[side, size, null] = cosines_at_random(
                self.sides[side], size, self.draws, self.seed, spread
            )
        return self._known[side, size, null]

    def _line(self, side: Side, against: str, kind: str, other: Tensor, null: Null) -> Line:
        chance = self._at_random(side, other.shape[1], null)
        return self.key, side, against, kind, compared(self.sides[side], other, null, chance)

    def _nulls(self) -> tuple[Null, ...]:
        return ("isotropic", "data") if len(self.spread.axes) else ("isotropic",)

    def against_edits(self, others: Sequence[BoundEdit]) -> Iterator[Line]:
        if len(self.sides) == 2:
            own = self.sides["read"]
            yield self._line("write", "its own read subspace", "own", own, "isotropic")
        for side in self.sides:
            for null in self._nulls():
                for other in others:
                    for theirs, basis in self.all_sides[other.key].items():
                        yield self._line(side, f"{other.key}, {theirs}", "edit", basis, null)

    def against_variance(self, components: int) -> Iterator[Line]:
        count = min(components, len(self.spread.axes))
        if count:
            for side in self.sides:
                axes = self.spread.axes[:count].T
                yield self._line(side, f"first {count} principal components", "pca", axes, "isotropic")

    def against_labels(self, labels: LabelSpans) -> tuple[list[Line], str]:
        fits = labels.fitted(self.given.base, self.given.rows)
        lines: list[Line] = []
        for fit in fits.fits:
            for side, own in self.sides.items():
                chance = cosines_of(own, fit.shuffled)
                angles = compared(own, fit.basis, "labels", chance)
                lines.append((self.key, side, fit.name, fit.method, angles))
        return lines, fits.note and f"{self.key}: {fits.note}"


def _sides(directions: Directions) -> dict[Side, Tensor]:
    """Bases of what an edit writes in and reads in, where it does."""
    found: dict[Side, Tensor] = {}
    candidates: tuple[tuple[Side, Tensor], ...] = (("write", directions.write), ("read", directions.read))
    for side, rows in candidates:
        if bool((rows.norm(dim=1) > 0).any()):
            found[side] = span(rows.T, side)
    return found
