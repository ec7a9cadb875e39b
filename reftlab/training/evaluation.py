"""How well a model answers: its replies beside the answers wanted, and the loss."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from reftlab.training.data import as_examples
from reftlab.training.loss import answer_loss, with_task
from reftlab.training.replies import reply
from reftlab.training.settings import whole

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

__all__ = ["Evaluation", "Outcome", "evaluate"]


@dataclass(frozen=True)
class Outcome:
    """One prompt, the reply to it, and the answer wanted (None where only the reply matters)."""

    prompt: str
    reply: str
    answer: str | None = None

    @property
    def exact(self) -> bool | None:
        """Whether the reply is the answer, but for white space at its ends."""
        return None if self.answer is None else self.reply.strip() == self.answer.strip()


@dataclass(frozen=True)
class Evaluation:
    """Replies to examples.

    Attributes:
        outcomes: one for each example, in order.
        loss: mean cross-entropy of the answers' tokens, nats a token; None without answers.
    """

    outcomes: tuple[Outcome, ...]
    loss: float | None

    @property
    def exact(self) -> int:
        """How many replies are exactly the answer."""
        return sum(bool(outcome.exact) for outcome in self.outcomes)

    @property
    def answered(self) -> int:
        """How many examples have an answer to compare with."""
        return sum(outcome.answer is not None for outcome in self.outcomes)

    def to_frame(self) -> pd.DataFrame:
        """One line an example: prompt, answer, reply, exact."""
        import pandas as pd

        lines = [{**asdict(outcome), "exact": outcome.exact} for outcome in self.outcomes]
        return pd.DataFrame(lines, columns=["prompt", "answer", "reply", "exact"])

    def __repr__(self) -> str:
        parts = [f"{len(self.outcomes)} replies"]
        if self.answered:
            parts.append(f"{self.exact} of {self.answered} exact")
        if self.loss is not None:
            parts.append(f"answer loss {self.loss:.4g} nats a token")
        return f"Evaluation({', '.join(parts)})"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>" + self.to_frame().to_html(index=False)


def evaluate(
    model: Any,
    examples: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    chat: bool | None = None,
    system: str | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    task: str | None = None,
    **options: Any,
) -> Evaluation:
    """Ask a model every example's prompt, and measure the loss on those with an answer.

    Args:
        model: a bound model, or a Hugging Face model together with its tokenizer.
        examples: prompts or (prompt, answer) pairs, see `reftlab.training.as_examples`.
        tokenizer, chat, system, max_new_tokens, **options: as for `reply`.
        batch_size: rows in one batch.
        task: the tasks whose edits act, in place of the examples' own.

    >>> evaluate(reft, [("What is the sea like?", "🌊🐠🐚")])  # doctest: +SKIP
    Evaluation(1 replies, 1 of 1 exact, answer loss 0.0072 nats a token)
    """
    batch_size = whole("batch_size", batch_size, 1)
    read = with_task(as_examples(examples), task)
    form: dict[str, Any] = {"chat": chat, "system": system}
    replies: list[str] = []
    for start in range(0, len(read), batch_size):
        rows = read[start : start + batch_size]
        replies += reply(model, rows, tokenizer, max_new_tokens=max_new_tokens, **form, **options)
    answered = [example for example in read if example.answer is not None]
    loss = answer_loss(model, answered, tokenizer, batch_size=batch_size, **form) if answered else None
    outcomes = [
        Outcome(example.prompt, said, example.answer) for example, said in zip(read, replies, strict=True)
    ]
    return Evaluation(tuple(outcomes), loss)
