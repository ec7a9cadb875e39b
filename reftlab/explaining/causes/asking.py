"""Runs of a question's rows in any number and order, each row measured by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from reftlab.measuring.inputs import accepted
from reftlab.measuring.runs import answer_nats
from reftlab.runtime.calls import continues_texts
from reftlab.runtime.cone import ConeRunner
from reftlab.runtime.window import IGNORED_LABEL
from reftlab.training.collate import OF_EDITS

if TYPE_CHECKING:
    from reftlab.measuring import Question
    from reftlab.runtime import BoundModel
    from reftlab.sweeping.metric import Measured

__all__ = ["Runs", "rows_of", "shared_out"]


class Runs:
    """Runs of one bound model on rows of a question's batches, on their causal cones where that is exact.

    Args:
        bound: the bound model.
        question: what is asked.
        edits: names of the base run's edits that act unless `run` adds some.
    """

    def __init__(self, bound: BoundModel, question: Question, edits: Sequence[str]) -> None:
        self.bound, self.question, self.edits = bound, question, tuple(edits)
        self._accepts = accepted(bound.model)
        self._texts = continues_texts(bound.model)
        self._runner = ConeRunner(bound)

    @property
    def why(self) -> tuple[str, ...]:
        """Why whole passes were run; empty where none was."""
        return self._runner.why_plain

    def batch(
        self, number: int, rows: Sequence[int] | None = None, further: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Rows of a batch, each as often as it is named, as the bound model takes them.

        Args:
            number: of the batch.
            rows: of the batch, all unless given.
            further: edits that act too, each with its positions, row by row or in words.
        """
        whole = self.question.batches[number]
        found = dict(whole) if rows is None else rows_of(whole, rows, len(whole["input_ids"]))
        own = {edit.name for edit in self.bound.graph.edits}
        theirs = {name.removesuffix(".source") for name in found.get("positions", {})}
        positions = {**found.get("positions", {})} if theirs <= own else {}
        positions |= {name: where for name, where in (further or {}).items() if where is not None}
        kept = {k: v for k, v in found.items() if k not in OF_EDITS and k in self._accepts | {"labels"}}
        if self.bound.graph.sources and "sources" in found:
            kept["sources"] = found["sources"]
        if positions:
            kept["positions"] = positions
        return {**kept, "select": [*self.edits, *(further or {})]}

    @torch.no_grad()
    def logits(self, batch: Mapping[str, Any], plain: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Logits `(n, vocab)` where something is predicted, the tokens wanted there, and their rows."""
        if self._texts and not plain:
            found = self._runner.predictions(batch)
            if found is not None:
                return found.logits.float(), found.labels, found.rows.cpu()
        inputs, labels = dict(batch), batch["labels"]
        if "labels" not in self._accepts:
            del inputs["labels"]
        output = self.bound(**inputs)
        logits = output.logits if hasattr(output, "logits") else output
        if self._texts:
            rows, columns = (labels[:, 1:] != IGNORED_LABEL).nonzero().unbind(1)
            wanted = labels[rows, columns + 1].to(logits.device)
            return logits[rows, columns].float(), wanted, rows.cpu()
        rows = torch.arange(len(labels))
        if logits.dim() == 3:
            mask = batch["attention_mask"]
            last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
            logits = logits[rows.to(logits.device), last.to(logits.device)]
        return logits.float(), rows.to(logits.device), rows

    def measured(
        self, batch: Mapping[str, Any], examples: Sequence[int], metrics: Sequence[Measured]
    ) -> Float[Tensor, " row"]:
        """The question's number of each row of a batch, on the CPU; as for `numbers`."""
        return self.numbers(self.logits(batch), examples, metrics)

    def numbers(
        self, found: tuple[Tensor, Tensor, Tensor], examples: Sequence[int], metrics: Sequence[Measured]
    ) -> Float[Tensor, " row"]:
        """What the question makes of each row's logits, on the CPU.

        Args:
            found: from `logits`.
            examples: the example of each row.
            metrics: for each example, what to make of the next token's logits; not needed for the loss.
        """
        logits, wanted, rows = found
        if self.question.answered:
            nats = answer_nats(logits, wanted, rows).float().cpu()
            count = torch.bincount(rows, minlength=len(examples))
            return torch.zeros(len(examples)).index_add_(0, rows, nats) / count
        logits = logits.cpu()
        return torch.cat([metrics[e](row[None]) for e, row in zip(examples, logits, strict=True)]).float()


def rows_of(value: Any, rows: Sequence[int], count: int) -> Any:
    """Rows of what a batch of `count` rows gives, in any number and order; what is for all rows stays."""
    if isinstance(value, Tensor):
        return value[list(rows)] if value.dim() and value.shape[0] == count else value
    if isinstance(value, Mapping):
        return {name: rows_of(item, rows, count) for name, item in value.items()}
    return [value[row] for row in rows] if isinstance(value, list | tuple) and len(value) == count else value


def shared_out(rows: Sequence[Any], tokens: int, most: int = 2048) -> Iterator[Sequence[Any]]:
    """Rows of so many tokens each in groups of about `most` tokens."""
    size = max(1, most // max(1, tokens))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
