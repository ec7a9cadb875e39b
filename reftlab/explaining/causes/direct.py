"""What an edit does to the logits by way of the residual stream alone, and what later blocks make of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from reftlab.address import parse_path, resolve
from reftlab.errors import AddressError, DataError
from reftlab.explaining.altering import Written, altered
from reftlab.explaining.causes.asking import Runs
from reftlab.explaining.causes.given import Noted, placed_at, whole_place
from reftlab.explaining.causes.split import DirectEffect, DirectEffects, split_effect
from reftlab.explaining.subject import Subject
from reftlab.graph import BASE
from reftlab.measuring import Question, metrics_of
from reftlab.runtime.calls import continues_texts
from reftlab.runtime.cone import BlockStack
from reftlab.runtime.modes import evaluating
from reftlab.sweeping.metric import Metric, answer_log_probability
from reftlab.training.settings import whole

if TYPE_CHECKING:
    from reftlab.runtime import BoundModel
    from reftlab.runtime.places import BoundEdit

__all__ = ["at_next_token", "direct_effect", "direct_effects"]

Context = Literal["alone", "together"]

_COMPONENTS = ("blocks[*].attn.output", "blocks[*].mlp.output")
_STREAM = ("blocks[*].input", "blocks[*].output", *_COMPONENTS)
_FIRST, _LAST = "blocks[0].output", "final_norm.input"
_OFF = {torch.float32: 1e-2, torch.float64: 1e-3}
"""How far a vector may be from the one that was added to the stream, as a share of its length."""
_COARSE = 0.1


def direct_effect(
    reft: BoundModel,
    examples: Any,
    metric: Metric | Callable[[Tensor], Tensor] | None = None,
    *,
    context: Context = "alone",
    top: int = 8,
    chat: bool | None = None,
    system: str | None = None,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    progress: bool = True,
    seed: int = 0,
) -> DirectEffects:
    """Split each edit's effect on the next token's logits into a direct part and what later blocks add.

    The total effect is the change that the edit makes. The direct effect is the change that is left where
    the output of every attention and every MLP is held at what it was without the edit: then what the
    edit writes reaches the logits by the residual stream alone, through the model's own final norm and
    unembedding, without linearisation. Where the edit acts inside an attention or an MLP, that one is not
    held. An edit that does not act at a prompt's last token has no direct effect there: exactly 0.

    Args:
        reft: a bound model with its tokenizer.
        examples: anything that `rl.train` takes; logits are those after the prompt.
        metric: of these logits, as for `reftlab.measuring.behaviour_of`. Unless given, the log-probability
            of the answer's first token where all examples have answers, else KL(edited ‖ run) of the next
            token.
        context: what the other edits do: `alone`, they are off in all runs; `together`, they are on in all
            runs, and where the edit's direct effect is taken they write what they write without it.
        top: how many raised and lowered tokens to keep, by the direct and by the total change.
        chat, system, sources: as for `reftlab.measuring.behaviour_of`.
        progress: whether to show a progress bar.
        seed: of the bootstrap.

    Raises:
        DataError: examples or an argument that cannot be used.

    Source: Pearl (2001) on direct and indirect effects; Vig et al. (2020) on both in language models;
    McGrath et al., "The Hydra Effect" (2023), for direct effects by holding later components.

    >>> rl.direct_effect(reft, [("What is the sea like?", "🌊🐠🐚")]).plot()        # doctest: +SKIP
    """
    if context not in ("alone", "together"):
        raise DataError(f"context={context!r}: expected 'alone' or 'together'")
    top = whole("top", top, 1)
    subject = Subject.of("direct_effect", reft, examples, metric, chat=chat, system=system, sources=sources)
    question = at_next_token(subject).question
    return direct_effects(reft, question, context=context, top=top, progress=progress, seed=seed)


def at_next_token(subject: Subject) -> Subject:
    """The same prompts without answers, of which the next token is measured.

    Unless there is a metric, that is the log-probability of the answer's first token, where all have answers.

    Raises:
        DataError: an answer without tokens.
    """
    rows, metric = subject.rows, subject.metric
    if metric is None and all(row.answer is not None for row in rows):
        tokenizer: Any = subject.reft.tokenizer
        ids = [tokenizer(row.answer, add_special_tokens=False)["input_ids"] for row in rows]
        empty = [row.answer for row, own in zip(rows, ids, strict=True) if not own]
        if empty:
            raise DataError(f"the answer {empty[0]!r} has no tokens")
        metric = answer_log_probability([own[0] for own in ids])
    return replace(subject, rows=tuple(replace(row, answer=None) for row in rows), metric=metric)


def direct_effects(
    reft: BoundModel,
    question: Question,
    *,
    context: Context = "alone",
    top: int = 8,
    progress: bool = True,
    seed: int = 0,
) -> DirectEffects:
    """`direct_effect` on prompts that are prepared already, without answers; see there."""
    name, unit = question.name, question.unit
    if question.answered:
        raise DataError("direct effects are on the next token's logits; prepare the prompts without answers")
    with evaluating(reft), torch.no_grad():
        try:
            work = _Work(reft, question, context)
        except _MissingError as error:
            return DirectEffects(name, unit, context, (), str(error))
        found = []
        for edit in tqdm(work.names, desc="direct effects", unit="edit", disable=not progress):
            found.append(work.effect(edit, top, seed))
    return DirectEffects(name, unit, context, tuple(found))


class _MissingError(Exception):
    """Why a model has no direct path to speak of."""


class _Work:
    """The runs with components noted and held."""

    def __init__(self, reft: BoundModel, question: Question, context: Context) -> None:
        model = reft.model
        if not continues_texts(model):
            raise _MissingError(f"{type(model).__name__} does not continue texts, so there is no next token")
        try:
            sites = [site for path in _COMPONENTS for site in resolve(parse_path(path), model)]
            ends = [*resolve(parse_path(_FIRST), model), *resolve(parse_path(_LAST), model)]
            known = [site for path in _STREAM for site in resolve(parse_path(path), model)]
        except AddressError as error:
            raise _MissingError(
                f"{type(model).__name__} has no blocks whose attention and MLP can be held, or no final norm "
                f"behind them, that reftlab can find ({error}), so there is no direct path"
            ) from error
        self._stream = {(site.module, site.side) for site in known}
        off = reft._disabled
        self.names = [e.name for e in reft.graph.edits if e.run == BASE and e.name not in off]
        self._reft, self._question, self._context = reft, question, context
        # On the left of the edits, so that an edit at a component's output acts on what is held there.
        self._held = placed_at(reft, [whole_place(site) for site in sites], "held")
        self._ends = placed_at(reft, [whole_place(site) for site in ends], "stream")
        self._bound = self._held.bound + reft + self._ends.bound
        self._runs = Runs(self._bound, question, ())
        self._stack = BlockStack.of(model)
        self._alone: _Base | None = None
        self._check_path()

    def effect(self, name: str, top: int, seed: int) -> DirectEffect:
        """The split effect of one edit."""
        bounds = [bound for bound in self._bound.edits if bound.edit.name == name]
        sites = tuple(str(bound.site) for bound in bounds)
        free: set[str] = set()
        for bound in bounds:
            inside = self._inside(bound)
            if inside is None:
                why = f"{bound.site} is neither on the residual stream nor inside an attention or an MLP"
                return DirectEffect.unavailable(name, sites, f"{why}, so its direct path is not defined")
            free |= inside
        others = [other for other in self.names if other != name] if self._context == "together" else []
        self._check_others(name, others)
        base = self._base(others)
        at_last: list[int] = []
        total = self._logits([*others, name], {}, watched=(name, at_last))
        held = [entry for entry in self._held.names if entry not in free]
        with self._replaying(base):
            direct = self._logits([*others, name], dict.fromkeys(held), base)
        metrics = metrics_of(self._question, self._reft.tokenizer, total, base.logits)
        return split_effect(
            name, sites, len(set(at_last)), metrics, base.logits, direct, total,
            self._reft.tokenizer, top, seed,
        )  # fmt: skip

    def _base(self, others: Sequence[str]) -> _Base:
        """The run without the edit, with what every component gives and every other edit writes in it."""
        if not others and self._alone is not None:
            return self._alone
        kept = {bound.key: _Writes() for bound in self._bound.edits if bound.edit.name in others}
        base = _Base([], [], kept)
        every = dict.fromkeys((*self._held.names, *self._ends.names))
        with altered(self._bound, {key: writes.note for key, writes in kept.items()}):
            base.logits = self._logits(others, every, base, noting=True)
        if not others:
            self._alone = base
        return base

    def _replaying(self, base: _Base) -> contextlib.AbstractContextManager[Any]:
        return altered(self._bound, {key: writes.again for key, writes in base.writes.items()})

    def _logits(
        self,
        edits: Sequence[str],
        further: Mapping[str, Any],
        base: _Base | None = None,
        *,
        noting: bool = False,
        watched: tuple[str, list[int]] | None = None,
    ) -> Float[Tensor, "example vocab"]:
        """The next token's logits with some edits on, and components noted or held."""
        found, runs = [], self._runs
        for number, first in enumerate(self._question.firsts):
            if base is not None:
                for writes in base.writes.values():
                    writes.batch = number
            if noting:
                self._held.note()
                self._ends.note()
            elif base is not None:
                for site, noted in enumerate(base.components[number]):
                    self._held[site].give(noted)
            runs.edits = tuple(edits)
            batch = runs.batch(number, None, further)
            with self._watching(watched, first):
                found.append(runs.logits(batch, plain=True)[0].cpu())
            if noting and base is not None:
                base.components.append(self._held.noted())
                base.ends.append(self._ends.noted())
        return torch.cat(found)

    def _watching(
        self, watched: tuple[str, list[int]] | None, first: int
    ) -> contextlib.AbstractContextManager[Any]:
        """Note the examples at whose prompt's last token an edit acts."""
        if watched is None:
            return contextlib.nullcontext()
        name, at_last = watched

        def see(bound: BoundEdit, tokens: Any, base: Tensor, new: Tensor, source: Tensor | None) -> None:
            if bound.edit.name == name:
                pairs = zip((tokens.rows + first).tolist(), tokens.numbers.tolist(), strict=True)
                prompts = self._question.prompts
                at_last.extend(row for row, token in pairs if token == len(prompts[row]) - 1)

        return self._bound.watching(see)

    def _inside(self, bound: BoundEdit) -> set[str] | None:
        """The components that an edit acts inside; None where its direct path is not defined."""
        block = None if self._stack is None else self._stack.block_of(bound.site.module)
        if block is None or (bound.site.module, bound.site.side) in self._stream:
            return set()
        assert self._stack is not None
        prefix = f"{self._stack.paths[block]}."
        child = bound.site.module.removeprefix(prefix).split(".")[0]
        own = [
            held
            for held in self._bound.edits
            if held.edit.name in self._held.names
            and held.site.module.startswith(prefix)
            and held.site.module.removeprefix(prefix).split(".")[0] == child
        ]
        return {held.edit.name for held in own if held.order > bound.order} if own else None

    def _check_others(self, name: str, others: Sequence[str]) -> None:
        mine = {bound.module for bound in self._bound.edits if bound.edit.name == name}
        for bound in self._bound.edits:
            if bound.edit.name not in others:
                continue
            if bound.edit.when is not None or bound.module in mine:
                what = "has a condition" if bound.edit.when is not None else f"shares its edit with {name!r}"
                raise DataError(
                    f"context='together': edit {bound.key!r} {what}, so what it writes cannot be held; take "
                    "context='alone'"
                )

    def _check_path(self) -> None:
        """Add a vector to the stream with all components held, and see it come out at the final norm."""
        base = self._base(())
        places = [
            (number, row, len(self._question.prompts[first + row]) - 1)
            for number, first in enumerate(self._question.firsts)
            for row in range(len(self._question.batches[number]["input_ids"]))
        ][:1]
        (number, row, token), (first, last) = places[0], base.ends[0]
        size = last.vectors[row, token].norm()
        added = torch.randn(last.vectors.shape[-1], generator=torch.Generator().manual_seed(0))
        added = added * size / added.norm()
        for site, noted in enumerate(base.components[number]):
            self._held[site].give(noted)
        self._ends.note()
        self._ends[0].give(Noted(first.vectors + added, first.there))
        self._runs.edits = ()
        every = dict.fromkeys((*self._held.names, *self._ends.names))
        self._runs.logits(self._runs.batch(number, None, every), plain=True)
        came = self._ends[1].noted().vectors[row, token] - last.vectors[row, token]
        off = float((came - added).norm() / added.norm())
        dtype = next(self._reft.model.parameters()).dtype
        if not off <= _OFF.get(dtype, _COARSE):
            raise _MissingError(
                f"in {type(self._reft.model).__name__} a vector that is added to the first block's output "
                f"comes to the final norm changed by {off:.0%} of its length though all attentions and MLPs "
                "are held, so there is no direct path"
            )


class _Writes:
    """What an edit adds in each batch, noted and added again."""

    def __init__(self) -> None:
        self.batch = 0
        self._kept: dict[int, list[Written]] = {}
        self._next: dict[int, int] = {}

    def note(self, written: Written) -> Tensor:
        self._kept.setdefault(self.batch, []).append(written)
        return written.delta

    def again(self, written: Written) -> Tensor:
        # A module that runs several times in a pass does so in the same order in every run.
        kept = self._kept[self.batch]
        place = self._next.get(self.batch, 0)
        self._next[self.batch] = (place + 1) % len(kept)
        return kept[place].delta


class _Base:
    """A run without the edit in question.

    Attributes:
        components: for each batch what each component gives.
        ends: for each batch what leaves the first block and enters the final norm.
        writes: what the other edits add, by the key of each.
        logits: of the next token, `(example, vocab)`.
    """

    logits: Float[Tensor, "example vocab"]

    def __init__(
        self, components: list[list[Noted]], ends: list[list[Noted]], writes: dict[str, _Writes]
    ) -> None:
        self.components, self.ends, self.writes = components, ends, writes
