"""What becomes of a behaviour when one part of the edits is left out, and when it acts alone."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from reftlab.explaining.altering import Change, altered, only_along, without_directions
from reftlab.explaining.causes.game import Coalitions
from reftlab.explaining.causes.parts import By, Part, game_of, taken_apart
from reftlab.explaining.progress import ticking
from reftlab.explaining.subject import Subject
from reftlab.measuring import Behaviour, Estimate, change_of
from reftlab.runtime.modes import evaluating
from reftlab.training.settings import whole

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from reftlab.runtime import BoundModel
    from reftlab.sweeping.metric import Metric

__all__ = ["Control", "LeaveOneOut", "leave_one_out", "left_out"]


@dataclass(frozen=True, eq=False)
class Control:
    """The same done to random directions in place of the edit's own.

    Attributes:
        within: `span`, of the edit's own directions, or `space`, of all vectors at the site.
        without: the behaviour with one random direction left out of what the edit adds, `(draw, example)`.
        alone: with only what the edit adds along that direction, `(draw, example)`.
    """

    within: Literal["span", "space"]
    without: Float[Tensor, "draw example"]
    alone: Float[Tensor, "draw example"]


@dataclass(frozen=True, eq=False)
class LeaveOneOut:
    """A behaviour with each part left out, and with each part alone.

    Attributes:
        by: what counts as one part, see `parts_of`.
        labels: names of the parts.
        name, unit: the behaviour, and its unit.
        weights: `(example,)`, how much each example counts in a mean.
        full: the behaviour with all parts, `(example,)`.
        none: with none of the parts, other edits in force.
        without: with all parts but one, `(part, example)`.
        alone: with one part only, `(part, example)`.
        controls: random directions, where parts are dimensions; two kinds, or one where the edit has a
            single direction.
        seed: of the random directions and of the resamples.
        note: what was left out, in words, or an empty text.
    """

    by: str
    labels: tuple[str, ...]
    name: str
    unit: str
    weights: Float[Tensor, " example"]
    full: Float[Tensor, " example"]
    none: Float[Tensor, " example"]
    without: Float[Tensor, "part example"]
    alone: Float[Tensor, "part example"]
    controls: tuple[Control, ...]
    seed: int
    note: str = ""

    @property
    def lost(self) -> tuple[Estimate, ...]:
        """For each part the mean change when it is left out: without it minus with all, in `unit`."""
        return tuple(self._estimate(values - self.full) for values in self.without)

    @property
    def gained(self) -> tuple[Estimate, ...]:
        """For each part the mean change when it acts alone: with it minus with none, in `unit`."""
        return tuple(self._estimate(values - self.none) for values in self.alone)

    @property
    def effect(self) -> Estimate:
        """The whole effect of all parts: with all minus with none, in `unit`."""
        return self._estimate(self.full - self.none)

    def _estimate(self, values: Tensor) -> Estimate:
        return change_of(values, self.weights, torch.stack([self.full, self.none]), seed=self.seed)

    def to_frame(self) -> pd.DataFrame:
        """One line a part and a random direction, with the changes in `unit` and their intervals.

        Columns: part, kind (`part`, `random in span`, `random in space`), left_out, left_out_low,
        left_out_high, alone, alone_low, alone_high.
        """
        import pandas as pd

        lines = [
            (label, "part", lost.value, lost.low, lost.high, gained.value, gained.low, gained.high)
            for label, lost, gained in zip(self.labels, self.lost, self.gained, strict=True)
        ]
        for control in self.controls:
            for draw, (without, alone) in enumerate(
                zip(control.without, control.alone, strict=True), start=1
            ):
                lost = self._estimate(without - self.full)
                gained = self._estimate(alone - self.none)
                kind = f"random in {control.within}"
                lines.append(
                    (str(draw), kind, lost.value, lost.low, lost.high, gained.value, gained.low, gained.high)
                )
        columns = [
            "part",
            "kind",
            "left_out",
            "left_out_low",
            "left_out_high",
            "alone",
            "alone_low",
            "alone_high",
        ]
        return pd.DataFrame(lines, columns=columns)

    def plot(self) -> Figure:
        """Change with each part left out, on the left, and with each part alone, on the right."""
        from reftlab.plotting.shapley import leave_one_out_figure

        frame, effect = self.to_frame(), self.effect.value
        parts = frame[frame.kind == "part"]
        random = dict(list(frame[frame.kind != "part"].groupby("kind", sort=False)))
        panels = [
            (
                [tuple(line) for line in parts[[what, f"{what}_low", f"{what}_high"]].to_numpy().tolist()],
                {str(kind): found[what].tolist() for kind, found in random.items()},
                whole,
            )
            for what, whole in (("left_out", -effect), ("alone", effect))
        ]
        return leave_one_out_figure(self.labels, panels[0], panels[1], self.by, self.name, self.unit)

    def _repr_html_(self) -> str:
        table = self.to_frame().to_html(index=False, float_format="{:.3g}".format, na_rep="–")
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        return f"<p>{html.escape(repr(self))}</p>{table}{note}"

    def __repr__(self) -> str:
        each = ", ".join(
            f"{label} {lost.value:+.3g}" for label, lost in zip(self.labels, self.lost, strict=True)
        )
        return (
            f"LeaveOneOut({self.name} of {len(self.weights)} examples, all parts change it by "
            f"{self.effect.value:+.3g} {self.unit}; left out: {each})"
        )


def leave_one_out(
    reft: BoundModel,
    examples: Any,
    by: By = "edit",
    *,
    of: str | Sequence[str] | None = None,
    metric: Metric | Callable[[Tensor], Tensor] | None = None,
    draws: int = 5,
    chat: bool | None = None,
    system: str | None = None,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    progress: bool = True,
    seed: int = 0,
) -> LeaveOneOut:
    """Measure a behaviour with each part of the edits left out, and with each part alone.

    A part whose work another one does too is not missed when it is left out, and a part that needs
    another does nothing alone; `shapley` weighs all combinations.

    Args:
        reft: a bound model with its tokenizer.
        examples: (prompt, answer) pairs, or anything that `rl.train` takes.
        by: what counts as one part: each named `edit`, each `site` of an edit, each `layer` (all edits in
            one block), each edited `position` of a row, or each `dimension` of one edit.
        of: the edits to take apart, by name or by key; the others stay as they are. Dimensions are those
            of one edit, which must be named where there are several.
        metric: what to measure of the logits after the prompt, such as `rl.logit_diff(" yes", " no")`;
            without it the answer loss, see `behaviour_of`.
        draws: how many random directions of each kind to leave out as a control, for dimensions.
        chat, system: as for `rl.reply`.
        sources: inputs of each source run for all examples, as for `reft(...)`.
        progress: whether to show a progress bar.
        seed: of the random directions and of the bootstrap.

    Returns:
        Exact changes for each example, with bootstrap intervals over the examples for their means.

    Raises:
        DataError: examples or arguments that cannot be used.

    >>> rl.leave_one_out(reft, pairs, by="layer").plot()                     # doctest: +SKIP
    """
    subject = Subject.of("leave_one_out", reft, examples, metric, chat=chat, system=system, sources=sources)
    parts = taken_apart(subject, by, of)
    with ticking("leave one out", "runs", progress) as tick:
        return left_out(reft, subject.behaviour, parts, draws=draws, seed=seed, tick=tick)


def left_out(
    reft: BoundModel,
    behaviour: Behaviour,
    parts: Sequence[Part],
    *,
    game: Coalitions | None = None,
    draws: int = 5,
    seed: int = 0,
    tick: Callable[[str], None] = lambda what: None,
) -> LeaveOneOut:
    """As `leave_one_out`, of a behaviour that is at hand and edits that are taken apart.

    Args:
        reft: the bound model.
        behaviour: what to measure.
        parts: from `parts_of`.
        game: from `game_of`, of the same parts, where others measure some of the same combinations.
        draws, seed: as for `leave_one_out`.
        tick: called after each measurement with a few words for a progress bar.
    """
    draws = whole("draws", draws, 0)
    game = game_of(reft, behaviour, parts, tick) if game is None else game
    everyone = game.everything
    without = torch.stack([game(everyone - {part}) for part in range(len(parts))])
    alone = torch.stack([game({part}) for part in range(len(parts))])
    controls, note = _controls(reft, behaviour, parts, draws, seed, tick)
    return LeaveOneOut(
        game.by, game.labels, game.name, game.unit, game.weights, game(everyone), game(), without, alone,
        controls, seed, note,
    )  # fmt: skip


def _controls(
    reft: BoundModel,
    behaviour: Behaviour,
    parts: Sequence[Part],
    draws: int,
    seed: int,
    tick: Callable[[str], None],
) -> tuple[tuple[Control, ...], str]:
    rows = [part.rows for part in parts if part.rows is not None]
    if not rows or not draws:
        return (), ""
    span, generator = torch.cat(rows), torch.Generator().manual_seed(seed)
    key, found, note = parts[0].edits[0], [], ""

    def measured(change: Change, what: str) -> Tensor:
        with evaluating(reft), torch.no_grad(), altered(reft, {key: change}):
            values = behaviour().double()
        tick(what)
        return values

    def control(within: Literal["span", "space"], basis: Tensor) -> Control:
        without, alone = [], []
        for _ in range(draws):
            direction = torch.randn(1, len(basis), generator=generator) @ basis
            direction = direction / direction.norm()
            without.append(measured(without_directions(direction), f"random in {within}"))
            alone.append(measured(only_along(direction), f"random in {within}"))
        return Control(within, torch.stack(without), torch.stack(alone))

    if len(span) > 1:
        found.append(control("span", span))
    else:
        note = "the edit has one direction, so a random direction of its span would be that one"
    found.append(control("space", torch.eye(span.shape[1])))
    return tuple(found), note
