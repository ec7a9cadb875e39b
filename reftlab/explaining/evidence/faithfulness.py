"""How far an explanation of edits holds: what is left of their effect when it acts in their place."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from reftlab.errors import DataError
from reftlab.explaining.budget import Budget
from reftlab.explaining.evidence.substitutes import Claim, What
from reftlab.explaining.subject import Subject
from reftlab.measuring import Behaviour, Estimate
from reftlab.runtime.modes import evaluating
from reftlab.training.settings import whole

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from reftlab.explaining.geometry.record import Recorded
    from reftlab.runtime import BoundModel
    from reftlab.sweeping.metric import Metric

__all__ = ["ALL_EDITS", "CLAIMS", "Faithfulness", "Headline", "Kept", "faithful", "faithfulness"]

ALL_EDITS = "all edits"
"""In place of an edit's key: every edit is replaced at once."""

CLAIMS: dict[What, str] = {
    "constant": "each edit adds its mean change, the same for every token",
    "mean per position": "each edit adds the mean change of each of its tokens (the first it acts on, the "
    "second, …), the same for every input; where it acts on several, as many in every example",
    "steering": "each edit adds one steering vector: the direction of its mean change, at the typical "
    "(root mean square) length of its changes",
    "norm-matched steering": "each edit adds a steering vector in proportion to the length of the vector "
    "it is given, in the direction of its mean change",
    "directions": "each edit adds only the part of its change along the k directions it writes most along",
    "reading": "each edit adds its mean change, which depends on the input along k directions only",
    "linearised": "each edit adds M h + c: gains times what its read directions find",
}
"""What each kind of explanation says; it is added in the edits' place."""


@dataclass(frozen=True, eq=False)
class Kept:
    """What is left of the effect when one explanation acts in the edits' place.

    Attributes:
        edits: key of the edit that it replaces, in `BoundModel.interventions`, or `ALL_EDITS`.
        what: kind of the explanation, see `CLAIMS`.
        k: how many directions, for `directions` and `reading`; else 0.
        numbers: how many numbers it takes to write the explanation down.
        share: the share of the effect that it keeps: 1 as with the edits, 0 as without.
        agreement: `1 − Σ(kept − full)² / Σ(bare − full)²` over the examples: 1 where it does to each
            example what the edits do, 0 where it comes no nearer than no edit, below 0 where further away.
        values: the behaviour with it, `(example,)`.
        control: kind of the random explanations that it is held against, see
            `reftlab.explaining.evidence.substitutes.Control`.
        controls: the share that each of these keeps, `(draw,)`.
        control_values: the behaviour with them, `(draw, example)`.
    """

    edits: str
    what: What
    k: int
    numbers: int
    share: Estimate
    agreement: float
    values: Float[Tensor, " example"]
    control: str
    controls: tuple[float, ...]
    control_values: Float[Tensor, "draw example"]

    @property
    def label(self) -> str:
        """Its name in tables, `directions 2`."""
        return Claim(self.what, self.k).label


