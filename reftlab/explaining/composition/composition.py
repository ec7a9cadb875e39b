"""Edits together: what each does alone, what they do together, in which order, and where they collide."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from reftlab.errors import DataError, did_you_mean
from reftlab.explaining.composition.collisions import Collision
from reftlab.explaining.subject import Subject
from reftlab.measuring import Estimate

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from reftlab.runtime import BoundModel
    from reftlab.sweeping.metric import Metric

__all__ = ["Alone", "Composition", "PairEffect", "Together", "composition", "units_of"]


@dataclass(frozen=True)
class Alone:
    """What one edit, or group of edits, does when it acts alone.

    Attributes:
        name: of the edit or group.
        effect: mean change of the behaviour from no edit.
    """

    name: str
    effect: Estimate


@dataclass(frozen=True)
class Together:
    """What several edits do together, beside the sum of what each does alone.

    Attributes:
        effect: mean change of the behaviour from no edit, with all of them.
        expected: the sum of the changes that each makes alone.
        interaction: `effect` minus `expected`: 0 where the effects add up.
    """

    effect: Estimate
    expected: Estimate
    interaction: Estimate


@dataclass(frozen=True)
class PairEffect(Together):
    """Two edits, or groups, together; `effect` is that of the order they have in the graph.

    Attributes:
        a, b: their names.
        reversed: the effect in the other order: whichever acts first at a site that they share comes last
            wherever they meet; None where they share none.
        order: `reversed` minus `effect`: 0 where the order does not matter.
        commutator: the largest that `interference` finds at a site they share: size of
            `a(b(h)) − b(a(h))` against what the two do alone; None where they share none, or where it
            cannot be had.
        logits: how far the logits after the prompt, with both, are from the sum of both changes, over the
            sum of the lengths of these changes: 0 where they add up.
    """

    a: str
    b: str
    reversed: Estimate | None
    order: Estimate | None
    commutator: float | None
    logits: Estimate | None


@dataclass(frozen=True, eq=False)
class Composition:
    """How edits act together.

    Attributes:
        behaviour: what was measured.
        unit: of its numbers.
        examples: how many.
        alone: each edit or group by itself.
        pairs: two together.
        together: all together.
        collisions: directions that two of them both write along, the largest first.
        note: what was left out, or an empty text.
    """

    behaviour: str
    unit: str
    examples: int
    alone: tuple[Alone, ...]
    pairs: tuple[PairEffect, ...]
    together: Together
    collisions: tuple[Collision, ...]
    note: str = ""

    def pair(self, a: str, b: str) -> PairEffect:
        """What was found of two edits or groups."""
        for one in self.pairs:
            if {one.a, one.b} == {a, b}:
                return one
        raise KeyError(f"there is no pair of {a!r} and {b!r}; there are {[(p.a, p.b) for p in self.pairs]}")

    @property
    def sentence(self) -> str:
        """The finding in plain words."""
        from reftlab.explaining.composition.saying import sentence_of

        return sentence_of(self)

    def to_frame(self) -> pd.DataFrame:
        """One line for each edit alone, each pair, and all together."""
        import pandas as pd

        def interval(name: str, found: Estimate | None) -> dict[str, float | None]:
            if found is None:
                return {name: None, f"{name} low": None, f"{name} high": None}
            return {name: found.value, f"{name} low": found.low, f"{name} high": found.high}

        lines: list[dict[str, Any]] = [{"edits": o.name, **interval("effect", o.effect)} for o in self.alone]
        both = [(f"{one.a} + {one.b}", one) for one in self.pairs]
        for name, one in [*both, ("all together", self.together)]:
            line = {"edits": name, **interval("effect", one.effect), "expected": one.expected.value}
            line |= interval("interaction", one.interaction)
            if isinstance(one, PairEffect):
                line |= interval("order", one.order)
                line |= {
                    "commutator": one.commutator,
                    "logits interaction": None if one.logits is None else one.logits.value,
                }
            lines.append(line)
        columns = ["edits"]
        columns += [f"effect{end}" for end in ("", " low", " high")] + ["expected"]
        columns += [f"{name}{end}" for name in ("interaction", "order") for end in ("", " low", " high")]
        return pd.DataFrame(lines, columns=[*columns, "commutator", "logits interaction"])

    def collision_frame(self) -> pd.DataFrame:
        """One line a collision: edits, place, angle, amounts, kind and tokens."""
        import pandas as pd

        lines = [
            (
                c.a, c.b, c.place, c.kind, c.angle, c.chance, *c.mean, *c.share, c.agreement,
                " ".join(c.promoted), " ".join(c.suppressed),
            )
            for c in self.collisions
        ]  # fmt: skip
        columns = ["a", "b", "place", "kind", "angle (degrees)", "chance (degrees)"]
        columns += ["amount of a", "amount of b", "share of a", "share of b", "agreement"]
        columns += ["promotes", "suppresses"]
        return pd.DataFrame(lines, columns=columns)

    def plot(self) -> Figure:
        """The composition matrix, and the directions in which the edits collide."""
        from reftlab.plotting.composition import composition_figure

        names = [one.name for one in self.alone]
        cells: dict[tuple[str, str], tuple[float, bool]] = {
            (one.name, one.name): (one.effect.value, one.effect.excludes(0.0)) for one in self.alone
        }
        for one in self.pairs:
            cells[one.a, one.b] = (one.interaction.value, one.interaction.excludes(0.0))
            if one.order is not None:
                cells[one.b, one.a] = (one.order.value, one.order.excludes(0.0))
        lines = [(c.a, c.b, c.kind, c.mean, c.typical, c.promoted) for c in self.collisions]
        scale = f"{self.behaviour}\n({self.unit})" if self.unit else self.behaviour
        return composition_figure(names, cells, lines, scale)

    def _repr_html_(self) -> str:
        form: dict[str, Any] = {"index": False, "float_format": "{:.3g}".format, "na_rep": "–"}
        said = f"<p>{html.escape(self.sentence)}</p>{self.to_frame().to_html(**form)}"
        if self.collisions:
            said += self.collision_frame().to_html(**form)
        return said + (f"<p>{html.escape(self.note)}</p>" if self.note else "")

    def __repr__(self) -> str:
        return f"Composition({self.sentence})"


def composition(
    reft: BoundModel,
    examples: Any,
    metric: Metric | Callable[[Tensor], Tensor] | None = None,
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    max_pairs: int = 15,
    chat: bool | None = None,
    system: str | None = None,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    budget: float | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Composition:
    """Measure each edit alone, every two together in both orders, and all together.

    Args:
        reft: a bound model with two edits or more, for instance `emoji + formal`; it is left as it was.
        examples, metric, chat, system, sources: what is measured, as for `behaviour_of`.
        groups: names of edits that count as one, `{"emoji": ["e15", "e20"], "formal": ["f"]}`; each edit
            for itself unless given.
        max_pairs: the largest number of pairs to measure: those whose edits do most alone.
        budget: stop beginning pairs after so many seconds; None for no limit.
        progress: whether to show a progress bar.
        seed: of the bootstrap.

    Returns:
        A `Composition`. Differences that rounding can make are counted as 0.

    Raises:
        DataError: fewer than two edits or groups, groups that do not fit, or examples, metric or arguments
            that cannot be used.

    >>> rl.composition(emoji + formal, examples).sentence              # doctest: +SKIP
    'Together, emoji and formal change the answer loss by −0.8 …'
    """
    from reftlab.explaining.composition.composing import composed

    subject = Subject.of("composition", reft, examples, metric, chat=chat, system=system, sources=sources)
    return composed(subject, groups, max_pairs=max_pairs, budget=budget, progress=progress, seed=seed)


def units_of(reft: BoundModel, groups: Mapping[str, Sequence[str]] | None) -> dict[str, tuple[str, ...]]:
    """Names of the edits of each unit."""
    known = [edit.name for edit in reft.graph.edits]
    units: dict[str, tuple[str, ...]]
    if groups is None:
        units = {name: (name,) for name in known}
    else:
        units = {str(name): tuple(names) for name, names in groups.items()}
        given = [name for names in units.values() for name in names]
        for name in given:
            if name not in known:
                raise DataError(
                    f"groups: there is no edit {name!r}; there is {known}.{did_you_mean(name, known)}"
                )
            if given.count(name) > 1:
                raise DataError(f"groups: the edit {name!r} is named twice; it can be in one group only")
        for name, names in units.items():
            if isinstance(groups[name], str) or not names:
                raise DataError(f"groups[{name!r}]={groups[name]!r}: expected a list of names of edits")
        left = [name for name in known if name not in given]
        if left:
            raise DataError(
                f"groups leave the edit {left[0]!r} out; put it in one, or take the others alone with "
                "reft.select(...)"
            )
    if len(units) < 2:
        raise DataError(f"composition needs two edits or groups, and there is {list(units)}")
    return units
