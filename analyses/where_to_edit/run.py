"""Where should one edit? The demo's task with LoReFT at one block, at four, and at every block.

    python analyses/where_to_edit/run.py            # about 15 minutes on two CPU cores

Trains each setting from several seeds on the demo's ten pairs, and writes `results.csv`, `table.md` and
`figure.png` beside this file. The settings of the first two are those that a trial with plain hooks had used.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch

import reftlab as rl
from reftlab.demo import PAIRS, UNSEEN, only_emojis
from reftlab.plotting.style import BLUE, GREEN, VERMILLION, empty_figure, frame

HERE = Path(__file__).parent
SETTINGS = {
    "block 15": {"at": "blocks[15].output", "epochs": 100, "learning_rate": 4e-3, "warmup_steps": 0},
    "blocks 4, 10, 16, 22": {
        "at": "blocks[4,10,16,22].output",
        "epochs": 80,
        "learning_rate": 8e-3,
        "warmup_steps": 10,
    },
    "every block": {"at": "blocks[*].output", "epochs": 60, "learning_rate": 4e-3, "warmup_steps": 10},
}


def one_run(model, tokenizer, at: str, seed: int, **settings) -> tuple[dict, rl.TrainResult]:
    torch.manual_seed(seed)
    edit = rl.Edit("emoji", at=at, positions="last", intervention=rl.LoReFT(rank=4))
    reft = rl.InterventionGraph(edit).bind(model, tokenizer)
    result = rl.train(reft, PAIRS, batch_size=len(PAIRS), seed=seed, progress=False, **settings)
    evaluation = rl.evaluate(reft, PAIRS, max_new_tokens=24)
    replies = rl.reply(reft, UNSEEN, max_new_tokens=24)
    row = {
        "seed": seed,
        "steps": result.steps,
        "loss": evaluation.loss,
        "exact": evaluation.exact,
        "only_emojis": sum(map(only_emojis, replies)),
        "unseen": " | ".join(replies),
    }
    return row, result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    model, tokenizer = rl.load_model()
    rows, figure = [], empty_figure(7.0, 3.8)
    axes = figure.subplots()
    for (name, settings), colour in zip(SETTINGS.items(), (VERMILLION, GREEN, BLUE), strict=True):
        for seed in range(options.seeds):
            row, result = one_run(model, tokenizer, seed=seed, **settings)
            rows.append({"where": name, **row})
            print(rows[-1], flush=True)
            history = result.to_frame()
            label = name if seed == 0 else None
            axes.plot(history["step"], history["loss"], color=colour, alpha=1 - 0.4 * (seed > 0), label=label)
    axes.set_yscale("log")
    axes.legend(frameon=False, title="LoReFT of rank 4 at", fontsize=8, title_fontsize=8)
    frame(axes, x="optimiser step", y="answer loss (nats per token, log scale)")
    figure.savefig(HERE / "figure.png")
    table = pd.DataFrame(rows)
    table.to_csv(HERE / "results.csv", index=False)
    lines = [
        f"| where | seed | steps | loss | exact of {len(PAIRS)} | only emojis of {len(UNSEEN)} |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['where']} | {r['seed']} | {r['steps']} | {r['loss']:.4f} | {r['exact']} | {r['only_emojis']} |"
        for r in rows
    ]
    (HERE / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
