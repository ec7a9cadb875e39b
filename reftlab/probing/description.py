"""Description length: how many bits the labels cost somebody who has the vectors and a probe.

Voita and Titov, "Information-Theoretic Probing with Minimum Description Length" (2020,
arXiv:2003.12298), the online (prequential) code.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from reftlab.errors import DataError
from reftlab.probing.checks import as_classes, as_groups, as_numpy, as_vectors
from reftlab.training.settings import whole

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["FRACTIONS", "CodeBlock", "DescriptionLength", "default_coder", "description_length"]
__all__ += ["require_code"]

FRACTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0)
"""Where the paper's blocks end, as shares of the examples."""


class CodeBlock(NamedTuple):
    """The examples from the end of the block before to `until`, summed over labels where there are several.

    Attributes:
        until: how many examples are coded with this block.
        bits: what its labels cost by the probe that was trained on all examples before it.
        frequency_bits: what they cost by how often each class came before it.
    """

    until: int
    bits: float
    frequency_bits: float


@dataclass(frozen=True)
class DescriptionLength:
    """What the labels cost, in bits.

    Attributes:
        bits: length of the online code.
        uniform_bits: length of the code that holds all classes equally likely, n log₂ K for K classes.
        frequency_bits: length of the online code that sees no vectors, only how often each class came before.
            Where classes are not equally frequent it is shorter than the uniform code, so that this,
            not 1, is what a probe has to beat; see `gain`.
        blocks: the blocks of the code, in order; the first one is coded uniformly.
        classes: how many classes there are; 2 for each label where there are several.
        labels: how many labels each example has.
    """

    bits: float
    uniform_bits: float
    frequency_bits: float
    blocks: tuple[CodeBlock, ...]
    classes: int
    labels: int = 1

    @property
    def compression(self) -> float:
        """Uniform code over online code; 1 where the vectors and the frequencies say nothing."""
        return self.uniform_bits / self.bits

    @property
    def gain(self) -> float:
        """Code by frequencies over online code; about 1 or less where the vectors say nothing."""
        return self.frequency_bits / self.bits

    @property
    def n(self) -> int:
        """How many examples were coded."""
        return self.blocks[-1].until

    def to_frame(self) -> pd.DataFrame:
        """One line a block: where it begins and ends, and its bits, in all and for each example."""
        import pandas as pd

        starts = [0, *(block.until for block in self.blocks[:-1])]
        counts = [block.until - start for start, block in zip(starts, self.blocks, strict=True)]
        return pd.DataFrame(
            {
                "from": starts,
                "until": [block.until for block in self.blocks],
                "bits": [block.bits for block in self.blocks],
                "frequency_bits": [block.frequency_bits for block in self.blocks],
                "uniform_bits": [self.uniform_bits * count / self.n for count in counts],
                "bits_per_example": [b.bits / c for b, c in zip(self.blocks, counts, strict=True)],
            }
        )

    def plot(self) -> Figure:
        """Bits per example of each block, against how many examples came before it."""
        from reftlab.plotting.probe_curves import code_figure

        return code_figure(
            [block.until for block in self.blocks],
            [block.bits for block in self.blocks],
            [block.frequency_bits for block in self.blocks],
            self.uniform_bits,
            f"Online code: {self.bits:.4g} bits, compression {self.compression:.3g}",
        )

    def __repr__(self) -> str:
        return (
            f"DescriptionLength({self.bits:.4g} bits for {self.n} examples, uniform {self.uniform_bits:.4g}, "
            f"compression {self.compression:.3g}, against frequencies {self.gain:.3g})"
        )

    def _repr_html_(self) -> str:
        table = self.to_frame().to_html(index=False, float_format="{:.3g}".format)
        return f"<div><p>{html.escape(repr(self))}</p>{table}</div>"


