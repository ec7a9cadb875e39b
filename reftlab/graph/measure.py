"""Measures: a number for each row or token, computed from vectors that are read in the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reftlab.errors import GraphError
from reftlab.graph.linear_probe import linear_parts, require_probabilities
from reftlab.graph.nodes import Read
from reftlab.interventions.base import as_vector, number

__all__ = [
    "Cosine",
    "Expression",
    "Measure",
    "Norm",
    "Probability",
    "Projection",
    "cosine",
    "norm",
    "probability",
    "projection",
]

Vectors = Mapping[Read, Tensor]
Values = Float[Tensor, " n"]


class Expression(ABC):
    """What measures and conditions share: equality by content, and the reads inside."""

    @property
    def reads(self) -> tuple[Read, ...]:
        """Every read that the expression needs, each once."""
        found: dict[Read, None] = {}
        for part in self._parts():
            found.update(dict.fromkeys([part] if isinstance(part, Read) else part.reads))
        return tuple(found)

    @property
    def widths(self) -> tuple[tuple[Read, int], ...]:
        """Reads, and how many features their vectors must have, wherever a part says so."""
        return tuple(pair for part in self._parts() if not isinstance(part, Read) for pair in part.widths)

    @abstractmethod
    def with_reads(self, change: Callable[[Read], Read]) -> Any:
        """The expression with every read changed."""

    @abstractmethod
    def _parts(self) -> tuple[Any, ...]:
        """The reads and expressions that it is made of."""

    def _key(self) -> tuple[Any, ...]:
        fields = (getattr(self, name) for name in self.__dataclass_fields__)  # type: ignore[attr-defined]
        return tuple(value.tolist() if isinstance(value, Tensor) else value for value in fields)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash((type(self).__name__, self.reads))


class Measure(Expression):
    """A number for each row or token, computed from reads; compare it to make a condition."""

    def __gt__(self, other: Measure | float) -> Any:
        return _compared(self, ">", other)

    def __ge__(self, other: Measure | float) -> Any:
        return _compared(self, ">=", other)

    def __lt__(self, other: Measure | float) -> Any:
        return _compared(self, "<", other)

    def __le__(self, other: Measure | float) -> Any:
        return _compared(self, "<=", other)

    @abstractmethod
    def value(self, vectors: Vectors) -> Values:
        """The measure of the read vectors, each `(n, width)`."""


@dataclass(frozen=True, eq=False)
class Cosine(Measure):
    """Cosine of the angle between two vectors, from −1 to 1; 0 where one of them is zero."""

    a: Read
    b: Read

    def value(self, vectors: Vectors) -> Values:
        a, b = vectors[self.a].float(), vectors[self.b].float()
        return torch.nn.functional.cosine_similarity(a, b, dim=-1)

    def with_reads(self, change: Callable[[Read], Read]) -> Cosine:
        return Cosine(change(self.a), change(self.b))

    def _parts(self) -> tuple[Any, ...]:
        return self.a, self.b

    def __repr__(self) -> str:
        return f"cosine({shortly(self.a)}, {shortly(self.b)})"


@dataclass(frozen=True, eq=False)
class Norm(Measure):
    """Euclidean length of a vector."""

    of: Read

    def value(self, vectors: Vectors) -> Values:
        return vectors[self.of].float().norm(dim=-1)

    def with_reads(self, change: Callable[[Read], Read]) -> Norm:
        return Norm(change(self.of))

    def _parts(self) -> tuple[Any, ...]:
        return (self.of,)

    def __repr__(self) -> str:
        return f"norm({shortly(self.of)})"


@dataclass(frozen=True, eq=False)
class Projection(Measure):
    """Length of a vector along a direction `(width,)`, which is normalised first."""

    of: Read
    direction: Tensor

    def value(self, vectors: Vectors) -> Values:
        base = vectors[self.of].float()
        if base.shape[1] != len(self.direction):
            raise GraphError(f"{self!r}: the vectors read have {base.shape[1]} features")
        return base @ (self.direction / self.direction.norm()).to(base)

    @property
    def widths(self) -> tuple[tuple[Read, int], ...]:
        return ((self.of, len(self.direction)),)

    def with_reads(self, change: Callable[[Read], Read]) -> Projection:
        return Projection(change(self.of), self.direction)

    def _parts(self) -> tuple[Any, ...]:
        return (self.of,)

    def __repr__(self) -> str:
        return f"projection({shortly(self.of)}, direction of {len(self.direction)})"


@dataclass(frozen=True, eq=False)
class Probability(Measure):
    """Probability that a linear probe gives to one of its classes.

    `σ(w·h + b)` where the probe has one row of weights, else the softmax over its rows.

    Attributes:
        of: what the probe looks at.
        weight: `(classes, width)`, or `(1, width)` for two classes.
        bias: `(classes,)` or `(1,)`.
        index: which class; for two classes 1 is the one that the weights speak for.
    """

    of: Read
    weight: Tensor
    bias: Tensor
    index: int = 1

    def value(self, vectors: Vectors) -> Values:
        base = vectors[self.of].float()
        if base.shape[1] != self.weight.shape[1]:
            raise GraphError(f"{self!r}: the vectors read have {base.shape[1]} features")
        logits = base @ self.weight.T.to(base) + self.bias.to(base)
        if len(self.bias) > 1:
            return logits.softmax(dim=-1)[:, self.index]
        return torch.sigmoid(logits[:, 0] if self.index == 1 else -logits[:, 0])

    @property
    def widths(self) -> tuple[tuple[Read, int], ...]:
        return ((self.of, self.weight.shape[1]),)

    def with_reads(self, change: Callable[[Read], Read]) -> Probability:
        return Probability(change(self.of), self.weight, self.bias, self.index)

    def _parts(self) -> tuple[Any, ...]:
        return (self.of,)

    def __repr__(self) -> str:
        return f"probability({shortly(self.of)}, probe of {self.weight.shape[1]} features)"


def cosine(a: str | Read, b: str | Read) -> Cosine:
    """Cosine similarity of two reads.

    >>> cosine("blocks[4].output @ last", "blocks[4].output @ first") > 0.8
    cosine('blocks[4].output @ last', 'blocks[4].output @ first') > 0.8
    """
    return Cosine(as_read(a), as_read(b))


def norm(of: str | Read) -> Norm:
    """Euclidean length of a read's vectors.

    >>> (norm("blocks[4].output") > 3.0) & (norm("blocks[4].output") <= 9)
    (norm('blocks[4].output') > 3) & (norm('blocks[4].output') <= 9)
    """
    return Norm(as_read(of))


def projection(of: str | Read, direction: Any) -> Projection:
    """Length of a read's vectors along a direction `(width,)`, in the units of the vectors."""
    try:
        vector = as_vector(direction, "direction")
    except ValueError as error:
        raise GraphError(f"projection: {error}") from error
    if vector is None or vector.dim() != 1 or not bool(vector.norm() > 0):
        raise GraphError("projection: direction must be a vector (width,) other than zero")
    return Projection(as_read(of), vector)


