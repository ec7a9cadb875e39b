"""The report: an explanation as one HTML file, with its figures inside and beside it."""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reftlab.errors import DataError
from reftlab.explaining.geometry.directions import BASES
from reftlab.explaining.report.summary import in_nats
from reftlab.explaining.section import QUESTIONS, Section

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from reftlab.explaining.explanation import EditExplanation, Explanation

__all__ = ["notebook_html", "save_report"]

LINES = 60
"""How many lines of a section's table the page shows."""
OPEN = 3
"""How many edits, the most important ones, are unfolded and have each figure of their own."""


def save_report(explanation: Explanation, path: Path) -> Path:
    """Write `path`, and its figures into a folder beside it; the page needs none of them."""
    path = path.expanduser()
    if path.suffix not in (".html", ".htm"):
        raise DataError(f"save({str(path)!r}): a report is an HTML file, such as 'report.html'")
    folder = path.with_name(f"{path.stem}_figures")
    folder.mkdir(parents=True, exist_ok=True)
    images: dict[str, str] = {}
    for name, figure in _figures(explanation):
        data = _png(figure)
        (folder / f"{name}.png").write_bytes(data)
        images[name] = _embedded(data)
    path.write_text(_template().render(**_content(explanation, images)), encoding="utf-8")
    return path


def notebook_html(explanation: Explanation) -> str:
    """The short form for a notebook: the summary, the overview figure and the table of edits."""
    sentences = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in explanation.summary)
    image = _embedded(_png(explanation.plot()))
    table = explanation.to_frame().to_html(index=False, float_format="{:.3g}".format)
    return f"<div><ul>{sentences}</ul><img src='{image}' style='max-width:100%'>{table}</div>"


def _figures(explanation: Explanation) -> Iterator[tuple[str, Figure]]:
    """Every figure of the report with the end of its file's name."""
    yield "overview", explanation.plot()
    if explanation.removal.missing is None:
        yield "removal", explanation.removal.plot()
    if explanation.replies.replies:
        yield "replies", explanation.replies.plot()
    for section in explanation.sections:
        if section.result is not None:
            yield section.name, section.plot()
    names = _file_names(explanation)
    for place, edit in enumerate(explanation.importance):
        name = names[edit.edit]
        yield name, edit.plot(explanation.removal)
        if place < OPEN:
            yield f"{name}_directions", edit.directions.plot()
            yield f"{name}_sizes", edit.sizes.plot()
            if edit.tokens.missing is None:
                yield f"{name}_tokens", edit.tokens.plot()


def _content(explanation: Explanation, images: dict[str, str]) -> dict[str, Any]:
    removal = explanation.removal
    whole = {r.edit: r for r in removal.removed if r.what == "edit"}
    names = _file_names(explanation)
    return {
        "explanation": explanation,
        "images": images,
        "removal": removal,
        "whole": whole,
        "facts": _flat(explanation.facts),
        "edits": [
            _edit(edit, explanation, place) | {"name": names[edit.edit]}
            for place, edit in enumerate(explanation.importance)
        ],
        "caveats": sorted({e.tokens.missing for e in explanation.edits if e.tokens.missing}),
        "groups": [
            {
                "name": name,
                "question": question,
                "sections": [_section(s) for s in explanation.sections if s.question == name and s.applies],
            }
            for name, question in QUESTIONS.items()
        ],
        "doubts": explanation.doubts,
    }


def _section(section: Section) -> dict[str, Any]:
    """A section as the template takes it, with what its result has of HTML beside figure and table."""
    from markupsafe import Markup

    made = {name: getattr(section, name) for name in ("name", "title", "says", "how", "missing", "note")}
    inline = getattr(section.result, "inline_html", None)
    frame = None if section.result is None else _frame(section.to_frame())
    return {**made, "inline": "" if inline is None else Markup(inline()), "frame": frame}


