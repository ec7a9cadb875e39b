"""The short form of a configuration, and how it becomes the full one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from reftlab.errors import ConfigError, GraphError, did_you_mean
from reftlab.experiment.source import DataSource
from reftlab.graph import Edit, InterventionGraph
from reftlab.interventions import LoReFT
from reftlab.training import train

__all__ = ["TRAINING_NAMES", "default_graph", "full_form"]

_ELSEWHERE = (
    "reft",
    "examples",
    "evaluation",
    "seed",
    "folder",
    "resume",
    "progress",
    "callbacks",
    "options",
)
"""Arguments of `train` that a configuration says elsewhere, or that belong to one call."""

TRAINING_NAMES = tuple(name for name in inspect.signature(train).parameters if name not in _ELSEWHERE)
"""Arguments of `train` that may stand at the top of a configuration, outside `training:`."""

_SAME = {"model_name": "model", "dataset_name": "data"}
_OF_DATA = {
    "dataset_subset": "subset",
    "dataset_split": "split",
    "prompt_column": "prompt",
    "answer_column": "answer",
    "task_column": "task",
    "limit": "limit",
}
_SHORT = (*_SAME, *_OF_DATA, *TRAINING_NAMES)

_BARE_EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")


def full_form(content: Mapping[str, Any], fields: Iterable[str], folder: Path) -> dict[str, Any]:
    """Turn short names into the fields that they stand for.

    Args:
        content: a configuration, in the short form, the full form or some of each.
        fields: names of the full form.
        folder: from which paths count.

    Raises:
        ConfigError: an unknown name, a thing said twice, or a graph that cannot be read.
    """
    fields = list(fields)
    for name in content:
        if name not in fields and name not in _SHORT:
            known = [*fields, *_SHORT]
            raise ConfigError(
                f"there is no field {name!r}; there is {', '.join(known)}; what else "
                f"transformers.TrainingArguments takes goes into training.{did_you_mean(name, known)}"
            )
    full = {name: value for name, value in content.items() if name not in _SHORT}
    for short, name in _SAME.items():
        if short in content:
            _put(full, name, content[short], short, name)
    for name in ("data", "evaluation"):
        if full.get(name) is not None:
            full[name] = _source(name, full[name], folder)
    for short, name in _OF_DATA.items():
        if content.get(short) is not None:
            if not isinstance(full.get("data"), dict):
                raise ConfigError(
                    f"{short}={content[short]!r} says something of the data, and data is missing"
                )
            _put(full["data"], name, content[short], short, f"data.{name}")
    flat = {name: content[name] for name in TRAINING_NAMES if name in content}
    training = full.get("training", {})
    if isinstance(training, Mapping):
        merged = dict(training)
        for name, value in flat.items():
            _put(merged, name, value, name, f"training.{name}")
        full["training"] = {name: _number(value) for name, value in merged.items()}
    full["graph"] = _graph(full.get("graph"), folder)
    return full


def default_graph() -> InterventionGraph:
    """What is trained where no graph is given: LoReFT of rank 4 at every block's output, on the last token.

    As in `reftlab demo`. It needs no more of a prompt than one token, unlike the ReFT paper's first and
    last seven.
    """
    return InterventionGraph(
        Edit("loreft", at="blocks[*].output", positions="last", intervention=LoReFT(rank=4))
    )


def _put(full: dict[str, Any], name: str, value: Any, short: str, long: str) -> None:
    if full.get(name) is not None:
        raise ConfigError(
            f"{short}={value!r} and {long}={full[name]!r} say the same thing; leave one of them out"
        )
    full[name] = value


def _source(name: str, value: Any, folder: Path) -> dict[str, Any]:
    try:
        return DataSource.fields_of(value, folder)
    except ValueError as error:
        raise ConfigError(f"{name}={value!r}: {error}") from error


def _graph(value: Any, folder: Path) -> Any:
    """A graph from what a configuration says of it."""
    try:
        if value is None:
            return default_graph()
        if isinstance(value, str | Path):
            return InterventionGraph.from_yaml(folder / value)
        return InterventionGraph.from_dict(value) if isinstance(value, Mapping) else value
    except GraphError as error:
        raise ConfigError(f"graph: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"graph={str(value)!r} cannot be read: {error}") from error


def _number(value: Any) -> Any:
    """A setting, and 3e-5 as the number that its writer meant: YAML 1.1 wants a point, 3.0e-5."""
    return float(value) if isinstance(value, str) and _BARE_EXPONENT.fullmatch(value) else value
