"""How much work a batch is, run plainly and on the cone: multiplications, counted from shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from reftlab.address.alias import innermost
from reftlab.runtime.cone.stack import BlockStack
from reftlab.runtime.cone.value import Cone

__all__ = ["Work", "work_of"]


@dataclass(frozen=True)
class Work:
    """Multiplications of one training step, forward and back.

    A product with a matrix counts one for each of its numbers and each token, and as many again in the
    backward pass, which goes from the logits down to the first edit; attention counts its two
    products with each earlier token. Norms, activations and the edits themselves are left out.

    Attributes:
        plain: with everything run.
        cone: from an example's second visit on.
        first: at its first visit, when what lies outside the cone is computed too.
    """

    plain: int
    cone: int
    first: int

    @property
    def share(self) -> float:
        """Work on the cone, as a share of that of the plain step."""
        return self.cone / max(1, self.plain)

    @property
    def first_share(self) -> float:
        """Work of the first visit, as a share of that of the plain step."""
        return self.first / max(1, self.plain)


def work_of(model: nn.Module, cone: Cone) -> Work:
    """Count the work of a batch from its cone and the shapes of the model's matrices.

    Args:
        model: the bare model.
        cone: the batch's cone; where it is everything, all three counts are those of the plain step.
    """
    stack = BlockStack.of(model)
    if stack is None:
        return Work(0, 0, 0)
    sizes = [_matrices(block) for block in stack.blocks]
    width = _attention_width(model)
    head = model.get_submodule(stack.head)
    vocabulary = sum(p.numel() for p in head.parameters() if p.dim() > 1)

    def blocks(first: int, starts: Sequence[int], stops: Sequence[int]) -> int:
        tokens = sum(stop - start for start, stop in zip(starts, stops, strict=True))
        # Token t looks at t + 1 tokens, once for the scores and once for their sum.
        pairs = sum(
            (stop * (stop + 1) - start * (start + 1)) // 2 for start, stop in zip(starts, stops, strict=True)
        )
        return sum(size * tokens + 2 * width * pairs for size in sizes[first:])

    nothing = (0,) * cone.rows
    lowest = min((reach.block for reach in cone.reaches), default=cone.blocks)
    everything = blocks(0, nothing, cone.lengths)
    plain = everything + blocks(lowest, nothing, cone.lengths) + 2 * vocabulary * sum(cone.lengths)
    if cone.why:
        return Work(plain, plain, plain)
    wanted = sum(len(targets) for targets in cone.targets)
    own = 2 * blocks(cone.first_block, cone.starts, cone.stops) + 2 * vocabulary * wanted
    return Work(plain, own, own + blocks(0, nothing, cone.stops))


def _matrices(block: nn.Module) -> int:
    """Numbers in the matrices that one token passes in a block; of experts, those that it is sent to."""
    total = 0
    for name, parameter in block.named_parameters():
        if parameter.dim() > 1:
            share = _used(block) if "experts" in name else 1.0
            total += round(share * parameter.numel())
    return total


def _used(block: nn.Module) -> float:
    """The share of its experts to which a block sends each token."""
    for module in block.modules():
        chosen = getattr(module, "top_k", None) or getattr(module, "num_experts_per_tok", None)
        count = getattr(module, "num_experts", None) or getattr(module, "num_local_experts", None)
        if isinstance(chosen, int) and isinstance(count, int) and count:
            return chosen / count
    return 1.0


def _attention_width(model: nn.Module) -> int:
    """Features of all heads together."""
    config: Any = getattr(innermost(model), "config", None)
    heads = getattr(config, "num_attention_heads", 0) or 0
    size = getattr(config, "head_dim", None)
    return heads * size if isinstance(size, int) else getattr(config, "hidden_size", 0) or 0
