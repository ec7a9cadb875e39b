"""What edits cost: a forward pass of 8 rows of 128 tokens in float32, with edits and bare, in turn.

    python analyses/benchmarks/overhead.py

Prints medians and the ratio. Both kinds of passes alternate in one process, so that whatever else
the machine does falls on both.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import reftlab as rl

GRAPHS = {
    "one LoReFT, rank 4, last token, block 15": ("blocks[15].output", "last", 4),
    "LoReFT, rank 4, last token, every block": ("blocks[*].output", "last", 4),
    "LoReFT, rank 4, first(7)+last(7), every block": ("blocks[*].output", "f7+l7", 4),
    "LoReFT, rank 4, all tokens, every block": ("blocks[*].output", "all", 4),
}


def seconds(call, inputs) -> float:
    started = time.perf_counter()
    call(**inputs)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    model, tokenizer = rl.load_model(dtype=getattr(torch, options.dtype), device=options.device)
    torch.manual_seed(0)
    ids = torch.randint(100, 40_000, (options.rows, options.tokens), device=options.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    threads = torch.get_num_threads()
    print(
        f"{options.rows}×{options.tokens} tokens, {options.dtype}, {options.device}, {threads} threads, "
        f"torch {torch.__version__}, medians of {options.runs} runs in turn\n"
    )
    print("| edits | bare, ms | with edits, ms | ratio | middle half of the ratios |")
    print("|---|---|---|---|---|")
    for name, (at, positions, rank) in GRAPHS.items():
        edit = rl.Edit("edit", at=at, positions=positions, intervention=rl.LoReFT(rank=rank))
        reft = rl.InterventionGraph(edit).bind(model, tokenizer)
        with torch.inference_mode():
            for call in (model, reft):
                seconds(call, inputs)
            pairs = []
            for number in range(options.runs):
                order = (model, reft) if number % 2 else (reft, model)
                taken = {id(call): seconds(call, inputs) for call in order}
                pairs.append((taken[id(model)], taken[id(reft)]))
        bare, edited = (statistics.median(column) * 1e3 for column in zip(*pairs, strict=True))
        ratios = [after / before for before, after in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"| {name} | {bare:.0f} | {edited:.0f} | {middle:.3f} | {low:.3f} to {high:.3f} |", flush=True)


if __name__ == "__main__":
    main()
