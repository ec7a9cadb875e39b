"""The logits that answer, under whatever edits are in force, run after run on the same examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from reftlab.runtime.cone import ConeRunner
from reftlab.runtime.window import IGNORED_LABEL

if TYPE_CHECKING:
    from reftlab.runtime import BoundModel
    from reftlab.runtime.cone import Cone

__all__ = ["AnswerRuns", "Measure", "answer_nats"]

Measure = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From logits `(n, vocab)`, the tokens wanted `(n,)` and their examples `(n,)` to one number each, `(n,)`."""


def answer_nats(
    logits: Float[Tensor, "n vocab"], wanted: Int[Tensor, " n"], examples: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Negative log-likelihood of the tokens wanted, in nats."""
    del examples
    return cross_entropy(logits.float(), wanted, reduction="none")


class AnswerRuns:
    """The logits where the answers' tokens are predicted, with the edits then in force.

    Every call runs the model on all batches, on the causal cone of all edits where that is exact, so
    that the first call computes the rest for all later ones.

    Args:
        reft: the bound model.
        batches: what `Collator` makes: `input_ids`, `attention_mask`, `labels`, …, `(row, token)`.
        accepts: the names among them that the bound model's forward takes.

    Attributes:
        example_of: `(answer token,)`, the example that each belongs to, in their order.
    """

    def __init__(
        self,
        reft: BoundModel,
        batches: Sequence[Mapping[str, Any]],
        accepts: frozenset[str],
    ) -> None:
        self.reft = reft
        self._batches = [{k: v for k, v in batch.items() if k in accepts | {"labels"}} for batch in batches]
        self._accepts_labels = "labels" in accepts
        self._runner = ConeRunner(reft)
        self._cones = [self._runner.cone(batch) for batch in self._batches]
        parts, first = [], 0
        for batch in self._batches:
            parts.append((batch["labels"][:, 1:] != IGNORED_LABEL).nonzero()[:, 0].cpu() + first)
            first += len(batch["labels"])
        self._examples: list[Int[Tensor, " token"]] = parts
        self.example_of = torch.cat(parts)

    @torch.no_grad()
    def __call__(self, measure: Measure = answer_nats) -> Float[Tensor, " token"]:
        """What `measure` makes of the logits, on the CPU, example after example."""
        found = []
        for batch, cone, examples in zip(self._batches, self._cones, self._examples, strict=True):
            logits, wanted = self._one(batch, cone)
            found.append(measure(logits, wanted, examples).float().cpu())
        return torch.cat(found)

    def _one(self, batch: Mapping[str, Any], cone: Cone) -> tuple[Tensor, Tensor]:
        # Where some edits are left out, the cone of all of them is still right, and its values are there.
        found = self._runner.predictions(batch, cone)
        if found is not None:
            return found.logits, found.labels
        inputs, labels = dict(batch), batch["labels"]
        if not self._accepts_labels:
            del inputs["labels"]
        output = self.reft(**inputs)
        logits = output.logits if hasattr(output, "logits") else output
        # The token in column t + 1 is predicted in column t.
        rows, columns = (labels[:, 1:] != IGNORED_LABEL).nonzero().unbind(1)
        return logits[rows, columns], labels[rows, columns + 1].to(logits.device)
