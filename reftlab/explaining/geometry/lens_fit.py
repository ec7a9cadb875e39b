"""Fitting a lens to data: ridge regression from a site to the final norm, scored on held-out examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reftlab.address import Site, head_name, resolve
from reftlab.collecting import collect
from reftlab.errors import DataError
from reftlab.explaining.geometry.lens import DataLens
from reftlab.explaining.geometry.repeats import counted_once, looks_back_only, repeats_of
from reftlab.explaining.geometry.sites import left_out, massive_of
from reftlab.explaining.geometry.tokens import Lens
from reftlab.explaining.subject import Subject
from reftlab.graph import InterventionGraph, Read
from reftlab.graph.nodes import replace_read
from reftlab.measuring.intervals import Estimate, mean_of
from reftlab.runtime import BoundModel
from reftlab.runtime.saving import signature_of
from reftlab.training.data import Example, as_examples
from reftlab.training.settings import whole

__all__ = ["fit_lens", "fit_lenses"]

_ENTERING = "final_norm.input"
_ALPHAS = tuple(10.0**power for power in range(-4, 4))
_FEWEST_TOKENS, _FEWEST_EXAMPLES = 40, 6
_FOLDS, _INNER_FOLDS = 5, 3
_AT_ONCE, _SCORED = 256, 1024


def fit_lens(
    model: BoundModel | nn.Module,
    examples: Any,
    site: str | Read,
    *,
    tokenizer: Any = None,
    chat: bool | None = None,
    system: str | None = None,
    samples: int = 4096,
    progress: bool = True,
    seed: int = 0,
) -> DataLens:
    """Fit the affine map from a site's vectors to what enters the final norm; see `DataLens`.

    Args:
        model: a bound model, whose edits are left out, or any language model.
        examples: texts or (prompt, answer) pairs, as `rl.train` takes them; all their tokens are used, but
            for those that repeat an earlier example from its first token on, as a chat template's first ones
            do: their vectors are the same, and would be known already where they are held out.
        site: such as `blocks[5].output`.
        tokenizer: a bound model's own unless given.
        chat, system: as for `rl.reply`.
        samples: how many tokens at most; whole examples are drawn at random where there are more.
        progress: whether to show a progress bar.
        seed: of that draw.

    Returns:
        A `DataLens`; with fewer than 40 tokens or 6 examples, or in a model without a final norm and
        unembedding, one that says in `missing` why there is none.

    Raises:
        AddressError: a site that the model does not have.
        DataError: examples or numbers that cannot be used.

    >>> rl.fit_lens(model, texts, "blocks[5].output", tokenizer=tokenizer)           # doctest: +SKIP
    DataLens(blocks[5].output: held-out R² 0.62, next token as the model's 31%, logit lens 12%; …)
    """
    if isinstance(model, BoundModel):
        reft = model
    else:
        reft = InterventionGraph().bind(model, tokenizer)
    # What the examples say of edits does not matter, since none acts.
    rows = [Example(row.prompt, row.answer) for row in as_examples(examples)]
    subject = Subject.of("fit_lens", reft, rows, chat=chat, system=system)
    return fit_lenses(subject, [site], samples=samples, progress=progress, seed=seed)[0]


def fit_lenses(
    subject: Subject,
    sites: Sequence[str | Read],
    *,
    samples: int = 4096,
    progress: bool = True,
    seed: int = 0,
) -> tuple[DataLens, ...]:
    """Fit a lens to each of several sites, from the same forward passes; see `fit_lens`.

    Args:
        subject: the examples, and a bound model, whose edits are left out.
        sites: where.
        samples, progress, seed: as for `fit_lens`.
    """
    reft, samples = subject.reft, whole("samples", samples, 1)
    places = [_Place.of(reft, number, site) for number, site in enumerate(sites)]
    lens, head = Lens(reft.model), head_name(reft.model)
    why = lens.missing
    if why is None and head is None:
        why = f"{type(reft.model).__name__} has no unembedding that reftlab can find"
    if why is not None:
        return tuple(DataLens.unavailable(place.name, why) for place in places)
    found = collect(
        reft.model, [_inputs(batch, subject.accepts) for batch in subject.texts],
        *[place.read for place in places], Read(_ENTERING, "all", name="entering"),
        Read(f"{head}.output", "last", name="logits"), tokenizer=reft.tokenizer, progress=progress,
    )  # fmt: skip
    entering, ends = found.flat("entering"), found.flat("logits")
    token_of = {pair: n for n, pair in enumerate(map(tuple, entering.index[:, :2].tolist()))}
    last = [token_of[tuple(pair)] for pair in ends.index[:, :2].tolist()]
    target = entering.vectors.float()
    lens.check(target[last], ends.vectors.float())
    if lens.missing is not None:
        return tuple(DataLens.unavailable(place.name, lens.missing) for place in places)
    kept, repeats, drawn = _chosen(entering.index, samples, seed, looks_back_only(reft.model))
    fitted, model = [], signature_of(reft.model)["fingerprint"]
    for place in places:
        base = found.flat(place.key)
        if not torch.equal(base.index[:, :2], entering.index[:, :2]):
            why = "it has no vector for each token of the text"
            fitted.append(DataLens.unavailable(place.name, why))
            continue
        massive = kept & (massive_of(target, kept) | massive_of(base.vectors, kept))
        usual = kept & ~massive
        parts = (drawn, left_out(massive, base.positions), counted_once(repeats))
        note = "; ".join(part for part in parts if part)
        stream = (place.site.module, place.site.side) in lens.stream and place.read.view.whole
        x = base.vectors[usual].float()
        one = _fitted(lens, place.name, x, target[usual], base.examples[usual], stream, note)
        fitted.append(replace(one, view=place.read.view, fitted_to=model))
    return tuple(fitted)


class _Place(NamedTuple):
    """A site by its name, the read of it, the place in the model, and the name of what is collected."""

    name: str
    read: Read
    site: Site
    key: str

    @classmethod
    def of(cls, reft: BoundModel, number: int, site: str | Read) -> _Place:
        given = site if isinstance(site, Read) else Read(site)
        if given.at is None or (given.positions is not None and str(given.positions) != "all"):
            raise DataError(
                f"site={site!r}: expected a place such as 'blocks[5].output'; a lens takes all tokens"
            )
        found = resolve(given.at, reft.model)
        if len(found) != 1:
            raise DataError(f"site={site!r} names {len(found)} places; name one")
        name = f"lens{number}"
        read = replace_read(given, positions="all", name=name)
        return cls(str(given.at), read, found[0], f"{name}[{found[0].label}]" if found[0].label else name)


def _fitted(
    lens: Lens,
    site: str,
    base: Float[Tensor, "token width"],
    target: Float[Tensor, "token out"],
    examples: Int[Tensor, " token"],
    stream: bool,
    note: str,
) -> DataLens:
    """Fit the map, and score it on held-out folds of the examples."""
    from sklearn.metrics import r2_score
    from sklearn.model_selection import GroupKFold

    x, y, groups = (part.double().numpy() for part in (base, target, examples.double()))
    count = len(np.unique(groups))
    if len(x) < _FEWEST_TOKENS or count < _FEWEST_EXAMPLES:
        return DataLens.unavailable(
            site,
            f"{len(x)} tokens of {count} examples are too few to fit and check a map; give "
            f"{_FEWEST_TOKENS} tokens of {_FEWEST_EXAMPLES} examples or more",
            len(x), count,
        )  # fmt: skip
    start = x if stream and x.shape[1] == y.shape[1] else 0.0
    rest = y - start
    held = np.empty_like(y)
    for train, test in GroupKFold(_FOLDS).split(x, groups=groups):
        alpha = _penalty(x[train], rest[train], groups[train])
        held[test] = _Ridge(x[train], rest[train]).predicted(x[test], alpha * _scale(x[train]))
    held += start
    alpha, whole = _penalty(x, rest, groups), _Ridge(x, rest)
    slopes = whole.slopes(alpha * _scale(x))
    matrix = torch.as_tensor(slopes.T).float()
    matrix = matrix + torch.eye(len(matrix)) if isinstance(start, np.ndarray) else matrix
    same_width = x.shape[1] == y.shape[1]
    # Logits of a whole vocabulary cost more than the fit.
    some = _drawn(examples, _SCORED, 0)
    own, scored = _named(lens, target[some]), examples[some]
    return DataLens(
        site,
        matrix,
        torch.as_tensor(whole.y_mean - whole.x_mean @ slopes).float(),
        alpha,
        float(r2_score(y, held, multioutput="variance_weighted")),
        float(r2_score(y, x, multioutput="variance_weighted")) if same_width else None,
        _agreement(own == _named(lens, torch.as_tensor(held).float()[some]), scored),
        _agreement(own == _named(lens, base[some]), scored) if same_width else None,
        float(torch.bincount(own).max()) / len(own),
        len(x),
        count,
        note,
    )


class _Ridge:
    """Ridge regression with an intercept, for any penalty after one eigendecomposition.

    What `sklearn.linear_model.Ridge` fits; its cross-validation over groups solves anew for every penalty.
    """

    def __init__(self, x: Float[np.ndarray, "n width"], y: Float[np.ndarray, "n out"]) -> None:
        self.x_mean, self.y_mean = x.mean(0), y.mean(0)
        x, y = x - self.x_mean, y - self.y_mean
        # The smaller of the two Gram matrices.
        self.wide = x.shape[1] > len(x)
        values, self.axes = np.linalg.eigh(x @ x.T if self.wide else x.T @ x)
        self.values = values.clip(min=0)
        self.x, self.cross = x, self.axes.T @ (y if self.wide else x.T @ y)

    def slopes(self, alpha: float) -> Float[np.ndarray, "width out"]:
        inside = self.axes @ (self.cross / (self.values + alpha)[:, None])
        found: Float[np.ndarray, "width out"] = self.x.T @ inside if self.wide else inside
        return found

    def predicted(self, x: Float[np.ndarray, "m width"], alpha: float) -> Float[np.ndarray, "m out"]:
        shift = x - self.x_mean
        if self.wide:
            weights = (shift @ self.x.T) @ self.axes / (self.values + alpha)
        else:
            weights = (shift @ self.axes) / (self.values + alpha)
        found: Float[np.ndarray, "m out"] = weights @ self.cross + self.y_mean
        return found


def _penalty(
    x: Float[np.ndarray, "n width"], y: Float[np.ndarray, "n out"], groups: Float[np.ndarray, " n"]
) -> float:
    """The penalty of the least squared error on held-out folds of whole examples."""
    from sklearn.model_selection import GroupKFold

    errors = np.zeros(len(_ALPHAS))
    for train, test in GroupKFold(_INNER_FOLDS).split(x, groups=groups):
        ridge, scale = _Ridge(x[train], y[train]), _scale(x[train])
        errors += [((ridge.predicted(x[test], alpha * scale) - y[test]) ** 2).sum() for alpha in _ALPHAS]
    return _ALPHAS[int(errors.argmin())]


def _scale(x: Float[np.ndarray, "n width"]) -> float:
    """Tokens times mean variance of a feature, against which a penalty is large or small."""
    return float(len(x) * max(x.var(0).mean(), 1e-30))


def _named(lens: Lens, vectors: Float[Tensor, "n out"]) -> Int[Tensor, " n"]:
    """The most likely next token that the model's own readout gives for vectors that enter its final norm."""
    parts = [lens.logits(part).argmax(1) for part in vectors.split(_AT_ONCE)]
    return torch.cat(parts)


def _agreement(same: Tensor, examples: Int[Tensor, " token"]) -> Estimate:
    """Share of tokens, its interval by the bootstrap over examples."""
    _, numbers, counts = examples.unique(return_inverse=True, return_counts=True)
    shares = torch.zeros(len(counts)).index_add_(0, numbers, same.float()) / counts
    return mean_of(shares, counts.float())


def _inputs(batch: Mapping[str, Any], accepts: frozenset[str]) -> dict[str, Any]:
    """A batch whose answers are text like any other."""
    left = {"labels", "sources", "tasks", "positions"}
    return {k: v for k, v in batch.items() if k in accepts and k not in left}


def _drawn(examples: Int[Tensor, " token"], samples: int, seed: int) -> Tensor:
    """Which tokens are kept: all, or those of examples drawn at random until there are enough."""
    if len(examples) <= samples:
        return torch.ones(len(examples), dtype=torch.bool)
    found, counts = examples.unique(return_counts=True)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    fits = counts[order].cumsum(0) <= samples
    fits[0] = True
    return torch.isin(examples, found[order][fits])


def _chosen(index: Int[Tensor, "token 3"], samples: int, seed: int, causal: bool) -> tuple[Tensor, int, str]:
    """Which tokens are fitted on, how many repeats were left out, and what was drawn, in words.

    Where there are too many, examples are drawn at random, and a token counts with the first one drawn.
    """
    examples, place = index[:, 0].unique(return_inverse=True)
    repeats = repeats_of(place, index[:, 2], causal=causal)
    if int((~repeats).sum()) <= samples:
        return ~repeats, int(repeats.sum()), ""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    turn = order.argsort()[place]
    by_turn = turn.argsort(stable=True)
    repeats[by_turn] = repeats_of(turn[by_turn], index[by_turn, 2], causal=causal)
    fits = torch.bincount(turn[~repeats], minlength=len(examples)).cumsum(0) <= samples
    fits[0] = True
    kept = fits[turn]
    note = f"fitted on {int(fits.sum())} of {len(examples)} examples, drawn at random"
    return kept & ~repeats, int((kept & repeats).sum()), note
