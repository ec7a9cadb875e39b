"""Where values that never change are kept: in memory, then in a memory-mapped file, within budgets."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reftlab.errors import DataError
from reftlab.runtime.sizes import in_words, parse_bytes

__all__ = ["ConeStore"]


@dataclass(frozen=True)
class _OnDisk:
    offset: int
    size: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class ConeStore:
    """Tensors by key, up to so many bytes in memory and so many in a file; further ones are not taken.

    What does not fit is computed anew each time it is needed, so a small budget costs time and never
    changes a result. Nothing is thrown out for something newer: epochs visit all examples in turn, and
    whatever a newcomer displaced would be missed as soon. Entries are found by tokens and by the model's
    numbers. Changes of these are seen at once, except such as go past torch's own count of them
    (`weight.data[3] += 1`) and past the numbers that are sampled in every batch; a new training sees all.

    Args:
        memory: bytes to keep in memory, a number or `"4GB"`; a quarter of what is free unless given.
        disk: bytes to keep in a file beyond that; half of what is free in `folder`, and at most 32 GB,
            unless given. `0` for no file.
        folder: where the file goes; the system's temporary folder unless given. The file has no use
            after this object, and goes with it.

    Raises:
        DataError: a budget is not a number of bytes, or `folder` is no folder.

    >>> ConeStore(memory="2MB", disk=0)
    ConeStore(0 B of 2.0 MB in memory, no file)
    """

    def __init__(
        self, memory: int | str | None = None, disk: int | str | None = None, folder: str | Path | None = None
    ) -> None:
        if not isinstance(folder, str | Path | None):
            raise DataError(f"folder={folder!r}: expected a folder that exists")
        self._folder = Path(tempfile.gettempdir() if folder is None else folder).expanduser()
        if str(folder) == "" or not self._folder.is_dir():
            raise DataError(f"folder={str(folder)!r}: expected a folder that exists")
        self.memory = _free_memory() // 4 if memory is None else parse_bytes("memory", memory)
        free = shutil.disk_usage(self._folder).free
        self.disk = min(free // 2, 32 * 10**9) if disk is None else parse_bytes("disk", disk)
        self.in_memory = self.on_disk = 0
        self._held: dict[bytes, Tensor] = {}
        self._written: dict[bytes, _OnDisk] = {}
        self._file: _File | None = None
        self._turn = threading.Lock()

    def __len__(self) -> int:
        return len(self._held) + len(self._written)

    def __contains__(self, key: bytes) -> bool:
        return key in self._held or key in self._written

    def get(self, key: bytes) -> Tensor | None:
        """The tensor under a key, on the CPU, or None; it is shared, so it must not be changed."""
        if key in self._held:
            return self._held[key]
        place = self._written.get(key)
        return None if place is None or self._file is None else self._file.read(place)

    def put(self, key: bytes, value: Tensor) -> bool:
        """Keep a copy of a tensor under a key; whether there was room for it."""
        with self._turn:
            return key in self or self._put(key, value)

    def _put(self, key: bytes, value: Tensor) -> bool:
        size = value.numel() * value.element_size()
        if self.in_memory + size <= self.memory:
            self._held[key] = value.detach().to("cpu", copy=True).contiguous()
            self.in_memory += size
            return True
        size = _File.room(size)
        if self.on_disk + size > self.disk:
            return False
        try:
            self._file = self._file or _File(self._folder)
            self._written[key] = self._file.append(value.detach().cpu().contiguous())
        except OSError:
            # The disk is full: what is there stays, and no more is written.
            self.disk = self.on_disk
            return False
        self.on_disk += size
        return True

    def clear(self) -> None:
        """Forget everything, and delete the file."""
        with self._turn:
            self._held.clear()
            self._written.clear()
            self.in_memory = self.on_disk = 0
            if self._file is not None:
                self._file.close()
                self._file = None

    def __repr__(self) -> str:
        file = f"{in_words(self.on_disk)} of {in_words(self.disk)} in a file" if self.disk else "no file"
        return f"ConeStore({in_words(self.in_memory)} of {in_words(self.memory)} in memory, {file})"


class _File:
    """A file that grows at its end and is read through a memory map; it goes when it is closed."""

    def __init__(self, folder: Path) -> None:
        # Unbuffered, so that a write that fails leaves nothing to be written later.
        self._file: Any = tempfile.TemporaryFile(prefix="reftlab-cone-", dir=folder, buffering=0)  # noqa: SIM115
        self._size = 0
        self._map: Any = None

    @staticmethod
    def room(size: int) -> int:
        """What so many bytes take: numbers of every width may begin at a multiple of 16."""
        return size + -size % 16

    def append(self, value: Tensor) -> _OnDisk:
        data = value.view(-1).view(torch.uint8).numpy().data
        self._file.seek(self._size)
        for part in (data, memoryview(bytes(self.room(len(data)) - len(data)))):
            while part:
                part = part[self._file.write(part) :]
        place = _OnDisk(self._size, len(data), tuple(value.shape), value.dtype)
        self._size += self.room(len(data))
        return place

    def read(self, place: _OnDisk) -> Tensor:
        if self._map is None or len(self._map) < self._size:
            self._map = np.memmap(self._file, dtype=np.uint8, mode="r+", shape=(self._size,))
        data = torch.from_numpy(self._map[place.offset : place.offset + place.size])
        return data.view(place.dtype).view(place.shape)

    def close(self) -> None:
        self._map = None
        self._file.close()


_LIMITS = (
    ("memory.max", "memory.current", "file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_cache"),
)
"""A container's limit, its use, and what of that is given back on demand, in both versions of cgroups."""


def _free_memory(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that are free, in this container where it has a limit."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit, used, cache in _LIMITS:
        # Elsewhere than in a container there are no such files, or no number in them.
        with contextlib.suppress(OSError, ValueError):
            lines = (groups / limit).with_name("memory.stat").read_text().splitlines()
            cached = next((int(size) for name, size in map(str.split, lines) if name == cache), 0)
            free = min(free, int((groups / limit).read_text()) - int((groups / used).read_text()) + cached)
    return max(0, free)