def description_length(
    X: Any,  # noqa: N803
    y: Any,
    estimator: Any = None,
    groups: Sequence[Any] | Any | None = None,
    *,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
    progress: bool = False,
) -> DescriptionLength:
    """Length of the online code of labels given vectors, by a probe that learns as it goes.

    The examples come in blocks, in random order. The first block costs log₂ K bits an example for K
    classes; each later one −Σ log₂ p(label | vector) by the probe that was trained on all before it.
    The shorter the code, the more of the labels is in the vectors, and the easier it is to get at.

    A probe that was trained on n examples is mixed with the uniform distribution, which gets the weight
    K / (n + K): a class that did not come yet so has the probability 1 / (n + K), and no label costs
    more than log₂(n + K) bits however sure the probe was of another. Where only one class came yet, the
    probe says that one.

    Blocks end between groups, and no earlier than after `max(2K, 8)` examples, so that for few examples
    the first of the paper's fractions drop out.

    Args:
        X: vectors `(n, width)`.
        y: n classes, or `(n, k)` zeros and ones, several labels an example, whose codes are added up.
        estimator: a scikit-learn classifier with `predict_proba`; a logistic regression of fixed strength on
            standardised vectors unless given, as in `rl.probe`. Cloned for every block. A search such as
            `GridSearchCV` gets the groups of what it is fitted on.
        groups: which examples belong together and are kept in one block; each on its own unless given.
        fractions: where blocks end, as shares of the examples, rising to 1.
        seed: of the order of the groups.
        progress: show a bar over the blocks.

    Returns:
        The code's length, block by block, beside two codes that need no vectors.

    Raises:
        DataError: labels that are no classes, an estimator without probabilities, or one that cannot be
            fitted on a block's examples.

    >>> vectors = np.random.default_rng(0).standard_normal((400, 4))
    >>> description_length(vectors, vectors[:, 0] > 0).compression > 2
    True
    """
    vectors = as_vectors(X)
    targets, classes = _targets(y, len(vectors))
    estimator = default_coder() if estimator is None else estimator
    require_code(estimator)
    numbers = as_groups(groups, len(vectors))
    order, ends = _blocks(numbers, classes, fractions, whole("seed", seed, 0))
    found: list[CodeBlock] = [_uniform_block(ends[0], classes, targets.shape[1])]
    for start, end in tqdm(list(itertools.pairwise(ends)), desc="code blocks", disable=not progress):
        bits = frequency = 0.0
        for column in range(targets.shape[1]):
            before, coded = order[:start], order[start:end]
            seen, true = targets[before, column], targets[coded, column]
            said = _said(estimator, vectors, before, coded, seen, classes, numbers)
            bits += _bits(said, true, len(seen), classes)
            shares = np.bincount(seen, minlength=classes) / len(seen)
            frequency += _bits(np.tile(shares, (len(true), 1)), true, len(seen), classes)
        found.append(CodeBlock(end, bits, frequency))
    return DescriptionLength(
        sum(block.bits for block in found),
        targets.size * float(np.log2(classes)),
        sum(block.frequency_bits for block in found),
        tuple(found),
        classes,
        targets.shape[1],
    )


def _targets(y: Any, n: int) -> tuple[Int[np.ndarray, "n k"], int]:
    """Numbers of the classes, a column a label, and how many classes each label has."""
    labels = as_numpy(y)
    if labels.ndim == 2:
        if len(labels) != n or labels.shape[1] < 1 or not bool(np.isin(labels, (0, 1)).all()):
            raise DataError(
                f"y has the shape {labels.shape}; several labels an example are zeros and ones ({n}, k)"
            )
        return labels.astype(np.int64), 2
    if labels.ndim == 1 and labels.dtype.kind == "f" and not bool((labels == np.round(labels)).all()):
        raise DataError(
            "y holds fractions: a description length needs classes, since bits of a number depend on how "
            "finely it is written; for a regression report R²"
        )
    classes, numbers = as_classes(y, n)
    return numbers[:, None], len(classes)


