"""Which choice a model finds most likely."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from questions import Question, endings
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

import reftlab as rl
from reftlab.measuring import AnswerRuns

__all__ = ["choice_scores", "option_scores"]


@torch.no_grad()
def choice_scores(
    model: Any, tokenizer: Any, questions: Sequence[Question], *, chat: bool = False, batch_size: int = 16
) -> np.ndarray:
    """Log-likelihood of each choice after the prompt, in nats `(question, choice)`.

    The answers "the correct answer is …" of a question share all tokens but the last one, and so what
    they differ in is the likelihood of that token.

    Args:
        model: a Hugging Face model, or one with edits bound to it.
        tokenizer: its tokenizer.
        questions: all with the same choices.
        chat: whether the instruction is put into the chat template; the answer then begins the reply.
        batch_size: rows a batch.
    """
    begin, rest = endings(questions[0].choices)
    ids = [tokenizer(ending, add_special_tokens=False)["input_ids"] for ending in rest]
    if any(len(one) != 1 for one in ids):
        raise ValueError(f"answers must differ in one token; {rest} are {ids}")
    prompts = [
        rl.format_prompt(tokenizer, question.instruction, chat=True) + begin if chat else question.prompt
        for question in questions
    ]
    encoded = [tokenizer(text, add_special_tokens=not chat)["input_ids"] for text in prompts]
    scores = np.zeros((len(questions), len(ids)))
    for rows, batch in _batches(tokenizer, encoded, batch_size):
        logits = model(**batch, logits_to_keep=1).logits[:, -1].double().log_softmax(-1)
        scores[rows] = logits[:, [one[0] for one in ids]].numpy()
    return scores


@torch.no_grad()
def option_scores(reft: rl.BoundModel, questions: Sequence[Question], *, batch_size: int = 32) -> np.ndarray:
    """Log-likelihood of each option's own text after the question, in nats a character `(question, option)`.

    The question is asked without its options, so that nothing has to be pointed at. The end of the text is
    not counted: the bare model knows nothing of where answers end.

    Args:
        reft: a model bound with its tokenizer, with or without edits.
        questions: with the text of their options.
        batch_size: rows a batch.
    """
    rows = [(q, option) for q in questions for option in q.options]
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row][0].text) - len(rows[row][1]))
    found = np.zeros(len(rows))
    for start in tqdm(
        range(0, len(order), batch_size), desc="asking", unit="batch", leave=False, disable=None
    ):
        some = order[start : start + batch_size]
        pairs = [(rows[row][0].open_prompt, f" {rows[row][1]}") for row in some]
        nats, rows_of = _answer_nats(reft, pairs)
        for place, row in enumerate(some):
            found[row] = -float(nats[rows_of == place][:-1].double().sum()) / len(rows[row][1])
    return found.reshape(len(questions), -1)


def _answer_nats(reft: rl.BoundModel, pairs: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each token of the answers and of the text's end, and their rows."""
    batch = rl.training_batch(reft, pairs, chat=False, side="left")
    if reft.edits:
        runs = AnswerRuns(reft, [batch], frozenset(batch))
        return runs(), runs.example_of
    labels = batch.pop("labels")
    longest = int((labels != -100).sum(1).max())
    logits, labels = reft(**batch, logits_to_keep=longest + 1).logits[:, :-1], labels[:, -longest:]
    rows, columns = (labels != -100).nonzero().unbind(1)
    return cross_entropy(logits[rows, columns], labels[rows, columns], reduction="none"), rows


def _batches(
    tokenizer: Any, encoded: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Rows of about the same length together, padded on the left."""
    order = sorted(range(len(encoded)), key=lambda row: -len(encoded[row]))
    for start in tqdm(
        range(0, len(order), batch_size), desc="asking", unit="batch", leave=False, disable=None
    ):
        rows = order[start : start + batch_size]
        width = len(encoded[rows[0]])
        ids = torch.full((len(rows), width), tokenizer.pad_token_id)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, width - len(encoded[row]) :] = torch.tensor(encoded[row])
            mask[place, width - len(encoded[row]) :] = 1
        yield (
            rows,
            {
                "input_ids": ids,
                "attention_mask": mask,
                "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            },
        )
