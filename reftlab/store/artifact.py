"""Artifacts on disk: a folder with graph, tensors, facts and a model card; never any code.

| file | holds |
|---|---|
| `graph.yaml` | the graph, with tensors that are arguments of interventions by name |
| `interventions.safetensors` | the interventions' parameters and those tensors |
| `artifact.json` | format version, checksums of the two above, base model, training facts |
| `README.md` | the model card |

A save builds the whole folder beside its destination and then moves it there, so that an
interrupted save leaves the old artifact as it was; the next save clears away what it left behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from reftlab.errors import ArtifactError, GraphError
from reftlab.graph import InterventionGraph, spec

__all__ = ["FORMAT", "Artifact", "check_destination", "read_artifact", "write_artifact"]

FORMAT = 1
"""Version of the folder's layout; a reader refuses a newer one."""

GRAPH, TENSORS, FACTS, CARD = "graph.yaml", "interventions.safetensors", "artifact.json", "README.md"
_ARGUMENT = "argument:"
_LONGEST_WAIT = 10.0


@dataclass(frozen=True)
class Artifact:
    """What an artifact holds.

    Attributes:
        folder: where it is.
        graph: the graph.
        state: the interventions' parameters and buffers, as `BoundModel.interventions` names them.
        facts: `base_model` and `training`, as written by `write_artifact`.
    """

    folder: Path
    graph: InterventionGraph
    state: dict[str, Tensor]
    facts: dict[str, Any]


def write_artifact(
    folder: str | Path,
    graph: InterventionGraph,
    state: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    card: str,
) -> Path:
    """Write an artifact; files of the user's own in an artifact's folder are kept.

    Raises:
        ArtifactError: the folder holds other things than an artifact.
        GraphError: the graph holds code (`Function`).
    """
    target = Path(folder).expanduser().resolve()
    arguments: dict[str, Tensor] = {}
    data = spec.graph_to_dict(graph.nodes, arguments)
    text = spec.to_yaml(data)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    tensors |= {_ARGUMENT + name: tensor.clone() for name, tensor in arguments.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone_in(target.parent) as alone:
        _recover(target)
        _refuse_to_overwrite(target)
        if alone:
            _clear_interrupted(target)
        building = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
        try:
            (building / GRAPH).write_text(text, encoding="utf-8")
            # Not `save_file`, which makes a file that only its owner can read.
            (building / TENSORS).write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
            sums = {name: _checksum(building / name) for name in (GRAPH, TENSORS)}
            written = {"format": FORMAT, "files": sums, **facts}
            (building / FACTS).write_text(
                json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            (building / CARD).write_text(card, encoding="utf-8")
            _keep_other_files(target, building)
            _flush(building)
            building.chmod(target.stat().st_mode & 0o777 if target.is_dir() else 0o755)
            _move(building, target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return target


def read_artifact(folder: str | Path) -> Artifact:
    """Read an artifact.

    Raises:
        ArtifactError: it is missing, incomplete, damaged, foreign or of a newer format; the message
            says which, and what to do.
    """
    target = Path(folder).expanduser().resolve()
    if _previous(target).is_dir() and not target.exists():
        with _alone_in(target.parent):
            _recover(target)
    if not target.is_dir():
        raise ArtifactError(f"there is no artifact at {target}: no such folder")
    _refuse_foreign(target)
    facts = _read_facts(target / FACTS) if (target / FACTS).is_file() else {}
    missing = [name for name in (GRAPH, TENSORS, FACTS) if not (target / name).is_file()]
    if missing:
        raise ArtifactError(
            f"{target} is not a whole artifact: {', '.join(missing)} is missing; save it again, or copy "
            "all of it"
        )
    tensors = _read_tensors(target / TENSORS)
    _check_sums(target, facts.pop("files", {}))
    arguments = {n.removeprefix(_ARGUMENT): t for n, t in tensors.items() if n.startswith(_ARGUMENT)}
    try:
        graph = InterventionGraph(*spec.nodes_from_dict(spec.parse_yaml(target / GRAPH), arguments))
    except (GraphError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{target / GRAPH} cannot be read: {error}") from error
    state = {name: tensor for name, tensor in tensors.items() if not name.startswith(_ARGUMENT)}
    return Artifact(target, graph, state, facts)


def _is_artifact(folder: Path) -> bool:
    return (folder / GRAPH).is_file() and (folder / FACTS).is_file()


def check_destination(folder: str | Path) -> None:
    """Refuse a folder that `write_artifact` would refuse, before the work that fills it.

    Raises:
        ArtifactError: it holds other things than an artifact.
    """
    _refuse_to_overwrite(Path(folder).expanduser().resolve())


def _refuse_to_overwrite(target: Path) -> None:
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not _is_artifact(target)):
        raise ArtifactError(
            f"{target} exists and is not a reftlab artifact; save to a new or empty folder, so that "
            "nothing of yours is overwritten"
        )


def _refuse_foreign(folder: Path) -> None:
    if _is_artifact(folder):
        return
    # pyreft's folders have a config.json like those of transformers, and a file for each intervention.
    pyreft = any(folder.glob("intkey_*"))
    foreign = {
        "adapter_config.json": "PEFT",
        "config.json": "pyreft or pyvene" if pyreft else "transformers",
    }
    for name, library in foreign.items():
        if (folder / name).is_file():
            way = "reftlab.compat.pyreft.load_artifact(folder, model)" if pyreft else library
            raise ArtifactError(
                f"{folder} was written by {library} ({name} is in it), not by reftlab; load it with {way}"
            )


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is damaged: {error}; copy it again or save the artifact again"
        ) from error
    written = facts.get("format") if isinstance(facts, dict) else None
    if type(written) is not int or written < 1:
        raise ArtifactError(f"{path} does not name a format, so this is not a reftlab artifact")
    if written > FORMAT:
        raise ArtifactError(
            f"{path.parent} has artifact format {written}, and this reftlab reads up to {FORMAT}; "
            "upgrade reftlab"
        )
    for key in ("base_model", "files"):
        if not isinstance(facts.get(key, {}), dict):
            raise ArtifactError(f"{path} is damaged: {key!r} is {facts[key]!r}; save the artifact again")
    return dict(facts)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} is damaged or cut short ({error}); copy it again or save the artifact again"
        ) from error


