"""What a model does with examples, as one number each: its loss on answers, or a metric of the next token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from reftlab.measuring.inputs import accepted
from reftlab.measuring.intervals import Estimate, change_of, share_kept
from reftlab.measuring.question import Question, metrics_of, question_of
from reftlab.measuring.runs import AnswerRuns, answer_nats
from reftlab.runtime.calls import continues_texts
from reftlab.runtime.modes import evaluating

if TYPE_CHECKING:
    from reftlab.runtime import BoundModel

__all__ = ["Behaviour", "behaviour_of", "measured_on"]


@dataclass(frozen=True, eq=False)
class Behaviour:
    """A number for each example, measured again whenever it is called, with the edits then in force.

    Attributes:
        name: what is measured.
        unit: of its numbers.
        examples: numbers of the examples that it is measured on, in the caller's data.
        weights: `(example,)`, how much each counts in a mean: its answer tokens, or 1.
        bare: `(example,)`, measured without any edit.
        full: `(example,)`, measured with all edits.
    """

    name: str
    unit: str
    examples: tuple[int, ...]
    weights: Float[Tensor, " example"]
    bare: Float[Tensor, " example"]
    full: Float[Tensor, " example"]
    measure: Callable[[], Tensor]

    def __call__(self) -> Float[Tensor, " example"]:
        """Measure it now."""
        return self.measure()

    def mean(self, values: Float[Tensor, " example"]) -> float:
        """Weighted mean over the examples; over answer tokens where these are the weights."""
        return float((values.double() * self.weights.double()).sum() / self.weights.double().sum())

    def change(self, values: Float[Tensor, " example"], seed: int = 0) -> Estimate:
        """Mean of `values` minus that of all edits, in `unit`, with its interval."""
        return change_of(values - self.full, self.weights, self._measured, seed=seed)

    def share(self, values: Float[Tensor, " example"], seed: int = 0) -> Estimate:
        """Which share of the whole effect `values` keep: 1 as with all edits, 0 as with none."""
        return share_kept(values, self.bare, self.full, self.weights, seed=seed)

    @property
    def effect(self) -> Estimate:
        """Mean with all edits minus mean with none, in `unit`, with its interval."""
        return change_of(self.full - self.bare, self.weights, self._measured)

    @property
    def _measured(self) -> Float[Tensor, "2 example"]:
        return torch.stack([self.bare, self.full])

    def __repr__(self) -> str:
        bare, full = self.mean(self.bare), self.mean(self.full)
        return (
            f"Behaviour({self.name} of {len(self.examples)} examples: {bare:.3g} {self.unit} without edits, "
            f"{full:.3g} with)"
        )


def behaviour_of(
    reft: BoundModel,
    examples: Any,
    metric: Any = None,
    *,
    chat: bool | None = None,
    system: str | None = None,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    who: str = "a behaviour",
) -> Behaviour:
    """Choose what to measure of a bound model's runs on examples.

    Every call runs only the causal cone of all edits where that is exact.

    Args:
        reft: a bound model with its tokenizer.
        examples: anything that `rl.train` takes.
        metric: of the logits after the prompt, `rl.logit_diff(" yes", " no")` or a function from
            `(row, vocab)` to `(row,)`; a list of answers in it has one an example. Without it, the mean
            negative log-likelihood of an answer's tokens, over the examples that have answers; and where
            none has, the divergence KL(edited ‖ run) of the next token from the model with all edits,
            which is 0 for that model itself.
        chat, system: as for `rl.reply`.
        sources: inputs of each source run for all examples, as for `reft(...)`.
        who: the function that asks, for messages.

    Raises:
        DataError: examples, metric or arguments that cannot be used.
    """
    question = question_of(reft, examples, metric, chat=chat, system=system, sources=sources, who=who)
    return measured_on(reft, question)


def measured_on(reft: BoundModel, question: Question) -> Behaviour:
    """The behaviour that answers a question, measured without edits and with all of them."""
    with evaluating(reft), torch.no_grad():
        if question.answered:
            measure = _answer_loss(reft, question)
            full = measure()
            with reft.disabled():
                bare = measure()
        else:
            logits = _next_token(reft, question)
            at_full = logits()
            with reft.disabled():
                at_bare = logits()
            each = metrics_of(question, reft.tokenizer, at_full, at_bare)

            def measured(found: Tensor) -> Tensor:
                return torch.cat([own(row[None]) for own, row in zip(each, found, strict=True)]).float()

            full, bare = measured(at_full), measured(at_bare)

            def measure() -> Tensor:
                return measured(logits())

    return Behaviour(question.name, question.unit, question.examples, question.weights, bare, full, measure)


def _answer_loss(reft: BoundModel, question: Question) -> Callable[[], Tensor]:
    runs = AnswerRuns(reft, question.batches, accepted(reft.model))

    def measure() -> Tensor:
        total = torch.zeros(len(question.weights)).index_add_(0, runs.example_of, runs(answer_nats))
        return total / question.weights

    return measure


def _next_token(reft: BoundModel, question: Question) -> Callable[[], Tensor]:
    """A function that runs the prompts and returns the logits after them, `(example, vocab)` float32."""
    takes = accepted(reft.model)
    if not continues_texts(reft.model):
        return lambda: torch.cat([_at_the_end(reft, batch, takes) for batch in question.batches])
    runs = AnswerRuns(reft, question.batches, takes)

    def logits() -> Tensor:
        kept: list[Tensor] = []

        def keep(found: Tensor, wanted: Tensor, examples: Tensor) -> Tensor:
            kept.append(found.float().cpu())
            return torch.zeros(len(wanted))

        runs(keep)
        return torch.cat(kept)

    return logits


@torch.no_grad()
def _at_the_end(reft: BoundModel, batch: Mapping[str, Any], takes: frozenset[str]) -> Tensor:
    """The logits of each row: those of its last token, or of the row where there is one for all."""
    output = reft(**{name: value for name, value in batch.items() if name in takes})
    logits = output.logits if hasattr(output, "logits") else output
    if logits.dim() == 2:
        return logits.float().cpu()
    mask = batch["attention_mask"]
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    return logits[torch.arange(len(mask), device=logits.device), last.to(logits.device)].float().cpu()
