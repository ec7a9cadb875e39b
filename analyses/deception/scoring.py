"""What the judgements are worth: accuracy and AUROC with intervals over topics."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

DRAWS = 2000


class Topics:
    """Resamples of topics, the same for every judge, so that judges are compared on the same draws.

    Attributes:
        weights: how often each topic is drawn `(draw, topic)`; the first row is the data themselves.
    """

    def __init__(self, topics: Sequence[str], draws: int = DRAWS, seed: int = 0) -> None:
        self.names = sorted(set(topics))
        random = np.random.default_rng(seed)
        drawn = random.multinomial(len(self.names), np.full(len(self.names), 1 / len(self.names)), size=draws)
        self.weights = np.concatenate([np.ones((1, len(self.names))), drawn])

    def of(self, topics: Sequence[str]) -> np.ndarray:
        """Weights of rows with these topics `(draw, row)`."""
        place = {name: number for number, name in enumerate(self.names)}
        return self.weights[:, [place[topic] for topic in topics]]


def accuracies(judged: pd.DataFrame, drawn: Topics) -> np.ndarray:
    """Share of right judgements in each draw `(draw,)`, seeds together; NaN where no topic is drawn."""
    weights = drawn.of(judged["topic"].tolist())
    total = weights.sum(1)
    right = (weights * judged["right"].to_numpy(float)).sum(1)
    return np.divide(right, total, out=np.full(len(total), np.nan), where=total > 0)


def aurocs(judged: pd.DataFrame, drawn: Topics) -> np.ndarray:
    """Area under the ROC curve in each draw `(draw,)`.

    Scores of two folds come from two fits and share no scale, so pairs are formed inside a seed's fold
    only: the share of pairs of a deceptive and an honest argument in the right order, ties counting half.
    """
    ordered = np.zeros(len(drawn.weights))
    pairs = np.zeros(len(drawn.weights))
    for _, part in judged.groupby(["seed", "fold"]):
        deceptive = part["deceptive"].to_numpy(bool)
        scores, weights = part["score"].to_numpy(), drawn.of(part["topic"].tolist())
        above = scores[deceptive][:, None] - scores[~deceptive][None]
        above = (above > 0) + 0.5 * (above == 0)
        yes, no = weights[:, deceptive], weights[:, ~deceptive]
        ordered += np.einsum("dp,pq,dq->d", yes, above, no, optimize=True)
        pairs += yes.sum(1) * no.sum(1)
    return ordered / np.maximum(pairs, 1)


def interval(draws: np.ndarray) -> tuple[float, float, float]:
    """The value on the data, and the ends of its 95% percentile interval."""
    low, high = np.nanpercentile(draws[1:], [2.5, 97.5])
    return float(draws[0]), float(low), float(high)
