"""What is asked of a model's runs: examples as batches, and the number that each example's logits make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from reftlab.errors import DataError
from reftlab.measuring.inputs import batches
from reftlab.runtime import BoundModel
from reftlab.runtime.calls import continues_texts
from reftlab.runtime.window import IGNORED_LABEL
from reftlab.sweeping.metric import Measured, Metric, References, as_metric
from reftlab.training.data import Encoded, Example, as_examples, encode
from reftlab.training.replies import prompt_form

if TYPE_CHECKING:
    from reftlab.training.replies import PromptForm

__all__ = ["Question", "checked_examples", "metrics_of", "question_of"]


@dataclass(frozen=True, eq=False)
class Question:
    """What is asked of a bound model's runs on examples.

    Attributes:
        name: what is measured.
        unit: of its numbers.
        examples: numbers of the examples in the caller's data.
        weights: `(example,)`, how much each counts in a mean: its answer tokens, or 1.
        prompts: token ids of each prompt.
        answers: number of tokens of each answer that the model is given.
        batches: the examples as the model takes them, one after the other.
        metric: of the next token; None for the answer loss or the divergence.
        answered: whether the answer loss is measured.
    """

    name: str
    unit: str
    examples: tuple[int, ...]
    weights: Float[Tensor, " example"]
    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[int, ...]
    batches: tuple[dict[str, Any], ...]
    metric: Metric | None
    answered: bool

    @property
    def firsts(self) -> tuple[int, ...]:
        """Number of each batch's first example."""
        found = [0]
        for batch in self.batches[:-1]:
            found.append(found[-1] + len(batch["input_ids"]))
        return tuple(found)


def question_of(
    reft: BoundModel,
    examples: Any,
    metric: Any = None,
    *,
    chat: bool | None = None,
    system: str | None = None,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    who: str = "a measurement",
) -> Question:
    """Choose what to measure; arguments as for `reftlab.measuring.behaviour_of`.

    Raises:
        DataError: examples or arguments that cannot be used.
    """
    rows, form = checked_examples(who, reft, examples, chat, system, sources)
    texts = continues_texts(reft.model)
    answered = [number for number, row in enumerate(rows) if row.answer is not None] if texts else []
    if metric is None and answered:
        if sources and len(answered) < len(rows):
            raise DataError(
                "some examples have no answers, and the source inputs belong to all of them; give each an "
                "answer, or leave those without out"
            )
        return _of_answers(reft, [rows[number] for number in answered], tuple(answered), form, sources)
    encoded = encode(reft.tokenizer, [replace(row, answer=None) for row in rows], **form)
    chosen = None if metric is None else as_metric(metric)
    if chosen is not None:
        chosen.check(len(rows), reft.tokenizer)
    return Question(
        "divergence of the next token from the edited model" if chosen is None else chosen.name,
        "nats" if chosen is None else chosen.unit,
        tuple(range(len(rows))),
        torch.ones(len(rows)),
        tuple(one.input_ids for one in encoded),
        (0,) * len(rows),
        tuple(batches(reft, _one_more(reft, encoded) if texts else encoded, sources)),
        chosen,
        False,
    )


def checked_examples(
    who: str, reft: Any, examples: Any, chat: bool | None, system: str | None, sources: Any
) -> tuple[list[Example], PromptForm]:
    """Examples for a function, and how their prompts are written.

    Args:
        who: the function, for messages.
        reft: a bound model with its tokenizer.
        examples, chat, system, sources: as for `reftlab.measuring.behaviour_of`.

    Raises:
        DataError: no bound model, no tokenizer, no examples, or examples of several tasks.
    """
    if not isinstance(reft, BoundModel):
        raise DataError(f"{who} takes a bound model, graph.bind(model, tokenizer), not {type(reft).__name__}")
    if reft.tokenizer is None:
        raise DataError(f"{who} needs a tokenizer: bind with one, graph.bind(model, tokenizer)")
    rows = as_examples(examples)
    if any(row.task is not None for row in rows):
        raise DataError(
            f"{who} looks at one set of edits; take one task's with reft.select(...), without tasks in the "
            "examples"
        )
    if sources and rows[0].sources:
        raise DataError("sources= says what the examples' own sources say already; leave one of them out")
    return rows, prompt_form(reft, reft.tokenizer, chat, system)


def metrics_of(
    question: Question,
    tokenizer: Any,
    full: Float[Tensor, "example vocab"],
    bare: Float[Tensor, "example vocab"],
) -> list[Measured]:
    """For each example, what is measured of the logits of its next token.

    Args:
        question: what is asked.
        tokenizer: for a metric's answers.
        full, bare: logits of the next token with all edits and with none.
    """
    if question.metric is None:
        return list(map(_divergence_from, full))
    metric = question.metric
    return [
        metric.finite(number, tokenizer, References(full[number], bare[number]))
        for number in range(len(full))
    ]


def _of_answers(
    reft: BoundModel, rows: Sequence[Example], numbers: tuple[int, ...], form: PromptForm, sources: Any
) -> Question:
    encoded = encode(reft.tokenizer, rows, **form)
    prompts = tuple(one.input_ids[: one.labels.count(IGNORED_LABEL)] for one in encoded)
    counts = [len(one) - len(prompt) for one, prompt in zip(encoded, prompts, strict=True)]
    return Question(
        "answer loss",
        "nats per answer token",
        numbers,
        torch.tensor(counts).float(),
        prompts,
        tuple(count - 1 for count in counts),
        tuple(batches(reft, encoded, sources)),
        None,
        True,
    )


def _divergence_from(logits: Float[Tensor, " vocab"]) -> Measured:
    wanted = logits.float().log_softmax(-1)

    def measured(found: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
        return (wanted.exp() * (wanted - found.float().log_softmax(-1))).sum(-1)

    return measured


def _one_more(reft: BoundModel, encoded: Sequence[Encoded]) -> list[Encoded]:
    """One token more, which nothing before it sees, so that what is predicted in its place is an answer."""
    end = getattr(reft.tokenizer, "eos_token_id", None)
    further = end if isinstance(end, int) else encoded[0].input_ids[-1]
    return [
        replace(one, input_ids=(*one.input_ids, further), labels=(*[IGNORED_LABEL] * len(one), further))
        for one in encoded
    ]
