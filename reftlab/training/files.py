"""Examples from files: JSON, JSON Lines, CSV or YAML."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from reftlab.errors import DataError, did_you_mean
from reftlab.training.data import Example, as_examples

__all__ = ["read_examples"]


def read_examples(
    path: str | Path, *, prompt: str = "prompt", answer: str = "answer", limit: int | None = None
) -> list[Example]:
    """Read (prompt, answer) pairs from a file.

    Args:
        path: `.json` or `.yaml` with a list, `.jsonl` with one entry a line, or `.csv` with a header.
            An entry is a mapping, or a [prompt, answer] pair.
        prompt, answer: the names of the fields; entries without an answer are prompts alone.
        limit: read so many of them at most.

    Raises:
        DataError: the file is missing, of another kind or malformed, or an entry lacks its prompt.
    """
    file = Path(path).expanduser()
    if file.suffix not in _READERS:
        raise DataError(f"examples={str(path)!r}: expected a file that ends in {', '.join(_READERS)}")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"examples={str(path)!r} cannot be read: {error}") from error
    try:
        entries = _READERS[file.suffix](text)
    except (ValueError, yaml.YAMLError, csv.Error) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file} is not well-formed {file.suffix[1:]}: {reason}") from error
    if not isinstance(entries, list):
        raise DataError(f"{file} must hold a list of examples, not {type(entries).__name__}")
    try:
        return as_examples([_renamed(entry, prompt, answer) for entry in entries[:limit]])
    except DataError as error:
        raise DataError(f"{file}: {error}") from error


def _renamed(entry: Any, prompt: str, answer: str) -> Any:
    if not isinstance(entry, dict):
        return entry
    if prompt not in entry:
        names = ", ".join(map(str, entry))
        raise DataError(
            f"an entry has no field {prompt!r}; it has {names}.{did_you_mean(prompt, map(str, entry))}"
        )
    return {"prompt": entry[prompt], "answer": entry.get(answer)}


def _json_lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))


_READERS: dict[str, Callable[[str], Any]] = {
    ".json": json.loads,
    ".jsonl": _json_lines,
    ".csv": _table,
    ".yaml": yaml.safe_load,
    ".yml": yaml.safe_load,
}
