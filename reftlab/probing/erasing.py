"""Erasers of a concept by method, and the two controls of each: random subspaces and shuffled labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float

from reftlab.errors import DataError
from reftlab.interventions import Erase, Intervention, ProjectOut
from reftlab.interventions.erase import NothingToEraseError
from reftlab.probing.inlp import inlp
from reftlab.probing.labels import Kind
from reftlab.probing.significance import Shuffles
from reftlab.probing.sites import is_list

__all__ = ["METHODS", "Draws", "Eraser", "Method", "Vectors", "erasers", "methods_of"]

Method = Literal["leace", "inlp"]
METHODS: tuple[Method, ...] = ("leace", "inlp")


@dataclass(frozen=True, eq=False)
class Vectors:
    """What an eraser is fitted on.

    Attributes:
        X: vectors `(n, width)`.
        y: their labels: numbers of classes `(n,)`, 0 and 1 `(n, label)`, or numbers `(n,)`.
        groups: their groups, as numbers `(n,)`.
        kind: what the labels are.
    """

    X: np.ndarray
    y: np.ndarray
    groups: np.ndarray
    kind: Kind


@dataclass(frozen=True, eq=False)
class Eraser:
    """A fitted eraser.

    Attributes:
        edit: what it does to vectors; None where it found nothing to remove.
        rank: how many directions it removes.
        mean: the vector that stays where it is, `(width,)`.
    """

    edit: Intervention | None
    rank: int
    mean: Float[np.ndarray, " width"]

    def __call__(self, X: Float[np.ndarray, "n width"]) -> Float[np.ndarray, "n width"]:  # noqa: N803
        """The vectors without the concept."""
        if self.edit is None:
            return X
        with torch.no_grad():
            erased = self.edit.build(X.shape[1])(torch.from_numpy(X).float())
        return np.asarray(erased.numpy().astype(X.dtype))


def methods_of(methods: Any, kind: Kind) -> tuple[Method, ...]:
    """The methods as names.

    Raises:
        DataError: an unknown one, none, one twice, or INLP for labels that are no classes.
    """
    found = (methods,) if isinstance(methods, str) else tuple(methods) if is_list(methods) else ()
    known = bool(found) and all(isinstance(name, str) and name in METHODS for name in found)
    if not known or len(set(found)) < len(found):
        raise DataError(f"methods={methods!r}: expected 'leace', 'inlp' or both")
    if "inlp" in found and kind != "classification":
        raise DataError(
            f"methods={methods!r}: INLP removes classes, and labels are {kind}; give methods='leace'"
        )
    return found


@dataclass(frozen=True, eq=False)
class Draws:
    """An eraser and its controls, all of one rank.

    Attributes:
        real: fitted on the labels.
        random: projections of random subspaces around the same mean.
        shuffled: fitted in the same way on shuffled labels; none for INLP.
    """

    real: Eraser
    random: tuple[Eraser, ...]
    shuffled: tuple[Eraser, ...]

    @property
    def reals(self) -> tuple[Eraser, ...]:
        """The eraser alone, by the number 0, as the draws are by theirs."""
        return (self.real,)


def erasers(method: Method, data: Vectors, draws: int, seed: int) -> Draws:
    """Fit an eraser, and draw its controls.

    Args:
        method: `leace` or `inlp`.
        data: what to fit on.
        draws: how many controls of each kind.
        seed: of the controls. The random subspaces of one seed and width are nested, so that
            erasers of different ranks have like controls.
    """
    if method == "leace":
        real = _leace(data.X, data.y, data.kind)
        shuffles = Shuffles.of(data.y, data.groups, draws, seed)
        shuffled = [_leace(data.X, data.y[shuffles.rows(n + 1)], data.kind) for n in range(draws)]
    else:
        real, shuffled = _inlp(data, seed), []
    random = [_projection(real, np.random.default_rng([seed, number])) for number in range(draws)]
    return Draws(real, tuple(random), tuple(shuffled))


def _leace(X: np.ndarray, y: np.ndarray, kind: Kind) -> Eraser:  # noqa: N803
    targets = torch.from_numpy(y[:, None].astype(np.float64) if kind == "regression" else y)
    try:
        found = Erase.fit(torch.from_numpy(X), targets)
    except NothingToEraseError:
        return Eraser(None, 0, X.mean(0, dtype=np.float64))
    assert found.mean is not None
    return Eraser(found, len(found.right), found.mean.double().numpy())


def _inlp(data: Vectors, seed: int) -> Eraser:
    rarest = min(len(np.unique(data.groups[data.y == number])) for number in np.unique(data.y))
    found = inlp(
        data.X, data.y, groups=data.groups, seed=seed, folds=max(2, min(5, rarest)), progress=False
    )  # fmt: skip
    return Eraser(found.intervention() if len(found.directions) else None, len(found.directions), found.mean)


def _projection(like: Eraser, generator: np.random.Generator) -> Eraser:
    """The projection of a uniformly drawn subspace of the same rank around the same mean."""
    if like.edit is None:
        return like
    rows = torch.from_numpy(generator.standard_normal((like.rank, len(like.mean))))
    return Eraser(ProjectOut(rows, torch.from_numpy(like.mean)), like.rank, like.mean)
