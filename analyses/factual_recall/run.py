"""Where does a small model keep the country while it recalls its capital, and can one swap it?

    python analyses/factual_recall/run.py              # about 15 minutes on two CPU cores
    python analyses/factual_recall/run.py --small      # a minute, to see that it runs

Patching maps, a subspace for "country" found by distributed alignment search, what swapping it does to facts
that it was not trained on, and probes before and after the swap. Writes tables (`*.csv`, `table.md`) and
figures into `--out`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import reftlab as rl
from reftlab.plotting.style import BLUE, GREY, ORANGE, VERMILLION, empty_figure, frame

HERE = Path(__file__).parent
TRAINED, OTHER_WORDS, OTHER_FACT = ("capital is", "visit"), "question", "language"


@dataclass(frozen=True)
class Facts:
    """Prompts of one template, all of one length.

    Attributes:
        ids: `(country, token)`.
        answers: first token of each answer, `(country,)`.
        subject: number of the country's token.
    """

    ids: Tensor
    answers: Tensor
    subject: int


def read_facts(tokenizer) -> tuple[list[dict], dict[str, Facts]]:
    data = json.loads((HERE / "facts.json").read_text(encoding="utf-8"))
    countries, found = data["countries"], {}
    for name, template in data["templates"].items():
        ids = torch.tensor([tokenizer(template.format(country=c["country"])).input_ids for c in countries])
        kind = "language" if name == OTHER_FACT else "capital"
        answers = [tokenizer(" " + c[kind], add_special_tokens=False).input_ids[0] for c in countries]
        (differs,) = (ids != ids[0]).any(0).nonzero().T
        assert len(differs) == 1, (name, differs)
        found[name] = Facts(ids, torch.tensor(answers), int(differs[0]))
    return countries, found


def choose(logits: Tensor, among: Tensor) -> Tensor:
    """The most probable of some tokens in each row."""
    return among[logits[:, among].argmax(1)]


def known(model, facts: dict[str, Facts]) -> pd.DataFrame:
    """How often the model's most probable token, and the best among all answers, is the right one."""
    rows = []
    for name, one in facts.items():
        with torch.no_grad():
            logits = model(one.ids).logits[:, -1]
        rows.append(
            {
                "template": name,
                "countries": len(one.ids),
                "first": int((logits.argmax(1) == one.answers).sum()),
                "best of the answers": int((choose(logits, one.answers.unique()) == one.answers).sum()),
            }
        )
    return pd.DataFrame(rows)


def maps(
    model, tokenizer, facts: Facts, countries: list[dict], pairs: list[tuple[int, int]], out: Path
) -> None:
    """Patching maps over blocks × tokens of the stream, attention and MLP outputs, averaged over pairs."""
    texts = [tokenizer.decode(ids) for ids in facts.ids]
    clean, corrupt = ([texts[pair[side]] for pair in pairs] for side in (0, 1))
    metric = rl.logit_diff(
        [int(facts.answers[a]) for a, _ in pairs], [int(facts.answers[b]) for _, b in pairs]
    )
    frames = []
    for part in ("output", "attn.output", "mlp.output"):
        found = rl.sweep(
            model,
            clean,
            corrupt,
            sites=f"blocks[*].{part}",
            metric=metric,
            tokenizer=tokenizer,
            progress=False,
        )
        found.plot().savefig(out / f"patching_{part.replace('.', '_')}.png")
        frames.append(found.to_frame().assign(part=part))
    pd.concat(frames).to_csv(out / "patching.csv", index=False)


def swap_at(model, tokenizer, block: int, subject: int, intervention: rl.Intervention) -> rl.BoundModel:
    graph = rl.InterventionGraph(
        rl.Source("other"),
        rl.Edit(
            "country",
            at=f"blocks[{block}].output",
            positions=[subject],
            intervention=intervention,
            source=rl.Read(run="other"),
        ),
    )
    return graph.bind(model, tokenizer)


def swapped_logits(reft: rl.BoundModel, facts: Facts, pairs: list[tuple[int, int]]) -> Tensor:
    base, other = (torch.tensor([pair[side] for pair in pairs]) for side in (0, 1))
    return reft(input_ids=facts.ids[base], sources={"other": {"input_ids": facts.ids[other]}}).logits[:, -1]


