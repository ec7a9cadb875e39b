"""Model, data and hyperparameters in one configuration: fine_tune(), evaluate()."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, PrivateAttr, ValidationError, field_validator

from reftlab.errors import ConfigError, DataError, GraphError, did_you_mean
from reftlab.experiment.form import full_form
from reftlab.experiment.source import DataSource
from reftlab.experiment.strict import Strict, first_reason
from reftlab.graph import InterventionGraph
from reftlab.graph.spec import parse_yaml
from reftlab.models import EMBEDDED, load_model
from reftlab.runtime import BoundModel, load
from reftlab.store import check_destination
from reftlab.training import Evaluation, Example, TrainResult, evaluate, train
from reftlab.training.columns import ANSWER_NAMES, Rows

__all__ = ["Experiment"]


class Experiment(Strict):
    """Model, graph, data and settings of one training, from arguments or from a YAML file.

        experiment = rl.Experiment(
            model_name="smollm2-135m-instruct", dataset_name="examples.jsonl",
            learning_rate=4e-3, epochs=3, batch_size=16,
        )
        reft, result = experiment.fine_tune()
        experiment.evaluate()

    Those names are short for the fields below, which a file may use as well; `Experiment.from_yaml`
    reads either form:

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

    | short | stands for |
    |---|---|
    | `model_name` | `model` |
    | `dataset_name` | `data`: a Hugging Face dataset's name, a file, a folder, a `datasets.Dataset` |
    | `dataset_subset`, `dataset_split`, `limit` | `data.subset`, `data.split`, `data.limit` |
    | `prompt_column`, `answer_column`, `task_column` | `data.prompt`, `data.answer`, `data.task` |
    | `learning_rate`, `epochs`, `batch_size`, `system` and so on | the same in `training` |

    Saying a thing twice, short and in full, is an error.

    Attributes:
        model: what `load_model` takes.
        dtype: of the model's weights.
        device: where the model goes.
        graph: a graph, as `to_dict` writes it, or the path of its YAML file; LoReFT of rank 4 at every
            block's output on the prompt's last token unless given.
        data: examples to train on: a list of them, or anything that `read_examples` takes, perhaps with
            more to say, `{path: examples.csv, prompt: question, limit: 100}`; see `DataSource`.
        evaluation: examples to evaluate on during training and by `evaluate`, likewise.
        training: arguments of `train`.
        seed: of the interventions' first values, and of the training unless it has its own.
        save: folder of the artifact; nothing is saved without it.
        folder: the configuration's folder, from which paths count.

    Raises:
        ConfigError: a field is missing, unknown, said twice or unusable; the message names it.
    """

    model: str = EMBEDDED
    dtype: str = "float32"
    device: str | None = None
    graph: InterventionGraph
    data: DataSource
    evaluation: DataSource | None = None
    training: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0
    save: Path | None = None
    folder: Path = Path()

    _reft: BoundModel | None = PrivateAttr(default=None)

    def __init__(self, **content: Any) -> None:
        folder = content.get("folder", ".")
        if not isinstance(folder, str | Path):
            raise ConfigError(f"folder={folder!r}: expected the path of a folder")
        try:
            super().__init__(**full_form(content, type(self).model_fields, Path(folder)))
        except ValidationError as error:
            raise ConfigError(first_reason(error)) from error

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
            ConfigError: a field is missing, unknown, said twice or unusable; the message names it.
        """
        if "folder" in data:
            raise ConfigError(
                f"folder={data['folder']!r} is no field of a configuration; paths count from its own folder"
            )
        return cls(**{str(name): value for name, value in data.items()}, folder=Path(folder))

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
        model, tokenizer = self._load_model()
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return self.graph.bind(model, tokenizer)

    def fine_tune(self, *, progress: bool = True, **overrides: Any) -> tuple[BoundModel, TrainResult]:
        """Bind, train and, where `save` names a folder, save.

        Args:
            progress: whether to show a progress bar.
            **overrides: arguments of `train` that take the place of those in `training`.

        Returns:
            The trained model, which `evaluate` takes from here on, and how the training went.

        Raises:
            DataError: the data cannot be read, or has no answers.
        """
        if self.save is not None:
            check_destination(self.folder / self.save)
        read = _answered(self.data.rows(self.folder), "data")
        settings = {"seed": self.seed, **self.training, **overrides}
        if settings.get("folder") is not None:
            settings["folder"] = self.folder / settings["folder"]
        if self.evaluation is not None:
            held_out = _answered(self.evaluation.rows(self.folder), "evaluation")
            if held_out.system != read.system:
                raise DataError(
                    f"evaluation: its conversations have the system message {held_out.system!r}, and those "
                    f"of the data {read.system!r}; they must be the same"
                )
            settings["evaluation"] = held_out.examples
        if read.system is not None:
            if settings.get("system") is not None:
                raise ConfigError(
                    f"system={settings['system']!r}, and the data's conversations have the system message "
                    f"{read.system!r}; leave one of them out"
                )
            settings["system"] = read.system
        bound = self.bind()
        result = train(bound, read.examples, progress=progress, **settings)
        bound.facts["examples"] = self.data.noted(self.folder, self.folder / (self.save or ""))
        self._reft = bound
        if self.save is not None:
            bound.save(self.folder / self.save)
        return bound, result

    def evaluate(self, reft: BoundModel | None = None, **options: Any) -> Evaluation:
        """Ask every question of `evaluation`; without it those of the data's held-out split.

        A Hugging Face dataset whose split is not named is trained on by its split `train` and evaluated
        by `validation` or `test`, if it has one. Everything else is evaluated by the training's examples.

        Args:
            reft: what to evaluate; what `fine_tune` made, or the saved artifact, unless given.
            **options: arguments of `evaluate`.

        Raises:
            ConfigError: there is nothing to evaluate.
        """
        reft = self._trained() if reft is None else reft
        if "batch_size" in self.training:
            options.setdefault("batch_size", self.training["batch_size"])
        if self.evaluation is not None:
            rows = self.evaluation.rows(self.folder)
        else:
            rows = self.data.rows(self.folder, self.data.held_out(self.folder))
        trained = options.get("system") or reft.facts.get("training", {}).get("system")
        if rows.system is not None and rows.system != trained:
            raise DataError(
                f"evaluation: its conversations have the system message {rows.system!r}, and the training "
                f"had {trained!r}; they must be the same"
            )
        return evaluate(reft, rows.examples, **options)

    def examples(self) -> list[Example]:
        """Read the training examples."""
        return self.data.rows(self.folder).examples

    def __repr__(self) -> str:
        edits = ", ".join(edit.name for edit in self.graph.edits)
        settings = ", ".join(f"{name}={value!r}" for name, value in self.training.items())
        return (
            f"Experiment({self.model!r}, edits {edits or 'none'}, {self.data!r}, {settings or 'no settings'})"
        )

    def __str__(self) -> str:
        return repr(self)

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>" + self.graph._repr_html_()

    def _load_model(self) -> tuple[Any, Any]:
        return load_model(self.model, dtype=getattr(torch, self.dtype), device=self.device)

    def _trained(self) -> BoundModel:
        if self._reft is not None:
            return self._reft
        if self.save is None:
            raise ConfigError(
                "there is nothing to evaluate: call fine_tune() first, give evaluate(reft), or name with "
                "save= the folder of an artifact"
            )
        model, tokenizer = self._load_model()
        self._reft = load(self.folder / self.save, model, tokenizer)
        return self._reft


def _answered(rows: Rows, name: str) -> Rows:
    """Refuse a table without a column of answers, with the names that it has."""
    if rows.columns is not None and rows.columns.answer is None and rows.columns.messages is None:
        raise DataError(
            f"{name}: there is no column with a usual name of an answer "
            f"({', '.join(ANSWER_NAMES)}); there is {', '.join(map(repr, rows.names))}; say which it is, "
            "answer_column='…'"
        )
    return rows
