"""The tokens that one bound edit's directions promote, by the logit lens and by a lens fitted to data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from reftlab.address import parse_path, resolve
from reftlab.errors import DataError, ReftlabError
from reftlab.explaining.geometry.lens import DataLens
from reftlab.explaining.geometry.lens_fit import fit_lenses
from reftlab.explaining.geometry.sites import unseen
from reftlab.explaining.geometry.tokens import TokenEffects, token_effects
from reftlab.explaining.subject import Subject
from reftlab.graph import Read
from reftlab.runtime.modes import evaluating
from reftlab.runtime.saving import signature_of
from reftlab.training.settings import whole

if TYPE_CHECKING:
    from reftlab.runtime import BoundModel
    from reftlab.runtime.places import BoundEdit

__all__ = ["FIT", "effects_of", "lenses_for", "promoted_tokens"]

FIT = "fit"
"""In place of a lens: fit one at each edit's site, on the examples."""


def promoted_tokens(
    reft: BoundModel,
    examples: Any,
    edit: str | None = None,
    *,
    lens: DataLens | Sequence[DataLens] | str | None = None,
    top: int = 8,
    chat: bool | None = None,
    system: str | None = None,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
) -> TokenEffects:
    """Find the tokens that each write direction of an edit promotes and suppresses; see `TokenEffects`.

    Args:
        reft: a bound model with its tokenizer.
        examples: anything that `rl.train` takes.
        edit: key of the edit, its name or `name[4]` where it acts at several sites; not needed where there
            is one edit at one site.
        lens: what `rl.fit_lens` gave for the edit's site, or `"fit"` to fit one on these examples; with it
            the result has both lists.
        top: how many tokens of each kind.
        chat, system: as for `rl.reply`.
        sources: inputs of each source run for all examples, as for `reft(...)`.
        seed: of the examples drawn to fit a lens on, where there are many.

    Raises:
        DataError: examples, a key, a lens or numbers that cannot be used, or an edit that acts on none of
            the examples.

    >>> rl.promoted_tokens(reft, examples, "emoji", lens="fit")            # doctest: +SKIP
    TokenEffects('emoji': 1: 🌊 🐠 🐚)
    """
    whole("top", top, 1)
    subject = Subject.of("promoted_tokens", reft, examples, chat=chat, system=system, sources=sources)
    bound = subject.edit(edit)
    if bound.key not in subject.recorded.vectors:
        raise DataError(f"edit={bound.key!r} acts on no token of these examples")
    with evaluating(reft), torch.no_grad():
        # A list may hold lenses of other edits' sites, as for `explain`.
        lenses = lenses_for(subject, lens, [bound] if isinstance(lens, str) else reft.edits, seed=seed)
        return effects_of(subject, bound, lenses.get(bound.key), top=top)


def effects_of(
    subject: Subject, bound: BoundEdit, data_lens: DataLens | None = None, *, top: int = 8
) -> TokenEffects:
    """`promoted_tokens` of an edit that acts on the examples.

    Args:
        subject: what is explained.
        bound: the edit.
        data_lens: a lens fitted at its site, or None.
        top: how many tokens of each kind.
    """
    recorded, caveat = subject.recorded, ""
    if (bound.site.module, bound.site.side) not in recorded.lens.stream:
        caveat = f"{bound.site} is not the residual stream itself; its vectors are read as if added to it"
    return token_effects(
        recorded.lens, subject.reft.tokenizer, subject.directions[bound.key],
        recorded.centres.get(bound.key), top=top, caveat=caveat, data_lens=data_lens,
    )  # fmt: skip


def lenses_for(
    subject: Subject, lens: Any, bounds: Sequence[BoundEdit], *, seed: int = 0
) -> dict[str, DataLens]:
    """The lens fitted to data at each edit's site, by key, where there is one.

    Args:
        subject: what is explained.
        lens: a lens, several, `"fit"`, or None.
        bounds: the edits.
        seed: as for `fit_lens`.

    Raises:
        DataError: something else, or a lens of a site at which no edit acts, or of another model.
    """
    if lens is None:
        return {}
    if isinstance(lens, str) and lens == FIT:
        return _fitted_for(subject, bounds, seed)
    lenses = [lens] if isinstance(lens, DataLens) else lens
    if (
        not isinstance(lenses, list | tuple)
        or not lenses
        or not all(isinstance(one, DataLens) for one in lenses)
    ):
        raise DataError(f"lens={lens!r}: expected what rl.fit_lens returns, a list of these, or 'fit'")
    found: dict[str, DataLens] = {}
    model = signature_of(subject.reft.model)["fingerprint"]
    for one in lenses:
        if one.fitted_to not in ("", model):
            raise DataError(
                f"lens={one!r}: it was fitted to a model with other weights; fit one to this model with "
                "rl.fit_lens, or give lens='fit'"
            )
        places = {(s.module, s.side, s.leaf) for s in resolve(parse_path(one.site), subject.reft.model)}
        own = [
            bound
            for bound in bounds
            if (bound.site.module, bound.site.side, bound.site.leaf) in places
            and (one.missing or (one.view == bound.edit.view and one.matrix.shape[1] == bound.width))
        ]
        if not own:
            edited = (f"{b.site}{b.edit.view.suffix} with {b.width} features" for b in bounds)
            known = ", ".join(dict.fromkeys(edited))
            raise DataError(
                f"lens={one!r}: no edit acts there, on the same heads or features; the edits act at {known}"
            )
        found |= {bound.key: one for bound in own}
    return found


def _fitted_for(subject: Subject, bounds: Sequence[BoundEdit], seed: int) -> dict[str, DataLens]:
    """A lens at every site at which an edit acts, where there can be one."""
    found = {
        bound.key: DataLens.unavailable(str(bound.site), why) for bound in bounds if (why := unseen(bound))
    }
    reads: dict[Read, list[str]] = {}
    for bound in bounds:
        if bound.key not in found:
            at = str(bound.site) if bound.site.label else bound.edit.at
            read = Read(at, heads=bound.edit.heads, features=bound.edit.features)
            reads.setdefault(read, []).append(bound.key)
    if not reads:
        return found
    try:
        lenses = fit_lenses(subject, list(reads), progress=False, seed=seed)
    except ReftlabError as error:
        lenses = tuple(DataLens.unavailable(str(read.at), str(error)) for read in reads)
    for keys, one in zip(reads.values(), lenses, strict=True):
        found |= dict.fromkeys(keys, one)
    return found
