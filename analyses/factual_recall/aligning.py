"""Distributed alignment search: a subspace in which the country stands, and how well swapping it works."""

from __future__ import annotations

import random
from typing import Any

import torch
from facts import TEMPLATES, Facts, Pair, examples, pairs_of

import reftlab as rl

__all__ = ["GROUPS", "HELD_OUT", "TRAINED", "align", "measured"]

TRAINED, HELD_OUT = TEMPLATES[:2], "held-out countries"
GROUPS = {
    "trained countries": ("capital is", "train"),
    HELD_OUT: ("capital is", "test"),
    "held-out countries, other words": ("question", "test"),
    "held-out countries, language": ("language", "test"),
}
"""What a swap is tested on: the template, and which countries."""


def swap_at(model: Any, tokenizer: Any, block: int, subject: int, swap: Any) -> rl.BoundModel:
    """The swap at the country's token, from a run on the other country's prompt."""
    graph = rl.InterventionGraph(
        rl.Source("other"),
        rl.Edit("country", at=f"blocks[{block}].output", positions=[subject], intervention=swap,
                source=rl.Read(run="other")),
    )  # fmt: skip
    return graph.bind(model, tokenizer)


def align(
    model: Any, tokenizer: Any, facts: dict[str, Facts], block: int, rank: int, pairs: list[Pair],
    *, steps: int, seed: int, rows: int = 8,
) -> dict[str, rl.BoundModel]:  # fmt: skip
    """Train one rotation on pairs of countries, in two templates in turn.

    Returns:
        It bound for every template, because the country's token stands elsewhere in each; all share the
        rotation.
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
        one, reft = facts[TRAINED[step % 2]], bound[TRAINED[step % 2]]
        base, other = torch.tensor(chance.sample(pairs, min(rows, len(pairs)))).T
        found = reft(
            input_ids=one.ids[base], sources={"other": {"input_ids": one.ids[other]}}, logits_to_keep=1
        )
        loss = torch.nn.functional.cross_entropy(found.logits[:, -1], one.answers[other])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return bound


def measured(
    bound: dict[str, rl.BoundModel], facts: dict[str, Facts], numbers: dict[str, list[int]], count: int
) -> list[dict[str, Any]]:
    """Interchange accuracy of a learned subspace and its controls, a line a group and way of swapping."""
    lines: list[dict[str, Any]] = []
    for group, (template, part) in GROUPS.items():
        one = facts[template]
        found = rl.interchange_accuracy(
            bound[template], examples(one, pairs_of(numbers[part], one, count)), choices=one.choices,
            chat=False, draws=1, detailed=0, progress=False,
        )  # fmt: skip
        table = found.to_frame().assign(tested_on=group)
        table["swapped"] = table["swapped"].str.replace(r" \(\d+\)$", "", regex=True)
        lines += table[["tested_on", "swapped", "accuracy", "n"]].to_dict("records")
    return lines