@dataclass(frozen=True)
class Headline:
    """The smallest explanation of all edits that keeps enough of the effect, or else the best one.

    Attributes:
        what, k, numbers: of the explanation, as in `Kept`.
        share: the share of the effect that it keeps on the examples it is reported on.
        enough: the share that was asked for.
        reached: whether it reached that (and went no further beyond 1) where it was chosen.
        control: kind of its random controls.
        controls: the share that each control keeps, on the same examples.
        chosen_on, reported_on: how many examples it was chosen on, and is reported on; the same ones
            where `held_out` is False.
        held_out: whether it is reported on other examples than it was chosen on.
    """

    what: What
    k: int
    numbers: int
    share: Estimate
    enough: float
    reached: bool
    control: str
    controls: tuple[float, ...]
    chosen_on: int
    reported_on: int
    held_out: bool


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """How much of the edits' effect is kept when explanations act in their place.

    Attributes:
        behaviour: what was measured.
        unit: of its numbers.
        examples: how many.
        effect: the effect of all edits on it, in `unit`.
        kept: one line an explanation, those of all edits at once first.
        headline: the smallest explanation that is enough; None where there is no effect to explain.
        folds: on how many parts of the examples explanations were fitted in turn, each to be measured on
            the part that it was not fitted on; 1 where all were used for both.
        note: what was sampled or left out, or an empty text.
        missing: why there is nothing here, or None.
    """

    behaviour: str
    unit: str
    examples: int
    effect: Estimate
    kept: tuple[Kept, ...]
    headline: Headline | None
    folds: int
    note: str = ""
    missing: str | None = None

    @classmethod
    def unavailable(cls, why: str) -> Faithfulness:
        nothing = Estimate(math.nan, math.nan, math.nan)
        return cls("", "", 0, nothing, (), None, 1, "", why)

    def of(self, edits: str = ALL_EDITS, what: What | None = None) -> tuple[Kept, ...]:
        """The lines of one edit, or of all at once; of one kind of explanation where one is named."""
        return tuple(one for one in self.kept if one.edits == edits and what in (None, one.what))

    @property
    def sentence(self) -> str:
        """The finding in plain words."""
        from reftlab.explaining.evidence.saying import sentence_of

        return sentence_of(self)

    def to_frame(self) -> pd.DataFrame:
        """One line an explanation, with the middle and the range of its random controls."""
        import pandas as pd

        def line(one: Kept) -> dict[str, Any]:
            drawn = [value for value in one.controls if not math.isnan(value)]
            return {
                "edits": one.edits, "explanation": one.what, "k": one.k or None, "numbers": one.numbers,
                "share": one.share.value, "low": one.share.low, "high": one.share.high,
                "agreement": one.agreement, "control": one.control,
                "control mean": sum(drawn) / len(drawn) if drawn else None,
                "control low": min(drawn, default=None), "control high": max(drawn, default=None),
                "draws": len(one.controls),
            }  # fmt: skip

        columns = ["edits", "explanation", "k", "numbers", "share", "low", "high", "agreement", "control",
                   "control mean", "control low", "control high", "draws"]  # fmt: skip
        return pd.DataFrame([line(one) for one in self.kept], columns=columns)

    def plot(self, edits: str = ALL_EDITS) -> Figure:
        """Share kept against the number of directions, and by the other explanations, with controls.

        Args:
            edits: key of one edit, or `ALL_EDITS`.
        """
        from reftlab.plotting.faithfulness import faithfulness_figure
        from reftlab.plotting.style import message_figure

        if self.headline is None:
            return message_figure("Faithfulness", self.sentence)
        lines = [
            (one.what, one.k, (one.share.value, one.share.low, one.share.high), one.control, one.controls)
            for one in self.of(edits)
        ]
        return faithfulness_figure(lines, f"{self.behaviour}, {edits}", self.headline.enough)

    def _repr_html_(self) -> str:
        said = f"<p>{html.escape(self.sentence)}</p>"
        if self.headline is None:
            return said
        table = self.to_frame().to_html(index=False, float_format="{:.3g}".format, na_rep="–")
        return said + table + (f"<p>{html.escape(self.note)}</p>" if self.note else "")

    def __repr__(self) -> str:
        return f"Faithfulness({self.sentence})"