def default_coder() -> Any:
    """A logistic regression on standardised vectors, the classes as frequent as they are.

    It is their probabilities that make the code, so that they are not weighted.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from reftlab.probing.estimators import UNCHOSEN_C

    return make_pipeline(StandardScaler(), LogisticRegression(C=UNCHOSEN_C, max_iter=2000))


def require_code(estimator: Any) -> None:
    """Refuse what gives no probabilities.

    Args:
        estimator: of the code.

    Raises:
        DataError: it is no classifier, or has no `predict_proba`.
    """
    if not hasattr(estimator, "fit"):
        raise DataError(f"estimator={estimator!r}: expected a scikit-learn classifier")
    if not hasattr(estimator, "predict_proba"):
        raise DataError(
            f"estimator={estimator!r} has no predict_proba, so its labels have no code; use one that has, "
            "such as LogisticRegression"
        )


def _blocks(
    groups: Int[np.ndarray, " n"], classes: int, fractions: Sequence[float], seed: int
) -> tuple[Int[np.ndarray, " n"], list[int]]:
    """The examples in the order in which they are coded, and where the blocks end."""
    shares = [float(fraction) for fraction in fractions]
    if not shares or shares[-1] != 1 or shares[0] <= 0 or any(np.diff(shares) <= 0):
        raise DataError(f"fractions={tuple(fractions)!r}: expected shares that rise from above 0 to 1")
    place = np.random.default_rng(seed).permutation(int(groups.max()) + 1)[groups]
    order = np.argsort(place, kind="stable")
    borders = np.append(np.flatnonzero(np.diff(place[order])) + 1, len(order))
    least = max(2 * classes, 8)
    usable = borders[borders >= least]
    ends = sorted(
        {int(usable[np.abs(usable - at).argmin()]) for at in np.multiply(shares, len(order)) if at >= least}
        if len(usable)
        else ()
    )
    if len(ends) < 2:
        raise DataError(
            f"{len(order)} examples in {len(borders)} groups make no two blocks of which the first has at "
            f"least {least} examples (for {classes} classes); give more examples or other fractions"
        )
    return order, ends


def _uniform_block(until: int, classes: int, labels: int) -> CodeBlock:
    bits = until * labels * float(np.log2(classes))
    return CodeBlock(until, bits, bits)


def _said(
    estimator: Any,
    vectors: Float[np.ndarray, "n width"],
    before: Int[np.ndarray, " seen"],
    coded: Int[np.ndarray, " coded"],
    labels: Int[np.ndarray, " seen"],
    classes: int,
    groups: Int[np.ndarray, " n"],
) -> Float[np.ndarray, "coded classes"]:
    """What a probe trained on the examples before says of those to be coded; 0 for unseen classes."""
    from sklearn.base import clone
    from sklearn.model_selection._search import BaseSearchCV

    said = np.zeros((len(coded), classes))
    present = np.unique(labels)
    if len(present) == 1:
        said[:, present[0]] = 1.0
        return said
    options = {"groups": groups[before]} if isinstance(estimator, BaseSearchCV) else {}
    try:
        fitted = clone(estimator).fit(vectors[before], labels, **options)
        found = np.asarray(fitted.predict_proba(vectors[coded]), dtype=np.float64)
    except ValueError as error:
        raise DataError(
            f"estimator={estimator!r} cannot learn from the first {len(before)} examples: {error}; give "
            "fractions that begin later, or an estimator that needs fewer"
        ) from error
    if not bool(np.isfinite(found).all()):
        raise DataError(
            f"estimator={estimator!r}, trained on {len(before)} examples, gives NaN as probability"
        )
    said[:, np.asarray(fitted.classes_)] = found
    return said


def _bits(
    said: Float[np.ndarray, "n classes"], true: Int[np.ndarray, " n"], seen: int, classes: int
) -> float:
    """−Σ log₂ of the probability of each true class, mixed with the uniform one."""
    given = said[np.arange(len(true)), true]
    return float(-np.log2((seen * given + 1.0) / (seen + classes)).sum())
