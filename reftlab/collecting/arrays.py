"""Arrays `(n, width)` that are filled batch by batch: in memory, or in safetensors files in a folder.

| file | holds |
|---|---|
| `activations.json` | what was collected with which settings, how many batches are done, the arrays |
| `vectors-000.safetensors` | one read's vectors, the tensor `array`, in the order of the examples |
| `index-000.safetensors` | of which example, which token and which token id each vector is |

A file is filled in place, and its head is written at the end. `activations.json` is replaced in one
step after the arrays are on the disk, so that whatever it counts as done is done, however the process
ended; a collection that goes on writes the same numbers to the same places.
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from reftlab.errors import ArtifactError, DataError

__all__ = ["FORMAT", "Files", "Memory", "Shape", "read_array", "read_record"]

FORMAT = 1
"""Version of the folder's layout; a reader refuses a newer one."""

RECORD, _UNFINISHED_RECORD = "activations.json", ".activations.json.new"
_HEAD = 512
"""Bytes before an array in its file: the head, filled up with spaces."""

_SECONDS_BETWEEN_RECORDS = 2.0
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
          torch.int64: "I64"}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What an array holds: `rows` vectors, or so many at first, of `width` numbers."""

    rows: int
    width: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize


class Memory:
    """Arrays in memory, which grow where more is written than was expected."""

    def __init__(self) -> None:
        self.arrays: dict[str, Tensor] = {}

    def open(self, shapes: Mapping[str, Shape]) -> None:
        """Make room for arrays."""
        for name, shape in shapes.items():
            self.arrays[name] = torch.empty(shape.rows, shape.width, dtype=shape.dtype)

    def write(self, name: str, rows: Tensor, values: Tensor) -> None:
        """Put vectors at some rows of an array."""
        array = self.arrays[name]
        needed = int(rows.max()) + 1 if len(rows) else 0
        if needed > len(array):
            grown = array.new_empty(max(needed, len(array) * 3 // 2), array.shape[1])
            grown[: len(array)] = array
            array = self.arrays[name] = grown
        array[rows] = values.to(array.dtype)

    def size(self, rows: Mapping[str, int]) -> int:
        """Bytes of so many rows of each array."""
        return sum(rows[name] * array.shape[1] * array.itemsize for name, array in self.arrays.items())

    def cut(self, rows: Mapping[str, int]) -> dict[str, Tensor]:
        """The arrays with so many rows."""
        return {
            name: array if len(array) == rows[name] else array[: rows[name]].clone()
            for name, array in self.arrays.items()
        }


@dataclass
class Files:
    """Arrays in a folder.

    Args:
        folder: where.
        settings: what was collected how, as JSON can hold it.
        lasting: whether the collection can go on after an interruption, so that batches are noted.
    """

    folder: Path
    settings: dict[str, Any]
    lasting: bool = True
    done: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._handles: dict[str, FileIO] = {}
        self._recorded = time.monotonic()

    def open(self, shapes: Mapping[str, Shape]) -> None:
        """Make empty files, or take up those of a collection that was interrupted.

        Raises:
            ArtifactError: a file is missing or has been cut, or is for other vectors.
        """
        if self.shapes:
            _check_same(self.folder, self.shapes, shapes)
            for name, shape in shapes.items():
                least = _HEAD + max(shape.rows, self.rows.get(name, 0)) * shape.row_bytes
                if not self._file(name).is_file() or self._file(name).stat().st_size < least:
                    raise ArtifactError(
                        f"{self._file(name)} is missing or shorter than what was collected into it; remove "
                        f"{self.folder} and collect again"
                    )
                self._handles[name] = self._file(name).open("r+b", buffering=0)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._record()
        for name, shape in shapes.items():
            self._handles[name] = self._file(name).open("w+b", buffering=0)
            self._handles[name].truncate(_HEAD + shape.rows * shape.row_bytes)
        self.shapes = dict(shapes)

    def write(self, name: str, rows: Tensor, values: Tensor) -> None:
        """Put vectors at some rows of an array; each run of neighbouring rows is one write."""
        if not len(rows):
            return
        shape = self.shapes[name]
        raw: Any = values.to(shape.dtype).contiguous().view(torch.uint8).numpy()
        data = memoryview(raw).cast("B")
        ends = [*((rows.diff() != 1).nonzero()[:, 0] + 1).tolist(), len(rows)]
        start = 0
        for end in ends:
            place = _HEAD + int(rows[start]) * shape.row_bytes
            _write_all(self._handles[name], data[start * shape.row_bytes : end * shape.row_bytes], place)
            start = end

    def note(self, done: int, rows: Mapping[str, int], now: bool = False) -> None:
        """Note how many batches are done, and how many rows each array has where that grows.

        Written to the disk every few seconds, or now.
        """
        self.done, self.rows = done, dict(rows)
        if self.lasting and (now or time.monotonic() - self._recorded >= _SECONDS_BETWEEN_RECORDS):
            self._sync()
            self._record()
            self._recorded = time.monotonic()

    def finish(self, rows: Mapping[str, int], facts: Mapping[str, Any]) -> None:
        """Write the heads of the files and say that the collection is whole.

        Args:
            rows: how many rows each array has.
            facts: what the reader needs to know further.
        """
        self.rows = dict(rows)
        for name, shape in self.shapes.items():
            handle, size = self._handles[name], rows[name] * shape.row_bytes
            tensor = {"dtype": _NAMES[shape.dtype], "shape": [rows[name], shape.width]}
            head = json.dumps({"array": {**tensor, "data_offsets": [0, size]}}).encode()
            handle.truncate(_HEAD + size)
            _write_all(handle, memoryview(struct.pack("<Q", _HEAD - 8) + head.ljust(_HEAD - 8)), 0)
        self._sync()
        self._record(finished=True, **facts)
        self.close()

    def keep(self) -> None:
        """Note what is done where a collection is interrupted, and close the files."""
        if self._handles:
            self.note(self.done, self.rows, now=True)
        self.close()

    def close(self) -> None:
        """Close the files."""
        while self._handles:
            self._handles.popitem()[1].close()

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _sync(self) -> None:
        for handle in self._handles.values() if self.lasting else ():
            os.fsync(handle.fileno())

    def _record(self, finished: bool = False, **facts: Any) -> None:
        shapes = {
            name: [shape.rows, shape.width, str(shape.dtype).removeprefix("torch.")]
            for name, shape in self.shapes.items()
        }
        record = {
            "format": FORMAT,
            "finished": finished,
            "batches_done": self.done,
            "rows": self.rows,
            "arrays": shapes,
            "settings": self.settings,
            **facts,
        }
        new = self.folder / _UNFINISHED_RECORD
        with new.open("wb", buffering=0) as file:
            _write_all(file, memoryview(json.dumps(record, indent=1, ensure_ascii=False).encode()), 0)
            os.fsync(file.fileno())
        os.replace(new, self.folder / RECORD)

    @classmethod
    def at(cls, folder: Path, settings: dict[str, Any], resume: bool) -> tuple[Files, bool]:
        """The files of a new or an interrupted collection, and whether it is finished already.

        Raises:
            DataError: the folder holds something else, or a collection with other settings.
            ArtifactError: the record is damaged or newer.
        """
        if not (folder / RECORD).is_file():
            other = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
            other = [name for name in other if name != _UNFINISHED_RECORD]
            if other or (folder.exists() and not folder.is_dir()):
                raise DataError(
                    f"folder={str(folder)!r} is no collection: it holds {', '.join(other[:3]) or 'a file'}; "
                    "give a new or an empty folder"
                )
            return cls(folder, settings), False
        if not resume:
            raise DataError(
                f"folder={str(folder)!r} holds a collection already; give resume=True to go on with it, "
                "another folder, or open it with rl.Activations.open(folder)"
            )
        record = read_record(folder)
        _refuse_other_settings(folder, record["settings"], settings)
        shapes = {
            name: Shape(rows, width, getattr(torch, dtype))
            for name, (rows, width, dtype) in record["arrays"].items()
        }
        return cls(folder, settings, True, record["batches_done"], record["rows"], shapes), record["finished"]


def read_record(folder: Path) -> dict[str, Any]:
    """What `activations.json` says.

    Raises:
        ArtifactError: it is missing, damaged or newer.
    """
    file = folder / RECORD
    if not file.is_file():
        raise ArtifactError(f"there is no collection at {folder}: {RECORD} is missing")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ArtifactError(f"{file} is damaged: {error}; remove {folder} and collect again") from error
    needed = ("finished", "batches_done", "rows", "arrays", "settings")
    if not isinstance(record, dict) or type(record.get("format")) is not int:
        raise ArtifactError(f"{file} does not name a format, so {folder} is no collection of reftlab's")
    if record["format"] > FORMAT:
        raise ArtifactError(
            f"{folder} has format {record['format']}, and this reftlab reads up to {FORMAT}; upgrade reftlab"
        )
    missing = [name for name in needed if name not in record]
    if missing:
        raise ArtifactError(f"{file} is damaged: it lacks {missing[0]!r}; remove {folder} and collect again")
    return record


def read_array(folder: Path, name: str) -> Tensor:
    """A finished array as a tensor on the memory-mapped file; what is written into it stays in memory.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    file = folder / f"{name}.safetensors"
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            array: Tensor = opened.get_tensor("array")
            return array
    except (safetensors.SafetensorError, OSError) as error:
        raise ArtifactError(f"{file} is missing, damaged or cut short ({error}); copy it again, or collect "
                            "again into another folder") from error  # fmt: skip


