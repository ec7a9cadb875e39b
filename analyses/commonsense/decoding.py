"""Is the right answer decodable at the last prompt token, block by block, without and with the edits?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.lines import Line2D
from questions import Chosen
from showing import TITLES

import reftlab as rl
from reftlab.plotting.style import BLACK, BLUE, GREY, SKY, VERMILLION, empty_figure, frame

__all__ = ["decode", "decoding_figure"]

STYLES = {
    "base": ("without edits", GREY, "--"),
    "edited": ("with edits", VERMILLION, "-"),
    "transfer": ("with edits, probe of the bare model", BLUE, "-."),
}


def decode(artifact: Path, model: Any, tokenizer: Any, chosen: Chosen, folds: int) -> pd.DataFrame:
    """Probe the last token's vector after each block for the right answer, on the test questions.

    Args:
        artifact: the trained edits.
        model, tokenizer: the bare model.
        chosen: the questions.
        folds: of the probes' cross-validation.
    """
    reft = rl.load(artifact, model, tokenizer)
    found = rl.probe_change(
        reft,
        [question.prompt for question in chosen.test],
        {"the right answer": [question.answer for question in chosen.test]},
        "blocks[*].output",
        "last",
        folds=folds,
        chat=False,
    )
    edited = {int(bound.site.label) for bound in reft.edits}
    table = found.to_frame()
    return table.assign(task=chosen.task, has_edit=table.block.isin(edited))


def decoding_figure(table: pd.DataFrame) -> Any:
    """Scores of the probes against depth, a panel a task.

    Args:
        table: what `decode` returned for each task, one after the other.
    """
    tasks = list(dict.fromkeys(table.task))
    figure = empty_figure(3.3 * max(len(tasks), 2) + 0.6, 3.8)
    grid = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for axes, task in zip(grid, tasks, strict=True):
        own = table[table.task == task]
        for run, (_, colour, line) in STYLES.items():
            if run != "transfer":
                axes.fill_between(
                    own.block, own[f"{run}_low"], own[f"{run}_high"], color=colour, alpha=0.18, linewidth=0
                )
            axes.plot(own.block, own[run], line, color=colour, linewidth=1.2)
        apart = own[own.p_value <= 0.05]
        axes.plot(apart.block, apart.edited, "s", color=BLACK, markersize=4)
        axes.plot(own.block, own.chance, ":", color=SKY, linewidth=1.4)
        edits = own.block[own.has_edit]
        axes.plot(edits, [0.02] * len(edits), "|", color=VERMILLION, markersize=7,
                  transform=axes.get_xaxis_transform())  # fmt: skip
        frame(axes, x="block", title=TITLES[task])
    grid[0].set_ylabel(f"{table.metric.iloc[0].replace('_', ' ')} of the probe", fontsize=9)
    handles = [
        Line2D([], [], linestyle=line, color=colour, label=label) for label, colour, line in STYLES.values()
    ]
    for label, line, marker, colour in (
        ("chance", ":", "", SKY),
        ("differs from without edits, p ≤ 0.05", "", "s", BLACK),
        ("a block with an edit", "", "|", VERMILLION),
    ):
        handles.append(Line2D([], [], linestyle=line, marker=marker, color=colour, markersize=5, label=label))
    figure.legend(
        handles=handles, fontsize=8, frameon=False, loc="outside lower center", ncols=2 + (len(tasks) > 1)
    )
    return figure