def _check_sums(folder: Path, sums: Mapping[str, Any]) -> None:
    for name in (GRAPH, TENSORS):
        if name in sums and sums[name] != _checksum(folder / name):
            raise ArtifactError(
                f"{folder / name} is not the file that was saved here: it was cut short, changed, or comes "
                "from another artifact; copy the whole folder again, or change the graph in Python and save"
            )


def _checksum(path: Path) -> str:
    data = path.read_bytes()
    # Version control may turn the line ends of a text.
    return hashlib.sha256(data.replace(b"\r\n", b"\n") if path.suffix == ".yaml" else data).hexdigest()


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[bool]:
    """Keep other processes from saving into `folder` meanwhile; the system ends the lock with the process.

    Yields:
        Whether that worked; not where another process holds the lock for long, or on file systems
        without locks. Systems that have none at all count as alone.
    """
    try:
        import fcntl
    except ImportError:
        yield True
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        alone, until = False, time.monotonic() + _LONGEST_WAIT
        while not alone and time.monotonic() < until:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:
                break
        yield alone
        if alone:
            fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)


def _clear_interrupted(target: Path) -> None:
    """Remove what saves to `target` that were killed have left beside it."""
    unfinished = re.compile(re.escape(f".{target.name}.new-") + r"[a-z0-9_]{8}")
    for entry in target.parent.iterdir():
        if unfinished.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)


def _previous(target: Path) -> Path:
    return target.parent / f".{target.name}.previous"


def _move(building: Path, target: Path) -> None:
    """Put the new folder in the old one's place; `_recover` undoes a move that was cut short."""
    previous = _previous(target)
    shutil.rmtree(previous, ignore_errors=True)
    if target.exists():
        target.rename(previous)
    building.rename(target)
    shutil.rmtree(previous, ignore_errors=True)


def _recover(target: Path) -> None:
    previous = _previous(target)
    if previous.is_dir() and not target.exists():
        previous.rename(target)


def _keep_other_files(target: Path, building: Path) -> None:
    if not target.is_dir():
        return
    for entry in target.iterdir():
        if entry.name in (GRAPH, TENSORS, FACTS, CARD):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, building / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, building / entry.name, follow_symlinks=False)


def _flush(folder: Path) -> None:
    for name in (GRAPH, TENSORS, FACTS, CARD):
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