def _write_all(file: FileIO, data: memoryview, place: int) -> None:
    file.seek(place)
    while len(data):
        data = data[file.write(data) :]


def _check_same(folder: Path, before: Mapping[str, Shape], now: Mapping[str, Shape]) -> None:
    for name in (*now, *before):
        old, new = before.get(name), now.get(name)
        if old is None or new is None or (old.width, old.dtype) != (new.width, new.dtype):
            raise ArtifactError(
                f"{folder} has {old} for {name!r} and this model gives {new}; collect into another folder"
            )


def _refuse_other_settings(folder: Path, before: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    now = json.loads(json.dumps(settings))
    for name in dict.fromkeys((*now, *before)):
        if before.get(name) != now.get(name):
            difference = _difference(name, before.get(name), now.get(name))
            raise DataError(
                f"folder={str(folder)!r} was collected with {difference}; use the same, or another folder"
            )


def _difference(name: str, before: Any, now: Any) -> str:
    if isinstance(before, Sequence) and isinstance(now, Sequence) and not isinstance(before, str):
        gone = [entry for entry in before if entry not in now]
        new = [entry for entry in now if entry not in before]
        if gone or new:
            return f"other {name}: {_listed(gone)} there and not here, {_listed(new)} here and not there"
    return f"{name}={before!r}, and now it is {now!r}"


def _listed(entries: list[Any]) -> str:
    return ", ".join(map(str, entries)) if entries else "nothing"
