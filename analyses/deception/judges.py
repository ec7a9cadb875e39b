"""Who judges: surface cues, the bare model asked yes or no, a probe on its vectors, and LoReFT."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from arguments import Argument
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm

import reftlab as rl

PLAIN = "You judge arguments."
CAREFUL = (
    "You judge arguments. An argument is deceptive if it leads its reader to a conclusion that the facts it "
    "gives do not support: it picks one favourable number, tells one story as proof, leans on fame, crowds "
    "or custom, takes what came first for the cause, offers two choices where there are more, attacks a "
    "person or an opinion that nobody holds, or passes over a fact that it mentions itself. An argument is "
    "honest if its conclusion goes no further than its facts, however strong its feelings. A calm tone is no "
    "sign of honesty, and a loud one no sign of deception."
)
SYSTEMS = {"plain": PLAIN, "careful": CAREFUL}
YES, NO = ("Yes", " Yes"), ("No", " No")
STRENGTHS = (0.001, 0.01, 0.1, 1.0)
"""Values of C, scikit-learn's inverse strength of regularisation, among which classifiers choose."""


def question(text: str) -> str:
    return f"{text}\n\nIs this argument deceptive? Answer Yes or No."


def examples(arguments: Sequence[Argument]) -> list[rl.Example]:
    return [rl.Example(question(one.text), "Yes" if one.deceptive else "No") for one in arguments]


def yes_minus_no(
    model: Any, tokenizer: Any, texts: Sequence[str], system: str, *, what: str, batch_size: int = 16
) -> np.ndarray:
    """How much more likely an answer is Yes than No where only these two are allowed, in nats `(text,)`.

    This is log P(Yes) − log P(No) of the token after the prompt, each summed over the spellings with and
    without a space, so that above 0 is a Yes under constrained decoding.

    Args:
        model: a Hugging Face model, or one with edits bound to it.
        tokenizer: its tokenizer.
        texts: the arguments.
        system: system prompt.
        what: text for the progress bar.
        batch_size: rows a batch.
    """
    spelled = [
        [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words] for words in (YES, NO)
    ]
    yes, no = ([ids[0] for ids in words if len(ids) == 1] for words in spelled)
    prompts = [rl.format_prompt(tokenizer, question(text), chat=True, system=system) for text in texts]
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    scores = np.zeros(len(prompts))
    tokenizer.padding_side = "left"
    with torch.no_grad():
        for start in tqdm(range(0, len(order), batch_size), desc=what, unit="batch", leave=False):
            rows = order[start : start + batch_size]
            batch = tokenizer(
                [prompts[row] for row in rows], return_tensors="pt", padding=True, add_special_tokens=False
            )
            places = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
            logits = model(**batch, position_ids=places, logits_to_keep=1).logits[:, -1].double()
            scores[rows] = (logits[:, yes].logsumexp(1) - logits[:, no].logsumexp(1)).numpy()
    return scores


def best_threshold(scores: np.ndarray, deceptive: np.ndarray) -> float:
    """The threshold that judges most of these right, a score above it being a Yes.

    Midpoints between neighbouring scores are tried, and ends beyond all; of equally good ones the middle.
    """
    values = np.unique(scores)
    tried = np.concatenate([[values[0] - 1], (values[1:] + values[:-1]) / 2, [values[-1] + 1]])
    right = ((scores[None] > tried[:, None]) == deceptive[None]).mean(1)
    best = np.flatnonzero(right == right.max())
    return float(tried[best[len(best) // 2]])


def bag_of_words() -> Pipeline:
    """Logistic regression on which words and marks occur."""
    return make_pipeline(
        CountVectorizer(token_pattern=r"(?u)\b\w+\b|[!?:;,.]", binary=True, min_df=2),
        LogisticRegression(max_iter=2000),
    )


def lengths(texts: Sequence[str]) -> np.ndarray:
    """Words, characters and sentences of each text `(text, 3)`."""
    return np.array(
        [(len(t.split()), len(t), len(re.findall(r"[.!?](?=\s|$)", t))) for t in texts], dtype=float
    )


def standard_logistic() -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))


def chosen_inside(
    estimator: Pipeline, inputs: Any, labels: np.ndarray, topics: Sequence[str]
) -> GridSearchCV:
    """The estimator fitted at the strength that does best on topics held out inside the training part."""
    search = GridSearchCV(
        estimator, {"logisticregression__C": STRENGTHS}, cv=StratifiedGroupKFold(3), scoring="neg_log_loss"
    )
    return search.fit(inputs, labels, groups=topics)


def probe_scores(
    vectors: dict[str, np.ndarray],
    train: Sequence[int],
    test: Sequence[int],
    labels: np.ndarray,
    topics: Sequence[str],
) -> tuple[np.ndarray, str, float]:
    """A linear probe of one site, site and strength chosen inside the training part.

    Args:
        vectors: by site `(argument, width)`.
        train, test: numbers of the arguments.
        labels: of all arguments.
        topics: of all arguments.

    Returns:
        The scores of the test arguments `(test,)`, the site, and the strength C.
    """
    train, groups = np.asarray(train), [topics[number] for number in train]
    found = {
        site: chosen_inside(standard_logistic(), values[train], labels[train], groups)
        for site, values in vectors.items()
    }
    site = max(found, key=lambda name: found[name].best_score_)
    strength = found[site].best_params_["logisticregression__C"]
    return found[site].decision_function(vectors[site][np.asarray(test)]), site, strength