def faithfulness(
    reft: BoundModel,
    examples: Any,
    metric: Metric | Callable[[Tensor], Tensor] | None = None,
    *,
    top: int | None = None,
    draws: int = 10,
    folds: int = 2,
    enough: float = 0.9,
    max_edits: int = 4,
    chat: bool | None = None,
    system: str | None = None,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    budget: float | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Faithfulness:
    """Put explanations in the edits' place and measure the share of the effect that they keep.

    The explanations are those of `CLAIMS`: a constant, a steering vector, k directions, and so on. What
    they say is fitted on one part of the examples and measured on another. Random explanations of the
    same form are measured beside them.

    Args:
        reft: a bound model with its tokenizer; it is left as it was.
        examples, metric, chat, system, sources: what is measured, as for `behaviour_of`.
        top: the largest number of directions to try; all unless given. Above 4 not every number is.
        draws: how many random explanations each is held against; at most 5 for single edits.
        folds: on how many parts of the examples to fit in turn; 1 fits and measures on the same. With
            fewer than 4 examples there is one.
        enough: the share that the headline asks for, 0 to 1.
        max_edits: up to so many edits, each is replaced alone too; its share is of what it adds to the
            effect when the others are in force.
        budget: stop beginning measurements after so many seconds; None for no limit.
        progress: whether to show a progress bar.
        seed: of folds, halves and random explanations.

    Returns:
        A `Faithfulness`. With 12 examples or more, its headline is chosen on one half of them and reported
        on the other.

    Raises:
        DataError: examples, metric or arguments that cannot be used.

    Source: the test is that of an explanation's sufficiency, as in DeYoung et al., "ERASER" (2020), with
    the measure of Wang et al., "Interpretability in the Wild" (2022), section 4, for parts of a model.

    >>> rl.faithfulness(reft, examples).sentence                       # doctest: +SKIP
    'Keeping only the direction that each edit writes most along keeps 0.97 of the effect …'
    """
    subject = Subject.of("faithfulness", reft, examples, metric, chat=chat, system=system, sources=sources)
    check_settings(top, draws, folds, enough, max_edits, budget)
    return faithful(
        reft, subject.behaviour, subject.recorded, top=top, draws=draws, folds=folds, enough=enough,
        max_edits=max_edits, budget=budget, progress=progress, seed=seed,
    )  # fmt: skip


def faithful(
    reft: BoundModel,
    behaviour: Behaviour,
    recorded: Recorded,
    *,
    top: int | None = None,
    draws: int = 10,
    folds: int = 2,
    enough: float = 0.9,
    max_edits: int = 4,
    runs: int | None = None,
    budget: float | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Faithfulness:
    """As `faithfulness`, of a behaviour and vectors that are there already.

    Args:
        reft: the bound model.
        behaviour: what is measured of it.
        recorded: what passed its edits, whose `rows` are the numbers of the caller's examples.
        runs: about how many runs of the behaviour to make of all edits at once, and half as many of single
            ones: fewer explanations are tried where they are few, and more than `draws` random ones
            where they are many. None tries all explanations against `draws` random ones.
        top, draws, folds, enough, max_edits, budget, progress, seed: as for `faithfulness`.
    """
    from reftlab.explaining.evidence.substituting import Settings, substituted

    clock = check_settings(top, draws, folds, enough, max_edits, budget)
    soft = [b.key for b in reft.edits if b.edit.when is not None and b.edit.when.gates]
    if soft:
        return Faithfulness.unavailable(
            f"{soft[0]!r} acts under a soft gate, which weighs each change anew; what would act in its place "
            "would be weighed twice"
        )
    if runs is not None:
        whole("runs", runs, 1)
    settings = Settings(top, draws, folds, enough, max_edits, clock, progress, seed, runs)
    with evaluating(reft), torch.no_grad():
        return substituted(reft, behaviour, recorded, settings)


def check_settings(
    top: int | None, draws: int, folds: int, enough: float, max_edits: int, budget: float | None
) -> Budget:
    """Refuse settings that cannot be used, and begin to count the time."""
    if top is not None:
        whole("top", top, 1)
    for name, value, low in (("draws", draws, 0), ("folds", folds, 1), ("max_edits", max_edits, 0)):
        whole(name, value, low)
    if not isinstance(enough, int | float) or not 0 < enough <= 1:
        raise DataError(f"enough={enough!r}: expected a share above 0 and up to 1, such as 0.9")
    return Budget(budget)
