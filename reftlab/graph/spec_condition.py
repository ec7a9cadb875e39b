"""Conditions as plain data: mappings of one key that say what they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reftlab.errors import GraphError, did_you_mean
from reftlab.graph.condition import Combined, Comparison, Condition, Gate, Not, gate
from reftlab.graph.measure import Cosine, Measure, Norm, Probability, Projection, projection
from reftlab.graph.nodes import Read

__all__ = ["read_condition", "write_condition"]

WriteRead = Callable[[Read], Any]
WriteTensor = Callable[[Tensor, str], Any]
Reader = Callable[[Any], Any]

_COMBINED = {"&": "all", "|": "any"}
_SIGNS = {word: sign for sign, word in _COMBINED.items()}


def write_condition(condition: Condition, name: str, read: WriteRead, tensor: WriteTensor) -> dict[str, Any]:
    """Write a condition.

    Args:
        condition: what to write.
        name: what its tensors are called, followed by their place.
        read: writes a read.
        tensor: writes a tensor, given its name.
    """
    if isinstance(condition, Comparison):
        sides = [
            _write_measure(side, f"{name}.{what}", read, tensor) if isinstance(side, Measure) else side
            for what, side in (("left", condition.left), ("right", condition.right))
        ]
        return {"compare": [sides[0], condition.sign, sides[1]]}
    if isinstance(condition, Combined):
        terms = [write_condition(t, f"{name}.{n}", read, tensor) for n, t in enumerate(condition.terms)]
        return {_COMBINED[condition.sign]: terms}
    if isinstance(condition, Not):
        return {"not": write_condition(condition.term, f"{name}.not", read, tensor)}
    if isinstance(condition, Gate):
        return {"gate": {"of": read(condition.of), "sparsity": condition.sparsity}}
    raise GraphError(f"{condition!r}: a condition of your own, {type(condition).__name__}, cannot be written")


def read_condition(entry: Any, read: Reader, value: Reader) -> Condition:
    """Read what `write_condition` wrote; anything else raises `GraphError`."""
    kind, inner = _only(entry, ("compare", "all", "any", "not", "gate"))
    if kind == "compare":
        left, sign, right = _list(inner, "compare", 3)
        other = _read_measure(right, read, value) if isinstance(right, Mapping) else _number(right)
        return Comparison(_read_measure(left, read, value), sign, other)
    if kind in _SIGNS:
        terms = _list(inner, kind)
        return Combined(_SIGNS[kind], tuple(read_condition(term, read, value) for term in terms))
    if kind == "not":
        return Not(read_condition(inner, read, value))
    fields = _fields(inner, "gate", ("of", "sparsity"))
    return gate(read(fields["of"]), fields["sparsity"])


def _write_measure(measure: Measure, name: str, read: WriteRead, tensor: WriteTensor) -> dict[str, Any]:
    if isinstance(measure, Cosine):
        return {"cosine": [read(measure.a), read(measure.b)]}
    if isinstance(measure, Norm):
        return {"norm": read(measure.of)}
    if isinstance(measure, Projection):
        direction = tensor(measure.direction, f"{name}.direction")
        return {"projection": {"of": read(measure.of), "direction": direction}}
    if isinstance(measure, Probability):
        parts = {"weight": measure.weight, "bias": measure.bias}
        written = {key: tensor(part, f"{name}.{key}") for key, part in parts.items()}
        return {"probability": {"of": read(measure.of), **written, "index": measure.index}}
    raise GraphError(f"{measure!r}: a measure of your own, {type(measure).__name__}, cannot be written")


def _read_measure(entry: Any, read: Reader, value: Reader) -> Measure:
    kind, inner = _only(entry, ("cosine", "norm", "projection", "probability"))
    if kind == "cosine":
        a, b = _list(inner, "cosine", 2)
        return Cosine(read(a), read(b))
    if kind == "norm":
        return Norm(read(inner))
    if kind == "projection":
        fields = _fields(inner, kind, ("of", "direction"))
        return projection(read(fields["of"]), value(fields["direction"]))
    fields = _fields(inner, kind, ("of", "weight", "bias", "index"))
    weight, bias = (torch.as_tensor(value(fields[key]), dtype=torch.float32) for key in ("weight", "bias"))
    if weight.dim() != 2 or bias.shape != weight.shape[:1] or fields["index"] not in range(max(2, len(bias))):
        raise GraphError(
            f"probability: weight (classes, width), bias (classes,) and index do not fit: "
            f"{tuple(weight.shape)}, {tuple(bias.shape)}, {fields['index']!r}"
        )
    return Probability(read(fields["of"]), weight, bias, fields["index"])


def _only(entry: Any, kinds: tuple[str, ...]) -> tuple[str, Any]:
    if not isinstance(entry, Mapping) or len(entry) != 1 or next(iter(entry)) not in kinds:
        word = str(next(iter(entry), "")) if isinstance(entry, Mapping) else ""
        raise GraphError(
            f"expected a mapping with one of {', '.join(kinds)}, not {entry!r}.{did_you_mean(word, kinds)}"
        )
    return next(iter(entry.items()))


def _list(value: Any, what: str, length: int | None = None) -> Sequence[Any]:
    if not isinstance(value, list | tuple) or not value or (length is not None and len(value) != length):
        raise GraphError(f"{what}: expected a list{f' of {length}' if length else ''}, not {value!r}")
    return value


def _fields(value: Any, what: str, names: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or set(value) != set(names):
        raise GraphError(f"{what}: expected a mapping with {', '.join(names)}, not {value!r}")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise GraphError(f"compare: expected a number or a measure, not {value!r}")
    return float(value)
