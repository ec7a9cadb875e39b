"""`sweep`: patching, ablation and noise over sites × positions (× heads)."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from reftlab.errors import DataError
from reftlab.graph import InterventionGraph
from reftlab.runtime import BoundModel
from reftlab.runtime.digest import digest_of
from reftlab.runtime.modes import evaluating
from reftlab.sweeping.changes import Changes, checked_fill, means_of
from reftlab.sweeping.engine import Engine, check_edits
from reftlab.sweeping.metric import Metric, as_metric
from reftlab.sweeping.pair import Map, Work
from reftlab.sweeping.passes import Passes
from reftlab.sweeping.prompts import Columns, Pair, columns_of, read_pairs
from reftlab.sweeping.result import SiteLabel, SweepResult
from reftlab.sweeping.sites import SweptSite, swept_sites
from reftlab.sweeping.store import CellStore, bound_digest, check_folder, content_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["sweep"]


def sweep(
    model: Any,
    clean: Any,
    corrupt: Any = None,
    sites: str | Sequence[str] = "blocks[*].output",
    positions: Any = "all",
    metric: Any = None,
    *,
    kind: str = "patch",
    direction: str = "denoise",
    heads: bool = False,
    fill: Any = "zero",
    scale: float = 3.0,
    samples: int = 10,
    seed: int = 0,
    attribution: bool = False,
    exact: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    example: Any = None,
    batch_size: int | None = None,
    cone: bool = True,
    folder: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> SweepResult:
    """Measure what patching each site and token changes.

    The clean and the corrupted prompt run once each. Every cell of the map is then a run of one of them
    with some vectors replaced; cells share batches, and each computes only its causal cone: the blocks
    from its site on, and the tokens from its own on. The numbers are those of one whole forward pass per
    cell, up to rounding.

    Args:
        model: a bound model, whose edits stay in force in every run, or a bare one.
        clean, corrupt: one text, several (pairs), or the tokenizer's output for them. `corrupt` may be
            None where nothing is taken from it.
        sites: one path or several, `blocks[*].output`, `["blocks[*].attn.output", "blocks[*].mlp.output"]`.
        positions: `"all"`, each token a column; or a list of positions, or a mapping from names to
            positions, each a column whose tokens are patched together: `["span('Mary')", "last"]`. A
            tuple of two positions is the clean prompt's and the corrupted prompt's.
        metric: `rl.logit_diff(" Mary", " John")`, `rl.answer_probability(...)`, `rl.kl_divergence()`, or a
            function from logits `(row, vocab)` at the last token to `(row,)`.
        kind: `patch` puts in the other run's vectors, `ablate` a fill, `noise` the vectors with Gaussian
            noise. The last two run on the clean prompt.
        direction: for `patch`: `denoise` runs on the corrupted prompt and patches clean vectors in, `noise`
            runs on the clean prompt and patches corrupted ones in.
        heads: each head on its own; for `blocks[*].attn.heads`, `blocks[*].attn.q` and their like.
        fill: for `ablate`: `zero`, `mean` (over all tokens of all clean prompts), `position mean` (over
            the clean prompts, for each column), a vector `(width,)`, or vectors by site. Means take one
            more run of each clean prompt.
        scale, samples, seed: for `noise`: its standard deviation, in standard deviations of the site's own
            numbers; how many draws each cell is the mean of; and their seed.
        attribution: whether to estimate every cell to first order too, with one backward pass.
        exact: whether to run the cells; without it there is attribution alone.
        tokenizer: for a bare model; a bound one has its own.
        example: for a bare model: inputs for the shape-only pass, where reftlab cannot make some up.
        batch_size: the most rows of one batch; chosen from the number of tokens unless given.
        cone: False runs every cell as a whole pass.
        folder: where finished cells are kept. The same call with the same folder goes on where an
            earlier one was stopped; anything that changes the numbers starts a new sweep. Hooks of your own
            on the model are told by their places and names alone. A metric of your own is told by its code
            and the values that this takes from elsewhere, or by its attribute `key` where it has one.
        resume: False forgets what an earlier call left there.
        progress: whether to show a progress bar.

    Returns:
        Every cell's metric, with means and intervals over pairs, figure and frame.

    Raises:
        DataError: prompts, a metric or an argument that cannot be used.
        PositionError: a position that a prompt lacks.
        AddressError: a site that the model does not have.
        RunError: a site without tokens, one inside what an edit is folded into, or an edit that needs a
            run of its own.

    Source: activation patching as in Vig et al. (2020) and Meng et al. (2022); on directions and
    metrics, Heimersheim and Nanda, "How to use and interpret activation patching" (2024).

    >>> rl.sweep(model, clean, corrupt, metric=rl.logit_diff(" Mary", " John")).plot()  # doctest: +SKIP
    """
    began = time.perf_counter()
    reft = as_bound(model, tokenizer, example)
    tokenizer = tokenizer if tokenizer is not None else reft.tokenizer
    check_switches(
        cone=cone, resume=resume, heads=heads, attribution=attribution, exact=exact, progress=progress
    )
    check_folder(folder)
    _check(kind, direction, scale, samples, seed, batch_size, attribution, exact, corrupt)
    measure = as_metric(metric)
    with evaluating(reft):
        check_edits(reft)
        swept = swept_sites(reft, sites, heads)
        pairs = read_pairs(reft, clean, corrupt, tokenizer)
        columns = columns_of(pairs, positions, _stream(swept), tokenizer)
        measure.check(len(pairs), tokenizer)
        fill = checked_fill(fill, swept) if kind == "ablate" else "zero"
        changes = Changes(kind, direction, fill, float(scale), samples, seed)  # type: ignore[arg-type]
        if isinstance(fill, str) and fill != "zero":
            changes = _with_means(reft, swept, pairs, columns, changes)
        store = None
        if folder is not None:
            key = _key(reft, swept, pairs, columns, measure, changes)
            about = {"metric": measure.name, "kind": kind, "sites": [s.name for s in swept]}
            store = CellStore(folder, key, {**about, "columns": columns.names}, fresh=not resume)
        engine = Engine(reft, swept, cone)
        work = Work(
            engine, swept, columns, changes, measure, tokenizer, attribution, exact, batch_size, store
        )
        cells = len(swept) * len(swept[0].parts) * len(columns.names)
        total = len(pairs) * cells if exact else 0
        with tqdm(total=total, desc="sweep", unit="cell", disable=not progress) as bar:
            maps = [work.run(number, pair, bar.update) for number, pair in enumerate(pairs)]
    return _result(maps, swept, pairs, columns, changes, measure, engine, heads, time.perf_counter() - began)


def as_bound(model: Any, tokenizer: Any, example: Any = None) -> BoundModel:
    """A bound model, without edits where a bare model is given.

    Raises:
        DataError: it is no model.
    """
    if isinstance(model, BoundModel):
        return model
    if not isinstance(model, nn.Module):
        raise DataError(f"sweep takes a bound model or a torch module, not {model!r}")
    return InterventionGraph().bind(model, tokenizer, example=example)


def check_switches(**switches: Any) -> None:
    """Refuse switches that are neither True nor False.

    Raises:
        DataError: as said.
    """
    for name, value in switches.items():
        if type(value) is not bool:
            raise DataError(f"{name}={value!r}: expected True or False")


def _check(
    kind: str,
    direction: str,
    scale: Any,
    samples: Any,
    seed: Any,
    batch_size: Any,
    attribution: bool,
    exact: bool,
    corrupt: Any,
) -> None:
    for name, value, known in (
        ("kind", kind, ("patch", "ablate", "noise")),
        ("direction", direction, ("denoise", "noise")),
    ):
        if value not in known:
            raise DataError(f"{name}={value!r}: expected {' or '.join(map(repr, known))}")
    if kind == "patch" and corrupt is None:
        raise DataError(
            "corrupt is None, and kind='patch' takes vectors from it; give it, or take kind='ablate'"
        )
    if (
        isinstance(scale, bool)
        or not isinstance(scale, int | float)
        or not math.isfinite(scale)
        or scale <= 0
    ):
        raise DataError(f"scale={scale!r}: expected a number above 0")
    for name, value, least in (("samples", samples, 1), ("seed", seed, 0), ("batch_size", batch_size, 1)):
        if name == "batch_size" and value is None:
            continue
        if type(value) is not int or value < least:
            raise DataError(f"{name}={value!r}: expected a whole number of {least} or more")
    if not exact and not attribution:
        raise DataError("exact=False leaves attribution alone; say attribution=True")
    if attribution and kind == "noise":
        raise DataError(
            "attribution=True: to first order, noise of mean 0 does nothing; take 'patch' or 'ablate'"
        )


def _stream(sites: Sequence[SweptSite]) -> str:
    streams = {site.place.stream: site.name for site in sites}
    if len(streams) > 1:
        raise DataError(
            f"sites: {' and '.join(streams.values())} hold the tokens of different texts; sweep them "
            "one after the other"
        )
    return next(iter(streams))


def _with_means(
    reft: BoundModel, sites: Sequence[SweptSite], pairs: Sequence[Pair], columns: Columns, changes: Changes
) -> Changes:
    @functools.cache
    def means() -> dict[str, Any]:
        recorded = [Passes(reft, pair.clean, None).record(sites) for pair in pairs]
        return means_of(recorded, sites, columns.of_pairs, changes.fill)

    return replace(changes, means=means)


def _key(
    reft: BoundModel,
    sites: Sequence[SweptSite],
    pairs: Sequence[Pair],
    columns: Columns,
    metric: Metric,
    changes: Changes,
) -> str:
    """A name made of everything that the numbers depend on."""
    rows = [row for pair in pairs for row in (pair.clean, pair.corrupt) if row is not None]
    fill = (
        changes.fill
        if isinstance(changes.fill, str)
        else {k: digest_of([v]) for k, v in changes.fill.items()}
    )
    return content_key(
        {
            "form": 1,
            "model": bound_digest(reft),
            "inputs": [{name: digest_of([value]) for name, value in row.inputs.items()} for row in rows],
            "corrupt": pairs[0].corrupt is not None,
            "sites": [(site.name, len(site.parts)) for site in sites],
            "columns": [[(c.clean, c.corrupt) for c in own] for own in columns.of_pairs],
            "metric": metric.key(),
            "change": [changes.kind, changes.direction, fill, changes.scale, changes.samples, changes.seed],
        }
    )


def _result(
    maps: Sequence[Map],
    sites: Sequence[SweptSite],
    pairs: Sequence[Pair],
    columns: Columns,
    changes: Changes,
    metric: Metric,
    engine: Engine,
    heads: bool,
    seconds: float,
) -> SweepResult:
    shape = (len(maps), len(sites), len(sites[0].parts), len(columns.names))
    estimates = None
    if maps[0].estimates is not None:
        estimates = np.array([found.estimates for found in maps]).reshape(shape)
    stream = _stream(sites)
    tokens = []
    for pair, own in zip(pairs, columns.of_pairs, strict=True):
        row = pair.corrupt if changes.into_corrupt and pair.corrupt is not None else pair.clean
        texts = row.tokens[stream]
        tokens.append(tuple("".join(texts[t] for t in changes.columns(column)[0]) for column in own))
    counts: dict[str, int] = {}
    for found in maps:
        for name, count in found.counts.items():
            counts[name] = counts.get(name, 0) + count
    return SweepResult(
        metric.name,
        metric.unit,
        changes.kind,
        changes.direction,
        tuple(SiteLabel(site.name, site.path, site.block) for site in sites),
        tuple(range(len(sites[0].parts))) if heads else None,
        columns.names,
        columns.every_token,
        tuple(tokens),
        np.array([found.values for found in maps]).reshape(shape),
        np.array([found.clean for found in maps]),
        np.array([found.corrupt for found in maps]),
        estimates,
        counts,
        engine.why,
        seconds,
    )
