"""The figures of a probe map."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from reftlab.errors import DataError, did_you_mean
from reftlab.plotting.probing import probe_line_figure, probe_map_figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from reftlab.probing.result import ProbeMap

__all__ = ["by_head", "draw"]

_WORDS = {
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "auroc": "AUROC",
    "r2": "R²",
    "selectivity": "selectivity",
    "bits": "description length (bits)",
    "compression": "compression (uniform code ÷ online code)",
    "gain": "gain (code by class frequencies ÷ online code)",
}


def draw(result: ProbeMap, metric: str | None) -> Figure:
    """The figure of a map; see `ProbeMap.plot`."""
    name = result.metric if metric is None else metric
    values, baseline, baseline_name = _values(result, name)
    n = result.counts["vectors"]
    many = f"n = {n[0]}" if len(set(n.tolist())) == 1 else f"n = {n.min()} to {n.max()}"
    what = f"{result.estimator_name}, {result.folds} folds, {many}"
    what += ", chat template" * bool(result.settings["chat"])
    # p-values are of the score; a code's length or selectivity has none.
    tested = name in result.metrics and bool(np.isfinite(result.p_values).any())
    significant = result.significant() if tested else np.zeros(values.shape, dtype=bool)
    rows, across = _rows(result)
    title = f"Probes: {what}"
    most = 1.0 if name in result.metrics else float("nan")
    if len(result.columns) == 1 and _are_heads(result) and len(result.sites) > 1:
        grid, (blocks, heads) = _grid(result, values[:, 0])
        marks = _grid(result, significant[:, 0].astype(float))[0] > 0
        at = f", at {result.columns[0]!r}" if result.columns[0] else ""
        return probe_map_figure(
            grid, list(map(str, blocks)), list(map(str, heads)), title + at, _WORDS[name],
            marks if tested else None, baseline, baseline_name, "block", most, "head",
        )  # fmt: skip
    if len(result.columns) > 1:
        return probe_map_figure(
            values, rows, result.columns, title, _WORDS[name], significant if tested else None, baseline,
            baseline_name, across, most,
        )  # fmt: skip
    if name == "bits" and result.description is not None:
        baseline = float(np.nanmean(values * result.description["compression"]))
        baseline_name = "uniform code"
    column = result.columns[0]
    intervals = result.intervals.get(name)
    control = None if result.control is None else result.control.get(name)
    return probe_line_figure(
        rows,
        values[:, 0],
        None if intervals is None else intervals[:, 0],
        baseline,
        baseline_name,
        None if control is None else control[:, 0],
        significant[:, 0] if tested else None,
        f"{title}, at {column!r}" if column else title,
        _WORDS[name],
        across,
        result.level,
    )


def by_head(result: ProbeMap, metric: str | None, column: int) -> pd.DataFrame:
    """A metric of heads at one position as a frame; see `ProbeMap.by_head`."""
    import pandas as pd

    if not _are_heads(result):
        raise DataError(
            "not every site is a head of a block; probe with sites='blocks[*].attn.heads', and as many heads "
            "of one kind as you like"
        )
    values = _values(result, result.metric if metric is None else metric)[0][:, column]
    grid, (blocks, heads) = _grid(result, values)
    return pd.DataFrame(grid, pd.Index(blocks, name="block"), pd.Index(heads, name="head"))


def _are_heads(result: ProbeMap) -> bool:
    """Whether every site is a head of a block, and none has the number of another."""
    places = [(site.block, site.head) for site in result.sites]
    return not any(None in place for place in places) and len(set(places)) == len(places)


def _grid(result: ProbeMap, values: np.ndarray) -> tuple[np.ndarray, tuple[list[int], list[int]]]:
    """Values of heads `(block, head)`, NaN where there is none, and the numbers of both."""
    blocks = sorted({site.block for site in result.sites if site.block is not None})
    heads = sorted({site.head for site in result.sites if site.head is not None})
    grid = np.full((len(blocks), len(heads)), np.nan)
    for site, value in zip(result.sites, values.tolist(), strict=True):
        if site.block is not None and site.head is not None:
            grid[blocks.index(site.block), heads.index(site.head)] = value
    return grid, (blocks, heads)


def _rows(result: ProbeMap) -> tuple[list[str], str]:
    """What the rows are called, by block where that tells them apart, and what they are."""
    blocks = [site.block for site in result.sites]
    if _are_heads(result):
        return [f"{site.block}.{site.head}" for site in result.sites], "block.head"
    by_block = None not in blocks and len(set(blocks)) == len(blocks)
    return ([str(block) for block in blocks], "block") if by_block else (
        [site.name for site in result.sites], "site"
    )  # fmt: skip


def _values(result: ProbeMap, name: str) -> tuple[np.ndarray, float, str]:
    if name in result.metrics:
        return result.metrics[name], float(result.chance[name].mean()), "chance"
    if name == "selectivity":
        if result.selectivity is None:
            raise DataError("metric='selectivity': there is no control here; probe with control='auto'")
        return result.selectivity, 0.0, "as on control labels"
    if result.description is not None and name in result.description:
        values = result.description[name]
        return values, (1.0 if name != "bits" else float("nan")), "no knowledge"
    known = [*result.metrics, "selectivity", *(result.description or ())]
    raise DataError(
        f"metric={name!r}: expected one of {', '.join(map(repr, known))}.{did_you_mean(name, known)}"
    )
