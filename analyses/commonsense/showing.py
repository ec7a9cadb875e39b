"""The study's results as a table, in words of the README, and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from cell import ASKED
from methods import METHODS
from questions import BY_TEXT, Chosen
from scipy.stats import binomtest

from reftlab.measuring import mean_of
from reftlab.plotting.style import BLUE, GREEN, GREY, ORANGE, VERMILLION, empty_figure, frame

__all__ = ["TITLES", "accuracy_figure", "lines_of", "per_seed", "table_text"]

MAJORITY = "majority"
TITLES = {
    "boolq": "BoolQ",
    f"ARC-Easy{BY_TEXT}": "ARC-Easy, by text",
    f"openbookqa{BY_TEXT}": "OpenBookQA, by text",
    "ARC-Easy": "ARC-Easy, by number",
    "openbookqa": "OpenBookQA, by number",
}
"""What tasks are called where they are shown."""

LABELS = {
    MAJORITY: "always the commonest answer of the training questions",
    **ASKED,
    **{name: method.label for name, method in METHODS.items()},
}


def right(cell: dict[str, Any], chosen: Chosen) -> np.ndarray:
    """Whether each test question was answered right `(question,)`."""
    wanted = np.array([question.right for question in chosen.test])
    return np.array(cell["scores"]).argmax(1) == wanted


def by_length(cell: dict[str, Any], chosen: Chosen) -> dict[str, float]:
    """Of options by text: accuracy by the likelihood of whole ones, and the share of longest ones taken."""
    if not chosen.by_text:
        return {}
    lengths = np.array([list(map(len, question.options)) for question in chosen.test])
    scores, wanted = np.array(cell["scores"]), np.array([question.right for question in chosen.test])
    taken = np.take_along_axis(lengths, scores.argmax(1)[:, None], 1)[:, 0]
    return {
        "accuracy_whole": float(((scores * lengths).argmax(1) == wanted).mean()),
        "longest_taken": float((taken == lengths.max(1)).mean()),
    }


def per_seed(cells: Sequence[dict[str, Any]], chosen: dict[str, Chosen]) -> pd.DataFrame:
    """One line a cell: accuracy with its Wilson interval, the choices taken, and the costs."""
    lines = []
    for cell in cells:
        names = cell["cell"]
        hits = right(cell, chosen[names["task"]])
        interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
        taken = np.bincount(np.array(cell["scores"]).argmax(1), minlength=len(cell["scores"][0]))
        rest = {k: v for k, v in cell.items() if k not in ("cell", "settings", "scores")}
        counted = {
            "accuracy": hits.mean(),
            "low": interval.low,
            "high": interval.high,
            "right": int(hits.sum()),
            "asked": len(hits),
            "choices_taken": "/".join(map(str, taken)),
            **by_length(cell, chosen[names["task"]]),
        }
        lines.append({**names, **counted, **rest})
    return pd.DataFrame(lines)


def lines_of(cells: Sequence[dict[str, Any]], chosen: dict[str, Chosen]) -> pd.DataFrame:
    """One line a task and method, seeds together.

    Intervals are bootstrapped over test questions, of the mean over seeds; differences are of the same
    questions.
    """
    costs = per_seed(cells, chosen)
    lines = []
    for task, own in chosen.items():
        wanted = np.array([question.right for question in own.test])
        hits = {(MAJORITY, 0): wanted == own.commonest}
        for cell in cells:
            if cell["cell"]["task"] == task:
                hits[cell["cell"]["method"], cell["cell"]["seed"]] = right(cell, own)
        for method in LABELS:
            found = [values for (name, _), values in sorted(hits.items()) if name == method]
            if not found:
                continue
            mean = torch.from_numpy(np.mean(found, axis=0))
            line = {"task": task, "method": method, "seeds": len(found), **_estimate("", mean)}
            line |= {"lowest": min(map(np.mean, found)), "highest": max(map(np.mean, found))}
            for other in (MAJORITY, "zero-shot"):
                if (other, 0) in hits and method != other:
                    line |= _estimate(f"minus_{other}_", mean - torch.from_numpy(hits[other, 0]).double())
            paid = costs[(costs.task == task) & (costs.method == method)]
            if method in METHODS:
                line |= {name: paid[name].iloc[0] for name in ("figures", "trained", "steps")}
                line |= {name: paid[name].mean() for name in ("seconds", "loss_first", "loss_last")}
                line |= {"memory_mb": (paid.peak_mb - paid.loaded_mb).mean()}
            if own.by_text and len(paid):
                line |= {name: paid[name].mean() for name in ("accuracy_whole", "longest_taken")}
            lines.append(line)
    return pd.DataFrame(lines)


def _estimate(name: str, values: torch.Tensor) -> dict[str, float]:
    found = mean_of(values.float())
    return {f"{name}value": found.value, f"{name}low": found.low, f"{name}high": found.high}


def table_text(lines: pd.DataFrame, chosen: dict[str, Chosen]) -> str:
    text = []
    for task, own in chosen.items():
        text += [
            f"**{TITLES[task]}**: {len(own.train)} training and {len(own.test)} test questions, answers "
            f"{'the text of the options' if own.by_text else ', '.join(own.choices)}.",
            "",
            "| | trained numbers | steps | seconds | memory, MB | accuracy, % | seeds, % "
            "| minus bare model | minus commonest answer |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        text += [_line(line) for _, line in lines[lines.task == task].iterrows()]
        left = "; ".join(f"{count} of {reason}" for reason, count in own.left_out.items())
        text += ["", f"Left out: {left or 'nothing'}.", ""]
        if own.by_text:
            text += [
                "| | accuracy per character, % | by the likelihood of the whole option, % "
                "| longest option taken, % |",
                "|---|---|---|---|",
            ]
            for _, line in lines[(lines.task == task) & (lines.method != MAJORITY)].iterrows():
                shares = (line.value, line.accuracy_whole, line.longest_taken)
                text.append(
                    f"| {' | '.join([LABELS[line.method], *(f'{100 * one:.1f}' for one in shares)])} |"
                )
            text.append("")
    return "\n".join(text)


def _line(line: Any) -> str:
    costs = ["", "", "", ""]
    if line.method in METHODS:
        costs = [
            f"{line.trained:,.0f}", f"{line.steps:.0f}", f"{line.seconds:.0f}",
            "" if np.isnan(line.memory_mb) else f"{line.memory_mb:,.0f}",
        ]  # fmt: skip
    seeds = f"{100 * line.lowest:.1f} to {100 * line.highest:.1f}" if line.seeds > 1 else ""
    apart = []
    for other in ("zero-shot", MAJORITY):
        value, low, high = (
            100 * line.get(f"minus_{other}_{name}", np.nan) for name in ("value", "low", "high")
        )
        apart.append("" if np.isnan(value) else f"{value:+.1f} [{low:+.1f}, {high:+.1f}]")
    accuracy = f"{100 * line.value:.1f} [{100 * line.low:.1f}, {100 * line.high:.1f}]"
    name = LABELS[line.method]
    if line.method == "lora-equal":
        name += f" ({line.figures})"
    return f"| {' | '.join([name, *costs, accuracy, seeds, *apart])} |"


def accuracy_figure(lines: pd.DataFrame, costs: pd.DataFrame) -> Any:
    """Accuracy of every method with its interval, a panel a task; small dots are the seeds."""
    tasks = list(dict.fromkeys(lines.task))
    methods = [name for name in LABELS if name in set(lines.method) and name != MAJORITY]
    across = min(len(tasks), 3)
    down = -(-len(tasks) // across)
    figure = empty_figure(2.5 * across + 3.6, (0.32 * len(methods) + 0.8) * down + 0.5)
    grid = figure.subplots(down, across, squeeze=False, sharey=True).flat
    for axes in grid[len(tasks) :]:
        axes.set_visible(False)
    for axes, task in zip(grid[: len(tasks)], tasks, strict=True):
        own = lines[lines.task == task].set_index("method")
        axes.axvline(100 * own.value[MAJORITY], color=BLUE, linewidth=1, linestyle=":")
        for place, method in enumerate(methods):
            if method not in own.index:
                continue
            colour = _colour(method)
            value, low, high = (100 * own[name][method] for name in ("value", "low", "high"))
            axes.plot([low, high], [place, place], color=colour, linewidth=2)
            axes.plot([value], [place], "D", color=colour, markersize=6)
            seeds = costs[(costs.task == task) & (costs.method == method)].accuracy
            if len(seeds) > 1:
                axes.plot(100 * seeds, [place + 0.25] * len(seeds), ".", color="#222222", markersize=4)
        frame(axes, x="accuracy (% of test questions)", title=TITLES[task], grid="x")
    grid[0].set_yticks(range(len(methods)), [LABELS[name] for name in methods])
    grid[0].set_ylim(len(methods) - 0.5, -0.5)
    figure.suptitle(
        "Lines: 95% over questions. Small dots: seeds. Dotted: always the commonest answer.", fontsize=8,
        x=0.01, ha="left",
    )  # fmt: skip
    return figure


def _colour(method: str) -> str:
    if method in ASKED:
        return GREY
    if method.startswith("lora"):
        return ORANGE
    return GREEN if method == "direft" else VERMILLION
