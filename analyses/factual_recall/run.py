"""Where does a small model keep the country while it recalls its capital, and can one swap it?

    python analyses/factual_recall/run.py              # the whole study
    python analyses/factual_recall/run.py --small      # to see that it runs

Patching maps, a subspace for "country" found by distributed alignment search, what swapping it does to facts
that it was not trained on, and probes before and after the swap. Every finished training is kept in `--work`,
so the same command goes on after an interruption. Writes tables (`*.csv`, `table.md`) and figures to `--out`.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from aligning import HELD_OUT, TRAINED, align, measured
from facts import Facts, Pair, pairs_of, read_facts
from showing import LEARNED, alignment_figure, alignment_table, probe_figure
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import reftlab as rl

HERE = Path(__file__).parent
PARTS = ("output", "attn.output", "mlp.output")


@dataclass(frozen=True)
class Settings:
    """How large the study is.

    Attributes:
        pairs: pairs of countries of the patching maps.
        blocks: where subspaces are learned, at `rank`.
        rank: of these.
        block: where other ranks are learned.
        ranks: these.
        seeds: trainings of each.
        steps: of a training, eight pairs each.
        tested: pairs of countries in a test.
    """

    pairs: int = 24
    blocks: tuple[int, ...] = (4, 8, 12, 16, 20, 24)
    rank: int = 16
    block: int = 12
    ranks: tuple[int, ...] = (1, 4, 16, 64, 256)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 120
    tested: int = 48


SMALL = Settings(pairs=2, blocks=(12,), ranks=(16,), seeds=(0,), steps=4, tested=4)


def known(model: Any, facts: dict[str, Facts]) -> pd.DataFrame:
    """How often the model's most probable token, and the best among all answers, is the right one."""
    lines = []
    for name, one in facts.items():
        with torch.no_grad():
            logits = model(one.ids).logits[:, -1]
        among = one.answers.unique()
        lines.append(
            {
                "template": name,
                "countries": len(one.ids),
                "most probable token": int((logits.argmax(1) == one.answers).sum()),
                "best of all answers": int((among[logits[:, among].argmax(1)] == one.answers).sum()),
            }
        )
    return pd.DataFrame(lines)


def maps(model: Any, tokenizer: Any, facts: Facts, pairs: list[Pair], out: Path) -> None:
    """Patching maps over blocks × tokens of the stream, attention and MLP outputs, averaged over pairs."""
    clean, corrupt = ([facts.texts[pair[side]] for pair in pairs] for side in (0, 1))
    metric = rl.logit_diff(
        [int(facts.answers[a]) for a, _ in pairs], [int(facts.answers[b]) for _, b in pairs]
    )
    frames = []
    for part in PARTS:
        found = rl.sweep(
            model, clean, corrupt, sites=f"blocks[*].{part}", metric=metric, tokenizer=tokenizer,
            progress=False,
        )  # fmt: skip
        found.plot().savefig(out / f"patching_{part.replace('.', '_')}.png")
        frames.append(found.to_frame().assign(part=part))
    cells = ["part", "block", "position", "column"]
    means = pd.concat(frames).groupby(cells)[["effect", "normalised"]].mean().reset_index()
    means.to_csv(out / "patching.csv", index=False, float_format="%.5g")


def alignments(
    model: Any, tokenizer: Any, facts: dict[str, Facts], numbers: dict[str, list[int]], settings: Settings,
    work: Path,
) -> pd.DataFrame:  # fmt: skip
    """Interchange accuracy of learned subspaces and of their controls, block by block and rank by rank."""
    cells = [(block, settings.rank) for block in settings.blocks]
    cells += [(settings.block, rank) for rank in settings.ranks if rank != settings.rank]
    pairs, lines = pairs_of(numbers["train"], facts[TRAINED[0]]), []
    work.mkdir(parents=True, exist_ok=True)
    for seed in settings.seeds:
        for block, rank in cells:
            size = f"{settings.steps}-{settings.tested}"
            file = work / f"block{block}-rank{rank}-seed{seed}-{size}.json"
            if not file.exists():
                bound = align(model, tokenizer, facts, block, rank, pairs, steps=settings.steps, seed=seed)
                found = measured(bound, facts, numbers, settings.tested)
                part = file.with_suffix(".part")
                part.write_text(json.dumps(found), encoding="utf-8")
                part.replace(file)
            own = json.loads(file.read_text(encoding="utf-8"))
            lines += [{"block": block, "rank": rank, "seed": seed, **line} for line in own]
            learned = {line["tested_on"]: round(line["accuracy"], 2) for line in own
                       if line["swapped"] == LEARNED}  # fmt: skip
            print(f"block {block} rank {rank} seed {seed}: {learned}", flush=True)
    return pd.DataFrame(lines)


