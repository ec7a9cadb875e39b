"""What the model says without and with its edits."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reftlab.training.data import Example
from reftlab.training.replies import reply

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from reftlab.runtime import BoundModel

__all__ = ["Reply", "ReplyTable", "ask"]


@dataclass(frozen=True)
class Reply:
    """One prompt and what came back.

    Attributes:
        prompt: the prompt.
        wanted: the answer that the example has, or None.
        bare: reply of the bare model.
        edited: reply with the edits.
        seen: whether the prompt is one of the explained examples rather than of `unseen`.
    """

    prompt: str
    wanted: str | None
    bare: str
    edited: str
    seen: bool

    @property
    def exact(self) -> bool:
        """Whether the edited reply is the wanted answer, up to spaces at the ends."""
        return self.wanted is not None and self.edited.strip() == self.wanted.strip()

    @property
    def bare_exact(self) -> bool:
        """Whether the bare model's reply already is the wanted answer."""
        return self.wanted is not None and self.bare.strip() == self.wanted.strip()

    @property
    def changed(self) -> bool:
        """Whether the edits changed the reply."""
        return self.bare != self.edited


@dataclass(frozen=True)
class ReplyTable:
    """Replies side by side, greedy, cut after `max_new_tokens` tokens.

    Attributes:
        replies: one for each prompt.
        max_new_tokens: longest reply in tokens.
        missing: why there are none, or None.
        note: what was left out, or an empty text.
    """

    replies: tuple[Reply, ...]
    max_new_tokens: int
    missing: str | None = None
    note: str = ""

    def to_frame(self) -> pd.DataFrame:
        """One line a prompt: prompt, wanted, bare, edited, seen, exact."""
        import pandas as pd

        lines = [(r.prompt, r.wanted, r.bare, r.edited, r.seen, r.exact) for r in self.replies]
        return pd.DataFrame(lines, columns=["prompt", "wanted", "bare", "edited", "seen", "exact"])

    def plot(self) -> Figure:
        from reftlab.plotting import message_figure, replies_figure

        if self.missing is not None:
            return message_figure("Replies", self.missing)
        return replies_figure([(r.prompt, r.bare, r.edited) for r in self.replies])

    def _repr_html_(self) -> str:
        if self.missing is not None:
            return f"<p>{html.escape(self.missing)}</p>"
        return str(self.to_frame().to_html(index=False))

    def __repr__(self) -> str:
        if self.missing is not None:
            return f"ReplyTable(not available: {self.missing})"
        seen = [r for r in self.replies if r.seen and r.wanted is not None]
        return (
            f"ReplyTable({len(self.replies)} prompts, {sum(r.exact for r in seen)} of {len(seen)} "
            "answers exact)"
        )


def ask(
    reft: BoundModel,
    examples: Sequence[Example],
    unseen: Sequence[Example],
    *,
    chat: bool,
    system: str | None,
    sources: Mapping[str, Any] | None,
    max_new_tokens: int,
) -> ReplyTable:
    """Ask the bare model and the edited one the same prompts."""
    if not hasattr(reft.model, "generate"):
        return ReplyTable((), max_new_tokens, f"{type(reft.model).__name__} cannot generate text")
    note = ""
    if unseen and (sources or _named(examples[0].sources) != _named(unseen[0].sources)):
        note, unseen = "unseen prompts were left out: the edits need source inputs that belong to them", ()
    elif unseen and _named(examples[0].positions) != _named(unseen[0].positions):
        note, unseen = "unseen prompts were left out: they and the examples say positions of other edits", ()
    prompts = [*examples, *unseen]
    options: dict[str, Any] = {"chat": chat, "system": system, "max_new_tokens": max_new_tokens}
    with reft.disabled():
        bare = reply(reft, prompts, **options)
    if sources:
        options["sources"] = sources
    edited = reply(reft, prompts, **options)
    replies = tuple(
        Reply(example.prompt, example.answer, before, after, number < len(examples))
        for number, (example, before, after) in enumerate(zip(prompts, bare, edited, strict=True))
    )
    return ReplyTable(replies, max_new_tokens, None, note)


def _named(given: Mapping[str, Any] | None) -> set[str]:
    return set(given or ())
