"""The heat maps of a sweep's result."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from reftlab.plotting.sweep import HeatMap, sweep_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from reftlab.sweeping.result import SiteLabel, SweepResult, What

__all__ = ["draw", "inline"]

_MOST_PANELS = 6
_DOES = {
    ("patch", "denoise"): "Clean vectors patched into the corrupted run",
    ("patch", "noise"): "Corrupted vectors patched into the clean run",
    ("ablate", ""): "Vectors of the clean run ablated",
    ("noise", ""): "Vectors of the clean run with noise",
}


def draw(result: SweepResult, what: What | None) -> Figure:
    """The figure of a result; see `SweepResult.plot`."""
    chosen: What = what or ("effect" if result.exact else "attribution")
    maps = _maps(result, result.mean(chosen), "" if chosen != "attribution" else "attribution, ")
    if what is None and result.exact and result.estimates is not None:
        agreement = result.agreement
        assert agreement is not None
        fit = f"correlation {agreement.correlation:.2f}, mean |error| {agreement.mean_absolute:.2g}"
        note = f"attribution ({fit}), "
        estimated = _maps(result, result.mean("attribution"), note)
        maps = [panel for both in zip(maps, estimated, strict=True) for panel in both]
    return sweep_figure(maps, _title(result, chosen), scale_of(result.metric, result.unit, chosen))


def scale_of(metric: str, unit: str, what: str) -> str:
    """What the colours mean."""
    if what == "normalised":
        return f"{metric}, 0 = corrupted run, 1 = clean run"
    inside = f" ({unit})" if unit else ""
    if what == "value":
        return metric + inside
    kind = "estimated change" if what == "attribution" else "change"
    return f"{kind} of {metric}{inside}"


def _title(result: SweepResult, what: What) -> str:
    does = _DOES[result.kind, result.direction if result.kind == "patch" else ""]
    if result.pairs == 1:
        return f"{does}; 1 prompt" if np.isnan(result.corrupt).all() else f"{does}; 1 pair of prompts"
    low, high = result.interval(what)
    half = np.nanmax((high - low) / 2) if np.isfinite(high).any() else float("nan")
    each = "prompts" if np.isnan(result.corrupt).all() else "pairs of prompts"
    return f"{does}; mean over n = {result.pairs} {each}, 95% t interval at most ±{half:.2g}"


def _maps(result: SweepResult, values: Any, note: str) -> list[HeatMap]:
    """Panels of `(site, head, column)`, one for each path that named sites, or each column of heads."""
    maps = []
    for path in dict.fromkeys(site.path for site in result.sites):
        own = [number for number, site in enumerate(result.sites) if site.path == path]
        rows = _rows([result.sites[number] for number in own])
        y = "block" if all(row.isdigit() for row in rows) else "site"
        part = values[own]
        if result.heads is None:
            x = "token" if result.every_token else "position"
            maps.append(HeatMap(note + path, part[:, 0], rows, result.columns, y, x))
            continue
        heads = [str(head) for head in result.heads]
        if len(result.columns) <= _MOST_PANELS:
            for number, column in enumerate(result.columns):
                maps.append(
                    HeatMap(f"{note}{path} at {column!r}", part[:, :, number], rows, heads, y, "head")
                )
            continue
        strongest = np.take_along_axis(part, np.abs(part).argmax(-1, keepdims=True), -1)[..., 0]
        maps.append(
            HeatMap(f"{note}{path}, at each head's strongest column", strongest, rows, heads, y, "head")
        )
    return maps


def _rows(sites: Sequence[SiteLabel]) -> list[str]:
    """Blocks where each site has its own, and names otherwise."""
    blocks = [site.block for site in sites]
    if None not in blocks and len(set(blocks)) == len(blocks):
        return [str(block) for block in blocks]
    return [site.name for site in sites]


def inline(figure: Figure) -> str:
    """A figure as an image inside HTML."""
    data = io.BytesIO()
    figure.savefig(data, format="png")
    text = base64.b64encode(data.getvalue()).decode("ascii")
    return f"<img style='max-width:100%' src='data:image/png;base64,{text}'>"
