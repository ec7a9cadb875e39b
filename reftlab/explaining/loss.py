"""The loss on the answers under whatever edits are in force, run after run on the same examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

__all__ = ["AnswerLoss"]


class AnswerLoss:
    """Mean negative log-likelihood of the answer tokens under a bound model.

    Every call runs the model on all batches with the edits then in force, on the causal cone of all
    edits where that is exact, so that the first call computes the rest for all later ones.

    Args:
        reft: the bound model.
        batches: what `Collator` makes: `input_ids`, `attention_mask`, `labels`, …, `(row, token)`.
        accepts: the names among them that the bound model's forward takes.
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
        self.example_of = self._examples()

    def _examples(self) -> Int[Tensor, " token"]:
        """`(answer token,)`, the example that each belongs to."""
        parts, first = [], 0
        for batch in self._batches:
            parts.append((batch["labels"][:, 1:] != IGNORED_LABEL).nonzero()[:, 0].cpu() + first)
            first += len(batch["labels"])
        return torch.cat(parts)

    @torch.no_grad()
    def __call__(self) -> Float[Tensor, " token"]:
        """Negative log-likelihood of each answer token in nats, example after example."""
        return torch.cat([self._one(b, cone) for b, cone in zip(self._batches, self._cones, strict=True)])

    def _one(self, batch: Mapping[str, Any], cone: Cone) -> Tensor:
        # Where some edits are left out, the cone of all of them is still right, and its values are there.
        found = self._runner.predictions(batch, cone)
        if found is not None:
            return cross_entropy(found.logits.float(), found.labels, reduction="none").cpu()
        inputs, labels = dict(batch), batch["labels"]
        if not self._accepts_labels:
            del inputs["labels"]
        output = self.reft(**inputs)
        logits = output.logits if hasattr(output, "logits") else output
        # The token in column t + 1 is predicted in column t.
        rows, columns = (labels[:, 1:] != IGNORED_LABEL).nonzero().unbind(1)
        wanted = labels[rows, columns + 1].to(logits.device)
        return cross_entropy(logits[rows, columns].float(), wanted, reduction="none").cpu()
