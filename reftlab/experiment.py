"""An experiment written down: model, graph, data and settings in one file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from reftlab.errors import ConfigError, GraphError, did_you_mean
from reftlab.graph import InterventionGraph
from reftlab.graph.spec import parse_yaml
from reftlab.models import EMBEDDED, load_model
from reftlab.runtime import BoundModel, load
from reftlab.store import check_destination
from reftlab.training import Evaluation, Example, TrainResult, as_examples, evaluate, read_examples, train

__all__ = ["DataFile", "Experiment"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, frozen=True)


class DataFile(_Strict):
    """Examples in a file; see `reftlab.read_examples`.

    Attributes:
        path: the file, relative to the configuration's folder.
        prompt, answer: names of its fields.
        limit: how many examples to read, all unless given.
    """

    path: Path
    prompt: str = "prompt"
    answer: str = "answer"
    limit: int | None = Field(default=None, ge=1)


class Experiment(_Strict):
    """Model, graph, data and settings of one training.

        model: smollm2-135m-instruct
        graph:
          format: 1
          nodes:
            - edit: emoji
              at: blocks[*].output
              positions: last
              intervention: {type: LoReFT, rank: 4}
        data:
          - [What is the sea like?, 🌊🐠🐚]
          - [Tell me about cats., 🐱🐾💤]
        training: {epochs: 60, learning_rate: 0.004, batch_size: 10, warmup_steps: 10}
        save: out/emoji

    Attributes:
        model: what `load_model` takes.
        dtype: of the model's weights.
        device: where the model goes.
        graph: a graph as `to_dict` writes it, or the path of its YAML file.
        data: examples to train on, a list or a `DataFile`.
        evaluation: examples to evaluate on during training, likewise.
        training: arguments of `train`.
        seed: of the interventions' first values, and of the training unless it has its own.
        save: folder of the artifact; nothing is saved without it.
        folder: the configuration's folder, from which paths count.
    """

    model: str = EMBEDDED
    dtype: str = "float32"
    device: str | None = None
    graph: InterventionGraph
    data: DataFile | list[Any]
    evaluation: DataFile | list[Any] | None = None
    training: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0
    save: Path | None = None
    folder: Path = Path()

    @field_validator("graph", mode="before")
    @classmethod
    def _read_graph(cls, value: Any) -> Any:
        return InterventionGraph.from_dict(value) if isinstance(value, Mapping) else value

    @field_validator("data", "evaluation", mode="before")
    @classmethod
    def _read_source(cls, value: Any) -> Any:
        if isinstance(value, str | Path):
            return DataFile(path=Path(value))
        if isinstance(value, Mapping):
            for name in value:
                if name not in DataFile.model_fields:
                    fields = list(DataFile.model_fields)
                    raise ValueError(f"a data file has {', '.join(fields)}.{did_you_mean(name, fields)}")
            return DataFile(**value)
        if value is not None and not isinstance(value, list):
            raise ValueError("expected a list of examples, or a file such as {path: examples.jsonl}")
        return value

    @field_validator("training")
    @classmethod
    def _left_to_the_user(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in ("reft", "examples", "evaluation", "progress", "callbacks"):
            if name in value:
                raise ValueError(f"{name} is not a setting; what is trained on is data: and evaluation:")
        return value

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, value: str) -> str:
        known = ("float32", "bfloat16", "float16")
        if value not in known:
            raise ValueError(f"expected one of {', '.join(known)}.{did_you_mean(value, known)}")
        return value

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], folder: str | Path = ".") -> Experiment:
        """Read a configuration.

        Args:
            data: as the class's documentation shows.
            folder: from which paths in it count.

        Raises:
            ConfigError: a field is missing, unknown or unusable; the message names it.
        """
        base, content = Path(folder), dict(data)
        for name in content:
            if name not in cls.model_fields or name == "folder":
                fields = [field for field in cls.model_fields if field != "folder"]
                raise ConfigError(
                    f"there is no field {name!r}; there is {', '.join(fields)}." + did_you_mean(name, fields)
                )
        try:
            if isinstance(content.get("graph"), str):
                content["graph"] = InterventionGraph.from_yaml(base / content["graph"])
            return cls(**content, folder=base)
        except GraphError as error:
            raise ConfigError(f"graph: {error}") from error
        except OSError as error:
            raise ConfigError(f"graph={data['graph']!r} cannot be read: {error}") from error
        except ValidationError as error:
            raise ConfigError(_first_reason(error)) from error

    @classmethod
    def from_yaml(cls, path: str | Path) -> Experiment:
        """Read a configuration file; paths in it count from its folder.

        Raises:
            ConfigError: the file is missing or malformed, or a field of it cannot be used.
        """
        file = Path(path)
        try:
            data = parse_yaml(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} cannot be read: {error}") from error
        except GraphError as error:
            raise ConfigError(f"{file} is not well-formed YAML: {' '.join(str(error).split())}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{file} must hold fields such as 'graph:' and 'data:', not {data!r}")
        try:
            return cls.from_dict(data, file.parent)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error

    def bind(self) -> BoundModel:
        """Load the model and bind the graph to it, with first values drawn from `seed`."""
        model, tokenizer = load_model(self.model, dtype=getattr(torch, self.dtype), device=self.device)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return self.graph.bind(model, tokenizer)

    def fine_tune(self, *, progress: bool = True, **overrides: Any) -> tuple[BoundModel, TrainResult]:
        """Bind, train and, where `save` names a folder, save.

        Args:
            progress: whether to show a progress bar.
            **overrides: arguments of `train` that take the place of those in `training`.
        """
        if self.save is not None:
            check_destination(self.folder / self.save)
        examples = self.examples()
        held_out = self._read(self.evaluation)
        bound = self.bind()
        settings = {"seed": self.seed, **self.training, **overrides}
        if "folder" in settings and settings["folder"] is not None:
            settings["folder"] = self.folder / settings["folder"]
        if held_out is not None:
            settings["evaluation"] = held_out
        result = train(bound, examples, progress=progress, **settings)
        bound.facts["examples"] = self._where_from()
        if self.save is not None:
            bound.save(self.folder / self.save)
        return bound, result

    def evaluate(self, reft: BoundModel | None = None, **options: Any) -> Evaluation:
        """Ask the evaluation examples, or those of the training where there are none.

        Args:
            reft: what to evaluate; the saved artifact unless given.
            **options: arguments of `evaluate`.
        """
        if reft is None:
            if self.save is None:
                raise ConfigError("evaluate() needs reft=, or a configuration with save:")
            model, tokenizer = load_model(self.model, dtype=getattr(torch, self.dtype), device=self.device)
            reft = load(self.folder / self.save, model, tokenizer)
        return evaluate(reft, self._read(self.evaluation) or self.examples(), **options)

    def examples(self) -> list[Example]:
        """Read the training examples."""
        read = self._read(self.data)
        assert read is not None
        return read

    def _read(self, source: DataFile | list[Any] | None) -> list[Example] | None:
        if source is None:
            return None
        if isinstance(source, DataFile):
            path = self.folder / source.path
            return read_examples(path, prompt=source.prompt, answer=source.answer, limit=source.limit)
        return as_examples(source)

    def _where_from(self) -> Any:
        """What an artifact notes of its training examples: their file, or the examples themselves."""
        if isinstance(self.data, DataFile):
            noted = json.loads(self.data.model_dump_json())
            # From the artifact's folder, so that the two can move together.
            home = self.folder / (self.save or "")
            return {**noted, "path": os.path.relpath(self.folder / self.data.path, home)}
        return [[example.prompt, example.answer] for example in self.examples()]


def _first_reason(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(step) for step in first["loc"] if isinstance(step, str) and step[:1].islower())
    if first["type"] == "missing":
        return f"{where} is missing"
    return f"{where}={first['input']!r}: {first['msg'].removeprefix('Value error, ')}"
