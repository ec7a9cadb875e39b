"""What orthonormal bases cost in a training step, and how orthonormal they stay.

    python analyses/benchmarks/basis.py

Trains the demo's edits for some steps by hand and times, inside them, the computation of all bases.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import reftlab as rl
from reftlab.demo import PAIRS


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args()
    model, tokenizer = rl.load_model()
    model.requires_grad_(False)
    batch = rl.training.Collator.of(tokenizer)(
        rl.training.encode(tokenizer, rl.training.as_examples(PAIRS), chat=True)
    )
    print(
        f"{tuple(batch['input_ids'].shape)} tokens, float32, {torch.get_num_threads()} threads, medians of "
        f"{options.steps} training steps\n"
    )
    print("| edits | step, ms | all bases, ms | share | bases per step, edit | largest entry of QᵀQ − I |")
    print("|---|---|---|---|---|---|")
    for at, rank in (("blocks[15].output", 4), ("blocks[*].output", 4), ("blocks[*].output", 32)):
        edit = rl.Edit("edit", at=at, positions="last", intervention=rl.LoReFT(rank=rank))
        reft = rl.InterventionGraph(edit).bind(model, tokenizer).train()
        bases = [module for module in reft.modules() if isinstance(module, rl.OrthonormalBasis)]
        optimiser = torch.optim.AdamW(reft.interventions.parameters(), lr=4e-3)
        steps, inside = [], []
        before = sum(basis.computed for basis in bases)
        for _ in range(options.steps):
            started = time.perf_counter()
            reft(**batch).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            steps.append(time.perf_counter() - started)
        count = (sum(basis.computed for basis in bases) - before) / options.steps / len(bases)
        for _ in range(options.steps):
            with torch.no_grad():
                for basis in bases:
                    basis.weight.add_(0.0)
            started = time.perf_counter()
            sum((basis() ** 2).sum() for basis in bases).backward()
            inside.append(time.perf_counter() - started)
            optimiser.zero_grad()
        with torch.no_grad():
            worst = max(float((basis().T @ basis() - torch.eye(rank)).abs().max()) for basis in bases)
        step, own = statistics.median(steps) * 1e3, statistics.median(inside) * 1e3
        print(
            f"| {at}, rank {rank} | {step:.0f} | {own:.2f} | {own / step:.2%} | {count:g} | {worst:.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
