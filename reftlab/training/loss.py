"""The answer loss: how surprised a model is by the answers that are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from reftlab.errors import DataError
from reftlab.runtime.modes import evaluating
from reftlab.runtime.window import IGNORED_LABEL
from reftlab.training.collate import Collator, moved
from reftlab.training.data import Encoded, Example, as_examples, encode
from reftlab.training.replies import prompt_form
from reftlab.training.settings import whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reftlab.runtime import BoundModel
    from reftlab.runtime.cone import ConeRunner

__all__ = ["answer_loss", "summed_loss", "training_batch"]


def answer_loss(
    model: Any,
    examples: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    chat: bool | None = None,
    system: str | None = None,
    batch_size: int = 16,
    side: Literal["left", "right"] = "right",
    task: str | None = None,
) -> float:
    """Mean cross-entropy of the answers' tokens, in nats a token, over all examples together.

    Args:
        model: a bound model, or a Hugging Face causal language model together with its tokenizer.
        examples: (prompt, answer) pairs, see `reftlab.training.as_examples`.
        tokenizer: the tokenizer; a bound model's own unless given.
        chat, system: as for `reply`.
        batch_size: rows in one forward pass; the result does not depend on it.
        side: where batches are padded; the result does not depend on it.
        task: the tasks whose edits act, in place of the examples' own.

    Raises:
        DataError: no tokenizer, or an example without an answer.
    """
    tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise DataError("answer_loss needs a tokenizer: bind with one, or give tokenizer=")
    batch_size = whole("batch_size", batch_size, 1)
    rows = with_task(with_answers(examples), task)
    encoded = encode(tokenizer, rows, **prompt_form(model, tokenizer, chat, system))
    return mean_loss(model, encoded, Collator.of(tokenizer, side), batch_size)


def mean_loss(
    model: Any,
    encoded: Sequence[Encoded],
    collate: Collator,
    batch_size: int,
    runner: ConeRunner | None = None,
) -> float:
    """The answer loss of encoded examples, in eval mode and without gradients.

    Args:
        model: a bound model, or a causal language model.
        encoded: the examples.
        collate: makes batches of them.
        batch_size: rows in one forward pass.
        runner: runs the bound model on the cone of its edits, where there is one.
    """
    total, count = 0.0, 0
    with evaluating(model), torch.no_grad():
        for start in range(0, len(encoded), batch_size):
            batch = moved(collate(encoded[start : start + batch_size]), model)
            found = None if runner is None else runner.predictions(batch)
            if found is None:
                losses, tokens = summed_loss(model(**batch).logits, batch["labels"])
            else:
                losses = cross_entropy(found.logits.float(), found.labels, reduction="sum")
                tokens = len(found.labels)
            total, count = total + float(losses), count + tokens
    return total / count


def with_task(examples: Sequence[Example], task: str | None) -> list[Example]:
    """The examples, all of one task where one is given."""
    return [example if task is None else replace(example, task=task) for example in examples]


def summed_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Sum of the cross-entropies of the labelled tokens, in nats, and how many they are.

    Args:
        logits: `(row, token, vocab)`; those at one token predict the next.
        labels: `(row, token)`, -100 where no label is.
    """
    wanted = labels[:, 1:].to(logits.device)
    kept = wanted != IGNORED_LABEL
    losses = cross_entropy(logits[:, :-1][kept].float(), wanted[kept], reduction="sum")
    return losses, int(kept.sum())


def with_answers(examples: Any) -> list[Any]:
    """Read examples and refuse those without an answer.

    Raises:
        DataError: an example has no answer; it is named by number.
    """
    read = as_examples(examples)
    for number, example in enumerate(read):
        if example.answer is None:
            raise DataError(
                f"example {number}, {example.prompt!r}, has no answer; a loss needs (prompt, answer) pairs"
            )
    return read


def training_batch(
    reft: BoundModel,
    examples: Any,
    *,
    chat: bool | None = None,
    system: str | None = None,
    side: Literal["left", "right"] = "right",
) -> dict[str, Any]:
    """Examples as the one batch that a training would make of them, to look at its plan or to run it.

    Args:
        reft: a bound model with a tokenizer.
        examples: (prompt, answer) pairs, see `reftlab.training.as_examples`.
        chat, system, side: as for `train`.

    Returns:
        `input_ids`, `attention_mask`, `position_ids` and `labels`, each `(row, token)`, and what the
        examples say of the edits.

    Raises:
        DataError: no tokenizer, or an example without an answer.

    >>> reft.plan(rl.training_batch(reft, pairs)).plot()  # doctest: +SKIP
    """
    if not hasattr(reft, "interventions"):
        raise DataError(
            f"training_batch takes a bound model, graph.bind(model, tokenizer), not {type(reft).__name__}"
        )
    if reft.tokenizer is None:
        raise DataError("training_batch needs a tokenizer: graph.bind(model, tokenizer)")
    rows = encode(reft.tokenizer, with_answers(examples), **prompt_form(reft, reft.tokenizer, chat, system))
    return moved(Collator.of(reft.tokenizer, side)(rows), reft)
