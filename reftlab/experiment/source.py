"""Where an experiment's examples come from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from reftlab.errors import did_you_mean
from reftlab.experiment.strict import Strict
from reftlab.training.columns import Rows
from reftlab.training.data import Example
from reftlab.training.files import is_data_file, load_rows
from reftlab.training.hub import held_out_split, is_dataset

__all__ = ["DataSource"]


class DataSource(Strict):
    """Examples in a file, in a dataset or in a list; see `reftlab.read_examples`.

    Attributes:
        path: a file, or the folder of a dataset, relative to the configuration's folder.
        dataset: the name of a Hugging Face dataset, a `datasets.Dataset`, a pandas frame, or a list of
            rows, in the place of `path`.
        subset, split: of a dataset; the split `train`, or the only one, unless given.
        prompt, answer, task: names of the columns; those with usual names unless given.
        limit: how many examples to read, all unless given.
    """

    path: Path | None = None
    dataset: Any = None
    subset: str | None = None
    split: str | None = None
    prompt: str | None = None
    answer: str | None = None
    task: str | None = None
    limit: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, value: Any) -> Any:
        for name in value:
            if name not in cls.model_fields:
                fields = list(cls.model_fields)
                raise ValueError(f"data has {', '.join(fields)}.{did_you_mean(name, fields)}")
        if (value.get("path") is None) == (value.get("dataset") is None):
            raise ValueError("data has either a path, of a file or folder, or a dataset, by name or loaded")
        return value

    @classmethod
    def fields_of(cls, value: Any, folder: Path) -> dict[str, Any]:
        """The fields of what a user gave as data.

        Args:
            value: fields already, a file, a folder, a dataset or its name, a frame, or a list of examples.
            folder: from which a path counts; a string is one if there is such a file or folder, or if it
                ends as a file does, and a name else.

        Raises:
            ValueError: it is none of these.
        """
        if isinstance(value, DataSource):
            return {name: getattr(value, name) for name in value.model_fields_set}
        if isinstance(value, Mapping) and not is_dataset(value):
            return dict(value)
        if isinstance(value, str | Path):
            where = Path(value).expanduser()
            is_path = isinstance(value, Path) or is_data_file(where) or (folder / where).exists()
            return {"path": where} if is_path else {"dataset": value}
        if isinstance(value, list | tuple) or is_dataset(value) or hasattr(value, "columns"):
            return {"dataset": value}
        raise ValueError(
            "expected a list of examples, a file such as examples.jsonl, or a dataset or its name"
        )

    def rows(self, folder: Path, split: str | None = None) -> Rows:
        """Read the examples.

        Args:
            folder: from which a path counts.
            split: another split than this source names.

        Raises:
            DataError: they cannot be read.
        """
        return load_rows(
            self._where(folder),
            prompt=self.prompt,
            answer=self.answer,
            task=self.task,
            limit=self.limit,
            subset=self.subset,
            split=split or self.split,
        )

    def held_out(self, folder: Path) -> str | None:
        """The split that is kept for evaluation, where this source is a dataset and names no split."""
        where = self._where(folder)
        whole = isinstance(where, str) or is_dataset(where) or (isinstance(where, Path) and where.is_dir())
        return held_out_split(where, self.subset) if whole and self.split is None else None

    def noted(self, folder: Path, home: Path) -> Any:
        """What an artifact in `home` notes of this source, so that its examples can be found again."""
        if not isinstance(self.dataset, str | None):
            return pairs(self.rows(folder).examples)
        fields = self.model_dump(mode="json")
        noted = {k: v for k, v in fields.items() if v is not None or k in ("prompt", "answer", "limit")}
        if self.path is not None:
            # From the artifact's folder, so that the two can move together.
            noted["path"] = os.path.relpath(folder / self.path, home)
        return noted

    def __repr_args__(self) -> Any:
        for name, value in super().__repr_args__():
            if value is not None:
                short = name != "dataset" or isinstance(value, str)
                many = f" of {len(value)}" if hasattr(value, "__len__") else ""
                yield name, value if short else f"a {type(value).__name__}{many}"

    def _where(self, folder: Path) -> Any:
        return folder / self.path if self.path is not None else self.dataset


def pairs(examples: list[Example]) -> list[Any]:
    """Examples as an artifact holds them: pairs, or mappings where they say more."""
    if any(example != Example(example.prompt, example.answer) for example in examples):
        return [{k: v for k, v in asdict(example).items() if v is not None} for example in examples]
    return [[example.prompt, example.answer] for example in examples]
