"""What a model does with examples, as one number each: its loss on answers, or a metric of the next token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from reftlab.errors import DataError
from reftlab.measuring.inputs import accepted, batches
from reftlab.measuring.intervals import Estimate, mean_of, share_kept
from reftlab.measuring.runs import AnswerRuns, answer_nats
from reftlab.runtime.calls import continues_texts
from reftlab.runtime.modes import evaluating
from reftlab.runtime.window import IGNORED_LABEL
from reftlab.sweeping.metric import Metric, References, as_metric
from reftlab.training.data import Encoded, as_examples, encode
from reftlab.training.replies import prompt_form

if TYPE_CHECKING:
    from reftlab.runtime import BoundModel

__all__ = ["Behaviour", "behaviour_of"]


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
        return mean_of(values - self.full, self.weights, seed=seed)

    def share(self, values: Float[Tensor, " example"], seed: int = 0) -> Estimate:
        """Which share of the whole effect `values` keep: 1 as with all edits, 0 as with none."""
        return share_kept(values, self.bare, self.full, self.weights, seed=seed)

    @property
    def effect(self) -> Estimate:
        """Mean with all edits minus mean with none, in `unit`, with its interval."""
        return mean_of(self.full - self.bare, self.weights)

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

    Raises:
        DataError: examples, metric or arguments that cannot be used.
    """
    if reft.tokenizer is None:
        raise DataError(
            "a behaviour is measured on texts, which need a tokenizer: graph.bind(model, tokenizer)"
        )
    rows = as_examples(examples)
    if sources and rows[0].sources:
        raise DataError("sources= says what the examples' own sources say already; leave one of them out")
    form = prompt_form(reft, reft.tokenizer, chat, system)
    texts = continues_texts(reft.model)
    answered = [number for number, row in enumerate(rows) if row.answer is not None] if texts else []
    with evaluating(reft), torch.no_grad():
        if metric is None and answered:
            if sources and len(answered) < len(rows):
                raise DataError(
                    "some examples have no answers, and the source inputs belong to all of them; give each "
                    "an answer, or leave those without out"
                )
            encoded = encode(reft.tokenizer, [rows[number] for number in answered], **form)
            return _of_answers(reft, encoded, tuple(answered), sources)
        prompts = encode(reft.tokenizer, [replace(row, answer=None) for row in rows], **form)
        return _of_next_token(reft, prompts, None if metric is None else as_metric(metric), sources)


def _of_answers(
    reft: BoundModel, encoded: list[Encoded], examples: tuple[int, ...], sources: Any
) -> Behaviour:
    runs = AnswerRuns(reft, batches(reft, encoded, sources), accepted(reft.model))
    counts = torch.bincount(runs.example_of, minlength=len(encoded)).float()

    def measure() -> Tensor:
        return torch.zeros(len(counts)).index_add_(0, runs.example_of, runs(answer_nats)) / counts

    full = measure()
    with reft.disabled():
        bare = measure()
    return Behaviour("answer loss", "nats per answer token", examples, counts, bare, full, measure)


def _of_next_token(
    reft: BoundModel, encoded: list[Encoded], metric: Metric | None, sources: Any
) -> Behaviour:
    count = len(encoded)
    logits = _next_token(reft, encoded, sources)
    full = logits()
    with reft.disabled():
        bare = logits()
    if metric is None:
        wanted = full.log_softmax(-1)

        def measured(found: Tensor) -> Tensor:
            return (wanted.exp() * (wanted - found.log_softmax(-1))).sum(-1)

        name, unit = "divergence of the next token from the edited model", "nats"
    else:
        metric.check(count, reft.tokenizer)
        each = [
            metric.finite(number, reft.tokenizer, References(full[number], bare[number]))
            for number in range(count)
        ]

        def measured(found: Tensor) -> Tensor:
            return torch.cat([own(row[None]) for own, row in zip(each, found, strict=True)]).float()

        name, unit = metric.name, metric.unit
    return Behaviour(
        name, unit, tuple(range(count)), torch.ones(count), measured(bare), measured(full),
        lambda: measured(logits()),
    )  # fmt: skip


def _next_token(reft: BoundModel, encoded: list[Encoded], sources: Any) -> Callable[[], Tensor]:
    """A function that runs the prompts and returns the logits after them, `(example, vocab)` float32."""
    if not continues_texts(reft.model):
        made = batches(reft, encoded, sources)
        takes = accepted(reft.model)
        return lambda: torch.cat([_at_the_end(reft, batch, takes) for batch in made])
    # One token more, which nothing before it sees, so that what is predicted in its place is an answer.
    end = getattr(reft.tokenizer, "eos_token_id", None)
    further = end if isinstance(end, int) else encoded[0].input_ids[-1]
    rows = [
        replace(one, input_ids=(*one.input_ids, further), labels=(*[IGNORED_LABEL] * len(one), further))
        for one in encoded
    ]
    runs = AnswerRuns(reft, batches(reft, rows, sources), accepted(reft.model))

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
