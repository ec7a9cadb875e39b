"""What stands at each edit's site at every token, edited or not: one pass over the examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reftlab.explaining.geometry.record import Recording
from reftlab.explaining.geometry.repeats import counted_once, likeness_in, looks_back_only, repeats_of
from reftlab.explaining.geometry.vectors import EditVectors
from reftlab.graph import BASE, Edit, InterventionGraph, Phase
from reftlab.interventions import Scale
from reftlab.runtime.calls import continues_texts

if TYPE_CHECKING:
    from reftlab.runtime import BoundModel
    from reftlab.runtime.places import BoundEdit

__all__ = ["Seen", "SiteTokens", "left_out", "massive_of", "see_sites", "unseen"]

_MASSIVE = 10.0


@dataclass(frozen=True, eq=False)
class SiteTokens:
    """The vectors that reach an edit's site, at every token of the examples.

    Those before any edit *of this site*; edits of earlier sites are in force.

    Attributes:
        edit: key of the edit.
        vectors: `(token, width)` float32.
        rows: `(token,)`, the example of each, from 0.
        positions: `(token,)`, the token's number in its example, from 0.
        ids: `(token,)`, its id.
        edited: `(token,)`, whether the edit acts on it.
        repeats: `(token,)`, whether it is an earlier example's once more; see `repeats_of`.
    """

    edit: str
    vectors: Float[Tensor, "token width"]
    rows: Int[Tensor, " token"]
    positions: Int[Tensor, " token"]
    ids: Int[Tensor, " token"]
    edited: Bool[Tensor, " token"]
    repeats: Bool[Tensor, " token"]

    @cached_property
    def massive(self) -> Bool[Tensor, " token"]:
        """See `massive_of`; repeats among them."""
        return massive_of(self.vectors, ~self.repeats)

    @property
    def counted(self) -> Bool[Tensor, " token"]:
        """Which tokens are neither massive nor repeats."""
        return ~(self.massive | self.repeats)

    @property
    def usual(self) -> Float[Tensor, "token width"]:
        """The vectors of the tokens that count."""
        return self.vectors[self.counted]

    @property
    def note(self) -> str:
        """What `usual` leaves out, in words, or an empty text."""
        massive = left_out(self.massive & ~self.repeats, self.positions)
        return "; ".join(part for part in (massive, counted_once(int(self.repeats.sum()))) if part)


def massive_of(
    vectors: Float[Tensor, "token width"], among: Bool[Tensor, " token"] | None = None
) -> Bool[Tensor, " token"]:
    """Vectors that are over ten times as long as the median one, of those in `among` where it is given.

    Many models give a few tokens, mostly the first of a text, vectors hundreds of times as long as all
    others, which serve as a place to attend to. They are alike in all texts, and would be nearly all of
    the variance. Sun et al., "Massive Activations in Large Language Models" (2024, arXiv:2402.17762).
    """
    lengths = vectors.float().norm(dim=1)
    return lengths > _MASSIVE * (lengths if among is None else lengths[among]).median()


def left_out(massive: Bool[Tensor, " token"], positions: Int[Tensor, " token"]) -> str:
    """What leaving massive vectors out left out, in words, or an empty text."""
    count, first = int(massive.sum()), int((massive & (positions == 0)).sum())
    if not count:
        return ""
    if count == 1:
        which = ", the first of its text," if first else ""
        return f"1 token{which} whose vector is over {_MASSIVE:g} times as long as the median was left out"
    return (
        f"{count} tokens whose vectors are over {_MASSIVE:g} times as long as the median were left out, "
        f"{first} of them the first of their text"
    )


@dataclass(frozen=True, eq=False)
class Seen:
    """What one pass gave.

    Attributes:
        tokens: by edit, what reaches its site.
        vectors: by edit, what it was given and made.
        missing: by edit, why there is nothing.
    """

    tokens: dict[str, SiteTokens]
    vectors: dict[str, EditVectors]
    missing: dict[str, str]


def see_sites(
    reft: BoundModel,
    batches: Sequence[Mapping[str, Any]],
    accepts: frozenset[str],
    keys: Sequence[str] | None = None,
    tick: Callable[[], Any] = lambda: None,
) -> Seen:
    """Run every batch once and keep what reaches the sites of edits, at every token.

    Args:
        reft: the bound model.
        batches: the examples.
        accepts: which entries of a batch the bound model's forward takes.
        keys: of the edits; all unless given.
        tick: called after each batch.
    """
    chosen = [bound for bound in reft.edits if keys is None or bound.key in keys]
    missing = {bound.key: why for bound in chosen if (why := unseen(bound))}
    watched = [bound for bound in chosen if bound.key not in missing]
    if not watched:
        return Seen({}, {}, missing)
    places, watcher = _watcher(reft, watched)
    recording = Recording()
    ids: list[Tensor] = []
    with watcher.watching(recording.see):
        for batch in batches:
            watcher(**{name: value for name, value in batch.items() if name in accepts})
            mask = batch["attention_mask"].bool().cpu()
            if "attention_mask" not in accepts:
                # A model that is told of no padding takes it for tokens.
                mask = torch.ones_like(mask)
            ids += [row[real] for row, real in zip(batch["input_ids"].cpu(), mask, strict=True)]
            recording.first_row += len(mask)
            tick()
    tokens, vectors = {}, {}
    lookers = {bound.key: bound for bound in watcher.edits}
    for bound in watched:
        seen, own = recording.vectors(lookers[places[bound.key]]), recording.vectors(bound)
        if seen is None or own is None:
            missing[bound.key] = "the edit acts on no token of these examples"
        elif seen.base.shape[1] != own.base.shape[1]:
            missing[bound.key] = (
                f"the edit takes {own.base.shape[1] // seen.base.shape[1]} tokens together, so it reads no "
                "single one"
            )
        else:
            vectors[bound.key] = own
            tokens[bound.key] = _site_tokens(reft, bound.key, seen, own, ids)
    return Seen(tokens, vectors, missing)


def unseen(bound: BoundEdit) -> str:
    """Why nothing can be seen at an edit's site, or an empty text."""
    if bound.edit.run != BASE:
        return f"the edit acts in the source run {bound.edit.run!r}, not on the examples' own tokens"
    if bound.site.part and bound.site.label:
        return f"{bound.site} is a part of several places, which has no path of its own"
    if bound.place.stream != "tokens":
        return f"{bound.site} has no vector for each token of the text"
    return "" if bound.width else f"{bound.site} has vectors of many widths"


