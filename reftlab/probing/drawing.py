"""The figures of a probe map."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from reftlab.errors import DataError, did_you_mean
from reftlab.plotting.probing import probe_line_figure, probe_map_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from reftlab.probing.result import ProbeMap

__all__ = ["draw"]

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
    what = f"{result.estimator:.40}, {result.folds} folds, {many}"
    # p-values are of the score; a code's length or selectivity has none.
    tested = name in result.metrics and bool(np.isfinite(result.p_values).any())
    significant = result.significant() if tested else np.zeros(values.shape, dtype=bool)
    blocks = [site.block for site in result.sites]
    by_block = None not in blocks and len(set(blocks)) == len(blocks)
    rows = [str(block) for block in blocks] if by_block else [site.name for site in result.sites]
    across = "block" if by_block else "site"
    title = f"Probes: {what}"
    if len(result.columns) > 1:
        return probe_map_figure(
            values, rows, result.columns, title, _WORDS[name], significant if tested else None, baseline,
            baseline_name, across,
            1.0 if name in result.metrics else float("nan"),
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
