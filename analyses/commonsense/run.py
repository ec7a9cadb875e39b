"""LoReFT, DiReFT and LoRA on commonsense questions: accuracy, numbers, time, memory, and what changed inside.

    python analyses/commonsense/run.py --data-dir DATA            # the whole study
    python analyses/commonsense/run.py --data-dir DATA --small    # to see that it runs

DATA holds `ARC-Easy`, `boolq` and `openbookqa` in the layout of LLM-Adapters. Every finished cell is kept in
`--work`, so the same command goes on after an interruption. Tables and figures go to `--out`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from cell import ASKED, Cell, chosen_for, write_whole
from decoding import decode, decoding_figure
from methods import METHODS, PROBED
from questions import BY_TEXT, TASKS, Chosen
from showing import accuracy_figure, lines_of, per_seed, table_text

import reftlab as rl

HERE = Path(__file__).parent
SMALL = {"seeds": 1, "train": 16, "test": 24, "tasks": ["boolq"], "methods": [PROBED, "lora-equal"]}


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """Every cell, a seed after the other, so that a part of them is a smaller study."""
    named = [
        (task, method, seed)
        for seed in range(options.seeds)
        for task in options.tasks
        if seed < options.number_seeds or task == "boolq" or task.endswith(BY_TEXT)
        for method in ([*ASKED] if seed == 0 else []) + list(options.methods)
        if not (method == "zero-shot-chat" and task.endswith(BY_TEXT))
    ]
    return [
        Cell(
            task, method, seed, str(options.data_dir), options.train, options.test, options.epochs,
            options.batch_size, 0.1, options.max_tokens, str(artifact_of(options, task, method, seed)),
        )
        for task, method, seed in named
    ]  # fmt: skip


def artifact_of(options: argparse.Namespace, task: str, method: str, seed: int) -> Path:
    return options.work.resolve() / "edits" / f"{task}-{method}-{seed}"


def finished(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """The cell's result, from an earlier run or from a process of its own."""
    file = options.work.resolve() / "cells" / f"{cell.task}-{cell.method}-{cell.seed}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        subprocess.run(
            [sys.executable, HERE / "cell.py", json.dumps(asdict(cell)), file], check=True, cwd=HERE
        )
    found = json.loads(file.read_text(encoding="utf-8"))
    if found["settings"] != cell.settings:
        raise SystemExit(
            f"{file} is of other settings, {found['settings']}, than asked for, {cell.settings}; give "
            "another --work, or delete it"
        )
    return found


def decodings(
    cells: list[Cell], chosen: dict[str, Chosen], options: argparse.Namespace
) -> pd.DataFrame | None:
    """Probe maps without and with the edits of the first seed, of each task."""
    # Which option is right cannot be told from a question without its options.
    edits = [
        cell for cell in cells if cell.method == PROBED and cell.seed == 0 and not cell.task.endswith(BY_TEXT)
    ]
    frames, folds = [], 3 if options.small else 5
    model = tokenizer = None
    for cell in edits:
        file = options.work / "probes" / f"{cell.task}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            if model is None:
                model, tokenizer = rl.load_model()
            found = decode(Path(cell.save), model, tokenizer, chosen[cell.task], folds)
            write_whole(file, found.to_csv(index=False))
        frames.append(pd.read_csv(file))
    return pd.concat(frames) if frames else None


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data-dir", type=Path, required=True, help="folder with TASK/train.json and test.json"
    )
    parser.add_argument("--small", action="store_true", help=f"{SMALL}")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--number-seeds", type=int, default=1, help="where options go by their number")
    parser.add_argument("--train", type=int, default=300, help="training questions a task")
    parser.add_argument("--test", type=int, default=250, help="test questions a task")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=256, help="leave out longer prompts")
    parser.add_argument("--work", type=Path, help="cells, probe maps and edits [out/commonsense]")
    parser.add_argument(
        "--out", type=Path, help="tables and figures [this folder; with --small, the work folder]"
    )
    options = parser.parse_args()
    if options.small:
        vars(options).update(SMALL)
    options.data_dir = options.data_dir.resolve()
    options.work = options.work or Path("out/commonsense-small" if options.small else "out/commonsense")
    options.out = options.out or (options.work if options.small else HERE)
    return options


def main() -> None:
    options = parsed()
    for folder in (options.work, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    cells = cells_of(options)
    _, tokenizer = rl.load_model()
    of_task = {cell.task: cell for cell in cells}
    chosen = {task: chosen_for(of_task[task], tokenizer) for task in options.tasks}
    found: list[dict[str, Any]] = []
    for number, cell in enumerate(cells, 1):
        found.append(finished(cell, options))
        results = per_seed(found, chosen)
        write_whole(options.out / "results.csv", results.to_csv(index=False, float_format="%.5g"))
        last = results.iloc[-1]
        print(
            f"{number}/{len(cells)} {cell.task} {cell.method} seed {cell.seed}: "
            f"accuracy {last.accuracy:.3f}, {last.whole_seconds:.0f} s in all",
            flush=True,
        )
    lines = lines_of(found, chosen)
    lines.to_csv(options.out / "summary.csv", index=False, float_format="%.5g")
    accuracy_figure(lines, results).savefig(options.out / "accuracy.png")
    text = table_text(lines, chosen)
    (options.out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    probes = decodings(cells, chosen, options)
    if probes is not None:
        probes.to_csv(options.out / "probes.csv", index=False, float_format="%.5g")
        decoding_figure(probes).savefig(options.out / "probes.png")


if __name__ == "__main__":
    main()
