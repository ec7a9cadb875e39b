"""Two runs compared: their subspaces, what they add, what comes of it, and a change in another's subspace."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from runs import Bare, Run, batch_of, write_whole
from tasks import TASKS
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tqdm.auto import tqdm

import reftlab as rl
from reftlab.explaining.altering import Written, altered, only_along
from reftlab.explaining.geometry.angles import SubspaceAngles, span, subspace_angles
from reftlab.measuring import behaviour_of
from reftlab.runtime.modes import evaluating

__all__ = ["alone", "angles_between", "compare", "overlap", "swapped"]

SIDES = ("write", "read")


def overlap(a: Tensor, b: Tensor) -> float:
    """Mean squared cosine of the principal angles: the share of the smaller subspace in the larger.

    Args:
        a, b: orthonormal bases, `(width, r)` and `(width, s)`.
    """
    return float((a.T @ b).square().sum()) / min(a.shape[1], b.shape[1])


def compare(runs: Sequence[Run], bare: Bare) -> pd.DataFrame:
    """Every two runs: overlap of subspaces, cosines of what they add, divergence of what comes of it."""
    bases = {side: [span(getattr(run, side)) for run in runs] for side in SIDES}
    seen = len(next(iter(TASKS.values())).pairs)
    lines = []
    for i, j in itertools.combinations(range(len(runs)), 2):
        a, b = runs[i], runs[j]
        apart = (_divergence(a, b) + _divergence(b, a)) / 2
        lines.append(
            {
                "task_a": a.task,
                "rank_a": a.rank,
                "seed_a": a.seed,
                "task_b": b.task,
                "rank_b": b.rank,
                "seed_b": b.seed,
                **{f"{side}_overlap": overlap(found[i], found[j]) for side, found in bases.items()},
                "mean_change_cosine": _cosine(a.delta.mean(0), b.delta.mean(0)),
                "change_cosine": float(cosine_similarity(a.delta, b.delta).mean()),
                "end_cosine": _cosine((a.end - bare.end).mean(0), (b.end - bare.end).mean(0)),
                "divergence_trained": float(apart[:seen].mean()),
                "divergence_unseen": float(apart[seen:].mean()),
                "same_replies": sum(map(str.__eq__, a.facts["unseen"], b.facts["unseen"])),
            }
        )
    return pd.DataFrame(lines)


def alone(runs: Sequence[Run], bare: Bare) -> pd.DataFrame:
    """One line a run: how it went, how far its subspace turned, and where it lies against the instruction."""
    lines = []
    for run in runs:
        write, instructed = span(run.write), bare.instructed[run.task]
        away = (run.log_probabilities.exp() * (run.log_probabilities - bare.log_probabilities)).sum(1)
        facts = {k: v for k, v in run.facts.items() if not isinstance(v, list | dict)}
        kept = {f"kept_{label.replace(' ', '_')}": share for label, share in run.facts["kept"].items()}
        random = {f"random_{k.replace(' ', '_')}": v for k, v in run.facts["kept_at_random"].items()}
        lines.append(
            {
                "task": run.task,
                "rank": run.rank,
                "seed": run.seed,
                **facts,
                "start_overlap": overlap(span(run.start), write),
                "read_write_overlap": overlap(span(run.read), write),
                "change_length": float(run.delta.norm(dim=1).mean()),
                "mean_change_share": float(
                    run.delta.mean(0).square().sum() / run.delta.square().sum(1).mean()
                ),
                "instructed_cosine": _cosine(run.delta.mean(0), instructed),
                "instructed_overlap": overlap(span(instructed[:, None]), write),
                "divergence_from_bare": float(away.mean()),
                "promoted": " ".join(run.facts["promoted"]),
                "unseen": " | ".join(run.facts["unseen"]).replace("\n", "⏎"),
                **kept,
                **random,
            }
        )
    return pd.DataFrame(lines)


def angles_between(
    runs: Sequence[Run], bare: Bare, draws: int, progress: bool = True
) -> list[tuple[Run, Run, str, dict[str, SubspaceAngles]]]:
    """Principal angles of every two runs of the same rank, with both kinds of chance.

    Directions drawn without regard to the model do not depend on the pair, so they are drawn once a rank
    and side and stand beside the first pair of it only.

    Args:
        runs: the runs.
        bare: what the model does without them.
        draws: how many random subspaces a comparison.
        progress: whether to show a progress bar.
    """
    pairs = [(a, b) for a, b in itertools.combinations(runs, 2) if a.rank == b.rank]
    found: list[tuple[Run, Run, str, dict[str, SubspaceAngles]]] = []
    first: set[tuple[int, str]] = set()
    for a, b in tqdm(pairs, desc="angles", disable=not progress):
        for side in SIDES:
            one, other = getattr(a, side), getattr(b, side)
            angles = {
                "data": subspace_angles(one, other, null="data", covariance=bare.covariance, draws=draws)
            }
            if (a.rank, side) not in first:
                first.add((a.rank, side))
                angles["isotropic"] = subspace_angles(one, other, draws=draws)
            found.append((a, b, side, angles))
    return found


def swapped(
    model: Any,
    tokenizer: Any,
    runs: Sequence[Run],
    bare: Bare,
    *,
    controls: int,
    folder: Path,
    progress: bool = True,
) -> pd.DataFrame:
    """Which share of each run's effect is left when its change is confined to another subspace.

    Subspaces are the write subspaces of the other seeds of the same task and rank one by one (`other
    seed`), all of them together (`all other seeds`), and random ones of the same dimensions. And random
    vectors of the change's length take its place (`random vector`): `end_cosine` is what the changes after
    the last block that two of them bring about have in common.

    Args:
        model, tokenizer: the bare model.
        runs: the runs.
        bare: what the model does without them.
        controls: how many random subspaces of each kind.
        folder: what is kept between calls.
        progress: whether to show a progress bar.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for run in tqdm(runs, desc="swaps", disable=not progress):
        others = [
            b for b in runs if (b.task, b.rank) == (run.task, run.rank) and b.seed != run.seed
        ]  # fmt: skip
        if not others:
            continue
        file = folder / f"{run.task}-r{run.rank}-s{run.seed}.json"
        wanted = {"others": sorted(b.seed for b in others), "controls": controls}
        kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if kept.get("of") != wanted:
            kept = {"of": wanted, "lines": _swapped(model, tokenizer, run, others, bare, controls)}
            write_whole(file, json.dumps(kept))
        lines += kept["lines"]
    return pd.DataFrame(lines)