def probes(
    model: Any, reft: rl.BoundModel, facts: Facts, countries: list[dict[str, str]], pairs: list[Pair]
) -> pd.DataFrame:
    """What a probe of "in Europe or not", trained on bare runs, reads at the last token of swapped ones."""
    labels = np.array([one["continent"] == "Europe" for one in countries])
    base, other = torch.tensor(pairs).T
    bare, blocks = rl.InterventionGraph().bind(model), range(model.config.num_hidden_layers)
    sites, lines = [f"blocks[{block}].output @ last" for block in blocks], []
    with torch.no_grad():
        plain = bare.read(*sites, input_ids=facts.ids)
        edited = reft.read(
            *sites, input_ids=facts.ids[base], sources={"other": {"input_ids": facts.ids[other]}}
        )
    for block, site in zip(blocks, sites, strict=True):
        vectors, swapped = plain[site][:, 0].numpy(), edited[site][:, 0].numpy()
        probe = make_pipeline(
            StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=2000)
        )
        held_out = cross_val_score(probe, vectors, labels, cv=5, scoring="balanced_accuracy").mean()
        read = probe.fit(vectors, labels).predict(swapped)
        differs = labels[base] != labels[other]
        lines.append(
            {
                "block": block,
                "bare runs, held out (balanced accuracy)": held_out,
                "swapped runs: reads the base country": float((read == labels[base])[differs].mean()),
                "swapped runs: reads the other country": float((read == labels[other])[differs].mean()),
            }
        )
    return pd.DataFrame(lines)


def replies(
    model: Any, tokenizer: Any, bound: dict[str, rl.BoundModel], facts: dict[str, Facts],
    countries: list[dict[str, str]], pairs: list[Pair],
) -> str:  # fmt: skip
    """What the model goes on to say, without and with the swap, for a few pairs."""
    lines = ["| prompt | swapped with | goes on, bare | goes on, swapped |", "|---|---|---|---|"]
    for name, one in facts.items():
        for base, other in pairs[:3]:
            ids = one.ids[base][None]
            options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
            sources = {"other": {"input_ids": one.ids[other][None]}}
            with torch.no_grad():
                said = (
                    model.generate(ids, **options),
                    bound[name].generate(input_ids=ids, sources=sources, **options),
                )
            texts = [tokenizer.decode(tokens[0, ids.shape[1] :]).replace("\n", "⏎") for tokens in said]
            lines.append(f"| {one.texts[base]} | {countries[other]['country']} | {' | '.join(texts)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="few pairs, one block, few steps")
    parser.add_argument("--work", type=Path, default=Path("out/factual_recall"), help="finished trainings")
    parser.add_argument("--out", type=Path, help="tables and figures [this folder; with --small, --work]")
    options = parser.parse_args()
    settings = SMALL if options.small else Settings()
    out = options.out or (options.work if options.small else HERE)
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = rl.load_model()
    model.requires_grad_(False)
    countries, facts = read_facts(tokenizer)
    knows = known(model, facts)
    print(knows.to_string(index=False), flush=True)
    knows.to_csv(out / "known.csv", index=False)

    order = list(range(len(countries)))
    random.Random(0).shuffle(order)
    numbers = {"train": sorted(order[:20]), "test": sorted(order[20:])}
    first = facts[TRAINED[0]]
    maps(model, tokenizer, first, pairs_of(order, first, settings.pairs), out)
    table = alignments(model, tokenizer, facts, numbers, settings, options.work / "cells")
    table.to_csv(out / "alignment.csv", index=False, float_format="%.5g")
    alignment_figure(table, settings.rank, settings.block).savefig(out / "alignment.png")

    # All swaps of some size do the trained countries, so the one to look at is chosen by the others.
    learned = table[(table["swapped"] == LEARNED) & (table["tested_on"] == HELD_OUT)]
    block, rank = map(int, learned.groupby(["block", "rank"])["accuracy"].mean().idxmax())
    bound = align(
        model, tokenizer, facts, block, rank, pairs_of(numbers["train"], first), steps=settings.steps, seed=0
    )
    tested = pairs_of(numbers["test"], first, 48)
    probed = probes(model, bound[TRAINED[0]], first, countries, tested)
    probed.to_csv(out / "probes.csv", index=False, float_format="%.5g")
    title = f"In Europe or not, at the last token; swap of rank {rank} at block {block}"
    probe_figure(probed, title).savefig(out / "probes.png")
    said = replies(model, tokenizer, bound, facts, countries, tested)
    text = "\n\n".join([alignment_table(table), f"Swap of rank {rank} at block {block}, seed 0:", said])
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
