"""Interchange accuracy: does swapping a learned subspace change the answer as the causal model says?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from reftlab.errors import DataError
from reftlab.explaining.budget import Budget
from reftlab.explaining.causes.asking import Runs
from reftlab.explaining.causes.interchanged import DirectionRemoved, InterchangeAccuracy, wilson
from reftlab.explaining.causes.swaps import edited, in_place, turned
from reftlab.explaining.causes.swaps import whole as whole_swap
from reftlab.explaining.subject import Subject
from reftlab.graph import BASE
from reftlab.measuring import mean_of
from reftlab.runtime.modes import evaluating
from reftlab.training.settings import whole

if TYPE_CHECKING:
    from reftlab.runtime import BoundModel
    from reftlab.runtime.places import BoundEdit

__all__ = ["Correct", "interchange_accuracy", "interchanged", "interchanges", "swaps_in"]

Correct = Callable[..., Tensor]
"""Runs the bound model, with further arguments of its forward, and says which examples are right, `(n,)`."""
Match = Literal["token", "answer"]

_OFF = 0.01
"""A direction that a learned mask swaps by less than this share takes no part."""


def interchange_accuracy(
    reft: BoundModel,
    examples: Any,
    *,
    match: Match = "token",
    choices: Sequence[str] | None = None,
    draws: int = 5,
    detailed: int = 32,
    budget: float | None = None,
    chat: bool | None = None,
    system: str | None = None,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    progress: bool = True,
    seed: int = 0,
) -> InterchangeAccuracy:
    """Measure how often swapping a learned subspace gives the counterfactual answer.

    Args:
        reft: a bound model with its tokenizer, of whose edits some take their values from a source run.
        examples: anything that `rl.train` takes; each answer is the one that the causal model gives after
            the interchange, and `sources` of each example the prompts of the source runs.
        match: `token`, the next token is the answer's first; `answer`, greedy decoding gives the whole
            answer.
        choices: answers among which the likeliest first token decides, with `match="token"`; all tokens
            unless given.
        draws: how many random subspaces to compare with.
        detailed: for edits of no more directions than this, each direction is left out once.
        budget: seconds after which no further direction is left out; None for no limit.
        chat, system, sources: as for `reftlab.measuring.behaviour_of`.
        progress: whether to show a progress bar.
        seed: of the random subspaces and the bootstrap.

    Raises:
        DataError: examples without answers, no edit that swaps, or an argument that cannot be used.

    Source: interchange intervention accuracy, Geiger et al. (2021, arXiv:2106.02997; 2024,
    arXiv:2303.02536).

    >>> pair = rl.Example("Paris is in", " Japan", sources={"other": "Tokyo is in"})   # doctest: +SKIP
    >>> rl.interchange_accuracy(reft, [pair])                                           # doctest: +SKIP
    """
    if match not in ("token", "answer"):
        raise DataError(f"match={match!r}: expected 'token' or 'answer'")
    subject = Subject.of("interchange_accuracy", reft, examples, chat=chat, system=system, sources=sources)
    return interchanged(
        subject, match, choices,
        draws=draws, detailed=detailed, budget=budget, progress=progress, seed=seed,
    )  # fmt: skip


def interchanged(
    subject: Subject,
    match: Match = "token",
    choices: Sequence[str] | None = None,
    *,
    draws: int = 5,
    detailed: int = 32,
    budget: float | None = None,
    progress: bool = True,
    seed: int = 0,
) -> InterchangeAccuracy:
    """`interchange_accuracy` of what is prepared already, without a metric; see there."""
    reft = subject.reft
    lacking = [number for number, row in enumerate(subject.rows) if row.answer is None]
    if lacking:
        raise DataError(
            f"example {lacking[0]}, {subject.rows[lacking[0]].prompt!r}, has no answer, so it is not known "
            "what the interchange should give"
        )
    among = None if choices is None else _first_tokens(reft.tokenizer, choices, match)
    with evaluating(reft), torch.no_grad():
        question = subject.question
        if not question.answered:
            raise DataError(f"{type(reft.model).__name__} does not continue texts, so it gives no answers")
        off = reft._disabled
        names = [e.name for e in reft.graph.edits if e.run == BASE and e.name not in off]
        runs = Runs(reft, question, names)
        end = getattr(reft.tokenizer, "eos_token_id", None)
        if among is not None:
            _check_among(among, question.batches, choices)

        def correct(**options: Any) -> Tensor:
            found = []
            for number in range(len(question.batches)):
                # Edits that a `with` block leaves out stay out, though they are named here.
                logits, wanted, rows = runs.logits({**runs.batch(number), **options})
                found.append(_matches(logits.cpu(), wanted.cpu(), rows, match, among, end))
            return torch.cat(found)

        return interchanges(
            reft, correct,
            match=_in_words(match, choices), draws=draws, detailed=detailed, budget=budget,
            progress=progress, seed=seed,
        )  # fmt: skip


def interchanges(
    reft: BoundModel,
    correct: Correct,
    *,
    match: str = "the answer is the counterfactual one",
    draws: int = 5,
    detailed: int = 32,
    budget: float | None = None,
    progress: bool = True,
    seed: int = 0,
) -> InterchangeAccuracy:
    """`interchange_accuracy` of any bound module, texts or not.

    Args:
        reft: the bound model.
        correct: runs it on the examples, with further arguments of its forward such as `subspace=`, and
            says for each example whether the answer is right, `(example,)` bool.
        match: what counts as right, in words.
        draws, detailed, budget, progress, seed: as for `interchange_accuracy`.

    Raises:
        DataError: no edit takes its values from a source run, or an argument cannot be used.
    """
    for name, count, least in (("draws", draws, 1), ("detailed", detailed, 0), ("seed", seed, 0)):
        whole(name, count, least)
    clock = Budget(budget)
    swaps = swaps_in(reft)
    if not swaps:
        raise DataError(
            "no edit in force takes its values from a source run, so nothing is interchanged; give an edit "
            "source=rl.Read(run=...)"
        )
    modules = {bound.module: reft.interventions[bound.module] for bound in swaps}
    with evaluating(reft), torch.no_grad(), tqdm(disable=not progress, desc="interchange") as bar:

        def ask(**options: Any) -> Tensor:
            bar.update()
            return correct(**options).cpu()

        right = ask()
        with in_place(reft, {key: whole_swap(inner) for key, inner in modules.items()}):
            in_full = ask()
        with reft.disabled(*{bound.edit.name for bound in swaps}):
            none = ask()
        generator, random = torch.Generator().manual_seed(seed), []
        for _ in range(draws):
            others = {key: turned(inner, generator) for key, inner in modules.items()}
            with in_place(reft, others):
                random.append(ask())
        removed, notes = [], []
        for bound in {bound.edit.name: bound for bound in swaps}.values():
            chosen = _directions(reft, bound)
            name = bound.edit.name
            if bound.edit.tasks or len(chosen) > detailed or not chosen:
                why = "its tasks choose them" if bound.edit.tasks else f"it has {len(chosen)}"
                notes.append(f"directions of {name!r} were not left out one by one: {why}")
                continue
            for k in chosen:
                if clock.used_up:
                    notes.append(f"the time was over before direction {k} of {name!r} was left out")
                    break
                found = ask(subspace={name: [other for other in chosen if other != k]})
                change = mean_of(found.float() - right.float(), seed=seed)
                removed.append(DirectionRemoved(name, k, wilson(found), change))
        ranks = {bound.key: _rank(reft, bound) for bound in swaps}
    return InterchangeAccuracy(
        match, right, in_full, none, torch.stack(random), ranks, tuple(removed), "; ".join(notes), seed
    )


def swaps_in(reft: BoundModel) -> list[BoundEdit]:
    """The edits in force that take their values from a source run."""

    def swaps(bound: BoundEdit) -> bool:
        on = bound.edit.run == BASE and bound.edit.name not in reft._disabled
        return on and bound.source is not None and bound.source.run != BASE

    return [bound for bound in reft.edits if swaps(bound)]


def _directions(reft: BoundModel, bound: BoundEdit) -> list[int]:
    """The directions that an edit swaps; none where it has none of its own."""
    built: Any = reft.interventions[bound.module]
    if getattr(built, "takes_subspace", "no") == "no" or built.directions is None:
        return []
    subspace = bound.edit.subspace
    chosen = list(range(built.directions)) if subspace is None else list(subspace)
    mask = getattr(built, "mask", None)
    if not callable(mask):
        return chosen
    amounts = mask().detach().tolist()
    return [k for k in chosen if amounts[k] > _OFF]


def _rank(reft: BoundModel, bound: BoundEdit) -> float:
    """The trace of the swap as a map of `source − base`: how many directions it swaps, and how far."""
    built: Any = reft.interventions[bound.module]
    device = next((p.device for p in (*built.parameters(), *built.buffers())), torch.device("cpu"))
    eye, extra = torch.eye(bound.width, device=device), dict[str, Any]()
    if bound.edit.subspace is not None and built.directions is not None:
        mask = torch.zeros(bound.width, built.directions, dtype=torch.bool, device=device)
        mask[:, list(bound.edit.subspace)] = True
        extra["subspace"] = mask
    zero = torch.zeros_like(eye)
    return float((edited(built, zero, eye, **extra) - edited(built, zero, zero, **extra)).trace())


def _matches(
    logits: Float[Tensor, "n vocab"],
    wanted: Tensor,
    rows: Tensor,
    match: Match,
    among: Tensor | None,
    end: int | None,
) -> Bool[Tensor, " row"]:
    """Which rows of a batch are right, from the logits where their answers are predicted."""
    found = []
    for row in range(int(rows.max()) + 1):
        own, answer = logits[rows == row], wanted[rows == row]
        if match == "token":
            best = own[0].argmax() if among is None else among[own[0][among].argmax()]
            found.append(bool(best == answer[0]))
            continue
        # What follows the answer is no part of it.
        length = len(answer) - int(len(answer) > 1 and int(answer[-1]) == end)
        found.append(bool((own[:length].argmax(1) == answer[:length]).all()))
    return torch.tensor(found)


def _first_tokens(tokenizer: Any, choices: Sequence[str], match: str) -> Tensor:
    if match != "token":
        raise DataError("choices are compared by their first tokens, so they need match='token'")
    if isinstance(choices, str) or len(choices) < 2:
        raise DataError(f"choices={choices!r}: expected two texts or more")
    ids = [tokenizer(choice, add_special_tokens=False)["input_ids"][:1] for choice in choices]
    if not all(ids) or len({own[0] for own in ids}) < len(ids):
        raise DataError(f"choices={list(choices)!r}: expected texts that begin with different tokens")
    return torch.tensor([own[0] for own in ids])


def _check_among(among: Tensor, made: Sequence[Mapping[str, Any]], choices: Any) -> None:
    for batch in made:
        labels = batch["labels"].cpu()
        firsts = labels.gather(1, (labels >= 0).long().argmax(1)[:, None])[:, 0]
        if not bool(torch.isin(firsts, among).all()):
            raise DataError(f"choices={list(choices)!r}: an example's answer begins with none of them")


def _in_words(match: str, choices: Sequence[str] | None) -> str:
    if choices is not None:
        return f"the likeliest of {len(choices)} choices is the counterfactual one"
    return {
        "token": "the next token is the counterfactual answer's first",
        "answer": "greedy decoding gives the counterfactual answer",
    }[match]
