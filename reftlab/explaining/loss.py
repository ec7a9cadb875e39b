"""The loss on the answers under whatever edits are in force, run after run on the same examples."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reftlab.runtime.window import IGNORED_LABEL, Layout

if TYPE_CHECKING:
    from reftlab.runtime import BoundModel

__all__ = ["AnswerLoss"]

_WORTH_IT = 4
"""How many columns a cache must save."""
_CACHED_FAMILIES = ("llama", "qwen3", "gemma3_text", "gpt2")


class AnswerLoss:
    """Mean negative log-likelihood of the answer tokens under a bound model.

    Every call runs the model on all batches with the edits then in force. Where all edits act on
    the prompt, the columns before the first edited one never change, so they are run once and kept
    in a key-value cache; the first call compares the two ways and keeps the plain one should they
    differ.

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
        self._prefixes = [self._prefix(batch) for batch in self._batches]
        self._checked = False
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
        quick = torch.cat([self._one(b, p) for b, p in zip(self._batches, self._prefixes, strict=True)])
        if not self._checked:
            self._checked = True
            if any(prefix is not None for prefix in self._prefixes):
                plain = torch.cat([self._one(batch, None) for batch in self._batches])
                if not torch.allclose(plain, quick, atol=1e-5, rtol=1e-4):
                    self._prefixes = [None] * len(self._batches)
                return plain
        return quick

    def _one(self, batch: Mapping[str, Any], prefix: _Prefix | None) -> Tensor:
        start = 0 if prefix is None else prefix.columns
        whole = {"attention_mask", "sources", "positions"}
        inputs: dict[str, Any] = {k: v if k in whole else v[:, start:] for k, v in batch.items()}
        labels = inputs["labels"]
        if prefix is None:
            if not self._accepts_labels:
                del inputs["labels"]
        else:
            del inputs["labels"]
            inputs |= {"past_key_values": copy.deepcopy(prefix.cache), "prompt": prefix.prompt}
        output = self.reft(**inputs)
        logits = output.logits if hasattr(output, "logits") else output
        # The token in column t + 1 is predicted in column t.
        rows, columns = (labels[:, 1:] != IGNORED_LABEL).nonzero().unbind(1)
        wanted = labels[rows, columns + 1].to(logits.device)
        loss = torch.nn.functional.cross_entropy(logits[rows, columns].float(), wanted, reduction="none")
        return loss.cpu()

    @torch.no_grad()
    def _prefix(self, batch: Mapping[str, Any]) -> _Prefix | None:
        """The cache of the columns that no edit can change, where there are enough to be worth it."""
        reft = self.reft
        edits = [bound.edit for bound in reft.edits]
        family = getattr(getattr(reft.model, "config", None), "model_type", "")
        if (
            family not in _CACHED_FAMILIES
            or not edits
            or "positions" in batch
            or any(e.phase != "prompt" or e.run != "base" or e.reads for e in edits)
        ):
            return None
        layout = Layout.of(batch, causal=True)
        if layout is None:
            return None
        chosen = [layout.select(edit.positions, edit.phase, reft.tokenizer).columns for edit in edits]
        columns = int(torch.cat(chosen).min())
        if columns < _WORTH_IT:
            return None
        inputs = {
            k: v[:, :columns]
            for k, v in batch.items()
            if k in ("input_ids", "attention_mask", "position_ids")
        }
        output = reft.model(**inputs, use_cache=True)
        mask = batch["attention_mask"] * (batch["labels"] == IGNORED_LABEL).to(batch["attention_mask"])
        prompt = {"input_ids": batch["input_ids"], "attention_mask": mask}
        return _Prefix(columns, output.past_key_values, prompt)


@dataclass(frozen=True, eq=False)
class _Prefix:
    columns: int
    cache: Any
    prompt: dict[str, Tensor]
