"""What a collection is told: its arguments checked, and everything that its vectors depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from reftlab.collecting.rows import ReadyBatches, TokenRows
from reftlab.errors import DataError
from reftlab.graph import Read
from reftlab.runtime import BoundModel
from reftlab.runtime.digest import model_digest, state_digest
from reftlab.runtime.saving import signature_of
from reftlab.training.checkpoints import graph_digest
from reftlab.training.replies import PromptForm

__all__ = ["dtype_of", "settings_of", "tasks_of"]

_LONGEST = 300


def dtype_of(dtype: Any) -> torch.dtype | None:
    """A dtype of vectors, which may be written as a text; None for that of the site.

    Raises:
        DataError: it is none.
    """
    known = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16,
             "float16": torch.float16}  # fmt: skip
    if dtype is None or dtype in known.values():
        return dtype  # type: ignore[no-any-return]
    if isinstance(dtype, str) and dtype in known:
        return known[dtype]
    raise DataError(f"dtype={dtype!r}: expected one of {', '.join(known)}, or None for that of the site")


def tasks_of(tasks: Any, source: TokenRows | ReadyBatches) -> str | tuple[str | None, ...] | None:
    """The tasks of all examples, or of each.

    Raises:
        DataError: another number of them than of examples, or examples that have their own.
    """
    if tasks is None or isinstance(tasks, str):
        found: str | tuple[str | None, ...] | None = tasks
    else:
        found = tuple(tasks)
        if len(found) != len(source):
            raise DataError(f"tasks= has {len(found)} entries and data {len(source)} examples; give one each")
    if found is not None and isinstance(source, TokenRows) and source.encoded[0].task is not None:
        raise DataError("tasks= says what the examples' own tasks say already; leave one of them out")
    if found is not None and isinstance(source, ReadyBatches) and any("tasks" in b for b in source.batches):
        raise DataError("tasks= says what the batches' own tasks say already; leave one of them out")
    return found


def settings_of(
    reft: BoundModel,
    nodes: Sequence[Read],
    source: TokenRows | ReadyBatches,
    form: PromptForm,
    **further: Any,
) -> dict[str, Any]:
    """Everything that the vectors depend on, as JSON can hold it.

    Args:
        reft: the model.
        nodes: what is collected.
        source: the data.
        form: how texts became prompts.
        **further: the call's other settings.
    """
    signature = signature_of(reft.model)
    edits = [edit.name for edit in reft.graph.edits if edit.name not in reft._disabled]
    texts = isinstance(source, TokenRows) and source.texts
    return {
        "sites": [_short(repr(node)) for node in nodes],
        "model": signature["class"],
        "model_dtype": signature.get("dtype"),
        "weights": model_digest(reft.model),
        "edits": edits,
        "graph": graph_digest(reft.graph) if edits else None,
        "interventions": state_digest(reft.interventions) if edits else None,
        **({"chat": form["chat"], "system": form["system"]} if texts else {}),
        **{name: _plain(value) for name, value in further.items()},
        "examples": len(source),
        "data": source.digest(),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return _short(repr(list(value))) if isinstance(value, list | tuple) else value


def _short(text: str) -> str:
    """A text, or the beginning of a long one and a hash of it."""
    return text if len(text) <= _LONGEST else f"{text[:80]}… {hashlib.sha256(text.encode()).hexdigest()[:16]}"
