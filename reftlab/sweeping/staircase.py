"""Many patched runs of one prompt at once, each computing nothing but its own causal cone.

A patch at token t and block l changes nothing at earlier tokens and nothing in earlier blocks. So the
batch covers only the tokens from the first patched one on, whose predecessors are in a key-value
cache of the unpatched run; and its rows enter one after the other: block b runs on the rows whose
patch lies at or before it, each new row taking the hidden state that the unpatched run had there.
Drawn with rows to the right and blocks upwards, what is computed is a staircase.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftlab.address import parse_path, portable_names, resolve
from reftlab.errors import RunError
from reftlab.runtime.cone import BlockStack, PrefixAttention, check_attended
from reftlab.runtime.hooks import OwnedHooks, StopForward
from reftlab.runtime.leaf import get_output, put_output
from reftlab.sweeping.passes import Passes, Patch, Recorded, acting, logits_of, patching, run_row
from reftlab.sweeping.prompts import Row
from reftlab.sweeping.sites import SweptSite, entry_of

if TYPE_CHECKING:
    from reftlab.runtime import BoundModel

__all__ = ["Staircase", "replaced"]


class Staircase(Passes):
    """Patched runs of one prompt on their causal cones.

    Args:
        reft: the bound model.
        row: the prompt.
        stack: the model's blocks.
        base: the unpatched run, recorded with its states.
        attention: the model's, over the tokens before the first patched one.
    """

    stack: BlockStack

    def __init__(
        self, reft: BoundModel, row: Row, stack: BlockStack, base: Recorded, attention: PrefixAttention
    ) -> None:
        super().__init__(reft, row, stack)
        self.base, self.attention = base, attention

    def entry(self, patches: Sequence[Patch]) -> int:
        """The first block that a row computes."""
        entries = [entry_of(patch.site.site, self.stack) for patch in patches]
        if None in entries:
            raise RunError(f"{patches[entries.index(None)].site.name} is outside the chain of blocks")
        return min(entry[0] for entry in entries if entry is not None)

    def logits(
        self, rows: Sequence[Sequence[Patch]], start: int, tokens: tuple[int, ...] | None = None
    ) -> Float[Tensor, "row vocab"]:
        """Logits at the last token, one row for each set of patches.

        Args:
            rows: the patches of each row; none lies before `start`.
            start: the first token that is computed.
            tokens: those whose logits are wanted, where the others' may be left out and be 0.
        """
        order, batch = self._batch(rows, start)

        def body(hooks: OwnedHooks, call: Callable[[], Any]) -> Tensor:
            batch.hook(hooks, self.reft.model)
            self._last_token_alone(hooks)
            with batch.entering(), self._last_mlp(), self.some_logits(tokens, rows) as spread:
                return spread(logits_of(call())[:, -1].detach())

        found = self._run(self._inputs(batch, start), body)
        return found[order.argsort().to(found.device)]

    def read(
        self, rows: Sequence[Sequence[Patch]], start: int, site: SweptSite
    ) -> Float[Tensor, "row token width"]:
        """A site's vectors in patched runs, from token `start` on; the passes end there."""
        order, batch = self._batch(rows, start)
        kept: list[Tensor] = []

        def keep(site: SweptSite, tensor: Tensor) -> None:
            kept.append(tensor.detach())
            raise StopForward

        def body(hooks: OwnedHooks, call: Callable[[], Any]) -> None:
            batch.hook(hooks, self.reft.model)
            acting(hooks, self.reft.model, [site], keep, batch.rows_at)
            with batch.entering():
                call()

        self._run(self._inputs(batch, start), body)
        return kept[0][order.argsort().to(kept[0].device)]

    def entered(
        self, block: int, start: int, rows: int, patches: Sequence[tuple[int, Patch]]
    ) -> Float[Tensor, "row token width"]:
        """What rows hold that enter at a block, from a token on: the unpatched run's vectors, and patches.

        Args:
            block: the block; the number of blocks stands for what comes after the last.
            start: the first token.
            rows: how many enter.
            patches: each with its row among these.
        """
        base = self.base.hidden[block][start:]
        entered = base.expand(rows, *base.shape)
        # Sites that stand for one block's input, its predecessor's output too, all go into one tensor.
        for name in dict.fromkeys(patch.site.name for _, patch in patches):
            own = [(row, patch) for row, patch in patches if patch.site.name == name]
            sites, act = patching(own, self.tokens)
            entered = act(sites[0], entered)  # type: ignore[assignment]
        return entered

    def _run(self, inputs: dict[str, Any], body: Callable[[OwnedHooks, Callable[[], Any]], Any]) -> Any:
        cache = inputs["past_key_values"]
        with torch.no_grad(), self.attention.attending(self.base.keys_values[0][0]):
            found = run_row(self.reft, self.row, inputs, body)
        check_attended(cache)
        return found

    @contextlib.contextmanager
    def _last_mlp(self, ends: Any = slice(-1, None)) -> Iterator[None]:
        """The last block's MLP runs on the last token alone, or on those of `ends`, inside a `with` block."""
        model = self.reft.model
        name = _last_mlp_of(model)
        edited = [f"{bound.site.module}." for bound in self.reft.edits]
        if name is None or any(module.startswith(f"{name}.") for module in edited):
            yield
            return
        module = model.get_submodule(name)
        own, forward = module.__dict__.get("forward"), module.forward

        def on_last(*args: Any, **kwargs: Any) -> Any:
            if kwargs or not all(isinstance(value, Tensor) and value.dim() == 3 for value in args):
                return forward(*args, **kwargs)
            found = forward(*(value[:, ends] for value in args))
            if not isinstance(found, Tensor) or found.dim() != 3:
                return forward(*args)
            whole = found.new_zeros(*args[0].shape[:2], found.shape[2])
            whole[:, ends] = found
            return whole

        module.__dict__["forward"] = on_last
        try:
            yield
        finally:
            module.__dict__.pop("forward")
            if own is not None:
                module.__dict__["forward"] = own

    def _batch(self, rows: Sequence[Sequence[Patch]], start: int) -> tuple[Tensor, _Batch]:
        entries = torch.tensor([self.entry(row) for row in rows])
        order = entries.argsort(stable=True)
        return order, _Batch(self, [rows[n] for n in order.tolist()], entries[order].tolist(), start)

    def _inputs(self, batch: _Batch, start: int) -> dict[str, Any]:
        """One row of the tokens from `start` on; the blocks make it the batch's rows."""
        layers = []
        for count, (keys, values) in zip(batch.counts, self.base.keys_values, strict=False):
            # Each block has its own number of rows; one that no row enters says how many tokens there are.
            wide = [part[:, :, :start].expand(max(1, count), -1, -1, -1) for part in (keys, values)]
            layers.append((wide[0], wide[1]))
        return self._inputs_of(self.attention.cache_of(layers), start)

    def _inputs_of(self, cache: Any, start: int) -> dict[str, Any]:
        """One row's tokens from `start` on, which continue a cache."""
        inputs: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        for key, value in self.row.inputs.items():
            whole = key == "attention_mask" or value.dim() < 2 or value.shape[1] != self.tokens
            inputs[key] = value if whole else value[:, start:]
        if "position_ids" in self.reft._calls._takes and "position_ids" not in inputs:
            device = self.base.logits.device
            inputs["position_ids"] = torch.arange(start, self.tokens, device=device)[None]
        return inputs