def probability(of: str | Read, probe: Any, label: Any = None) -> Probability:
    """Probability that a fitted linear probe gives to a class.

    Args:
        of: what the probe looks at.
        probe: a fitted scikit-learn classifier whose probabilities are the sigmoid or softmax of a linear
            function: `LogisticRegression`, `LinearDiscriminantAnalysis`, `SGDClassifier` with
            `loss="log_loss"` for two classes, `reftlab.probing.MeanDifference`, …; alone, in a pipeline
            behind `StandardScaler` steps, or found by a search such as `GridSearchCV`. Each is asked for
            its own probabilities of a few vectors, and refused where they are others.
        label: which of `probe.classes_`; for two classes the second unless given.

    Raises:
        GraphError: the probe is not fitted, not linear, gives other or no probabilities, or has no
            such class.
    """
    try:
        parts = linear_parts(probe)
        require_probabilities(probe, parts)
    except GraphError as error:
        raise GraphError(f"probability: {error}") from error
    classes = parts.classes or []
    if label is None and len(classes) != 2:
        raise GraphError(
            f"probability: the probe has the classes {classes}; say which, as in label={classes[0]!r}"
        )
    if label is not None and label not in classes:
        raise GraphError(f"probability: label={label!r} is none of the probe's classes {classes}")
    # A softmax does not see what all rows share, and in float32 that could be most of the digits.
    shared = len(parts.bias) > 1
    weight, bias = (torch.from_numpy(part - part.mean(0) if shared else part).float() for part in parts[:2])
    return Probability(as_read(of), weight, bias, 1 if label is None else classes.index(label))


def as_read(value: str | Read) -> Read:
    read = Read(value) if isinstance(value, str) else value
    if not isinstance(read, Read) or read.at is None:
        raise GraphError(
            "a condition reads sites, as in 'blocks[4].output @ last' or rl.Read('blocks[4].output'), "
            f"not {value!r}"
        )
    return read


def _operand(value: Any) -> Measure | float:
    if isinstance(value, Measure):
        return value
    try:
        return number(value, "value")
    except ValueError as error:
        raise GraphError(f"a measure is compared with a number or another measure: {error}") from error


def _compared(left: Measure, sign: str, right: Any) -> Any:
    from reftlab.graph.condition import Comparison

    return Comparison(left, sign, _operand(right))


def shortly(read: Read) -> str:
    text = repr(read)
    return text[len("Read(") : -1] if text.count(",") == 0 else text
