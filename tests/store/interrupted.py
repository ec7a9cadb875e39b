"""Saves over an artifact that are killed at one file operation after the other; prints what is left.

    python -m tests.store.interrupted EMPTY_FOLDER

Each attempt is a forked process that kills itself with SIGKILL before its n-th operation, for every n
until one finishes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

WATCHED = (
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.chmod",
    "shutil.rmtree",
    "sync",
    "half",
)


def count_down(folder: Path, operations: int) -> None:
    """From now on, die before the operation with this number that concerns a file in `folder`."""
    left = operations

    def audit(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        # Inside a removal, names are relative to a folder that is open already.
        concerns = event in ("os.remove", "os.rmdir", "sync", "half") or str(folder) in str(args[:1])
        if event in WATCHED and concerns:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    fsync, write_bytes = os.fsync, Path.write_bytes

    def watched_fsync(handle: int) -> None:
        sys.audit("sync")
        fsync(handle)

    def watched_write(path: Path, data: bytes) -> int:
        write_bytes(path, data[: len(data) // 2])
        sys.audit("half")
        return write_bytes(path, data)

    os.fsync, Path.write_bytes = watched_fsync, watched_write  # type: ignore[method-assign]
    sys.addaudithook(audit)


def main(root: Path) -> None:
    import torch

    from tests.store import cases

    torch.set_num_threads(1)
    model, tokenizer = cases.build_model(), cases.build_tokenizer()
    target = root / "artifact"
    versions = {
        name: cases.randomise(cases.example(model, tokenizer), seed)
        for name, seed in (("old", 1), ("new", 2))
    }
    weights = {name: bound.interventions.state_dict() for name, bound in versions.items()}
    report = []
    while not report or report[-1]["killed"]:
        shutil.rmtree(target, ignore_errors=True)
        versions["old"].save(target)
        (target / "mine").mkdir()
        (target / "mine" / "notes.txt").write_text("keep me")
        clean = sorted(entry.name for entry in root.iterdir())
        child = os.fork()
        if child == 0:
            count_down(root, len(report) + 1)
            versions["new"].save(target)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        left = sorted(entry.name for entry in root.iterdir())
        loaded = cases.load(target, model, tokenizer).interventions.state_dict()
        found = [
            name for name, state in weights.items() if all(torch.equal(loaded[k], state[k]) for k in state)
        ]
        kept = (target / "mine" / "notes.txt").read_text()
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if not killed:
            assert status == 0, status
        versions["new"].save(target)
        after = sorted(entry.name for entry in root.iterdir())
        report.append(
            {"killed": killed, "found": found, "left": left, "clean": clean, "after": after, "kept": kept}
        )
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
