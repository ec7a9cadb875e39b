"""Parts that several figures have: bars of tokens, and sites along an axis."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from reftlab.plotting.style import drawable, frame
from reftlab.plotting.wording import block_named

__all__ = ["site_label", "site_ticks", "token_bars"]

_MOST_LABELS = 24

Tokens = Sequence[tuple[str, float]]


def token_bars(axes: Axes, tokens: Tokens, colour: str, title: str, limit: int) -> None:
    """Draw the size of each token's change, the first one on top.

    Args:
        axes: where.
        tokens: text and change of each.
        colour: of the bars.
        title: of the panel.
        limit: of the characters of a token.
    """
    axes.barh(range(len(tokens)), [abs(change) for _, change in tokens], color=colour, height=0.7)
    axes.set_yticks(range(len(tokens)), [drawable(text, limit) for text, _ in tokens])
    axes.invert_yaxis()
    frame(axes, title=title, grid="x")
    axes.tick_params(axis="y", length=0)


def site_ticks(axes: Axes, sites: Sequence[str], room: float = 0.4) -> None:
    """Name the sites along the horizontal axis: some of many, and turned where their names are long.

    Args:
        axes: whose places 0, 1, … are the sites.
        sites: their names.
        room: left of the first and right of the last.
    """
    step = -(-len(sites) // _MOST_LABELS)
    shown = [site_label(site) for site in sites[::step]]
    turned = max(map(len, shown)) > 4 and len(shown) > 1
    axes.set_xticks(
        range(0, len(sites), step), shown, rotation=30 if turned else 0, ha="right" if turned else "center",
        rotation_mode="anchor",
    )  # fmt: skip
    axes.set_xlim(-room, len(sites) - 1 + room)


def site_label(site: str, limit: int = 32) -> str:
    """A site in few words, or the end of its path, which tells it from others.

    >>> site_label("model.layers[19].output"), site_label("model.layers.19.mlp.down_proj.input", 16)
    ('block 19', '…down_proj.input')
    """
    name = block_named(site)
    return drawable(name if len(name) <= limit else "…" + name[1 - limit :])
