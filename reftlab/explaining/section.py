"""Sections of an explanation: each one answer, with what it says, its figure, and its table."""

from __future__ import annotations

import html
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from reftlab.errors import DataError, ReftlabError
from reftlab.explaining.budget import Budget

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["QUESTIONS", "NotApplicable", "Result", "Section", "answered"]


class NotApplicable(DataError):  # noqa: N818, it says what is so and not what went wrong
    """A question that does not arise, such as how one edit goes together with others."""


QUESTIONS = {
    "what": "What does it do?",
    "evidence": "How do we know?",
    "where": "Where does it happen?",
    "amount": "How much does each part matter?",
    "doubts": "What could be wrong?",
}
"""What a reader asks, in this order, by the name that sections give it."""


class Result(Protocol):
    """What every section holds."""

    def to_frame(self) -> pd.DataFrame: ...
    def plot(self) -> Figure: ...


@dataclass(frozen=True, eq=False)
class Section:
    """One answer of an explanation.

    Attributes:
        name: short, as in `explanation.section("faithfulness")`.
        question: which of `QUESTIONS` it answers.
        title: its heading.
        says: the findings in plain sentences, computed from the numbers.
        how: what was done, and how to read it.
        result: the numbers, with `to_frame()` and `plot()`; None where there are none.
        missing: why there is no result, or None.
        applies: False where the question does not arise; `missing` says why.
        note: what was sampled or left out; empty where nothing was.
        seconds: how long it took.
    """

    name: str
    question: str
    title: str
    says: tuple[str, ...] = ()
    how: str = ""
    result: Any = None
    missing: str | None = None
    applies: bool = True
    note: str = ""
    seconds: float = 0.0

    def to_frame(self) -> pd.DataFrame:
        """The table; empty where there is no result."""
        import pandas as pd

        return pd.DataFrame() if self.result is None else self.result.to_frame()

    def plot(self) -> Figure:
        """The figure, or one that says why there is none."""
        from reftlab.plotting import message_figure

        if self.result is None:
            return message_figure(self.title, self.missing or "there is no result")
        return self.result.plot()

    def _repr_html_(self) -> str:
        lines = self.says if self.missing is None else (f"{self._without}: {self.missing}.",)
        inner = getattr(self.result, "_repr_html_", str)()
        # What the result says itself is not said twice.
        said = [text for text in map(html.escape, lines) if text not in inner]
        note = html.escape(self.note)
        text = "".join(f"<p>{line}</p>" for line in said)
        text += f"<p><small>{note}</small></p>" if note and note not in inner else ""
        return f"<h4>{html.escape(self.title)}</h4>{text}{inner}"

    def __repr__(self) -> str:
        shown = (
            f"{self._without.lower()}: {self.missing}" if self.missing is not None else " ".join(self.says)
        )
        return f"Section({self.name!r}: {shown if len(shown) < 120 else shown[:119] + '…'})"

    @property
    def _without(self) -> str:
        return "Not available" if self.applies else "Does not apply"


def answered(empty: Section, work: Callable[[], Section], budget: Budget) -> Section:
    """Carry out a section, or say why there is none.

    Args:
        empty: its name, question and title.
        work: makes the section; what it raises of reftlab's own errors becomes the reason.
        budget: once it is used up, the section is left out and says so.
    """
    if budget.used_up:
        return replace(empty, missing=f"left out, since the time budget of {budget.seconds:g} s was used up")
    began = time.perf_counter()
    try:
        made = work()
    except NotApplicable as error:
        made = replace(empty, missing=str(error), applies=False)
    except ReftlabError as error:
        made = replace(empty, missing=str(error))
    return replace(made, seconds=time.perf_counter() - began)