def _watcher(reft: BoundModel, watched: Sequence[BoundEdit]) -> tuple[dict[str, str], BoundModel]:
    """The bound model with an edit at each watched site that changes nothing and sees every token."""
    phase: Phase = "both" if continues_texts(reft.model) else "prompt"
    taken = {edit.name for edit in reft.graph.edits} | {node.name for node in reft.graph.reads}
    prefix = "seen"
    while any(str(name).startswith(prefix) for name in taken):
        prefix += "_"
    places, edits, known = {}, [], dict[Any, str]()
    for bound in watched:
        edit, site = bound.edit, bound.site
        here = (str(site), site.part, str(edit.view))
        if here not in known:
            known[here] = f"{prefix}{len(known)}"
            edits.append(
                Edit(
                    known[here], at=str(site) if site.label else edit.at, positions="all",
                    intervention=Scale(1.0), phase=phase, heads=edit.heads, features=edit.features,
                )
            )  # fmt: skip
        places[bound.key] = known[here]
    lookers = InterventionGraph(*edits).bind(reft.model, reft.tokenizer, example=reft._example)
    # The left one's edits act first at a shared site.
    both = lookers + reft
    both.facts = dict(reft.facts)
    return places, both


def _site_tokens(
    reft: BoundModel, key: str, seen: EditVectors, own: EditVectors, ids: Sequence[Tensor]
) -> SiteTokens:
    order = sorted(range(len(seen.rows)), key=lambda n: (int(seen.rows[n]), int(seen.positions[n])))
    vectors, rows, positions = seen.base[order], seen.rows[order], seen.positions[order]
    acted = set(zip(own.rows.tolist(), own.positions.tolist(), strict=True))
    pairs = list(zip(rows.tolist(), positions.tolist(), strict=True))
    numbers = torch.tensor([int(ids[row][number]) for row, number in pairs])
    causal, likeness = looks_back_only(reft.model), likeness_in(reft.model)
    return SiteTokens(
        key,
        vectors,
        rows,
        positions,
        numbers,
        torch.tensor([pair in acted for pair in pairs]),
        repeats_of(rows, numbers, vectors, causal=causal, likeness=likeness),
    )
