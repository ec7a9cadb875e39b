"""`probe`: which sites and positions tell the labels, with controls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import nn

from reftlab.collecting import Activations
from reftlab.errors import DataError
from reftlab.probing.cells import Cells, cells_of_activations, cells_of_model
from reftlab.probing.checks import as_groups, check_level, is_unordered, seed_number
from reftlab.probing.columns import Settings
from reftlab.probing.description import require_code
from reftlab.probing.estimators import probe_of
from reftlab.probing.labels import parse_labels
from reftlab.probing.result import ProbeMap
from reftlab.probing.work import Work
from reftlab.runtime import BoundModel
from reftlab.runtime.sizes import parse_bytes
from reftlab.training.settings import whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["probe"]

_PERMUTATIONS = {"linear": 1000, "refit": 99}


def probe(
    model: BoundModel | nn.Module | Activations,
    data: Any = None,
    labels: Any = None,
    sites: Any = None,
    positions: Any = None,
    *,
    estimator: Any = "auto",
    kind: Literal["auto", "classification", "multilabel", "regression"] = "auto",
    groups: Sequence[Any] | Any | None = None,
    folds: int = 5,
    control: Any = "auto",
    description: bool = False,
    permutations: int | None = None,
    null: Literal["auto", "linear", "refit"] = "auto",
    bootstrap: int = 1000,
    level: float = 0.95,
    memory: int | str = "2GB",
    folder: str | Path | None = None,
    chat: bool | None = None,
    system: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tasks: str | Sequence[str | None] | None = None,
    select: str | Sequence[str] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> ProbeMap:
    """Fit a probe at each site and position, and say what its scores are worth.

    Every score is of predictions on folds that the probe did not see, pooled; groups are never split, and
    scaling and regularisation are chosen inside each training part. Beside each score stand what guessing
    gives, a bootstrap interval, a p-value that holds for the whole map, and the same probe's score on
    control labels.

    *p-values.* Labels are shuffled, the probe is refitted for each shuffle, and a cell counts by how far
    its true labels stand out; see `ProbeMap.significant`. Where all vectors of a group have one label,
    groups swap labels; otherwise groups of equal size swap theirs whole, and labels are shuffled inside
    each group, which supposes that a group's vectors could have come in any order. With `null="linear"`
    what is refitted is ridge regression at fixed strengths on label-blind folds, the statistic being the
    correlation of labels and held-out predictions: that is exact and quick, and sees what a linear probe
    can. With `null="refit"` it is the estimator itself, the regularisation of those by name being fixed.

    *Control labels.* Each type, such as a token id, gets one random label (Hewitt and Liang 2019). A probe
    can know these only by heart, and selectivity, the score minus that on control labels, is what it
    does not owe to that. Where types are groups, none is in two folds, so that a control shows no more
    than that folds do not leak.

    Args:
        model: a bound model, whose edits are in force; any model; or vectors that `rl.collect` returned.
        data: as for `rl.collect`; None with vectors.
        labels: one for each example. Anything hashable are classes; fractions are numbers; a 2-D array of
            0 and 1 is several labels. Or a list for each example, with a label for each of its tokens,
            or for each that is chosen.
        sites: a path, an `rl.Read` or several of both, `"blocks[*].output"` unless given; of vectors, those
            of all reads. `"blocks[*].attn.heads"` makes each attention head a site of its own, such as
            `blocks[2].attn.heads (heads 3)`; a read is taken as it is written, with its `heads=` or
            `features=`, joined, or all heads together.
        positions: a position, several, or several by name, each a column of the map, for the sites that name
            none; `"last"` unless given; of vectors, those of all reads. Of several tokens each is a
            vector with the example's label.
        estimator: `"logistic"` (L2, classes weighted equally), `"mean_difference"`, `"lda"` (shrunk
            covariance), for numbers `"ridge"`, or a scikit-learn estimator, which is cloned and fitted as it
            is, for several labels one for each. `"auto"` is logistic or ridge.
        kind: what the labels are, where that is not plain.
        groups: one entry for each example; examples of a group are on the same side of every split. Each
            example is its own unless given, also where texts come twice, of which `notes` tell.
        folds: number of folds.
        control: `"auto"` for token ids as types where labels are of tokens or a position has several tokens,
            and groups elsewhere; a sequence of types, one for each example; or None for no control.
        description: whether to add the online code's length (Voita and Titov 2020), in bits; see
            `description_length`. The code of `"logistic"` is that of fixed strength.
        permutations: number of shuffles; 1000 for linear ones and 99 for others unless given; 0 for no
            p-values.
        null: what is refitted for shuffled labels; `"linear"` for estimators by name and `"refit"` for one's
            own unless given.
        bootstrap: number of resamples of groups; 0 for no intervals.
        level: of the intervals.
        memory: of how many bytes vectors may take. Where those of a cell, with the copies that a fit makes,
            take more, it is fitted chunk by chunk, by stochastic gradients.
        folder, chat, system, tokenizer, tasks, select, batch_size: as for `rl.collect`.
        seed: of splits, shuffles, resamples and control labels.
        progress: whether to show progress bars.

    Returns:
        `ProbeMap`.

    Raises:
        DataError: arguments that cannot be used, or a class in fewer groups than folds.
        AddressError: a site that the model does not have.

    >>> found = rl.probe(model, texts, labels, sites="blocks[*].output")            # doctest: +SKIP
    >>> found.plot()                                                                # doctest: +SKIP
    >>> found["blocks[5].output @ last"].steer(4.0)                                 # doctest: +SKIP
    >>> found.predictions("blocks[5].output @ last")                                # doctest: +SKIP
    """
    folds, bootstrap = whole("folds", folds, 2), whole("bootstrap", bootstrap, 0)
    seed, budget = seed_number(seed), parse_bytes("memory", memory)
    check_level(level, 0.95)
    if null not in ("auto", "linear", "refit"):
        raise DataError(f"null={null!r}: expected 'auto', 'linear' or 'refit'")
    if isinstance(model, Activations):
        _refuse_collecting(data, folder, chat, system, tasks, select)
        cells = cells_of_activations(model, sites, positions)
    else:
        if data is None:
            raise DataError(
                "data=None: give texts, or vectors that rl.collect returned in place of the model"
            )
        if labels is None:
            raise DataError("labels=None: expected one label for each example")
        cells = cells_of_model(
            model, data, "blocks[*].output" if sites is None else sites, positions, tokenizer, folder,
            budget=budget, chat=chat, system=system, tasks=tasks, select=select, batch_size=batch_size,
            progress=progress,
        )  # fmt: skip
    parsed = parse_labels(labels, kind, cells.examples)
    chosen = probe_of(estimator, parsed.kind)
    if null == "auto":
        null = "linear" if chosen.own is None else "refit"
    count = _PERMUTATIONS[null] if permutations is None else whole("permutations", permutations, 0)
    if description and parsed.kind == "regression":
        raise DataError("description=True: numbers have no code of finite length; leave it out")
    if description and chosen.own is not None:
        require_code(chosen.own)
    settings = Settings(
        chosen, folds, _groups(groups, cells.examples), _types(control, cells), description, count, null,
        bootstrap, level, budget, seed, progress, _copies(data) if groups is None else 0,
    )  # fmt: skip
    return Work(cells, parsed, settings).run()


def _groups(groups: Any, examples: int) -> np.ndarray:
    if groups is not None and not hasattr(groups, "shape") and not is_unordered(groups):
        groups = list(groups)
    if groups is not None and len(groups) != examples:
        raise DataError(f"groups has {len(groups)} entries and data {examples} examples; give one each")
    return as_groups(groups, examples)


def _copies(data: Any) -> int:
    """How many texts, or rows of token ids, stand in a list before."""
    if not isinstance(data, list | tuple) or not all(isinstance(one, str | list | tuple) for one in data):
        return 0
    return len(data) - len({repr(one) for one in data})


def _types(control: Any, cells: Cells) -> Any:
    if control is None or (isinstance(control, str) and control == "auto"):
        return control
    if isinstance(control, str) or not hasattr(control, "__len__"):
        raise DataError(f"control={control!r}: expected 'auto', None, or a type for each example")
    if len(control) != cells.examples:
        raise DataError(
            f"control has {len(control)} entries and data {cells.examples} examples; give one each"
        )
    return as_groups(control, cells.examples, "control")


def _refuse_collecting(data: Any, *further: Any) -> None:
    if data is not None:
        raise DataError(
            "data is given, and the vectors are there already; call rl.probe(activations, labels=labels)"
        )
    names = ("folder", "chat", "system", "tasks", "select")
    given = [name for name, value in zip(names, further, strict=True) if value is not None]
    if given:
        raise DataError(f"{given[0]}= is for collecting vectors, and they are there already; leave it out")