def align(
    model, tokenizer, facts: dict[str, Facts], block: int, rank: int, pairs: list, steps: int, seed: int
) -> dict[str, rl.BoundModel]:
    """Train one rotation on the capitals of some countries; returns it bound for every template.

    One object a template, because the country's token stands elsewhere; all share the rotation.
    """
    torch.manual_seed(seed)
    chance = random.Random(seed)
    bound = {
        name: swap_at(model, tokenizer, block, one.subject, rl.RotatedSwap(rank=rank))
        for name, one in facts.items()
    }
    rotation = bound[TRAINED[0]].interventions["country"]
    for reft in bound.values():
        reft.interventions["country"] = rotation
    optimiser = torch.optim.Adam(rotation.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, steps)
    for step in range(steps):
        name = TRAINED[step % len(TRAINED)]
        batch = chance.sample(pairs, min(16, len(pairs)))
        logits = swapped_logits(bound[name], facts[name], batch)
        wanted = facts[name].answers[torch.tensor([other for _, other in batch])]
        loss = torch.nn.functional.cross_entropy(logits, wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return bound


@torch.no_grad()
def interchange_accuracy(reft: rl.BoundModel, facts: Facts, pairs: list[tuple[int, int]]) -> float:
    """Share of pairs whose best answer, among all answers, is the other country's."""
    found = []
    for start in range(0, len(pairs), 32):
        some = pairs[start : start + 32]
        wanted = facts.answers[torch.tensor([other for _, other in some])]
        found.append(choose(swapped_logits(reft, facts, some), facts.answers.unique()) == wanted)
    return float(torch.cat(found).float().mean())


def pairs_of(numbers: list[int], facts: Facts) -> list[tuple[int, int]]:
    """Ordered pairs of countries whose answers differ."""
    return [(a, b) for a, b in itertools.permutations(numbers, 2) if facts.answers[a] != facts.answers[b]]


def alignments(model, tokenizer, facts, train, test, blocks, ranks, seeds, steps, out) -> pd.DataFrame:
    """Interchange accuracy of learned subspaces and of their controls, block by block and rank by rank."""
    rows = []
    cells = [(block, ranks[-2] if len(ranks) > 1 else ranks[0]) for block in blocks]
    cells += [(blocks[1] if len(blocks) > 1 else blocks[0], rank) for rank in ranks]
    groups = {
        "trained countries": (TRAINED[0], train),
        "held-out countries": (TRAINED[0], test),
        "held-out, other words": (OTHER_WORDS, test),
        "held-out, language": (OTHER_FACT, test),
    }
    width = model.config.hidden_size
    for block, rank in dict.fromkeys(cells):
        for seed in seeds:
            torch.manual_seed(1000 + seed)
            learned = align(
                model, tokenizer, facts, block, rank, pairs_of(train, facts[TRAINED[0]]), steps, seed
            )
            kinds = {"learned": learned}
            for kind, intervention in (
                ("random subspace", rl.RotatedSwap(rank=rank)),
                ("whole vector", rl.Swap()),
            ):
                kinds[kind] = {
                    name: swap_at(model, tokenizer, block, one.subject, intervention)
                    for name, one in facts.items()
                }
            for kind, bound in kinds.items():
                if kind == "whole vector" and (seed or rank != cells[0][1]):
                    continue
                for group, (template, numbers) in groups.items():
                    accuracy = interchange_accuracy(
                        bound[template], facts[template], pairs_of(numbers, facts[template])
                    )
                    rows.append(
                        {
                            "block": block,
                            "rank": rank if kind != "whole vector" else width,
                            "seed": seed,
                            "swap": kind,
                            "tested on": group,
                            "accuracy": accuracy,
                        }
                    )
            print(
                f"block {block} rank {rank} seed {seed}: {[round(r['accuracy'], 2) for r in rows[-12:]]}",
                flush=True,
            )
            pd.DataFrame(rows).to_csv(out / "alignment.csv", index=False)
    return pd.DataFrame(rows)


def draw_alignment(table: pd.DataFrame, out: Path) -> None:
    figure = empty_figure(10.0, 3.6)
    left, right = figure.subplots(1, 2, sharey=True)
    styles = {
        "trained countries": (BLUE, "o-"),
        "held-out countries": (VERMILLION, "s-"),
        "held-out, other words": (ORANGE, "^-"),
        "held-out, language": ("#222222", "D-"),
    }
    by_block = table[table["rank"] == table[table.swap == "learned"].groupby("rank").block.nunique().idxmax()]
    learned = table[table.swap == "learned"]
    block = learned.groupby("block")["rank"].nunique().idxmax()
    for group, (colour, mark) in styles.items():
        for axes, data, x in ((left, by_block, "block"), (right, table[table.block == block], "rank")):
            for kind, alpha, line in (
                ("learned", 1.0, mark),
                ("random subspace", 0.35, mark.replace("-", ":")),
            ):
                some = data[(data.swap == kind) & (data["tested on"] == group)]
                means = some.groupby(x).accuracy.mean()
                label = group if kind == "learned" else None
                axes.plot(
                    means.index, means.values, line, color=colour, alpha=alpha, markersize=5, label=label
                )
    right.set_xscale("log", base=2)
    ranks = sorted(learned[learned.block == block]["rank"].unique())
    right.set_xticks(ranks, [str(rank) for rank in ranks])
    right.plot([], [], ":", color=GREY, label="random subspace of the same rank")
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    left.set_ylim(-0.03, 1.03)
    frame(left, x="block", y="interchange accuracy", title=f"Rank {int(by_block['rank'].iloc[0])}")
    frame(right, x="rank of the swapped subspace", title=f"Block {block}")
    figure.savefig(out / "alignment.png")


def probes(
    model, reft: rl.BoundModel, facts: Facts, countries: list[dict], pairs: list, out: Path
) -> pd.DataFrame:
    """What a probe of the continent, trained on bare runs, reads at the last token of swapped ones."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels = np.array([c["continent"] == "Europe" for c in countries])
    base, other = (torch.tensor([pair[side] for pair in pairs]) for side in (0, 1))
    bare = rl.InterventionGraph().bind(model)
    blocks, rows = range(model.config.num_hidden_layers), []
    sites = [f"blocks[{block}].output @ last" for block in blocks]
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
        rows.append(
            {
                "block": block,
                "held-out balanced accuracy on bare runs": held_out,
                "reads the base country": float((read == labels[base])[differs].mean()),
                "reads the other country": float((read == labels[other])[differs].mean()),
            }
        )
    table = pd.DataFrame(rows)
    table.to_csv(out / "probes.csv", index=False)
    figure = empty_figure(6.4, 3.4)
    axes = figure.subplots()
    styles = ((GREY, "--"), (BLUE, "o-"), (VERMILLION, "s-"))
    for name, (colour, mark) in zip(table.columns[1:], styles, strict=True):
        axes.plot(table.block, table[name], mark, color=colour, markersize=4, label=name)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set_ylim(-0.03, 1.03)
    frame(axes, x="block", y="share", title="Europe or not, at the last token, after the swap")
    figure.savefig(out / "probes.png")
    return table


def replies(model, tokenizer, bound, facts, countries, pairs) -> list[str]:
    """What the model goes on to say, without and with the swap, for a few pairs."""
    lines = ["| prompt | other country | bare | swapped |", "|---|---|---|---|"]
    for template in (TRAINED[0], OTHER_WORDS, OTHER_FACT):
        for base, other in pairs[:3]:
            ids, given = facts[template].ids[base][None], facts[template].ids[other][None]
            options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
            with torch.no_grad():
                bare = model.generate(ids, **options)[0, ids.shape[1] :]
                said = bound[template].generate(
                    input_ids=ids, sources={"other": {"input_ids": given}}, **options
                )[0, ids.shape[1] :]
            texts = [tokenizer.decode(tokens).replace("\n", "⏎") for tokens in (ids[0], bare, said)]
            lines.append(f"| {texts[0]} | {countries[other]['country']} | {texts[1]} | {texts[2]} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="few pairs, one block, few steps")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = rl.load_model()
    model.requires_grad_(False)
    countries, facts = read_facts(tokenizer)
    table = known(model, facts)
    print(table.to_string(index=False), flush=True)
    table.to_csv(options.out / "known.csv", index=False)

    numbers = list(range(len(countries)))
    random.Random(0).shuffle(numbers)
    train, test = sorted(numbers[:20]), sorted(numbers[20:])
    pairs = random.Random(1).sample(pairs_of(numbers, facts[TRAINED[0]]), 2 if options.small else 24)
    maps(model, tokenizer, facts[TRAINED[0]], countries, pairs, options.out)

    blocks, ranks, seeds, steps = (2, 8, 12, 16, 20, 24), (1, 4, 16, 64), (0, 1, 2), 200
    if options.small:
        blocks, ranks, seeds, steps = (8,), (4,), (0,), 4
    found = alignments(model, tokenizer, facts, train, test, blocks, ranks, seeds, steps, options.out)
    if not options.small:
        draw_alignment(found, options.out)
    learned = found[(found.swap == "learned") & (found["tested on"] == "trained countries")]
    block, rank = learned.groupby(["block", "rank"]).accuracy.mean().idxmax()
    bound = align(model, tokenizer, facts, block, rank, pairs_of(train, facts[TRAINED[0]]), steps, seeds[0])
    tested = pairs_of(test, facts[TRAINED[0]])
    probed = probes(model, bound[TRAINED[0]], facts[TRAINED[0]], countries, tested, options.out)
    print(probed.round(2).to_string(index=False))
    mean = found.groupby(["swap", "block", "rank", "tested on"]).accuracy.agg(["mean", "min", "max"])
    lines = ["| swap | block | rank | tested on | mean | lowest | highest |", "|---|---|---|---|---|---|---|"]
    lines += [
        f"| {' | '.join(map(str, key))} | {row['mean']:.2f} | {row['min']:.2f} | {row['max']:.2f} |"
        for key, row in mean.iterrows()
    ]
    lines += ["", *replies(model, tokenizer, bound, facts, countries, tested)]
    (options.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
