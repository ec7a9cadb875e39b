"""Finding what drives an edit's read directions, and random directions beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from reftlab.explaining.geometry.contexts import MEASURES, Against, Context, Contexts, Drive, TokenMean
from reftlab.explaining.geometry.directions import Directions, directions_of
from reftlab.explaining.geometry.sites import Seen, SiteTokens, see_sites
from reftlab.explaining.geometry.tokens import readable_token
from reftlab.explaining.subject import Subject
from reftlab.runtime.modes import evaluating
from reftlab.training.settings import whole

if TYPE_CHECKING:
    from reftlab.runtime import BoundModel

__all__ = ["contexts_of", "driven", "driving_contexts"]


def driving_contexts(
    reft: BoundModel,
    examples: Any,
    edit: str | None = None,
    *,
    top: int = 8,
    draws: int = 200,
    chat: bool | None = None,
    system: str | None = None,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Contexts:
    """Find the tokens and texts that drive each read direction of an edit; see `Contexts`.

    Args:
        reft: a bound model with its tokenizer.
        examples: anything that `rl.train` takes; answers are part of their texts.
        edit: key of the edit, its name or `name[4]` where it acts at several sites; not needed where there
            is one edit at one site.
        top: how many texts and tokens of each end.
        draws: how many random directions.
        chat, system: as for `rl.reply`.
        sources: inputs of each source run for all examples, as for `reft(...)`.
        progress: whether to show a progress bar.
        seed: of the random directions.

    Raises:
        DataError: examples, a key or numbers that cannot be used.

    >>> rl.driving_contexts(reft, examples, "emoji")                       # doctest: +SKIP
    Contexts('emoji': 420 tokens of 20 texts; most driven by 1: ␣sea, z 6.1)
    """
    whole("top", top, 1)
    whole("draws", draws, 1)
    subject = Subject.of("driving_contexts", reft, examples, chat=chat, system=system, sources=sources)
    edit = subject.edit(edit).key
    with evaluating(reft), torch.no_grad(), tqdm(disable=not progress, desc="driving_contexts") as bar:
        seen = see_sites(reft, subject.texts, subject.accepts, [edit], tick=bar.update)
        return driven(subject, edit, seen, top=top, draws=draws, seed=seed)


def driven(
    subject: Subject, edit: str, seen: Seen, *, top: int = 8, draws: int = 200, seed: int = 0
) -> Contexts:
    """`driving_contexts` of an edit whose site has been seen; see there.

    Args:
        subject: what is explained.
        edit: key of the edit.
        seen: what reaches its site.
        top, draws, seed: as for `driving_contexts`.
    """
    reft = subject.reft
    site = next(str(bound.site) for bound in reft.edits if bound.key == edit)
    if edit in seen.missing:
        return Contexts(edit, site, (), 0, len(subject.rows), 0, missing=seen.missing[edit])
    with evaluating(reft), torch.no_grad():
        directions = directions_of(reft, {edit: seen.vectors[edit]})[edit]
        return contexts_of(
            directions, seen.tokens[edit], reft.tokenizer, site=site, top=top, draws=draws, seed=seed
        )


def contexts_of(
    directions: Directions,
    tokens: SiteTokens,
    tokenizer: Any,
    *,
    site: str = "",
    top: int = 8,
    draws: int = 200,
    seed: int = 0,
) -> Contexts:
    """Find what drives the read directions of an edit that has been seen; see `driving_contexts`.

    Args:
        directions: the edit's directions.
        tokens: what reaches its site.
        tokenizer: to name the tokens.
        site: its name.
        top, draws, seed: as for `driving_contexts`.
    """
    reads = [
        (label, read)
        for label, read in zip(directions.labels, directions.read, strict=True)
        if float(read.norm()) > 0
    ]
    count = len(tokens.rows.unique())
    if not reads:
        why = "the edit reads nothing: it writes the same whatever stands there"
        return Contexts(directions.edit, site, (), len(tokens.rows), count, 0, missing=why)
    generator = torch.Generator().manual_seed(seed)
    width = tokens.vectors.shape[1]
    random = torch.randn(draws, width, generator=generator)
    chance = _measured(tokens.usual, random / random.norm(dim=1, keepdim=True))
    names = {int(number): readable_token(tokenizer, int(number)) for number in tokens.ids.unique()}
    made = _Texts(tokens, names)
    drives = tuple(_drive(label, read / read.norm(), made, chance, top) for label, read in reads)
    return Contexts(directions.edit, site, drives, len(tokens.rows), count, draws, tokens.note)


class _Texts:
    """The tokens of the examples, by example."""

    def __init__(self, tokens: SiteTokens, names: Mapping[int, str]) -> None:
        self.tokens, self.names = tokens, names
        self.counted = tokens.counted
        self.places = {int(row): (tokens.rows == row).nonzero()[:, 0] for row in tokens.rows.unique()}

    def ends(self, values: Float[Tensor, " token"], top: int, largest: bool) -> tuple[Context, ...]:
        """The texts with the largest or smallest values, each at its own extreme token."""
        turned = values if largest else -values
        turned = turned.where(self.counted, float("-inf"))
        peaks = {row: places[turned[places].argmax()] for row, places in self.places.items()}
        peaks = {row: peak for row, peak in peaks.items() if self.counted[peak]}
        order = sorted(peaks, key=lambda row: float(turned[peaks[row]]), reverse=True)[:top]
        return tuple(self._context(row, int(peaks[row]), values) for row in order)

    def _context(self, row: int, peak: int, values: Float[Tensor, " token"]) -> Context:
        places = self.places[row]
        return Context(
            row,
            int((places == peak).nonzero()[0, 0]),
            tuple(self.names[number] for number in self.tokens.ids[places].tolist()),
            tuple(values[places].tolist()),
            tuple(self.tokens.edited[places].tolist()),
        )

    def means(self, values: Float[Tensor, " token"]) -> list[TokenMean]:
        """Means by token of the vocabulary, largest first."""
        ids, place, counts = self.tokens.ids[self.counted].unique(return_inverse=True, return_counts=True)
        sums = torch.zeros(len(ids)).index_add_(0, place, values[self.counted])
        found = [
            TokenMean(self.names[number], mean, count)
            for number, mean, count in zip(
                ids.tolist(), (sums / counts).tolist(), counts.tolist(), strict=True
            )
        ]
        return sorted(found, key=lambda one: one.mean, reverse=True)


def _drive(
    label: str,
    read: Float[Tensor, " width"],
    texts: _Texts,
    chance: Mapping[str, Float[Tensor, " draw"]],
    top: int,
) -> Drive:
    values = texts.tokens.vectors @ read
    usual = values[texts.counted]
    own = _measured(texts.tokens.usual, read[None])
    means = texts.means(values)
    each = min(top, -(-len(means) // 2))
    return Drive(
        label,
        float(usual.mean()),
        float(usual.std(correction=0)),
        texts.ends(values, top, largest=True),
        texts.ends(values, top, largest=False),
        tuple(means[:each]),
        tuple(means[: len(means) - each - 1 : -1][: len(means) - each]),
        tuple(_against(name, float(own[name][0]), chance[name]) for name in MEASURES),
    )


def _measured(
    vectors: Float[Tensor, "token width"], directions: Float[Tensor, "direction width"]
) -> dict[str, Float[Tensor, " direction"]]:
    """The `MEASURES` of unit directions."""
    centred = vectors.double() - vectors.double().mean(0)
    along = centred @ directions.double().T
    variance = along.square().mean(0)
    whole = centred.square().mean(0).sum()
    tiny = torch.finfo(torch.float64).tiny
    z = along / variance.sqrt().clamp(min=tiny**0.5)
    return {
        "variance": variance / whole.clamp(min=tiny),
        "kurtosis": z.pow(4).mean(0) - 3,
        "largest": z.abs().amax(0),
    }


def _against(measure: str, value: float, random: Float[Tensor, " draw"]) -> Against:
    low, middle, high = random.quantile(random.new_tensor([0.025, 0.5, 0.975])).tolist()
    p = (1 + int((random >= value).sum())) / (1 + len(random))
    return Against(measure, value, low, middle, high, p)
