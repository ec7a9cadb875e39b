"""How figures look: one palette, one frame, and text that the font can show.

Figures are `matplotlib.figure.Figure` objects made without pyplot, so that nothing global changes
and no window opens.
"""

from __future__ import annotations

import functools
import io
import unicodedata
from typing import TYPE_CHECKING, Any, Literal

from matplotlib import font_manager, ft2font
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from reftlab.plotting.wording import true_minus

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BLACK", "BLUE", "DIVERGING", "FONT", "GREEN", "GREY", "ORANGE", "PURPLE", "SKY", "VERMILLION"]
__all__ += ["YELLOW", "InlineFigure", "drawable", "empty_figure", "frame", "message_figure", "with_glyphs"]

BLACK, GREY = "#222222", "#8A8A8A"
ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
"""Okabe and Ito's palette (2008), which readers with any colour vision can tell apart."""

DIVERGING = LinearSegmentedColormap.from_list(
    "reftlab", ["#003B5C", BLUE, "#FFFFFF", VERMILLION, "#7A2E00"]
).with_extremes(bad="#D9D9D9")
"""Dark blue far below 0, white at 0, dark red far above it; grey where there is no number."""

FONT = "DejaVu Sans"
"""The font that matplotlib carries, so that figures look alike everywhere."""

_UNSEEN = {"\ufe0f": "", "\ufe0e": "", "\u200d": "+"}


class InlineFigure(Figure):
    """A figure that notebooks show without pyplot."""

    def _repr_png_(self) -> bytes:
        data = io.BytesIO()
        self.savefig(data, format="png")
        return data.getvalue()


def empty_figure(width: float, height: float) -> Figure:
    """A blank figure, in inches, whose parts make room for each other."""
    return InlineFigure(figsize=(width, height), layout="constrained", facecolor="white", dpi=130)


def frame(
    axes: Axes, *, x: str = "", y: str = "", title: str = "", grid: Literal["x", "y", "both", ""] = "y"
) -> None:
    """Label an axes and give it the house's frame.

    Args:
        axes: what to frame.
        x, y: labels with their units.
        title: short title.
        grid: `x`, `y`, `both`, or an empty text for none.
    """
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.set_title(title, fontsize=10, loc="left")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(axis=grid, color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)


def message_figure(title: str, message: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    figure = empty_figure(7.0, 1.8)
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_title(drawable(title), fontsize=10, loc="left")
    said = drawable(true_minus(message))
    axes.text(0, 0.5, said, wrap=True, va="center", fontsize=9, transform=axes.transAxes)
    return figure


def drawable(text: str, limit: int = 0) -> str:
    """Text with characters that the font lacks written as their names, `:snowman without snow:`.

    Args:
        text: anything.
        limit: cut to about so many characters, 0 for no limit.

    >>> drawable("ok 🌊")
    'ok :water wave:'
    """
    parts = [with_glyphs(character) for character in text]
    shown = "".join(parts)
    if limit and len(shown) > limit:
        shown, kept = "", parts
        while kept and len(shown) + len(kept[0]) <= limit:
            shown, kept = shown + kept[0], kept[1:]
        shown = (shown or parts[0][:limit]) + "…"
    # A dollar would begin a formula.
    return shown.replace("$", r"\$")


def with_glyphs(text: str) -> str:
    """Text with characters that the font lacks as their names, or as their codes where names are long."""
    return "".join(map(_with_glyph, text))


def _with_glyph(character: str) -> str:
    if character in _UNSEEN:
        return _UNSEEN[character]
    if ord(character) in _glyphs() or character in "\n ":
        return character
    name = unicodedata.name(character, "").lower()
    return f":{name}:" if 0 < len(name) <= 25 else f"‹U+{ord(character):04X}›"


@functools.cache
def _glyphs() -> frozenset[int]:
    """Code points that the font has."""
    path: Any = font_manager.findfont(FONT)
    return frozenset(ft2font.FT2Font(path).get_charmap())
