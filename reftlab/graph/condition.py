"""Conditions: yes or no, or how much, from vectors that are read in the model.

A *measure* is a number computed from reads, such as their cosine; comparing it makes a
*condition*. Conditions combine with `&`, `|` and `~`. A read with positions of its own gives one
value for each row, or as many as the edit has tokens; a read without positions is at the edit's own
tokens, in the prompt as among generated tokens, and gives one value for each of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from reftlab.errors import GraphError
from reftlab.graph.measure import Expression, Measure, Values, Vectors, as_read, shortly
from reftlab.graph.nodes import Read
from reftlab.interventions.base import number

__all__ = ["Combined", "Comparison", "Condition", "Gate", "Not", "gate"]

Gates = Mapping[Any, nn.Module]


class Condition(Expression):
    """Yes or no for each row or token, or a number from 0 to 1 where a gate is in it."""

    @abstractmethod
    def mask(self, vectors: Vectors, gates: Gates) -> Bool[Tensor, " n"] | Values:
        """The condition for read vectors, each `(n, width)`; `gates` are the built soft gates."""

    @property
    def gates(self) -> tuple[Gate, ...]:
        """The learnable gates inside, in the order in which they are written."""
        return tuple(gate for part in self._parts() if isinstance(part, Condition) for gate in part.gates)

    def __and__(self, other: Condition) -> Condition:
        return Combined("&", (self, _condition(other)))

    def __or__(self, other: Condition) -> Condition:
        return Combined("|", (self, _condition(other)))

    def __invert__(self) -> Condition:
        return Not(self)

    def __bool__(self) -> NoReturn:
        raise GraphError(
            f"the condition {self!r} has no truth value before the model runs; combine conditions with "
            "&, | and ~, each in brackets, in place of and, or, not and a < b < c"
        )


_COMPARE: dict[str, Callable[[Any, Any], Tensor]] = {
    ">": torch.gt, ">=": torch.ge, "<": torch.lt, "<=": torch.le,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Comparison(Condition):
    """A measure compared with a number or another measure."""

    left: Measure
    sign: str
    right: Measure | float

    def __post_init__(self) -> None:
        if self.sign not in _COMPARE:
            raise GraphError(f"comparison {self.sign!r}: expected one of {', '.join(_COMPARE)}")

    def mask(self, vectors: Vectors, gates: Gates) -> Bool[Tensor, " n"]:
        left = self.left.value(vectors)
        right = self.right.value(vectors) if isinstance(self.right, Measure) else left.new_tensor(self.right)
        return _COMPARE[self.sign](left, right.to(left.device))

    def with_reads(self, change: Callable[[Read], Read]) -> Comparison:
        right = self.right.with_reads(change) if isinstance(self.right, Measure) else self.right
        return Comparison(self.left.with_reads(change), self.sign, right)

    def _parts(self) -> tuple[Any, ...]:
        return (self.left, self.right) if isinstance(self.right, Measure) else (self.left,)

    def __repr__(self) -> str:
        right = repr(self.right) if isinstance(self.right, Measure) else f"{self.right:g}"
        return f"{self.left!r} {self.sign} {right}"


@dataclass(frozen=True, eq=False)
class Combined(Condition):
    """Several conditions, all of them (`&`) or any (`|`); of soft ones the product, and its dual."""

    sign: str
    terms: tuple[Condition, ...]

    def mask(self, vectors: Vectors, gates: Gates) -> Bool[Tensor, " n"] | Values:
        result, *rest = [term.mask(vectors, gates) for term in self.terms]
        for other in rest:
            if result.dtype == other.dtype == torch.bool:
                result = result & other if self.sign == "&" else result | other
            else:
                a, b = result.float(), other.float()
                result = a * b if self.sign == "&" else 1 - (1 - a) * (1 - b)
        return result

    def with_reads(self, change: Callable[[Read], Read]) -> Combined:
        return Combined(self.sign, tuple(term.with_reads(change) for term in self.terms))

    def _parts(self) -> tuple[Any, ...]:
        return self.terms

    def __repr__(self) -> str:
        return f" {self.sign} ".join(f"({term!r})" for term in self.terms)


@dataclass(frozen=True, eq=False)
class Not(Condition):
    """The contrary of a condition; of a soft one, what it lacks to 1."""

    term: Condition

    def mask(self, vectors: Vectors, gates: Gates) -> Bool[Tensor, " n"] | Values:
        mask = self.term.mask(vectors, gates)
        return ~mask if mask.dtype == torch.bool else 1 - mask

    def with_reads(self, change: Callable[[Read], Read]) -> Not:
        return Not(self.term.with_reads(change))

    def _parts(self) -> tuple[Any, ...]:
        return (self.term,)

    def __repr__(self) -> str:
        return f"~({self.term!r})"


@dataclass(frozen=True, eq=False)
class Gate(Condition):
    """A learned number from 0 to 1: `σ(w·h + b)`, trained together with the edit.

    Attributes:
        of: what the gate looks at.
        sparsity: weight of the gate's mean in the training loss, which draws it towards closed.
    """

    of: Read
    sparsity: float = 0.0

    def mask(self, vectors: Vectors, gates: Gates) -> Values:
        opened: Tensor = gates[self](vectors[self.of].float())
        return opened

    @property
    def gates(self) -> tuple[Gate, ...]:
        return (self,)

    def with_reads(self, change: Callable[[Read], Read]) -> Gate:
        return Gate(change(self.of), self.sparsity)

    def _parts(self) -> tuple[Any, ...]:
        return (self.of,)

    def __repr__(self) -> str:
        return f"gate({shortly(self.of)}" + (f", sparsity={self.sparsity:g})" if self.sparsity else ")")


def gate(of: str | Read, sparsity: float = 0.0) -> Gate:
    """A learnable soft gate on a read, `σ(w·h + b)`: the share of the edit that is applied.

    Args:
        of: what the gate looks at; without positions the edit's own tokens.
        sparsity: weight of the gate's mean in the training loss, 0 or more.

    Raises:
        GraphError: no site, or a sparsity that is no number from 0.

    >>> gate("blocks[4].output", sparsity=0.01)
    gate('blocks[4].output', sparsity=0.01)
    """
    try:
        return Gate(as_read(of), number(sparsity, "sparsity", 0.0))
    except ValueError as error:
        raise GraphError(f"gate: {error}") from error


def _condition(value: Any) -> Condition:
    if not isinstance(value, Condition):
        raise GraphError(
            f"& and | combine conditions, not {value!r}; put each comparison in brackets, (a > 1) & (b < 2)"
        )
    return value
