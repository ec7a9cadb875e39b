"""The figure of mediation: which share of an effect flows through each site and token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from reftlab.plotting.style import message_figure
from reftlab.plotting.sweep import HeatMap, sweep_figure

__all__ = ["mediation_figure"]

_MOST_PANELS = 6


def mediation_figure(
    shares: Mapping[str, Float[np.ndarray, "site head column"]],
    paths: Sequence[str],
    rows: Sequence[str],
    heads: Sequence[int] | None,
    columns: Sequence[str],
    title: str,
    every_token: bool = True,
    missing: str = "",
) -> Figure:
    """Draw maps of shares, one panel for each kind and path.

    Args:
        shares: of the whole effect, by what they are called; NaN is drawn grey.
        paths: the path that named each site; each has panels of its own.
        rows: label of each site.
        heads: numbers of the heads, or None.
        columns: label of each column of tokens.
        title: above all panels.
        every_token: whether each token is a column.
        missing: why there are no shares; a figure that says so is drawn then.
    """
    if missing:
        return message_figure(title, f"no shares are shown: {missing}")
    panels = []
    for path in dict.fromkeys(paths):
        own = [number for number, site in enumerate(paths) if site == path]
        labels = [rows[number] for number in own]
        y = "block" if all(label.isdigit() for label in labels) else "site"
        for name, values in shares.items():
            part, x = values[own], "token" if every_token else "position"
            if heads is None:
                panels.append(HeatMap(f"{name}\n{path}", part[:, 0], labels, columns, y, x))
                continue
            numbers = [str(head) for head in heads]
            if len(columns) * len(shares) <= _MOST_PANELS:
                panels += [
                    HeatMap(f"{name}\n{path} at {column!r}", part[:, :, n], labels, numbers, y, "head")
                    for n, column in enumerate(columns)
                ]
                continue
            known = np.abs(np.nan_to_num(part))
            strongest = np.take_along_axis(part, known.argmax(-1, keepdims=True), -1)[..., 0]
            where = f"{name}\n{path}, at each head's strongest token"
            panels.append(HeatMap(where, strongest, labels, numbers, y, "head"))
    return sweep_figure(panels, title, "share of the whole effect: 1 all of it, 0 none; grey: not run")
