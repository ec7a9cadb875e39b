"""Many patched runs of one short prompt, packed one behind the other on one token axis.

A staircase whose rows begin at different tokens computes some of them for nothing, and calls every
block once for each number of tokens. Packed, each row has its own tokens and no others, so that a block
is called once for all of them: only attention looks at rows, and it takes those of equal length together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reftlab.errors import RunError
from reftlab.runtime.cone import Segment
from reftlab.runtime.hooks import OwnedHooks
from reftlab.runtime.leaf import get_output, put_output
from reftlab.sweeping.passes import Patch, logits_of
from reftlab.sweeping.sites import entry_of
from reftlab.sweeping.staircase import Staircase, replaced

__all__ = ["Packed"]

_LONGEST = 64
"""Longer prompts fill a staircase well, and their attention is better left to a fused kernel."""


class Packed(Staircase):
    """A staircase whose rows may begin at different tokens, where all patches are put in between blocks."""

    @property
    def packs(self) -> bool:
        """Whether rows are packed; otherwise this is a staircase like any other."""
        return self.tokens <= _LONGEST and self.attention.applies(self.base.keys_values[0][0])

    def logits(
        self, rows: Sequence[Sequence[Patch]], start: int, tokens: tuple[int, ...] | None = None
    ) -> Float[Tensor, "row vocab"]:
        if not self.packs:
            return super().logits(rows, start, tokens)
        pack = _Pack(self, rows, start)
        inputs = self._inputs_of(pack.cache(), start)

        def body(hooks: OwnedHooks, call: Callable[[], Any]) -> Tensor:
            hooks.on_output(self.stack.blocks[-1], pack.leaving)
            self._last_token_alone(hooks)
            last_mlp = self._last_mlp(pack.ends(len(self.stack) - 1))
            with replaced(self.stack.blocks, pack.block), last_mlp, self.some_logits(tokens, rows) as spread:
                return spread(logits_of(call())[:, -1].detach())

        found = self._run(inputs, body)
        return found[pack.order.argsort().to(found.device)]


class _Segment:
    """Rows that begin at one token, in the order in which they enter.

    Attributes:
        start: their first token.
        counts: how many of them have entered each block, and what comes after the last.
        entering: for each block the patches of those that enter there, by their place among those.
    """

    def __init__(self, start: int, rows: Sequence[tuple[int, Sequence[Patch]]], blocks: int) -> None:
        self.start = start
        self.counts = [sum(entry <= block for entry, _ in rows) for block in range(blocks + 1)]
        self.entering: list[list[tuple[int, Patch]]] = [[] for _ in range(blocks + 1)]
        for number, (entry, patches) in enumerate(rows):
            before = self.counts[entry - 1] if entry else 0
            self.entering[entry] += [(number - before, patch) for patch in patches]


class _Pack:
    """Rows, packed.

    Args:
        stairs: the prompt's passes.
        rows: the patches of each row, all at what enters some block.
        start: the first token of all.
    """

    def __init__(self, stairs: Packed, rows: Sequence[Sequence[Patch]], start: int) -> None:
        self._stairs, self._first = stairs, start
        places = [(int(min(patch.columns.min() for patch in row)), stairs.entry(row)) for row in rows]
        for row, (_, entry) in zip(rows, places, strict=True):
            if any(entry_of(patch.site.site, stairs.stack) != (entry, True) for patch in row):
                raise RunError("a packed row is patched where it enters and nowhere else")
        order = sorted(range(len(rows)), key=places.__getitem__)
        self.order = torch.tensor(order)
        self._segments = [
            _Segment(
                begin, [(places[n][1], rows[n]) for n in order if places[n][0] == begin], len(stairs.stack)
            )
            for begin in sorted({begin for begin, _ in places})
        ]

    def ends(self, block: int) -> Tensor:
        """The last token of each row that has entered a block, among the packed ones."""
        lengths = [self._stairs.tokens - s.start for s in self._segments for _ in range(s.counts[block])]
        return torch.tensor(lengths, dtype=torch.long).cumsum(0) - 1

    def cache(self) -> Any:
        """The unpatched run's keys and values: of the tokens before all rows, and before each row's own."""
        layers = self._stairs.base.keys_values
        packed = [
            [
                Segment(s.counts[block], keys[:, :, : s.start], values[:, :, : s.start])
                for s in self._segments
                if s.counts[block]
            ]
            for block, (keys, values) in enumerate(layers)
        ]
        common = [(keys[:, :, : self._first], values[:, :, : self._first]) for keys, values in layers]
        return self._stairs.attention.cache_of(common, packed)

    def block(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A block's `forward` on the tokens of those rows that have entered."""
        extra = self._stairs.base.extras[number]
        numbers = [
            torch.arange(s.start - self._first, self._stairs.tokens - self._first).repeat(s.counts[number])
            for s in self._segments
        ]
        tokens = torch.cat(numbers)

        def on_packed(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if not len(tokens):
                return hidden if extra < 0 else (hidden, *(None,) * extra)
            width = self._stairs.tokens - self._first
            seen = (width, self._stairs.tokens)
            rest = [_picked(value, tokens, seen) for value in args[1:]]
            named = {key: _picked(value, tokens, seen) for key, value in kwargs.items()}
            return forward(self._joined(number, hidden), *rest, **named)

        return on_packed

    def leaving(self, module: Any, args: Any, output: Any) -> Any:
        """Let rows enter behind the last block, and unpack: a row's last token stands for all its tokens."""
        count, name = len(self._stairs.stack), self._stairs.stack.paths[-1]
        joined = self._joined(count, get_output(output, (), name))[0]
        ends = joined[self.ends(count).to(joined.device)]
        return put_output(output, (), ends[:, None].expand(-1, self._stairs.tokens - self._first, -1), name)

    def _joined(self, number: int, hidden: Tensor) -> Tensor:
        """The rows so far, `hidden`, and those that enter at a block, packed."""
        befores = [s.counts[number - 1] if number else 0 for s in self._segments]
        sizes = [n * (self._stairs.tokens - s.start) for n, s in zip(befores, self._segments, strict=True)]
        pieces = []
        rows_so_far = hidden[0, : sum(sizes)].split(sizes)
        for segment, before, piece in zip(self._segments, befores, rows_so_far, strict=True):
            pieces.append(piece)
            fresh = segment.counts[number] - before
            if fresh:
                patches = segment.entering[number]
                pieces.append(self._stairs.entered(number, segment.start, fresh, patches).flatten(0, 1))
        return torch.cat(pieces)[None]


def _picked(value: Any, tokens: Tensor, seen: tuple[int, int]) -> Any:
    """An argument that was made for some tokens of one row, for packed tokens of many.

    Args:
        value: the argument.
        tokens: which token of the row each packed one is.
        seen: how many tokens of the row there are, and how many with those before them.

    Raises:
        RuntimeError: it is not known how.
    """
    if isinstance(value, tuple | list):
        return type(value)(_picked(item, tokens, seen) for item in value)
    if isinstance(value, dict):
        return {key: _picked(item, tokens, seen) for key, item in value.items()}
    if not isinstance(value, Tensor) or not value.dim():
        return value
    if value.dim() == 4 and value.shape[2:] == seen:
        return value  # the mask, which attention takes apart
    tokens = tokens.to(value.device)
    if value.dim() == 1 and value.shape[0] == seen[0]:
        return value[tokens]
    if value.dim() in (2, 3) and value.shape[:2] == (1, seen[0]):
        return value[:, tokens]
    raise RuntimeError(f"an argument of shape {tuple(value.shape)} belongs to no token of the {seen[0]}")
