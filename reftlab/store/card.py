"""The model card of an artifact."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from reftlab.graph import Edit, InterventionGraph

__all__ = ["model_card"]


def model_card(graph: InterventionGraph, facts: Mapping[str, Any], parameters: int) -> str:
    """Write the card as Markdown.

    Args:
        graph: the graph.
        facts: `base_model` and, after training, `training`.
        parameters: number of trainable numbers.
    """
    base, training = facts.get("base_model", {}), facts.get("training", {})
    name = base.get("name") or base.get("class", "the base model")
    parts = [
        "---\nlibrary_name: reftlab\ntags: [interpretability, reft, intervention]\n"
        f"base_model: {json.dumps(name, ensure_ascii=False)}\n---",
        f"# Interventions on {name}",
        "Made with reftlab: edits of hidden vectors in a frozen model. "
        "The model's own weights are not in here and are not changed.",
        _base_section(base),
        _edit_section(graph, parameters),
    ]
    if training:
        parts.append("## Training\n\n" + _listed(training))
    parts.append(_use_section(name, bool(training.get("chat"))))
    return "\n\n".join(parts) + "\n"


def _base_section(base: Mapping[str, Any]) -> str:
    return "## Base model\n\n" + _listed(base)


def _edit_section(graph: InterventionGraph, parameters: int) -> str:
    lines = [
        "## Edits",
        "",
        f"{parameters:,} trainable numbers.",
        "",
        "| edit | site | positions | intervention | new vector |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_edit_row, graph.edits)])


def _edit_row(edit: Edit) -> str:
    positions = str(edit.positions) + ("" if edit.phase == "prompt" else f", phase {edit.phase}")
    site = str(edit.at) + ("" if edit.view.whole else f", {edit.view}")
    does = edit.intervention.describe()
    if edit.source is not None:
        does += f", source {edit.source!r}"
    if edit.strength != 1.0:
        does += f", strength {edit.strength:g}"
    cells = (edit.name, _code(site), _code(positions), _code(does), edit.intervention.formula)
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _code(text: str) -> str:
    """Text as Markdown code, fenced by more backticks than it has in a row."""
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return f"{fence}{text}{fence}"


def _use_section(name: str, chat: bool) -> str:
    return f"""## Use

```python
import reftlab as rl

model, tokenizer = rl.load_model({name!r})
reft = rl.load("path/to/this/folder", model, tokenizer)
print(rl.reply(reft, "Your question", chat={chat}))
print(reft.plan())
```"""


def _listed(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"- {_words(key)}: {_value(value)}" for key, value in facts.items())


def _words(key: str) -> str:
    return key.replace("_", " ")


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
