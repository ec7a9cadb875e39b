"""The figure of mediation: which share of an effect flows through each site and token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from reftlab.plotting.style import message_figure
from reftlab.plotting.sweep import HeatMap, sweep_figure

__all__ = ["mediation_figure"]

_MOST_PANELS = 6
_FEW_COLUMNS = 6
"""So few columns are all drawn."""
_EMPTY = 0.01
"""A share of the effect below which nothing to speak of flows through a place."""

Shares = Mapping[str, Float[np.ndarray, "site head column"]]


def mediation_figure(
    shares: Shares,
    paths: Sequence[str],
    rows: Sequence[str],
    heads: Sequence[int] | None,
    columns: Sequence[str],
    title: str,
    every_token: bool = True,
    missing: str = "",
) -> Figure:
    """Draw maps of shares, one panel for each kind and path.

    Neighbouring tokens through which next to nothing flows are drawn as one column.

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
    panels, note = [], ""
    if heads is None:
        shares, columns, note = _joined(shares, columns)
    names = list(dict.fromkeys(paths))
    for path in names:
        own = [number for number, site in enumerate(paths) if site == path]
        labels = [rows[number] for number in own]
        y = "block" if all(label.isdigit() for label in labels) else "site"
        also = f"\n{path}" if len(names) > 1 else ""
        for kind, values in shares.items():
            name = kind.replace(": ", ":\n")
            part, x = values[own], "token" if every_token else "position"
            if heads is None:
                panels.append(HeatMap(f"{name}{also}", part[:, 0], labels, columns, y, x))
                continue
            numbers = [str(head) for head in heads]
            if len(columns) * len(shares) <= _MOST_PANELS:
                panels += [
                    HeatMap(f"{name}{also}\nat {column!r}", part[:, :, n], labels, numbers, y, "head")
                    for n, column in enumerate(columns)
                ]
                continue
            known = np.abs(np.nan_to_num(part))
            strongest = np.take_along_axis(part, known.argmax(-1, keepdims=True), -1)[..., 0]
            where = f"{name}{also}\nat each head's strongest token"
            panels.append(HeatMap(where, strongest, labels, numbers, y, "head"))
    scale = "share of the whole effect:\n1 all of it, 0 none"
    if any(np.isnan(values).any() for values in shares.values()):
        scale += "; grey: not run"
    return sweep_figure(panels, title if len(names) > 1 else f"{title}; {names[0]}", scale, note)


def _joined(
    shares: Shares, columns: Sequence[str]
) -> tuple[Mapping[str, Float[np.ndarray, "site head joined"]], list[str], str]:
    """The shares with runs of empty columns as one column each, their labels, and what to say of it."""
    flow = np.max([np.abs(np.nan_to_num(values)).max((0, 1)) for values in shares.values()], 0)
    runs = [list(run) for _, run in groupby(range(len(columns)), key=lambda n: bool(flow[n] < _EMPTY))]
    if len(columns) <= _FEW_COLUMNS or not any(flow >= _EMPTY):
        return shares, list(columns), ""
    kept = [part for run in runs for part in ([run] if flow[run[0]] < _EMPTY and len(run) > 2 else zip(run))]
    labels = [columns[part[0]] if len(part) == 1 else f"… {len(part)} …" for part in kept]
    if len(kept) == len(columns):
        return shares, labels, ""
    # Of those that are joined, the largest share stands for all.
    strongest = [part[int(np.argmax(flow[list(part)]))] for part in kept]
    said = f"… n …: so many neighbouring columns as one, since less than {_EMPTY:.0%} of the effect flows "
    return {name: values[:, :, strongest] for name, values in shares.items()}, labels, said + "through each"
