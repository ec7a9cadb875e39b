"""Through which sites and tokens the effect of a bound model's edits flows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from reftlab.errors import DataError
from reftlab.explaining.budget import Budget
from reftlab.explaining.causes.asking import Runs, shared_out
from reftlab.explaining.causes.columns import Columns, columns_of
from reftlab.explaining.causes.given import Noted, Placed, placed_at, whole_place
from reftlab.explaining.causes.mediated import ANSWER, Mediation
from reftlab.explaining.subject import Subject
from reftlab.graph import BASE
from reftlab.measuring import Question, metrics_of
from reftlab.plotting.wording import block_named
from reftlab.runtime.cone import BlockStack, reasons_against
from reftlab.runtime.modes import evaluating
from reftlab.sweeping.metric import Measured, Metric
from reftlab.sweeping.result import SiteLabel
from reftlab.sweeping.sites import SweptSite, entry_of, swept_sites

if TYPE_CHECKING:
    from reftlab.runtime import BoundModel

__all__ = ["mediate", "mediation"]

_COMPUTED = "cells computed"
_EQUAL = "cells not run, as both runs hold the same vectors there"
_BEYOND = "cells not run, as nothing of them reaches what is measured"
_LATE = "cells left out, as the time was over"


def mediate(
    reft: BoundModel,
    examples: Any,
    sites: str | Sequence[str] = "blocks[*].output",
    positions: Any = None,
    metric: Metric | Callable[[Tensor], Tensor] | None = None,
    *,
    heads: bool = False,
    necessity: bool = True,
    budget: float | None = None,
    chat: bool | None = None,
    system: str | None = None,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Mediation:
    """Measure through which sites and tokens the effect of all edits flows.

    The examples run once without any edit and once with all. Every cell, a site (or a head of it) at
    the tokens of a column, is then run twice more: without edits and with the vectors of the edited run
    put there (*sufficiency*: what of the effect comes about through this cell alone), and with all
    edits and the vectors of the run without put there (*necessity*: what of the effect is lost). Cells of
    one site share batches, and only the causal cone of a cell runs where that is exact. A cell at which
    both runs hold the very same vectors, or of which nothing reaches what is measured, is exactly 0 and
    is not run.

    Args:
        reft: a bound model with its tokenizer.
        examples: anything that `rl.train` takes.
        sites: one path or several, `blocks[*].output`, `["blocks[*].attn.output", "blocks[*].mlp.output"]`.
        positions: `"all"`, each token of the prompt a column; or a list of positions, or a mapping from
            names to positions, whose tokens are patched together. Unless given, each token where all
            prompts have as many, and the last tokens, counted from the end, where they have not. Where
            answers have several tokens, those given to the model are one more column.
        metric, chat, system, sources: as for `reftlab.measuring.behaviour_of`.
        heads: each head on its own; for `blocks[*].attn.heads`, `blocks[*].attn.q` and their like.
        necessity: whether to measure the mirror too.
        budget: seconds after which no further site is begun; None for no limit.
        progress: whether to show a progress bar.
        seed: of the bootstrap.

    Raises:
        DataError: examples or an argument that cannot be used.
        PositionError: a position that a prompt lacks.
        AddressError: a site that the model does not have.

    Source: natural direct and indirect effects, Pearl (2001); their use on language models, Vig et al.
    (2020). Sufficiency is the natural (pure) indirect effect of a cell over the total effect; necessity
    the total indirect effect over it (Robins and Greenland, 1992).

    >>> rl.mediate(reft, [("What is the sea like?", "🌊🐠🐚")]).plot()        # doctest: +SKIP
    """
    subject = Subject.of("mediate", reft, examples, metric, chat=chat, system=system, sources=sources)
    return mediation(
        reft, subject.question, sites, positions,
        heads=heads, necessity=necessity, budget=budget, progress=progress, seed=seed,
    )  # fmt: skip


def mediation(
    reft: BoundModel,
    question: Question,
    sites: str | Sequence[str] = "blocks[*].output",
    positions: Any = None,
    *,
    heads: bool = False,
    necessity: bool = True,
    budget: float | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Mediation:
    """`mediate` on examples that are prepared already; see there."""
    clock = Budget(budget)
    for name, value in (("heads", heads), ("necessity", necessity), ("progress", progress)):
        if type(value) is not bool:
            raise DataError(f"{name}={value!r}: expected True or False")
    swept = swept_sites(reft, sites, heads)
    columns = columns_of(question, positions, reft.tokenizer)
    with (
        evaluating(reft),
        torch.no_grad(),
        tqdm(desc="mediation", unit="cell", disable=not progress) as bar,
    ):
        work = _Work(reft, question, swept, columns, necessity)
        bar.total = len(swept) * work.cells_a_site
        for number in _spread_out(len(swept)):
            if clock.used_up:
                work.count(_LATE, work.cells_a_site * len(question.examples))
                work.left.append(swept[number].name)
            else:
                work.site(number)
            bar.update(work.cells_a_site)
    return Mediation(
        question.name,
        question.unit,
        tuple(SiteLabel(site.name, site.path, site.block) for site in swept),
        tuple(range(len(swept[0].parts))) if heads else None,
        columns.names,
        columns.every_token,
        question.examples,
        question.weights,
        work.bare,
        work.full,
        work.sufficient,
        work.necessary if necessity else None,
        work.counts,
        work.why,
        " ".join(note for note in (columns.note, _left_out(work.left, len(swept))) if note),
        seed,
        clock.spent,
    )


class _Work:
    """The runs, and what they gave so far."""

    def __init__(
        self,
        reft: BoundModel,
        question: Question,
        sites: tuple[SweptSite, ...],
        columns: Columns,
        necessity: bool,
    ) -> None:
        self.question, self.sites, self.columns, self.necessity = question, sites, columns, necessity
        paths = [whole_place(site.site) for site in sites]
        self._in_prompt = placed_at(reft, paths, "given", "prompt")
        self._in_answer = placed_at(reft, paths, "given-answer", "decode") if any(question.answers) else None
        alone = self._in_prompt.bound
        alone = alone if self._in_answer is None else alone + self._in_answer.bound
        off = reft._disabled
        names = [e.name for e in reft.graph.edits if e.run == BASE and e.name not in off]
        self._bare, self._edited = Runs(alone, question, ()), Runs(reft + alone, question, names)
        (before, bare), (after, full) = self._vectors(self._bare), self._vectors(self._edited)
        self._noted = before, after
        self._metrics: list[Measured] = []
        if not question.answered:
            next_token = [torch.cat([logits.cpu() for logits, _, _ in found]) for found in (full, bare)]
            self._metrics = metrics_of(question, reft.tokenizer, *next_token)
        self.bare, self.full = (self._everything(found) for found in (bare, full))
        self._stack = None if reasons_against(reft.model, training=False) else BlockStack.of(reft.model)
        shape = len(sites), len(sites[0].parts), len(columns.names), len(question.examples)
        self.sufficient, self.necessary = np.full(shape, np.nan), np.full(shape, np.nan)
        self.counts: dict[str, int] = {}
        self.left: list[str] = []

    @property
    def cells_a_site(self) -> int:
        return len(self.sites[0].parts) * len(self.columns.names)

    @property
    def why(self) -> tuple[str, ...]:
        """Why whole passes were run."""
        return tuple(dict.fromkeys((*self._bare.why, *self._edited.why)))

    def count(self, what: str, cells: int) -> None:
        self.counts[what] = self.counts.get(what, 0) + cells

    def site(self, number: int) -> None:
        """All cells of one site."""
        bare, full = self.bare.double().numpy(), self.full.double().numpy()
        for batch, first in enumerate(self.question.firsts):
            rows = range(len(self.question.batches[batch]["input_ids"]))
            there = [self._both(number, batch, phase) for phase in ("prompt", "decode")]
            cells = list(product(rows, range(len(self.sites[number].parts)), range(len(self.columns.names))))
            wanted: dict[bool, list[tuple[int, int, int]]] = {False: [], True: []}
            for row, part, column in cells:
                example, answer = first + row, self.columns.names[column] == ANSWER
                tokens = self.columns.tokens[example][column]
                why = self._zero(number, part, tokens, example, row, there[answer])
                self.count(why or _COMPUTED, 1)
                if why:
                    self.sufficient[number, part, column, example] = bare[example]
                    self.necessary[number, part, column, example] = full[example]
                else:
                    wanted[answer].append((row, part, column))
            width = self.question.batches[batch]["input_ids"].shape[1]
            for answer, own in wanted.items():
                for group in shared_out(own, width):
                    self._run(number, batch, group, answer, there[answer])

    def _run(
        self,
        number: int,
        batch: int,
        cells: Sequence[tuple[int, int, int]],
        answer: bool,
        noted: tuple[Noted, Noted] | None,
    ) -> None:
        """Some cells of one site and batch, each a row of one pass."""
        placed = self._in_answer if answer else self._in_prompt
        assert placed is not None
        assert noted is not None
        first = self.question.firsts[batch]
        rows = torch.tensor([row for row, _, _ in cells])
        where: Any = None
        if not answer:
            where = [list(self.columns.tokens[first + row][column]) for row, _, column in cells]
        further = {placed.names[number]: where}
        examples = [first + row for row, _, _ in cells]
        ways = [(self._bare, noted[1], self.sufficient), (self._edited, noted[0], self.necessary)]
        for runs, given, found in ways[: 1 + self.necessity]:
            placed[number].give(given, rows, self._features(number, [part for _, part, _ in cells]))
            values = runs.measured(runs.batch(batch, rows.tolist(), further), examples, self._metrics)
            for (row, part, column), value in zip(cells, values.tolist(), strict=True):
                found[number, part, column, first + row] = value

    def _features(self, number: int, parts: Sequence[int]) -> Tensor | None:
        """Which features of the site are replaced in each row; None for all."""
        own = self.sites[number].parts
        if own[0] is None:
            return None
        width = self.sites[number].place.site_width or 0
        mask = torch.zeros(len(parts), width, dtype=torch.bool)
        for row, part in enumerate(parts):
            chosen = own[part]
            assert chosen is not None
            mask[row, chosen] = True
        return mask

    def _zero(
        self,
        number: int,
        part: int,
        tokens: Sequence[int],
        example: int,
        row: int,
        noted: tuple[Noted, Noted] | None,
    ) -> str:
        """Why a cell is exactly 0; empty where it must be run."""
        if not tokens or noted is None:
            return _BEYOND
        features = self.sites[number].parts[part]
        one, other = (known.vectors[row, list(tokens)] for known in noted)
        if features is not None:
            one, other = one[:, features], other[:, features]
        if torch.equal(one, other):
            return _EQUAL
        entry = None if self._stack is None else entry_of(self.sites[number].site, self._stack)
        if entry is None or self._stack is None:
            return ""
        # Behind the last attention a token has a say in its own logits alone.
        blocks = len(self._stack)
        last = entry[0] == blocks or (self.sites[number].local and entry[0] == blocks - 1)
        predicts = len(self.question.prompts[example]) - 1
        return _BEYOND if last and max(tokens) < predicts else ""

    def _vectors(
        self, runs: Runs
    ) -> tuple[list[dict[str, list[Noted]]], list[tuple[Tensor, Tensor, Tensor]]]:
        """What stands at each site in each batch, in prompts and in answers, and the logits.

        They are made by whole passes over the same batches, so that what the edits do not reach is the
        same bit by bit without them.
        """
        found, logits = [], []
        for number in range(len(self.question.batches)):
            kinds: list[tuple[str, Placed]] = [("prompt", self._in_prompt)]
            kinds += [] if self._in_answer is None else [("decode", self._in_answer)]
            further = {name: None for _, placed in kinds for name in placed.names}
            for _, placed in kinds:
                placed.note()
            logits.append(runs.logits(runs.batch(number, None, further), plain=True))
            found.append({phase: placed.noted() for phase, placed in kinds})
        return found, logits

    def _both(self, number: int, batch: int, phase: str) -> tuple[Noted, Noted] | None:
        bare, edited = (noted[batch].get(phase) for noted in self._noted)
        return None if bare is None or edited is None else (bare[number], edited[number])

    def _everything(self, found: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Float[Tensor, " example"]:
        """The question's number of each example, from the logits of each batch."""
        parts = []
        for batch, first, own in zip(self.question.batches, self.question.firsts, found, strict=True):
            examples = range(first, first + len(batch["input_ids"]))
            parts.append(self._bare.numbers(own, examples, self._metrics))
        return torch.cat(parts)


def _spread_out(count: int) -> list[int]:
    """Numbers in an order in which any beginning is spread over all of them."""
    step = 1
    while step < count:
        step *= 2
    order: dict[int, None] = {}
    while step:
        order |= dict.fromkeys(range(0, count, step))
        step //= 2
    return list(order)


def _left_out(names: Sequence[str], count: int) -> str:
    if not names:
        return ""
    left = ", ".join(map(block_named, names))
    return f"The time was over after {count - len(names)} of {count} sites; left out: {left}."