@torch.no_grad()
def _swapped(
    model: Any, tokenizer: Any, run: Run, others: Sequence[Run], bare: Bare, controls: int
) -> list[dict[str, Any]]:
    reft = rl.load(run.artifact, model, tokenizer)
    behaviour, key = behaviour_of(reft, TASKS[run.task].pairs), reft.edits[0].key
    together = span(torch.cat([other.write for other in others], 1))
    generator = torch.Generator().manual_seed(run.seed)

    def random(size: int) -> Tensor:
        return span(torch.randn(len(together), size, generator=generator))

    spans = [("other seed", other.seed, span(other.write)) for other in others]
    spans.append(("all other seeds", None, together))
    spans += [("random", None, random(run.write.shape[1])) for _ in range(controls)]
    spans += [("random, as many as all", None, random(together.shape[1])) for _ in range(controls)]
    named = {"task": run.task, "rank": run.rank, "seed": run.seed}
    lines: list[dict[str, Any]] = []
    with evaluating(reft):
        for kind, seed, basis in spans:
            with altered(reft, {key: only_along(basis.T.float())}):
                share = behaviour.share(behaviour()).value
            inside = run.delta.double() @ basis
            part = float(inside.square().sum() / run.delta.double().square().sum())
            lines.append(
                {**named, "kind": kind, "other": seed, "dimensions": basis.shape[1], "share": share,
                 "of_change": part}
            )  # fmt: skip
        batch, last = batch_of(tokenizer, TASKS[run.task].prompts), "blocks[-1].output @ last"
        before: Tensor | None = None
        for _ in range(controls):
            vector = random(1)[:, 0].float() * run.delta.norm(dim=1).mean()
            with altered(reft, {key: functools.partial(_constant, vector)}):
                share = behaviour.share(behaviour()).value
                end = (reft.read(last, **batch)[last][:, 0] - bare.end).mean(0)
            shared = None if before is None else _cosine(before, end)
            lines.append({**named, "kind": "random vector", "share": share, "end_cosine": shared})
            before = end
    return lines


def _constant(vector: Tensor, written: Written) -> Tensor:
    """Add the same vector everywhere."""
    return vector.to(written.delta).expand_as(written.delta)


def _divergence(a: Run, b: Run) -> Tensor:
    """KL(a ‖ b) of the next token in nats, `(prompt,)`."""
    return (a.log_probabilities.exp() * (a.log_probabilities - b.log_probabilities)).sum(1)


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(cosine_similarity(a, b, dim=0))
