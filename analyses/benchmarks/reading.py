"""What reading costs: a pass that stops after a block, against a full forward pass, in turn.

    python analyses/benchmarks/reading.py

The first table is one batch of 8 rows of 128 tokens, read with `reft.read`. The second is a data set of
prompts of mixed lengths, collected with `rl.collect` and with a plain hook on full passes over
batches of as many rows in the given order. All kinds of passes alternate in one process, so that
whatever else the machine does falls on all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import reftlab as rl

SITES = (
    "blocks[5].output @ last",
    "blocks[5].output @ all",
    "blocks[15].output @ last",
    "blocks[29].output @ last",
)


def seconds(call) -> float:
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def in_turn(runs: int, full, other) -> tuple[float, float, tuple[float, float, float]]:
    """Median seconds of both, and the quartiles of the ratio of neighbours."""
    for call in (full, other):
        seconds(call)
    pairs = []
    for number in range(runs):
        order = (full, other) if number % 2 else (other, full)
        taken = {id(call): seconds(call) for call in order}
        pairs.append((taken[id(full)], taken[id(other)]))
    before, after = (statistics.median(column) for column in zip(*pairs, strict=True))
    low, middle, high = statistics.quantiles([b / a for a, b in pairs], n=4)
    return before, after, (low, middle, high)


def hooked(model, rows: list[list[int]], size: int) -> torch.Tensor:
    """The last tokens' vectors after block 5 by a plain hook, in full passes over padded batches."""
    kept, found = [], []

    def keep(module, args, output):
        kept.append(output if isinstance(output, torch.Tensor) else output[0])

    handle = model.model.layers[5].register_forward_hook(keep)
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        width = max(map(len, batch))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in batch], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=model.device)
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        ends = torch.tensor([len(row) - 1 for row in batch])
        found.append(kept.pop()[torch.arange(len(batch)), ends].cpu())
    handle.remove()
    return torch.cat(found)


def line(name: str, full: float, other: float, quartiles: tuple[float, float, float]) -> None:
    low, middle, high = quartiles
    print(
        f"| {name} | {full * 1e3:.0f} | {other * 1e3:.0f} | {middle:.3f} | {low:.3f} to {high:.3f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    model, _ = rl.load_model(dtype=getattr(torch, options.dtype), device=options.device)
    torch.manual_seed(0)
    ids = torch.randint(100, 40_000, (options.rows, options.tokens), device=options.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    reft = rl.InterventionGraph().bind(model)
    print(
        f"{options.rows}×{options.tokens} tokens, {options.dtype}, {options.device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"medians of {options.runs} runs in turn\n"
    )
    print("| read | full forward, ms | read, ms | ratio | middle half of the ratios |\n|---|---|---|---|---|")
    with torch.inference_mode():
        for site in SITES:
            line(
                site,
                *in_turn(options.runs, lambda: model(**inputs), lambda site=site: reft.read(site, **inputs)),
            )
    lengths = torch.randint(8, 2 * options.tokens, (options.prompts,)).tolist()
    prompts = [torch.randint(100, 40_000, (length,)).tolist() for length in lengths]
    site = SITES[0]

    def collected() -> torch.Tensor:
        return rl.collect(model, prompts, site, batch_size=options.rows, progress=False)[site]

    with torch.inference_mode():
        plain = hooked(model, prompts, options.rows)
    difference = (collected() - plain).abs().max() / plain.abs().max()
    print(
        f"\n{options.prompts} prompts of {min(lengths)} to {max(lengths)} tokens, {options.rows} rows in a "
        f"batch; largest difference of a vector's number {float(difference):.1e} of the largest\n"
    )
    print(
        "| data set | plain hook, ms | rl.collect, ms | ratio | middle half of the ratios |\n"
        "|---|---|---|---|---|"
    )
    with torch.no_grad():
        runs = max(3, options.runs // 3)
        line(site, *in_turn(runs, lambda: hooked(model, prompts, options.rows), collected))


if __name__ == "__main__":
    main()
