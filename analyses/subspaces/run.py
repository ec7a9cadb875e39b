"""What ranks and seeds find: do edits that were trained apart share a subspace, or only what they do?

    python analyses/subspaces/run.py            # the whole study
    python analyses/subspaces/run.py --small    # to see that it runs

Trains LoReFT at one block on two tasks, for several ranks and seeds, and compares all of them. What is
finished is kept in `--work`, so the same command goes on after an interruption. Tables and figures go to
`--out`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from comparing import alone, angles_between, compare, swapped
from figures import agreement_figure, matrix_figure, spectra_figure
from runs import bare_of, run_of, write_whole
from tables import angle_frame, text_of
from tasks import TASKS

import reftlab as rl

HERE = Path(__file__).parent
SMALL = {"ranks": [1, 2], "seeds": 2, "epochs": 6, "draws": 50, "controls": 2}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help=f"{SMALL}")
    parser.add_argument("--block", type=int, default=15)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=100, help="steps of all ten pairs")
    parser.add_argument("--draws", type=int, default=400, help="random subspaces a comparison")
    parser.add_argument("--controls", type=int, default=3, help="random controls of shares of the effect")
    parser.add_argument("--work", type=Path, help="trained edits and what was measured [out/subspaces]")
    parser.add_argument(
        "--out", type=Path, help="tables and figures [this folder; with --small, the work folder]"
    )
    options = parser.parse_args()
    if options.small:
        vars(options).update(SMALL)
    options.work = options.work or Path("out/subspaces-small" if options.small else "out/subspaces")
    options.out = options.out or (options.work if options.small else HERE)
    return options


def main() -> None:
    options = parsed()
    for folder in (options.work, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = rl.load_model()
    model.requires_grad_(False)
    bare, store, runs = bare_of(model, tokenizer, options.block), rl.ConeStore(memory="1GB", disk=0), []
    for seed in range(options.seeds):
        for task in TASKS.values():
            for rank in options.ranks:
                run = run_of(
                    model, tokenizer, task, rank, seed, block=options.block, epochs=options.epochs,
                    draws=options.controls, store=store, folder=options.work,
                )  # fmt: skip
                runs.append(run)
                table = alone(runs, bare)
                save(table, options.out / "results.csv")
                print(
                    f"{task.name} rank {rank} seed {seed}: loss {run.facts['loss']:.3f}, "
                    f"{run.facts['exact']} exact, {run.facts['fits']} of the kind, "
                    f"{run.facts['seconds']:.0f} s",
                    flush=True,
                )
    runs.sort(key=lambda run: (list(TASKS).index(run.task), run.rank, run.seed))
    table, pairs = alone(runs, bare), compare(runs, bare)
    swaps = swapped(model, tokenizer, runs, bare, controls=options.controls, folder=options.work / "swaps")
    found = angles_between(runs, bare, options.draws)
    angles = angle_frame(found)
    for name, frame in (("results", table), ("pairs", pairs), ("angles", angles), ("swaps", swaps)):
        save(frame, options.out / f"{name}.csv")
    spectra_figure(found).savefig(options.out / "spectra.png")
    matrix_figure(runs).savefig(options.out / "overlap.png")
    agreement_figure(pairs, table, swaps).savefig(options.out / "agreement.png")
    text = text_of(table, pairs, angles, swaps)
    write_whole(options.out / "table.md", text)
    print(text)


def save(table: pd.DataFrame, file: Path) -> None:
    write_whole(file, table.to_csv(index=False, float_format="%.5g"))


if __name__ == "__main__":
    main()
