"""`sweep_paths`: direct paths from each head to each later head."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from reftlab.errors import DataError, RunError
from reftlab.runtime import BoundModel
from reftlab.runtime.digest import digest_of
from reftlab.runtime.modes import evaluating
from reftlab.sweeping.engine import Engine, check_edits
from reftlab.sweeping.metric import as_metric
from reftlab.sweeping.path_result import PathResult
from reftlab.sweeping.path_work import Head, PathWork, Places
from reftlab.sweeping.prompts import Columns, Pair, columns_of, read_pairs
from reftlab.sweeping.store import CellStore, bound_digest, check_folder, content_key
from reftlab.sweeping.sweep import as_bound

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["sweep_paths"]

_INPUTS = ("q", "k", "v", "all")


def sweep_paths(
    model: Any,
    clean: Any,
    corrupt: Any,
    metric: Any = None,
    *,
    inputs: str = "all",
    direction: str = "denoise",
    positions: Any = "all",
    senders: Iterable[Head] | None = None,
    receivers: Iterable[Head] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int | None = None,
    folder: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> PathResult:
    """Measure what each head tells each later head directly.

    For a sender and a receiver in a later block, the sender's result is replaced by that of the other
    run, and the change travels to the receiver along the residual stream alone: all other heads and all
    MLPs from the sender's block up to the receiver's are frozen, which is to say that what they add to
    the stream is that of the unchanged run. Norms are not frozen. The receiver computes its result from
    that changed stream, in its queries, keys, values or all three; only this result is put into a further
    run, everything after it computes freely, and the metric is taken.

    Args:
        model: a bound model, whose edits stay in force, or a bare one with a known chain of blocks.
        clean, corrupt, metric, direction, tokenizer, batch_size, folder, resume, progress: as for `sweep`.
        inputs: through which of its inputs the receiver hears: `q`, `k`, `v` or `all`.
        positions: the tokens at which senders are changed; all unless given.
        senders, receivers: `(block, head)` pairs; all heads unless given.

    Returns:
        The metric for every pair of heads, with means and intervals over prompts, figure and frame.

    Raises:
        DataError, PositionError: as for `sweep`.
        RunError: the model's chain of blocks, heads, queries, keys or values are not known.

    Source: path patching of direct edges between heads, as in Goldowsky-Dill et al., "Localizing Model
    Behavior with Path Patching" (2023). Wang et al., "Interpretability in the Wild" (2022), section 3.1
    and appendix B, freeze the other heads too but compute the MLPs between anew, so that their paths lead
    through MLPs as well and their numbers differ from these.

    >>> rl.sweep_paths(model, clean, corrupt, rl.logit_diff(" Mary", " John"), inputs="q")  # doctest: +SKIP
    """
    began = time.perf_counter()
    _check(inputs, direction, batch_size, corrupt)
    measure = as_metric(metric)
    reft = as_bound(model, tokenizer)
    tokenizer = tokenizer if tokenizer is not None else reft.tokenizer
    with evaluating(reft):
        check_edits(reft)
        places = Places.of(reft, inputs)
        pairs = read_pairs(reft, clean, corrupt, tokenizer)
        everywhere = isinstance(positions, str) and positions == "all"
        columns = columns_of(pairs, positions if everywhere else {"senders": positions}, "tokens", tokenizer)
        measure.check(len(pairs), tokenizer)
        heads = [(block, head) for block in range(len(places.heads)) for head in range(places.count)]
        sending, receiving = _chosen("senders", senders, heads), _chosen("receivers", receivers, heads)
        order = [(s, r) for r in receiving for s in sending if s[0] < r[0]]
        if not order:
            raise DataError(f"no sender of {sending} is in an earlier block than a receiver of {receiving}")
        store = None
        if folder is not None:
            check_folder(folder)
            key = _key(reft, pairs, columns, [inputs, direction, order, measure.key()])
            about = {"metric": measure.name, "inputs": inputs, "direction": direction}
            store = CellStore(folder, key, about, fresh=not resume)
        engine = Engine(reft, places.all)
        if not engine.cone:
            raise RunError(f"sweep_paths needs the model's chain of blocks: {engine.why[0]}")
        total = len(order) * len(pairs)
        with tqdm(total=total, desc="sweep_paths", unit="path", disable=not progress) as bar:
            work = PathWork(
                engine, places, direction, order, columns, measure, tokenizer, batch_size, store, bar.update
            )
            found = [work.run(number, pair) for number, pair in enumerate(pairs)]
    return PathResult(
        measure.name,
        measure.unit,
        direction,
        inputs,
        tuple(sending),
        tuple(receiving),
        _matrices([done for done, _, _ in found], order, sending, receiving),
        np.array([clean for _, clean, _ in found]),
        np.array([corrupt for _, _, corrupt in found]),
        time.perf_counter() - began,
    )


def _check(inputs: Any, direction: Any, batch_size: Any, corrupt: Any) -> None:
    for name, value, known in (("inputs", inputs, _INPUTS), ("direction", direction, ("denoise", "noise"))):
        if value not in known:
            raise DataError(f"{name}={value!r}: expected {' or '.join(map(repr, known))}")
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise DataError(f"batch_size={batch_size!r}: expected a whole number of 1 or more")
    if corrupt is None:
        raise DataError("corrupt is None; paths are patched between two prompts, so give it")


def _matrices(
    found: Sequence[Mapping[int, float]],
    order: Sequence[tuple[Head, Head]],
    senders: Sequence[Head],
    receivers: Sequence[Head],
) -> Float[np.ndarray, "pair sender receiver"]:
    """Paths by number as senders × receivers; NaN where there is no path."""
    rows = {sender: number for number, sender in enumerate(senders)}
    columns = {receiver: number for number, receiver in enumerate(receivers)}
    values = np.full((len(found), len(senders), len(receivers)), np.nan)
    for cell, (sender, receiver) in enumerate(order):
        values[:, rows[sender], columns[receiver]] = [done[cell] for done in found]
    return values


def _chosen(name: str, given: Iterable[Head] | None, known: Sequence[Head]) -> list[Head]:
    if given is None:
        return list(known)
    chosen = list(given)
    for head in chosen:
        if not isinstance(head, tuple) or head not in known:
            raise DataError(f"{name}: {head!r} is no head; expected (block, head) from (0, 0) to {known[-1]}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise DataError(f"{name}={chosen!r}: expected one head or more, each once")
    return chosen


def _key(reft: BoundModel, pairs: Sequence[Pair], columns: Columns, rest: list[Any]) -> str:
    rows = [row for pair in pairs for row in (pair.clean, pair.corrupt) if row is not None]
    return content_key(
        {
            "form": "paths 1",
            "model": bound_digest(reft),
            "inputs": [{name: digest_of([value]) for name, value in row.inputs.items()} for row in rows],
            "columns": [[(c.clean, c.corrupt) for c in own] for own in columns.of_pairs],
            "rest": rest,
        }
    )
