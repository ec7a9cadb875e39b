"""Texts with every token marked by what a read direction finds there."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from reftlab.explaining.geometry.contexts import MEASURES
from reftlab.plotting.wording import true_minus

if TYPE_CHECKING:
    from reftlab.explaining.geometry.contexts import Context, Contexts, Drive

__all__ = ["contexts_html", "texts_html"]

_AROUND = 24
_FULL = 4.0

# Orange and sky of Okabe and Ito, let through, so that the text keeps its colour on light and dark pages.
# What colour says is said by the line below too: solid above the mean, dotted below it.
_STYLE = """<style>
.drive { line-height: 2; max-width: 60em; margin: 0.2em 0 0.6em; }
.drive span { white-space: pre-wrap; padding: 0.1em 0; border-bottom: 2px solid transparent; }
.drive .more { border-bottom-style: solid; }
.drive .less { border-bottom-style: dotted; }
.drive .edited { outline: 1px solid currentColor; outline-offset: 1px; border-radius: 2px; }
.drive .peak { font-weight: bold; }
@media print { .drive span { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
</style>"""

_KEY = (
    "Each token is marked by v · h: orange with a solid line above the mean, blue with a dotted line below, "
    "fuller the more standard deviations. Bold: the token that the text is here for. Framed: a token that "
    "the edit acts on. Point at a token for its value."
)


def contexts_html(contexts: Contexts) -> str:
    """The texts that drive each read direction, marked, and the direction beside random ones."""
    if contexts.missing is not None:
        return f"<p>{html.escape(repr(contexts))}</p>"
    parts = [_STYLE, f"<p>{html.escape(repr(contexts))}</p>", f"<p>{_KEY}</p>"]
    if contexts.note:
        parts.append(f"<p>{html.escape(contexts.note)}</p>")
    for drive in contexts.directions:
        parts += [f"<h4>Read direction {html.escape(drive.label)}</h4>", _controls(drive), _texts(drive)]
    return f"<div>{''.join(parts)}</div>"


def texts_html(contexts: Contexts, open_: int = 1) -> str:
    """The marked texts alone, each direction's folded but those of the first.

    Args:
        contexts: what was found.
        open_: how many directions are unfolded.
    """
    if contexts.missing is not None:
        return ""
    parts = [
        f"<details{' open' * (place < open_)}><summary>texts that drive read direction "
        f"{html.escape(drive.label)}</summary>{_texts(drive)}</details>"
        for place, drive in enumerate(contexts.directions)
    ]
    return f"<div>{_STYLE}<p>{_KEY}</p>{''.join(parts)}</div>"


def _texts(drive: Drive) -> str:
    parts = []
    for words, some in (("the most", drive.most), ("the least", drive.least)):
        parts += [f"<p>Driven {words} by</p>", *(_text(drive, one) for one in some)]
    return "".join(parts)


def _controls(drive: Drive) -> str:
    lines = "".join(
        f"<tr><td>{html.escape(MEASURES[one.measure])}</td><td>{one.value:.3g}</td>"
        f"<td>{one.middle:.3g} ({one.low:.3g} to {one.high:.3g})</td><td>{one.p:.2g}</td></tr>"
        for one in drive.against
    )
    head = (
        "<tr><th>measure</th><th>this direction</th><th>random directions, median and 95%</th><th>p</th></tr>"
    )
    return f"<table>{head}{lines}</table>"


def _text(drive: Drive, one: Context) -> str:
    start, stop = max(0, one.place - _AROUND), min(len(one.tokens), one.place + _AROUND + 1)
    tokens = "".join(_token(drive, one, number) for number in range(start, stop))
    left, right = "… " if start else "", " …" if stop < len(one.tokens) else ""
    return f'<div class="drive">{left}{tokens}{right} <small>(example {one.example})</small></div>'


def _token(drive: Drive, one: Context, number: int) -> str:
    value = one.values[number]
    z = drive.z(value)
    strength = min(1.0, abs(z) / _FULL)
    red, green, blue = (230, 159, 0) if z > 0 else (86, 180, 233)
    classes = ["more" if z > 0 else "less"]
    classes += ["edited"] if one.edited[number] else []
    classes += ["peak"] if number == one.place else []
    colour = f"rgba({red},{green},{blue},{0.65 * strength:.2f})"
    line = f"rgba({red},{green},{blue},{strength:.2f})"
    title = true_minus(f"v · h = {value:+.3g}, {z:+.1f} standard deviations")
    title += ", edited" if one.edited[number] else ""
    return (
        f'<span class="{" ".join(classes)}" style="background-color:{colour};border-bottom-color:{line}" '
        f'title="{html.escape(title)}">{html.escape(_shown(one.tokens[number], number == one.place))}</span>'
    )


def _shown(token: str, peak: bool) -> str:
    """A token as part of a text: spaces as spaces, but where the text is here for the space itself."""
    return token if peak and token == "␣" else token.replace("␣", " ", 1)
