"""The result of `explain`: everything that was found out, edit by edit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reftlab.explaining.causes.removal import Removal
from reftlab.explaining.evidence.replies import ReplyTable
from reftlab.explaining.geometry.directions import Directions
from reftlab.explaining.geometry.tokens import TokenEffects
from reftlab.explaining.geometry.vectors import CommonAxes, EditVectors, Sizes
from reftlab.explaining.section import Section
from reftlab.training.data import Example

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from reftlab.measuring import Behaviour
    from reftlab.runtime.plan import Plan

__all__ = ["EditExplanation", "Explanation"]


@dataclass(frozen=True, eq=False)
class EditExplanation:
    """What one edit does.

    Attributes:
        edit: its key in `BoundModel.interventions`: the edit's name, with `[4]` and the like where
            one edit acts at several sites.
        site: raw path of the site.
        block: number of the block that the site is in, or None.
        positions: which tokens, as written in the graph.
        phase: `prompt`, `decode` for generated tokens (here those of the answers), or `both`.
        does: the intervention in words.
        formula: its formula.
        vectors: the vectors that it was given and made.
        directions, tokens, sizes, axes: the sections.
    """

    edit: str
    site: str
    block: int | None
    positions: str
    phase: str
    does: str
    formula: str
    vectors: EditVectors
    directions: Directions
    tokens: TokenEffects
    sizes: Sizes
    axes: CommonAxes

    @property
    def main(self) -> int | None:
        """Number of the direction along which most is written, or None where nothing is."""
        return int(self.directions.rms.argmax()) if len(self.directions) else None

    @property
    def push(self) -> float:
        """Largest logit change that the main direction makes directly; 0 where it is not known."""
        if self.tokens.missing is not None or self.main is None:
            return 0.0
        return self.tokens.promoted[self.main][0].change

    def towards(self, count: int = 3) -> tuple[str, ...]:
        """The tokens that the main direction promotes most."""
        if self.tokens.missing is not None or self.main is None:
            return ()
        return tuple(token.text for token in self.tokens.promoted[self.main][:count])

    def to_frame(self) -> pd.DataFrame:
        """The edit's directions; the other sections have frames of their own."""
        return self.directions.to_frame()

    def plot(self, removal: Removal | None = None) -> Figure:
        """Amounts written, vectors before and after, and the answer loss without it, side by side."""
        from reftlab.plotting import edit_figure

        directions, axes = self.directions, self.axes
        shown = removal is not None and removal.missing is None
        removed = removal.of(self.edit) if removal is not None and shown else ()
        return edit_figure(
            self.edit,
            (directions.labels, directions.mean.tolist(), directions.std.tolist()),
            (axes.before.numpy(), axes.after.numpy(), axes.explained.tolist()),
            [(r.what, r.label, r.change) for r in removed] if shown else None,
        )

    def __repr__(self) -> str:
        return f"EditExplanation({self.edit!r} at {self.site} @ {self.positions}: {self.does})"


@dataclass(frozen=True, eq=False)
class Explanation:
    """What every edit of a bound model reads, writes and causes, on some examples.

    Attributes:
        model: name of the model.
        plan: what the bound model does, step by step.
        facts: how it was trained, as far as it knows.
        examples: the examples.
        chat: whether they went through the chat template.
        edits: one explanation for each edit, in the order of execution.
        removal: the answer loss without each edit and direction.
        replies: replies without and with the edits.
        seed: of the random directions.
        behaviour: what was measured of the runs, with and without edits; None where nothing can be.
        sections: the further answers, in the order of `reftlab.explaining.section.QUESTIONS`.
    """

    model: str
    plan: Plan
    facts: dict[str, Any]
    examples: tuple[Example, ...]
    chat: bool
    edits: tuple[EditExplanation, ...]
    removal: Removal
    replies: ReplyTable
    seed: int
    behaviour: Behaviour | None = None
    sections: tuple[Section, ...] = ()

    def section(self, name: str) -> Section:
        """A section by its name.

        Raises:
            KeyError: there is none of that name.
        """
        for found in self.sections:
            if found.name == name:
                return found
        raise KeyError(f"there is no section {name!r}; there is {[found.name for found in self.sections]}")

    def __getitem__(self, edit: str) -> EditExplanation:
        for found in self.edits:
            if found.edit == edit:
                return found
        raise KeyError(f"there is no edit {edit!r}; there is {[found.edit for found in self.edits]}")

    @property
    def importance(self) -> tuple[EditExplanation, ...]:
        """The edits, the one whose removal hurts most first; by relative size without answers."""
        changes = self._changes

        def cost(one: EditExplanation) -> float:
            return changes.get(one.edit, 0.0) if changes else one.sizes.median

        return tuple(sorted(self.edits, key=cost, reverse=True))

    @property
    def summary(self) -> tuple[str, ...]:
        """The findings in a few plain sentences."""
        from reftlab.explaining.report.summary import summary_of

        return summary_of(self)

    @property
    def doubts(self) -> tuple[str, ...]:
        """What could be wrong with all this, in plain sentences: what was left out, and what is weak."""
        from reftlab.explaining.report.doubts import doubts_of

        return doubts_of(self)

    def to_frame(self) -> pd.DataFrame:
        """One line an edit: edit, site, block, positions, size, cosine, loss_change, towards."""
        import pandas as pd

        changes = self._changes
        lines = [
            (
                found.edit, found.site, found.block, found.positions, found.sizes.median,
                float(found.sizes.cosine.median()), changes.get(found.edit), " ".join(found.towards()),
            )
            for found in self.edits
        ]  # fmt: skip
        columns = ["edit", "site", "block", "positions", "size", "cosine", "loss_change", "towards"]
        return pd.DataFrame(lines, columns=columns)

    def plot(self) -> Figure:
        """Size of every edit, and the answer loss without it, by depth."""
        from reftlab.plotting import overview_figure

        changes = self._changes
        return overview_figure(
            [(e.edit, e.block, e.sizes.median, e.sizes.quartiles, changes.get(e.edit)) for e in self.edits]
        )

    def save(self, path: str | Path) -> Path:
        """Write the report, one HTML file that needs nothing else, and its figures as PNG beside it.

        Args:
            path: of the HTML file; the figures of `report.html` are `report_figures/overview.png` and so on.

        Returns:
            The path of the HTML file.
        """
        from reftlab.explaining.report.report import save_report

        return save_report(self, Path(path))

    def _repr_html_(self) -> str:
        from reftlab.explaining.report.report import notebook_html

        return notebook_html(self)

    def __repr__(self) -> str:
        return f"Explanation({len(self.edits)} edits of {self.model} on {len(self.examples)} examples)"

    @property
    def _changes(self) -> dict[str, float]:
        """Loss change without each whole edit."""
        return {r.edit: r.change for r in self.removal.removed if r.what == "edit"}
