"""Graphs as YAML and JSON: plain data in, nodes out, and an error for everything else."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, MutableMapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from reftlab.errors import GraphError, ReftlabError, did_you_mean
from reftlab.graph.edit import Edit, Node
from reftlab.graph.nodes import BASE, Read, Source
from reftlab.graph.spec_condition import read_condition, write_condition
from reftlab.interventions import Intervention, intervention_types

__all__ = ["FORMAT", "graph_to_dict", "nodes_from_dict"]

FORMAT = 1
"""Version of the written form; a reader refuses a newer one."""

Tensors = MutableMapping[str, Tensor]


def graph_to_dict(nodes: Sequence[Node], tensors: Tensors | None = None) -> dict[str, Any]:
    """Write nodes as plain data.

    Args:
        nodes: the graph's nodes.
        tensors: where to put tensors that are arguments of interventions, under the name that the
            data then refers to; without it their numbers are written out.

    Raises:
        GraphError: an intervention whose arguments are code.
    """
    return {"format": FORMAT, "nodes": [_write_node(node, tensors) for node in nodes]}


def nodes_from_dict(data: Any, tensors: Mapping[str, Tensor] | None = None) -> list[Node]:
    """Read what `graph_to_dict` wrote.

    Raises:
        GraphError: it is not a graph, or is of a newer format; the message names the node.
    """
    if not isinstance(data, Mapping) or "format" not in data or "nodes" not in data:
        raise GraphError("this is not an intervention graph: 'format' and 'nodes' are missing")
    if type(data["format"]) is not int or not 1 <= data["format"] <= FORMAT:
        raise GraphError(
            f"graph format {data['format']!r}: this reftlab reads formats 1 to {FORMAT}; "
            "a newer one needs a newer reftlab"
        )
    if not isinstance(data["nodes"], Sequence) or isinstance(data["nodes"], str):
        raise GraphError("'nodes' must be a list")
    return [_read_node(entry, number, tensors or {}) for number, entry in enumerate(data["nodes"])]


def _write_node(node: Node, tensors: Tensors | None) -> dict[str, Any]:
    if isinstance(node, Source):
        inputs = {} if node.inputs is None else {"inputs": node.inputs}
        return {"source": node.name} | inputs | ({"grad": True} if node.grad else {})
    if isinstance(node, Read):
        return {"read": _write_read(node)}
    written: dict[str, Any] = {"edit": node.name, "at": str(node.at), "positions": str(node.positions)}
    written["intervention"] = _write_intervention(node.intervention, node.name, tensors)
    if node.source is not None:
        written["source"] = _write_read(node.source)
    if node.when is not None:
        written["when"] = write_condition(
            node.when, f"{node.name}.when", _write_read, partial(_write_tensor, tensors=tensors)
        )
    optional = {
        "run": (node.run, BASE),
        "phase": (node.phase, "prompt"),
        "strength": (node.strength, 1.0),
        "tasks": (node.written_tasks, None),
        "subspace": (None if node.subspace is None else list(node.subspace), None),
        "share": (node.share, None),
    }
    written.update({key: value for key, (value, default) in optional.items() if value != default})
    return written | _write_view(node)


def _write_read(read: Read) -> dict[str, Any]:
    written: dict[str, Any] = {}
    if read.at is not None:
        written["at"] = str(read.at)
    if read.positions is not None:
        written["positions"] = str(read.positions)
    if read.run != BASE:
        written["run"] = read.run
    if read.name is not None:
        written["name"] = read.name
    return written | _write_view(read)


def _write_view(node: Read | Edit) -> dict[str, Any]:
    if node.heads is not None:
        return {"heads": list(node.heads)}
    if isinstance(node.features, slice):
        return {"features": {"slice": [node.features.start, node.features.stop, node.features.step]}}
    return {} if node.features is None else {"features": list(node.features)}


def _write_intervention(intervention: Intervention, who: str, tensors: Tensors | None) -> dict[str, Any]:
    defaults = inspect.signature(type(intervention).__init__).parameters
    written: dict[str, Any] = {"type": type(intervention).__name__}
    for key, value in intervention.config.items():
        if isinstance(value, Tensor):
            written[key] = _write_tensor(value, f"{who}.{key}", tensors)
        elif isinstance(value, Intervention):
            written[key] = {"intervention": _write_intervention(value, f"{who}.{key}", tensors)}
        elif callable(value):
            raise GraphError(
                f"edit {who!r}: {intervention.describe()} holds code, which is never written to "
                "a file; write an Intervention subclass instead, whose arguments are numbers and texts"
            )
        elif value != defaults[key].default:
            written[key] = _plain(value, f"edit {who!r}: {key} of {intervention.describe()}")
    return written


def _plain(value: Any, what: str) -> Any:
    """The value, if reading it again gives an equal one."""
    try:
        if yaml.safe_load(yaml.safe_dump(value, allow_unicode=True)) == value:
            return value
    except yaml.YAMLError:
        pass
    raise GraphError(
        f"{what} is {value!r}, which cannot be written down; use numbers, texts, lists and tensors"
    )


def _write_tensor(value: Tensor, name: str, tensors: Tensors | None) -> Any:
    if tensors is None:
        return value.tolist()
    tensors[name] = value.detach().cpu().contiguous()
    return {"tensor": name}


def _read_node(entry: Any, number: int, tensors: Mapping[str, Tensor]) -> Node:
    kinds = [key for key in ("edit", "read", "source") if isinstance(entry, Mapping) and key in entry]
    if not kinds:
        raise GraphError(f"node {number}: expected 'edit', 'read' or 'source', found {entry!r}")
    kind = kinds[0]
    try:
        if kind == "source":
            return Source(**_arguments(entry, {"source": "name", "inputs": "inputs", "grad": "grad"}))
        if kind == "read":
            return _read_read(entry["read"])
        values = dict(entry)
        values["intervention"] = _read_intervention(values.get("intervention"), tensors)
        if "source" in values:
            values["source"] = _read_read(values["source"])
        if "when" in values:
            values["when"] = read_condition(values["when"], _read_read, partial(_read_value, tensors=tensors))
        _unslice(values)
        allowed = {"edit": "name", **{key: key for key in Edit.__dataclass_fields__ if key != "name"}}
        return Edit(**_arguments(values, allowed))
    except (ReftlabError, TypeError, ValueError, OverflowError) as error:
        raise GraphError(f"node {number} ({kind} {entry[kind]!r}): {error}") from error


def _read_read(entry: Any) -> Read:
    if not isinstance(entry, Mapping):
        raise GraphError(f"a read is written as a mapping with 'at' and 'positions', not {entry!r}")
    values = dict(entry)
    _unslice(values)
    keys = ("at", "positions", "run", "name", "heads", "features")
    return Read(**_arguments(values, {key: key for key in keys}))


def _read_intervention(entry: Any, tensors: Mapping[str, Tensor]) -> Intervention:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("type"), str):
        raise GraphError(f"an intervention is written as {{type: LoReFT, rank: 4}}, not {entry!r}")
    types = intervention_types()
    name = entry["type"]
    if name not in types:
        raise GraphError(
            f"intervention type {name!r} is not known; if it is your own, import the module that "
            "defines it first (for one of pyvene's programs, reftlab.compat.pyvene)."
            + did_you_mean(name, types)
        )
    values = {key: _read_value(value, tensors) for key, value in entry.items() if key != "type"}
    return types[name](**values)


def _read_value(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, Mapping) and set(value) == {"intervention"}:
        return _read_intervention(value["intervention"], tensors)
    if isinstance(value, Mapping) and set(value) == {"tensor"}:
        if value["tensor"] not in tensors:
            raise GraphError(f"the tensor {value['tensor']!r} is not among those stored beside the graph")
        return tensors[value["tensor"]]
    return value


def _unslice(values: dict[str, Any]) -> None:
    features = values.get("features")
    if isinstance(features, Mapping):
        bounds = features.get("slice")
        if not isinstance(bounds, Sequence) or len(bounds) != 3:
            raise GraphError(f"features: expected {{slice: [start, stop, step]}}, not {features!r}")
        values["features"] = slice(*bounds)


def _arguments(values: Mapping[str, Any], allowed: Mapping[str, str]) -> dict[str, Any]:
    for key in values:
        if key not in allowed:
            raise GraphError(f"unknown key {key!r}.{did_you_mean(str(key), allowed)}")
    return {allowed[key]: value for key, value in values.items()}


class _Dumper(yaml.SafeDumper):
    """Short lists in one line; floats with all their digits."""


def _represent_list(dumper: yaml.SafeDumper, data: list[Any]) -> yaml.Node:
    scalars = all(isinstance(item, int | float | type(None)) for item in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=scalars)


_Dumper.add_representer(list, _represent_list)


def to_yaml(data: Mapping[str, Any]) -> str:
    """Write what `graph_to_dict` made as YAML, lists of numbers on one line."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def to_json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.append(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str | Path) -> Any:
    """Read YAML that says nothing twice; anything else raises `GraphError`."""
    try:
        return yaml.load(_text(text), Loader=_Loader)
    # PyYAML lets its constructors' own errors through: a date that does not exist is a ValueError,
    # `!!bool x` a KeyError, `!!timestamp x` an AttributeError, deep brackets a RecursionError.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise GraphError(f"this is not YAML: {error}") from error


def parse_json(text: str | Path) -> Any:
    """Read JSON; anything else raises `GraphError`."""
    try:
        return json.loads(_text(text))
    except (ValueError, RecursionError) as error:
        raise GraphError(f"this is not JSON: {error}") from error


def write(text: str, path: str | Path | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def _text(text: str | Path) -> str:
    return text.read_text(encoding="utf-8") if isinstance(text, Path) else text
