"""Finished cells on disk, so that a sweep that was interrupted goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reftlab.errors import ArtifactError, DataError
from reftlab.runtime.digest import digest_of, model_digest, state_digest
from reftlab.runtime.hooks import foreign_hooks

if TYPE_CHECKING:
    from reftlab.runtime import BoundModel

__all__ = ["CellStore", "bound_digest", "check_folder", "content_key"]


def check_folder(folder: Any) -> None:
    """Refuse what is no folder and cannot become one.

    Raises:
        DataError: as said.
    """
    if folder is None:
        return
    if not isinstance(folder, str | Path) or not str(folder).strip() or Path(folder).is_file():
        raise DataError(f"folder={str(folder)!r}: expected the path of a folder, not of a file")


class CellStore:
    """The finished cells of one sweep.

    They lie in a folder of the sweep's own, named after everything that its numbers depend on, so that
    another sweep's cells can never be taken for them. Each file appears whole or not at all.

    Args:
        folder: where sweeps are kept.
        key: of this sweep, see `content_key`.
        about: what the sweep is, for people who look into the folder.
        fresh: whether to forget what an earlier run of this sweep left.
    """

    def __init__(self, folder: str | Path, key: str, about: Mapping[str, Any], fresh: bool = False) -> None:
        self.folder = Path(folder) / f"sweep-{key}"
        self.folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            for path in self.folder.glob("*.safetensors"):
                path.unlink()
        for path in self.folder.glob("*.partial"):
            path.unlink()
        written = self.folder / "sweep.json"
        if not written.exists():
            partial = written.with_suffix(".partial")
            partial.write_text(json.dumps(about, indent=1, ensure_ascii=False, default=str))
            _put_in_place(partial, written)

    def cells(self, pair: int) -> dict[int, float]:
        """A pair's finished cells by number."""
        found: dict[int, float] = {}
        for path in sorted(self.folder.glob(f"pair{pair:05d}-cells*.safetensors")):
            held = self._read(path)
            found.update(zip(held["cells"].tolist(), held["values"].tolist(), strict=True))
        return found

    def add_cells(self, pair: int, cells: Sequence[int], values: Sequence[float]) -> None:
        """Keep finished cells."""
        number = len(list(self.folder.glob(f"pair{pair:05d}-cells*.safetensors")))
        self._write(
            f"pair{pair:05d}-cells{number:06d}",
            {"cells": torch.tensor(cells), "values": torch.tensor(values, dtype=torch.float64)},
        )

    def get(self, name: str) -> dict[str, Tensor] | None:
        """Tensors that were kept under a name, or None."""
        path = self.folder / f"{name}.safetensors"
        return self._read(path) if path.exists() else None

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name."""
        self._write(name, dict(tensors))

    def _read(self, path: Path) -> dict[str, Tensor]:
        try:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ArtifactError(
                f"{path} cannot be read: {error}; delete it, and its cells are computed again"
            ) from error

    def _write(self, name: str, tensors: dict[str, Tensor]) -> None:
        path = self.folder / f"{name}.safetensors"
        partial = path.with_suffix(".partial")
        save_file(tensors, partial)
        _put_in_place(partial, path)


def _put_in_place(partial: Path, path: Path) -> None:
    """Give a finished file its name, once it is on the disk."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def content_key(parts: Mapping[str, Any]) -> str:
    """A short hash of everything that a sweep's numbers depend on."""
    text = json.dumps(parts, sort_keys=True, default=_told)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _told(value: Any) -> str:
    return digest_of([value]) if isinstance(value, Tensor) else repr(value)


def bound_digest(reft: BoundModel) -> str:
    """A hash of a bound model: of the model as it is now, and of the edits in force.

    Of hooks of others it tells where they are and what they are called, not what they do.
    """
    digest = hashlib.blake2b(model_digest(reft.model).encode(), digest_size=16)
    for name, module in reft.model.named_modules():
        for hook in foreign_hooks(module):
            digest.update(f"{name} {getattr(hook, '__qualname__', type(hook).__qualname__)}".encode())
    active = [bound.key for bound in reft.edits if bound.edit.name not in reft._disabled]
    digest.update(repr((reft.graph, active)).encode())
    digest.update(state_digest(reft.interventions).encode())
    return digest.hexdigest()
