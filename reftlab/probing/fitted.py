"""One cell's probe, fitted on all of its vectors: a direction, a condition, a way to steer."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.multioutput import MultiOutputClassifier
from torch import Tensor

from reftlab.errors import DataError, GraphError
from reftlab.graph import Condition, Read, probability
from reftlab.graph.linear_probe import linear_parts
from reftlab.graph.nodes import replace_read
from reftlab.interventions import Steer
from reftlab.probing.labels import Kind

__all__ = ["FittedProbe"]


@dataclass(frozen=True, eq=False)
class FittedProbe:
    """A probe of one site and position, fitted on everything.

    Attributes:
        name: `"site @ position"`.
        read: where its vectors come from; None for a read whose name does not say it.
        kind: `classification`, `multilabel` or `regression`.
        classes: the classes; numbers of the labels for several; empty for numbers.
        estimator: the fitted scikit-learn estimator. Where classes are neither all texts nor all whole
            numbers it knows them by their place in `classes`.
        metric: the headline metric.
        score: its value out of fold, of probes fitted on the other folds.
        vectors: on how many vectors it was fitted.
    """

    name: str
    read: Read | None
    kind: Kind
    classes: tuple[Any, ...]
    estimator: Any
    metric: str
    score: float
    vectors: int

    @property
    def direction(self) -> Float[Tensor, " width"] | Float[Tensor, "classes width"]:
        """Unit vector along which the probe's output grows the most, in the units of the site.

        `(width,)` for two classes, towards the second, and for numbers; else a row for each class or label.
        The weights are pulled back through the scaler, so that this is the gradient with respect to the
        site's own vectors, not to the scaled ones. For more than two classes a row is towards its class and
        away from the mean of all, since what all rows share decides between no classes.

        Raises:
            DataError: the estimator is not linear.
        """
        try:
            rows = [linear_parts(one).weights for one in self._estimators]
        except GraphError as error:
            raise DataError(f"{self.name}: only a linear probe has a direction; {error}") from error
        weights = np.concatenate(rows)
        if self.kind == "classification" and len(weights) > 1:
            weights = weights - weights.mean(0)
        length = np.linalg.norm(weights, axis=1, keepdims=True)
        if not (length > 0).all():
            raise DataError(f"{self.name}: the probe's weights are all 0, so it has no direction")
        found = torch.from_numpy((weights / length).astype(np.float32))
        return found[0] if len(found) == 1 and self.kind != "multilabel" else found

    def condition(self, threshold: float = 0.5, label: Any = None, positions: Any = "probed") -> Condition:
        """A condition for an edit's `when=`: the probe holds a class more likely than so.

        It is asked where the vectors came from. One token, such as `last`, decides for a row's whole prompt
        and, where the edit goes on, for what is generated after it; several decide each for one of the
        edit's tokens, and there must be as many. They are tokens of the prompt: to decide token by token
        also while text is generated, for an edit with `phase="both"` or `"decode"`, give `positions=None`.

        Args:
            threshold: from 0 to 1. Probes are fitted with classes weighted equally, and so are these
                probabilities.
            label: which class, or which label of several; of two classes the second unless given.
            positions: at which tokens it is asked: `"probed"` for those that the probe was fitted on, None
                for the edit's own, in the prompt as among generated ones, or any others, such as `"first"`.

        Raises:
            DataError: a probe of numbers, no such class, or a threshold outside 0 to 1.
            GraphError: a probe without linear probabilities.
            PositionError: positions that cannot be read.

        >>> rl.Edit("calm", at="blocks[9].output", intervention=rl.Zero(),
        ...         when=found["blocks[5].output @ last"].condition(0.9))            # doctest: +SKIP
        >>> found["blocks[5].output @ last"].condition(0.9, positions=None)          # doctest: +SKIP
        """
        if self.kind == "regression":
            raise DataError(
                f"{self.name} predicts numbers; compare a projection, rl.projection(probe.read, "
                "probe.direction) > 3.0"
            )
        threshold = threshold.item() if isinstance(threshold, np.number) else threshold
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
            raise DataError(f"threshold={threshold!r}: expected a probability from 0 to 1")
        if self.read is None:
            raise DataError(
                f"{self.name} does not say which site it is; use rl.probability(read, probe.estimator)"
            )
        place, read = self._place(label), self.read
        if not (isinstance(positions, str) and positions == "probed"):
            read = replace_read(read, positions=positions)
        if self.kind == "multilabel":
            return probability(read, self.estimator.estimators_[place]) > threshold
        return probability(read, self.estimator, self.estimator.classes_[place].item()) > threshold

    def steer(self, amount: float, norm_matched: bool = False, label: Any = None) -> Steer:
        """Steering along the probe's direction.

        Args:
            amount: how far, in the site's units, or norm-matched as a share of each vector's length;
                below 0 away from the class.
            norm_matched: see `rl.Steer`.
            label: towards which class or label; of two classes the second unless given. The first of two
                is the opposite direction.

        Raises:
            DataError: the probe is not linear, or has no such class.

        >>> rl.Edit("polite", at="blocks[5].output", positions="last",
        ...         intervention=found["blocks[5].output @ last"].steer(4.0))       # doctest: +SKIP
        """
        direction = self.direction
        if self.kind == "regression":
            if label is not None:
                raise DataError(f"label={label!r}: {self.name} predicts numbers and has no classes")
        else:
            place = self._place(label)
            if direction.dim() == 2:
                direction = direction[place]
            elif place == 0:
                direction = -direction
        return Steer(direction, amount, norm_matched)

    @property
    def _estimators(self) -> list[Any]:
        return (
            self.estimator.estimators_
            if isinstance(self.estimator, MultiOutputClassifier)
            else [self.estimator]
        )

    def _place(self, label: Any) -> int:
        if label is None:
            if self.kind == "classification" and len(self.classes) == 2:
                return 1
            raise DataError(
                f"label=None: {self.name} has {list(self.classes)}; say which, as in "
                f"label={self.classes[0]!r}"
            )
        if label not in self.classes:
            raise DataError(f"label={label!r}: {self.name} knows {list(self.classes)}")
        return self.classes.index(label)

    def __repr__(self) -> str:
        named = "labels" if self.kind == "multilabel" else "classes"
        what = f"{len(self.classes)} {named}" if self.classes else "numbers"
        held_out = f"{self.metric.replace('_', ' ')} {self.score:.3f} out of fold"
        return f"FittedProbe({self.name!r}, {what}, {self.vectors} vectors, {held_out})"

    def _repr_html_(self) -> str:
        return f"<div><p>{html.escape(repr(self))}</p><pre>{html.escape(repr(self.estimator))}</pre></div>"
