"""The tables of the study."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from runs import Run

from reftlab.explaining.geometry.angles import SubspaceAngles
from reftlab.plotting.wording import true_minus

__all__ = ["Angles", "angle_frame", "text_of"]

Angles = list[tuple[Run, Run, str, dict[str, SubspaceAngles]]]


def angle_frame(found: Angles) -> pd.DataFrame:
    """One line a pair, side and null."""
    return pd.DataFrame(
        [
            {
                "task_a": a.task, "seed_a": a.seed, "task_b": b.task, "seed_b": b.seed, "rank": a.rank,
                "side": side, "null": null, "smallest": one.smallest, "overlap": one.overlap,
                "smallest_low": one.band[0][0], "chance_median": one.chance[1], "chance_high": one.chance[2],
                "p_overlap": one.p_overlap, "p_angle": one.p_angle,
            }
            for a, b, side, angles in found
            for null, one in angles.items()
        ]
    )  # fmt: skip


def text_of(runs: pd.DataFrame, pairs: pd.DataFrame, angles: pd.DataFrame, swaps: pd.DataFrame) -> str:
    """All tables, with the sentences that say what they hold."""
    parts = (_trained(runs), _subspaces(runs, pairs, angles), _function(runs, pairs, swaps), _swaps(swaps),
             _ranks(pairs), _explained(runs))  # fmt: skip
    return true_minus("\n\n".join("\n".join(part) for part in parts)) + "\n"


def _trained(runs: pd.DataFrame) -> list[str]:
    head = ["task", "rank", "seeds", "loss, nats a token", "exact of 10", "of the kind, of 6 unseen",
            "length of the change", "KL from the bare model, nats"]  # fmt: skip
    rows = [
        [*key, len(own), _range(own.loss, ".3f"), _range(own.exact, ".0f"), _range(own.fits, ".0f"),
         _range(own.change_length, ".0f"), _range(own.divergence_from_bare, ".1f")]
        for key, own in runs.groupby(["task", "rank"], sort=False)
    ]  # fmt: skip
    return ["The edits; mean over seeds, and the range:", "", *_table(head, rows)]


def _subspaces(runs: pd.DataFrame, pairs: pd.DataFrame, angles: pd.DataFrame) -> list[str]:
    """Overlap of write and read subspaces between seeds and between tasks, beside both kinds of chance."""
    head = ["side", "rank", "between", "pairs", "overlap", "isotropic, 97.5%", "data, 97.5%",
            "pairs above data chance at 0.05", "with its own start"]  # fmt: skip
    rows = []
    for (side, rank), own in angles.groupby(["side", "rank"], sort=False):
        flat = own[own.null == "isotropic"].chance_high.iloc[0]
        data = own[own.null == "data"]
        kinds = {
            f"seeds, {task}": (data.task_a == task) & (data.task_b == task)
            for task in dict.fromkeys(runs.task)
        }
        kinds["the two tasks"] = data.task_a != data.task_b
        for name, chosen in kinds.items():
            some = data[chosen]
            if not len(some):
                continue
            task = name.removeprefix("seeds, ")
            start = runs[(runs.task == task) & (runs["rank"] == rank)].start_overlap
            rows.append(
                [side, rank, name, len(some), _range(some.overlap, ".3f"), f"{flat:.3f}",
                 f"{some.chance_high.mean():.3f}", int((some.p_overlap <= 0.05).sum()),
                 f"{start.mean():.3f}" if side == "write" and len(start) else ""]
            )  # fmt: skip
    return [
        "Overlap of subspaces of the same rank, mean over pairs and the range; 1 is the same subspace. A "
        "pair's p-value is against the data null; pairs share runs, so they are not independent:",
        "",
        *_table(head, rows),
    ]


def _function(runs: pd.DataFrame, pairs: pd.DataFrame, swaps: pd.DataFrame) -> list[str]:
    """What runs of the same task and rank have in common beside their subspaces."""
    head = ["task", "rank", "cosine of the mean changes", "of the changes prompt by prompt",
            "of the mean changes after the last block", "that of random vectors",
            "KL between seeds, trained prompts", "KL, unseen prompts",
            "KL from the bare model", "same replies, of 6"]  # fmt: skip
    rows = []
    for task in dict.fromkeys(runs.task):
        for rank in dict.fromkeys(runs["rank"]):
            some = _same(pairs, task, rank)
            own = runs[(runs.task == task) & (runs["rank"] == rank)]
            if not len(some):
                continue
            columns = ("mean_change_cosine", "change_cosine", "end_cosine")
            rows.append(
                [task, rank, *(_range(some[column], ".2f") for column in columns),
                 _range(_random_ends(swaps, task, rank), ".2f"),
                 f"{some.divergence_trained.mean():.3f}", f"{some.divergence_unseen.mean():.2f}",
                 f"{own.divergence_from_bare.mean():.1f}", f"{some.same_replies.mean():.1f}"]
            )  # fmt: skip
    other = pairs[pairs.task_a != pairs.task_b]
    lines = [
        "Agreement of what is added and of what comes of it, between seeds; random vectors are as long as "
        "the changes in whose place they were added:",
        "",
        *_table(head, rows),
    ]
    if len(other):
        lines += [
            "",
            f"Between the two tasks: cosine of the mean changes {_range(other.mean_change_cosine, '.2f')}, "
            f"after the last block {_range(other.end_cosine, '.2f')}.",
        ]
    lines += ["", *_instructed(runs)]
    return lines


def _random_ends(swaps: pd.DataFrame, task: str, rank: int) -> Any:
    if not len(swaps):
        return []
    return swaps[(swaps.task == task) & (swaps["rank"] == rank) & (swaps.kind == "random vector")].end_cosine


def _instructed(runs: pd.DataFrame) -> list[str]:
    head = ["task", "cosine with the mean change", "share inside the write subspace, by rank"]
    rows = []
    for task, own in runs.groupby("task", sort=False):
        inside = own.groupby("rank", sort=False).instructed_overlap.mean()
        rows.append(
            [
                task,
                _range(own.instructed_cosine, ".2f"),
                ", ".join(f"{r}: {v:.3f}" for r, v in inside.items()),
            ]
        )
    return [
        "The difference that asking for it in the prompt makes at the same place:",
        "",
        *_table(head, rows),
    ]


def _swaps(swaps: pd.DataFrame) -> list[str]:
    if not len(swaps):
        return ["Confined to other subspaces: there is one seed only."]
    head = ["task", "rank", "confined to", "dimensions", "of the change", "share of the effect kept"]
    rows = [
        [*key, _range(own.dimensions, ".0f"), _range(own.of_change, ".2f"), _range(own.share, ".2f")]
        for key, own in swaps.groupby(["task", "rank", "kind"], sort=False)
    ]
    return [
        "Each edit's change confined to another write subspace, and random vectors of its length in its "
        "place:",
        "",
        *_table(head, rows),
    ]


def _ranks(pairs: pd.DataFrame) -> list[str]:
    """Share of the write subspaces of lower ranks inside those of the highest."""
    if not len(pairs):
        return ["Between ranks: there is one run only."]
    ranks = sorted({*pairs.rank_a, *pairs.rank_b})
    rows = []
    for task in dict.fromkeys([*pairs.task_a, *pairs.task_b]):
        inside = pairs[(pairs.task_a == task) & (pairs.task_b == task)]
        for low in ranks[:-1]:
            some = inside[
                ((inside.rank_a == low) & (inside.rank_b == ranks[-1]))
                | ((inside.rank_b == low) & (inside.rank_a == ranks[-1]))
            ]
            if len(some):
                rows.append([task, low, ranks[-1], _range(some.write_overlap, ".3f"),
                             _range(some.mean_change_cosine, ".2f")])  # fmt: skip
    head = ["task", "rank", "inside rank", "share of the write subspace", "cosine of the mean changes"]
    return ["Lower ranks inside the highest, any two seeds:", "", *_table(head, rows)]


def _explained(runs: pd.DataFrame) -> list[str]:
    head = ["task", "rank", "seed", "largest direction promotes", "its share of the change",
            "kept by that direction", "at random", "kept by the mean change", "at random"]  # fmt: skip
    rows = [
        [run.task, run["rank"], run.seed, run.promoted.replace("|", r"\|"), f"{run.direction_share:.2f}",
         f"{run.kept_directions_1:.2f}", f"{run.random_directions_1:.2f}", f"{run.kept_constant:.2f}",
         f"{run.random_constant:.2f}"]
        for _, run in runs.iterrows()
    ]  # fmt: skip
    return [
        "The explanations side by side, with the share of the effect that they keep:",
        "",
        *_table(head, rows),
    ]


def _same(pairs: pd.DataFrame, task: str, rank: int) -> pd.DataFrame:
    if not len(pairs):
        return pairs
    same = (pairs.task_a == task) & (pairs.task_b == task)
    return pairs[same & (pairs.rank_a == rank) & (pairs.rank_b == rank)]


def _range(values: Any, form: str) -> str:
    found = np.asarray(values, dtype=float)
    found = found[np.isfinite(found)]
    if not len(found):
        return "–"
    mean, low, high = (format(of(found), form) for of in _OF)
    return mean if low == high else f"{mean} ({low} to {high})"


_OF: tuple[Callable[[Any], float], ...] = (np.mean, np.min, np.max)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]