def _frame(frame: pd.DataFrame) -> dict[str, Any] | None:
    """The first lines of a table, as texts."""
    if frame.empty:
        return None
    numeric = {str(name): bool(frame[name].dtype.kind in "iuf") for name in frame.columns}
    rows = [[_cell(value) for value in row] for row in frame.head(LINES).itertuples(index=False)]
    return {
        "columns": list(numeric), "numeric": numeric, "rows": rows, "left": max(0, len(frame) - LINES),
    }  # fmt: skip


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.3g}".replace("-", "−") if isinstance(value, float) else str(value)


def _edit(edit: EditExplanation, explanation: Explanation, place: int) -> dict[str, Any]:
    directions, tokens, removal = edit.directions, edit.tokens, explanation.removal
    frame = directions.to_frame()
    losses = {r.label: r.change for r in removal.of(edit.edit, "direction")}
    random = [r.change for r in removal.of(edit.edit, "random")]
    carried = tokens.data if tokens.data is not None and tokens.data.missing is None else None
    rows = [
        {
            "label": label,
            "gain": float(frame["gain"].iloc[k]),
            "mean": float(frame["mean"].iloc[k]),
            "std": float(frame["std"].iloc[k]),
            "share": float(frame["share"].iloc[k]),
            "loss": losses.get(label),
            "most": _vector(edit, explanation, int(directions.amounts[:, k].argmax())),
            "least": _vector(edit, explanation, int(directions.amounts[:, k].argmin())),
            "promoted": tokens.promoted[k] if tokens.promoted else (),
            "suppressed": tokens.suppressed[k] if tokens.suppressed else (),
            "carried": carried.promoted[k] if carried is not None else (),
            "sunk": carried.suppressed[k] if carried is not None else (),
        }
        for k, label in enumerate(directions.labels)
    ]
    return {
        "edit": edit,
        "open": place < OPEN,
        "basis": BASES[directions.basis],
        "rows": rows,
        "random": random,
        "carried": carried,
        "single": len(directions) == 1,
    }


def _vector(edit: EditExplanation, explanation: Explanation, number: int) -> str:
    """Which example, and which of its tokens where the edit acts on several, a vector belongs to."""
    rows = edit.vectors.rows
    row = int(rows[number])
    prompt = explanation.examples[row].prompt if row < len(explanation.examples) else f"row {row}"
    shown = prompt if len(prompt) <= 48 else prompt[:47] + "…"
    several = len(rows) > len(set(rows.tolist()))
    return shown + (f" (token {int(edit.vectors.positions[number])})" if several else "")


def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["nats"] = in_nats
    environment.filters["signed"] = lambda value: f"{value:+.3f}".replace("-", "−")
    environment.filters["short"] = lambda value: f"{value:.3g}"
    environment.filters["percent"] = lambda value: f"{value:.0%}"
    return environment.get_template("report.html.j2")


def _flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Facts as lines of a table; lists and other long things are left out."""
    lines: list[tuple[str, str]] = []
    for key, value in facts.items():
        if isinstance(value, dict):
            lines += _flat(value, f"{prefix}{key} ")
        elif isinstance(value, str | int | float | bool):
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            lines.append((f"{prefix}{key}".replace("_", " "), shown))
    return lines


def _file_names(explanation: Explanation) -> dict[str, str]:
    """For each edit a name that files may have, unlike that of any other figure."""
    names: dict[str, str] = {}
    taken = {"overview", "removal", "replies", *(section.name for section in explanation.sections)}
    for edit in explanation.edits:
        plain = name = re.sub(r"[^A-Za-z0-9_-]+", "-", edit.edit).strip("-")
        number = 2
        while name in taken:
            name, number = f"{plain}-{number}", number + 1
        taken |= {name, *(f"{name}_{kind}" for kind in ("directions", "tokens", "sizes"))}
        names[edit.edit] = name
    return names


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def _embedded(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")
