"""Collections that are killed at one file operation after the other, and then go on; prints what came of it.

    python -m tests.collecting.interrupted killed EMPTY_FOLDER
    python -m tests.collecting.interrupted memory EMPTY_FOLDER

Each attempt is a forked process that kills itself with SIGKILL before its n-th operation, for every n
until one finishes; half of a write counts as one. `memory` prints by how many bytes the process grew
while it collected, and how many it collected.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

WATCHED = ("open", "os.mkdir", "os.rename", "sync", "half")


def count_down(folder: Path, operations: int) -> None:
    """From now on, die before the operation with this number that concerns a file in `folder`."""
    from reftlab.collecting import arrays

    left = operations

    def audit(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if event in WATCHED and (event in ("sync", "half") or str(folder) in str(args[:1])):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    write_all = arrays._write_all

    def watched_fsync(handle: int) -> None:
        sys.audit("sync")

    def watched_write(file: Any, data: memoryview, place: int) -> None:
        write_all(file, data[: len(data) // 2], place)
        sys.audit("half")
        write_all(file, data, place)

    os.fsync, arrays._write_all = watched_fsync, watched_write  # type: ignore[assignment]
    sys.addaudithook(audit)


def attempts(kind: str, root: Path) -> list[dict[str, Any]]:
    import torch

    import reftlab as rl
    from reftlab.collecting import arrays
    from tests.models import batch_of, build

    torch.set_num_threads(1)
    arrays._SECONDS_BETWEEN_RECORDS = 0.0
    # What a killed process has written is in the system's hands; only a power cut needs the disk's word.
    os.fsync = lambda handle: None  # type: ignore[assignment]
    model, target = build("llama"), root / "found"
    lengths = (5, 3, 7, 2)
    rows: list[Any] = [list(range(4 + n, 4 + n + length)) for n, length in enumerate(lengths)]
    data = rows if kind == "rows" else [batch_of((4, 6)), batch_of((3, 2))]
    site = "blocks[0].output @ first(2)"

    def collected(folder: Path | None) -> Any:
        return rl.collect(model, data, site, batch_size=2, folder=folder, progress=False)

    expected = collected(None)
    passes = mmap.mmap(-1, 1)
    model.register_forward_pre_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    report: list[dict[str, Any]] = []
    while not report or report[-1]["killed"]:
        shutil.rmtree(target, ignore_errors=True)
        passes[0] = 0
        child = os.fork()
        if child == 0:
            count_down(root, len(report) + 1)
            collected(target)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or status == 0, status
        try:
            rl.Activations.open(target)
            whole = True
        except rl.ArtifactError:
            whole = False
        found = collected(target)
        opened = rl.Activations.open(target)
        equal = all(
            torch.equal(one.flat(name).vectors, expected[name])
            and torch.equal(one.flat(name).index, expected.flat(name).index)
            for one in (found, opened)
            for name in expected
        )
        left = sorted(entry.name for entry in target.iterdir())
        report.append({"killed": killed, "equal": equal, "whole": whole, "passes": passes[0], "left": left})
    return report


def growth(root: Path) -> list[int]:
    import torch
    from torch import nn

    import reftlab as rl

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(50, 4096)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.words(input_ids)

    torch.set_num_threads(1)
    rows = [[number % 50] * 64 for number in range(200)]
    rl.collect(Words(), rows[:2], "words.output", progress=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = rl.collect(Words(), rows, "words.output", batch_tokens=256, folder=root / "found", progress=False)
    return [1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before), found.nbytes]


if __name__ == "__main__":
    task, folder = sys.argv[1], Path(sys.argv[2])
    if task == "memory":
        print(json.dumps(growth(folder)))
    else:
        print(json.dumps({kind: attempts(kind, folder) for kind in ("rows", "batches")}))
