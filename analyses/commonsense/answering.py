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
def option_scores(reft: rl.BoundModel, questions: Sequence[Question], *, batch_size: int = 8) -> np.ndarray:
    """Log-likelihood of each option's own text after the question, in nats a character `(question, option)`.

    The question is asked without its options, so that nothing has to be pointed at. All options of a
    question share one run of it. The end of the text is not counted: the bare model knows nothing of
    where answers end.

    Args:
        reft: a model bound with its tokenizer, with or without edits, which act on the prompt alone.
        questions: with the text of their options, as many each.
        batch_size: questions a batch.
    """
    tokenizer, several = reft.tokenizer, len(questions[0].options)
    found = np.zeros((len(questions), several))
    encoded = [tokenizer(question.open_prompt)["input_ids"] for question in questions]
    for some, prompts in _batches(tokenizer, encoded, batch_size):
        asked = reft(**prompts, use_cache=True, logits_to_keep=1)
        options = [option for row in some for option in questions[row].options]
        answers = tokenizer(
            [f" {option}" for option in options], add_special_tokens=False, padding=True,
            padding_side="right", return_tensors="pt",
        )  # fmt: skip
        before = prompts["attention_mask"].repeat_interleave(several, 0)
        asked.past_key_values.batch_repeat_interleave(several)
        # The edits have acted on the prompts, and on what is cached of these.
        with reft.disabled():
            after = reft(
                input_ids=answers.input_ids,
                attention_mask=torch.cat([before, answers.attention_mask], 1),
                position_ids=before.sum(1, keepdim=True) + torch.arange(answers.input_ids.shape[1]),
                past_key_values=asked.past_key_values,
            ).logits[:, :-1]
        logits = torch.cat([asked.logits.repeat_interleave(several, 0), after], 1)
        nats = cross_entropy(logits.transpose(1, 2), answers.input_ids, reduction="none")
        total = (nats * answers.attention_mask).sum(1).numpy() / np.array(list(map(len, options)))
        found[some] = -total.reshape(len(some), several)
    return found


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
