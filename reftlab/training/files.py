"""Examples from files: JSON, JSON lines, CSV, parquet and YAML; and from whatever else holds rows."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from reftlab.errors import DataError
from reftlab.training.columns import Rows, read_rows
from reftlab.training.data import Example, table_rows
from reftlab.training.hub import dataset_rows, is_dataset

__all__ = ["is_data_file", "load_rows", "read_examples"]

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def read_examples(
    source: Any,
    *,
    prompt: str | None = None,
    answer: str | None = None,
    task: str | None = None,
    limit: int | None = None,
    subset: str | None = None,
    split: str | None = None,
) -> list[Example]:
    """Read (prompt, answer) pairs from a file, a dataset or a list.

    Args:
        source: a file, `.json` or `.yaml` with a list, `.jsonl` with one entry a line, `.csv` with a
            header, or `.parquet`; a folder that `datasets` wrote or can read; the name of a Hugging Face
            dataset; a `datasets.Dataset`; or a list. An entry is a mapping or a [prompt, answer] pair.
        prompt, answer: the names of the columns, looked for among the usual names unless given, see
            `reftlab.training.columns`; entries without an answer are prompts alone.
        task: the name of the column of tasks, see `Example.task`.
        limit: read so many of them at most.
        subset, split: of a Hugging Face dataset; the split `train`, or the only one, unless given.

    Raises:
        DataError: the source is missing, of another kind or malformed, or an entry lacks its prompt.

    >>> read_examples([{"question": "What is the sea like?", "answer": "🌊🐠🐚"}])
    [Example(prompt='What is the sea like?', answer='🌊🐠🐚')]
    """
    columns = {"prompt": prompt, "answer": answer, "task": task}
    return load_rows(source, **columns, limit=limit, subset=subset, split=split).examples


def load_rows(
    source: Any,
    *,
    prompt: str | None = None,
    answer: str | None = None,
    task: str | None = None,
    limit: int | None = None,
    subset: str | None = None,
    split: str | None = None,
) -> Rows:
    """Read examples as `read_examples` does, and say from which columns.

    Raises:
        DataError: as `read_examples`.
    """
    if limit is not None and (type(limit) is not int or limit < 1):
        raise DataError(f"limit={limit!r}: expected a whole number of 1 or more, or None for all")
    named = str(source) if isinstance(source, str | Path) else f"a {type(source).__name__}"
    is_set = _is_dataset(source)
    for name, value in (("subset", subset), ("split", split)):
        if value is not None and not is_set:
            raise DataError(f"{name}={value!r}: only a Hugging Face dataset has one, and {named} is none")
    if is_set:
        entries = dataset_rows(source, subset, split)
    elif isinstance(source, str | Path):
        entries = _file_entries(Path(source).expanduser())
    elif isinstance(source, Iterable) and not isinstance(source, Mapping):
        entries = table_rows(source)
    else:
        raise DataError(
            f"examples must be a list, a file, or a dataset or its name, not {type(source).__name__}"
        )
    try:
        return read_rows(entries, prompt=prompt, answer=answer, task=task, limit=limit)
    except DataError as error:
        raise DataError(f"{named}: {error}") from error


def is_data_file(name: str | Path) -> bool:
    """Whether a name ends as the files do that `read_examples` reads."""
    return Path(name).suffix in _READERS


def _is_dataset(source: Any) -> bool:
    if isinstance(source, str | Path):
        return not is_data_file(source) and (Path(source).expanduser().is_dir() or not _is_path(source))
    return is_dataset(source)


def _is_path(name: str | Path) -> bool:
    """Whether a name is that of a file: it says so, it is one, or no dataset could be called so."""
    return isinstance(name, Path) or Path(name).expanduser().is_file() or not _HUB_NAME.fullmatch(name)


def _file_entries(file: Path) -> list[Any]:
    if file.suffix not in _READERS:
        raise DataError(f"examples={str(file)!r}: expected a file that ends in {', '.join(_READERS)}")
    try:
        entries = _READERS[file.suffix](file)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"examples={str(file)!r} cannot be read: {error}") from error
    except (ValueError, RecursionError, yaml.YAMLError, csv.Error) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file} is not well-formed {file.suffix[1:]}: {reason}") from error
    if not isinstance(entries, list):
        raise DataError(f"{file} must hold a list of examples, not {type(entries).__name__}")
    return entries


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8-sig")  # spreadsheets put a mark before the first column's name


def _json(file: Path) -> Any:
    text = _text(file)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return _each_line(text)  # JSON lines are often called .json
        raise


def _each_line(text: str) -> list[Any]:
    entries = []
    # Not splitlines(), for which characters that may stand in a JSON text end a line.
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            if line.strip():
                entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: {error}") from error
    return entries


def _table(file: Path) -> list[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(_text(file), newline=""), strict=True)
    rows = []
    for row in reader:
        if None in row or None in row.values():
            raise csv.Error(
                f"line {reader.line_num} has {'more' if None in row else 'fewer'} fields than the header"
            )
        rows.append(row)
    return rows


def _parquet(file: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise DataError(f"{file}: reading parquet needs the package pyarrow: pip install pyarrow") from error
    with file.open("rb") as stream:
        return list(parquet.read_table(stream).to_pylist())


_READERS: dict[str, Callable[[Path], Any]] = {
    ".json": _json,
    ".jsonl": lambda file: _each_line(_text(file)),
    ".csv": _table,
    ".parquet": _parquet,
    ".yaml": lambda file: yaml.safe_load(_text(file)),
    ".yml": lambda file: yaml.safe_load(_text(file)),
}
