"""What a cell's probes said of the vectors that they had not seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from reftlab.probing.estimators import Predictions
from reftlab.probing.labels import Kind, Labels

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["HeldOut", "held_out"]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Out-of-fold predictions of one cell: each vector's by the probe of the fold that it was left out of.

    All are in the order of the vectors: example after example, and the tokens of an example ascending.

    Attributes:
        kind: `classification`, `multilabel` or `regression`.
        classes: the classes; numbers of the labels for several; empty for numbers.
        examples: number of each vector's example in the data, `(n,)`.
        tokens: number of its token among the real tokens of the example; the first one of joined ones.
        folds: the fold that it was in.
        labels, predicted: numbers of classes `(n,)`, 0 and 1 `(n, label)`, or numbers `(n,)`.
        scores: how strongly the second of two classes `(n, 1)`, or each class or label `(n, k)`, is spoken
            for, float32: log-odds for logistic regression with two classes, probabilities with more; the
            predictions themselves for numbers. NaN where an estimator gives none. Each fold's probe has
            a scale of its own.
    """

    kind: Kind
    classes: tuple[Any, ...]
    examples: Int[np.ndarray, " n"]
    tokens: Int[np.ndarray, " n"]
    folds: Int[np.ndarray, " n"]
    labels: np.ndarray
    predicted: np.ndarray
    scores: Float[np.ndarray, "n k"]

    def to_frame(self) -> pd.DataFrame:
        """One line a vector: example, token, fold, label, predicted, and a score.

        For more than two classes a score for each, `score A`; of several labels a label, a prediction and a
        score for each, `label 0`, `predicted 0`, `score 0`; of numbers no score.
        """
        import pandas as pd

        frame: dict[str, Any] = {"example": self.examples, "token": self.tokens, "fold": self.folds}
        if self.kind == "multilabel":
            for name in self.classes:
                frame |= {f"label {name}": self.labels[:, name], f"predicted {name}": self.predicted[:, name]}
            frame |= {f"score {name}": self.scores[:, name] for name in self.classes}
            return pd.DataFrame(frame)
        frame |= {"label": self._named(self.labels), "predicted": self._named(self.predicted)}
        if self.kind == "classification" and len(self.classes) == 2:
            frame["score"] = self.scores[:, 0]
        elif self.kind == "classification":
            frame |= {f"score {name}": self.scores[:, number] for number, name in enumerate(self.classes)}
        return pd.DataFrame(frame)

    def _named(self, numbers: np.ndarray) -> Any:
        """Classes in the place of their numbers."""
        if self.kind == "regression":
            return numbers
        import pandas as pd

        # One by one, since tuples as classes are no rows of an array.
        return pd.Series([self.classes[number] for number in numbers.tolist()])


def held_out(
    labels: Labels, index: np.ndarray, folds: np.ndarray, y: np.ndarray, found: Predictions
) -> HeldOut:
    """A cell's predictions, in as little room as they need.

    Args:
        labels: what the labels are.
        index: example and token of each vector, `(n, 2)` or wider.
        folds: the fold of each.
        y: the labels as numbers.
        found: the predictions.
    """
    small = np.float32 if labels.kind == "regression" else np.int32
    return HeldOut(
        labels.kind, labels.classes, index[:, 0], index[:, 1], folds, y,
        found.predicted.astype(small), found.scores.astype(np.float32),
    )  # fmt: skip