class _Batch:
    """Rows in the order in which they enter.

    Args:
        stairs: the staircase.
        rows: the patches of each row.
        entries: the block at which each row enters, ascending.
        start: the first token that is computed.
    """

    def __init__(
        self, stairs: Staircase, rows: list[Sequence[Patch]], entries: list[int], start: int
    ) -> None:
        self._stairs, self._stack, self._start = stairs, stairs.stack, start
        blocks = len(self._stack)
        self.counts = [sum(entry <= block for entry in entries) for block in range(blocks + 1)]
        self._entering: list[list[tuple[int, Patch]]] = [[] for _ in range(blocks + 1)]
        self._later: list[tuple[int, Patch]] = []
        for number, (row, entry) in enumerate(zip(rows, entries, strict=True)):
            for patch in row:
                if entry_of(patch.site.site, self._stack) == (entry, True):
                    self._entering[entry].append((number, patch))
                else:
                    self._later.append((number, patch))

    def hook(self, hooks: OwnedHooks, model: Any) -> None:
        """Put patches inside blocks in, and let rows enter behind the last block."""
        sites, act = patching(self._later, self._stairs.tokens)
        acting(hooks, model, sites, act, self.rows_at)
        last = len(self._stack) - 1

        def leaving(module: Any, args: Any, output: Any) -> Any:
            if self.counts[last + 1] == self.counts[last]:
                return None
            name = self._stack.paths[last]
            joined = self._joined(last + 1, get_output(output, (), name))
            return put_output(output, (), joined, name)

        hooks.on_output(self._stack.blocks[last], leaving)

    def rows_at(self, site: SweptSite) -> int:
        """How many rows have entered where a site is reached."""
        return self.counts[-1] if site.block is None else self.counts[site.block]

    def entering(self) -> AbstractContextManager[None]:
        """Each block runs on its own rows inside a `with` block."""
        return replaced(self._stack.blocks, self._shadow)

    def _shadow(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A block's `forward` on those rows that have entered."""
        count, extra = self.counts[number], self._stairs.base.extras[number]

        def on_entered(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if count == 0:
                return hidden if extra < 0 else (hidden, *(None,) * extra)
            rest = [_widened("", value, count) for value in args[1:]]
            named = {key: _widened(key, value, count) for key, value in kwargs.items()}
            return forward(self._joined(number, hidden), *rest, **named)

        return on_entered

    def _joined(self, number: int, hidden: Tensor) -> Tensor:
        """The rows so far, `hidden`, and those that enter at a block."""
        before = self.counts[number - 1] if number else 0
        fresh = self.counts[number] - before
        if fresh == 0:
            return hidden
        patches = [(row - before, patch) for row, patch in self._entering[number]]
        entered = self._stairs.entered(number, self._start, fresh, patches)
        # A copy, as a model may write to its hidden state, and the base run's is needed again.
        return entered.clone() if before == 0 else torch.cat([hidden[:before], entered])


@contextlib.contextmanager
def replaced(
    blocks: Sequence[nn.Module], other: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Each block has another `forward` inside a `with` block.

    Args:
        blocks: the blocks.
        other: makes it, from the block's number and its own `forward`.
    """
    own = [block.__dict__.get("forward") for block in blocks]
    try:
        for number, block in enumerate(blocks):
            block.__dict__["forward"] = other(number, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = forward


def _last_mlp_of(model: Any) -> str | None:
    """The last block's module that returns what its MLP adds to the stream, by the families' table."""
    if "blocks[*].mlp.output" not in portable_names(model):
        return None
    site = resolve(parse_path("blocks[-1].mlp.output"), model)[0]
    return site.module if site.side == "output" and not site.leaf else None


def _widened(name: str, value: Any, rows: int) -> Any:
    """An argument that was made for one row, for `rows` of them."""
    if isinstance(value, tuple | list):
        return type(value)(_widened(name, item, rows) for item in value)
    if isinstance(value, dict):
        return {key: _widened(name, item, rows) for key, item in value.items()}
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    if value.shape[0] == 1:
        return value.expand(rows, *value.shape[1:])
    # ALiBi's slopes stand row after row on one axis, (row · head, 1, key).
    return value.repeat(rows, *(1,) * (value.dim() - 1)) if name == "alibi" else value
