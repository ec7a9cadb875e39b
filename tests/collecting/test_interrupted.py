"""Collections that are killed go on without loss, and hold little in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run(task: str, folder: Path) -> Any:
    command = [sys.executable, "-m", "tests.collecting.interrupted", task, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_collection_killed_at_any_file_operation_goes_on_without_loss(tmp_path: Path) -> None:
    for report in run("killed", tmp_path).values():
        check(report, batches=2)


def check(report: list[dict[str, Any]], batches: int) -> None:
    assert len(report) > 25
    assert [attempt["killed"] for attempt in report] == [True] * (len(report) - 1) + [False]
    assert all(attempt["equal"] for attempt in report)
    # What was noted is never run again; at most the batch at which the kill came is.
    assert all(attempt["passes"] <= batches + 1 for attempt in report)
    assert any(attempt["passes"] == batches and not attempt["whole"] for attempt in report)
    assert report[-1]["whole"]
    assert {tuple(attempt["left"]) for attempt in report} == {tuple(report[-1]["left"])}


def test_memory_holds_about_a_batch_of_what_goes_to_the_disk(tmp_path: Path) -> None:
    grown, collected = run("memory", tmp_path)
    assert collected > 200e6
    assert grown < collected / 4
