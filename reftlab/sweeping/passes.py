"""Forward passes of a bound model over one prompt: recording it, and patching vectors into copies of it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftlab.address import head_name
from reftlab.graph import BASE
from reftlab.runtime.build import forget_pass
from reftlab.runtime.cone import BlockStack, extras_of
from reftlab.runtime.hooks import OwnedHooks
from reftlab.runtime.leaf import get_input, get_output, put_input, put_output
from reftlab.runtime.options import Options
from reftlab.sweeping.prompts import Row
from reftlab.sweeping.sites import SweptSite

if TYPE_CHECKING:
    from reftlab.runtime import BoundModel

__all__ = ["Passes", "Patch", "Recorded", "acting", "patching", "run_row"]

Act = Callable[[SweptSite, Tensor], Tensor | None]


@dataclass(frozen=True, eq=False)
class Patch:
    """Vectors to put in the place of a run's own.

    Attributes:
        site: where.
        columns: at which tokens, `(k,)` int64.
        values: `(k, width)`.
        features: which features of the site they are, `(width,)` int64, or None for all.
    """

    site: SweptSite
    columns: Tensor
    values: Tensor
    features: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Recorded:
    """What one pass over a prompt held.

    Attributes:
        logits: `(vocab,)` at the last token.
        values: each site's vectors `(token, width)`.
        hidden: what entered each block and what left the last, `(token, width)`; empty unless asked for.
        keys_values: each block's keys and values, `(1, head, token, d)`.
        extras: what each block returned behind the hidden state, see `extras_of`.
    """

    logits: Tensor
    values: Mapping[str, Tensor]
    hidden: tuple[Tensor, ...] = ()
    keys_values: tuple[tuple[Tensor, Tensor], ...] = ()
    extras: tuple[int, ...] = ()


def run_row(
    reft: BoundModel,
    row: Row,
    inputs: Mapping[str, Any],
    body: Callable[[OwnedHooks, Callable[[], Any]], Any],
) -> Any:
    """One forward pass with the bound model's edits in force.

    Args:
        reft: the bound model.
        row: the prompt that the pass covers, or a part of it; all rows of the batch are of this prompt.
        inputs: the model's inputs.
        body: puts further hooks on the model, behind those of the edits, and makes the call.

    Returns:
        What `body` returns.
    """
    for intervention in reft.interventions.values():
        forget_pass(intervention)
    run = reft._run(BASE, row.layouts, {}, Options.of(reft.graph))
    kept: list[Any] = []

    def call(**named: Any) -> Any:
        with OwnedHooks(reft.model) as hooks:
            kept.append(body(hooks, lambda: reft.model(**named)))

    reft._call(run, call, (), dict(inputs))
    return kept[0] if kept else None


def acting(
    hooks: OwnedHooks,
    model: nn.Module,
    sites: Iterable[SweptSite],
    act: Act,
    rows: Callable[[SweptSite], int],
) -> None:
    """Show `act` each site's tensor as (row, token, feature), and put in its place what it returns.

    Args:
        hooks: take the hooks.
        model: the bare model.
        sites: the sites.
        act: what is done at each.
        rows: how many rows the batch has where a site is reached.
    """
    groups: dict[tuple[str, str], list[SweptSite]] = {}
    for site in sites:
        groups.setdefault((site.site.module, site.site.side), []).append(site)

    def changed(site: SweptSite, tensor: Tensor) -> Tensor | None:
        arranged = site.place.axes.arrange(tensor, rows(site))
        new = act(site, arranged)
        return None if new is None else site.place.axes.restore(new, tensor)

    def on_output(group: list[SweptSite]) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            for site in group:
                new = changed(site, get_output(output, site.site.leaf, site.name))
                if new is not None:
                    output = put_output(output, site.site.leaf, new, site.name)
            return output

        return hook

    def on_input(group: list[SweptSite]) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            for site in group:
                new = changed(site, get_input(module, args, kwargs, site.site.leaf, site.name))
                if new is not None:
                    args, kwargs = put_input(module, args, kwargs, site.site.leaf, new, site.name)
            return args, kwargs

        return hook

    for (name, side), group in groups.items():
        target = model.get_submodule(name)
        if side == "output":
            hooks.on_output(target, on_output(group))
        else:
            hooks.on_input(target, on_input(group))


def patching(patches: Sequence[tuple[int, Patch]], tokens: int) -> tuple[list[SweptSite], Act]:
    """What puts patches into a batch.

    Args:
        patches: each with the number of its row.
        tokens: how many tokens the prompt has; a site's last column is the last of them.

    Returns:
        The sites, and what `acting` is to do at each.
    """
    by_site: dict[str, list[tuple[int, Patch]]] = {}
    for row, patch in patches:
        by_site.setdefault(patch.site.name, []).append((row, patch))
    sites = {patch.site.name: patch.site for _, patch in patches}

    def act(site: SweptSite, tensor: Tensor) -> Tensor | None:
        own, offset = by_site[site.name], tokens - tensor.shape[1]
        device = tensor.device
        rows = torch.cat([torch.full_like(patch.columns, row) for row, patch in own]).to(device)
        columns = torch.cat([patch.columns for _, patch in own]).to(device) - offset
        values = torch.cat([patch.values for _, patch in own]).to(tensor)
        if own[0][1].features is None:
            kept = columns >= 0
            return tensor.index_put((rows[kept], columns[kept]), values[kept])
        features = torch.cat(
            [patch.features.expand(len(patch.columns), -1) for _, patch in own if patch.features is not None]
        ).to(device)
        kept = columns >= 0
        where = (rows[kept, None], columns[kept, None], features[kept])
        return tensor.index_put(where, values[kept])

    return list(sites.values()), act


class Passes:
    """Passes over one prompt.

    Args:
        reft: the bound model.
        row: the prompt.
        stack: the model's blocks, where the causal cone holds.
    """

    def __init__(self, reft: BoundModel, row: Row, stack: BlockStack | None) -> None:
        self.reft, self.row, self.stack = reft, row, stack
        stream = "decoder" if "decoder" in row.layouts else "tokens"
        self.tokens = row.layouts[stream].width
        self._head = head_name(reft.model)
        names = inspect.signature(reft.model.forward).parameters
        self.without_cache = {"use_cache": False} if "use_cache" in names else {}

    def record(self, sites: Sequence[SweptSite], states: bool = False) -> Recorded:
        """One pass over the prompt as it is.

        Args:
            sites: whose vectors to keep.
            states: whether to keep what entered each block, and the blocks' keys and values.
        """
        values: dict[str, Tensor] = {}
        hidden: dict[int, Tensor] = {}
        extras: dict[int, int] = {}
        inputs: dict[str, Any] = {**self.row.inputs, **self.without_cache}
        cache: Any = None
        if states:
            from transformers import DynamicCache

            cache = DynamicCache()
            inputs |= {"past_key_values": cache, "use_cache": True}

        def keep(site: SweptSite, tensor: Tensor) -> None:
            # Falcon adds to what its MLP returned, in place.
            values[site.name] = tensor[0].detach().clone()

        def body(hooks: OwnedHooks, call: Callable[[], Any]) -> Tensor:
            acting(hooks, self.reft.model, sites, keep, lambda site: 1)
            if states:
                self._keep_states(hooks, hidden, extras)
            if not any(site.site.module == self._head for site in sites):
                self._last_token_alone(hooks)
            return logits_of(call())[0, -1].detach()

        with torch.no_grad():
            logits = run_row(self.reft, self.row, inputs, body)
        if not states:
            return Recorded(logits, values)
        layers = tuple((layer.keys, layer.values) for layer in cache.layers)
        in_order = tuple(hidden[number] for number in sorted(hidden))
        return Recorded(logits, values, in_order, layers, tuple(extras[n] for n in sorted(extras)))

    def plain(self, rows: Sequence[Sequence[Patch]]) -> Float[Tensor, "row vocab"]:
        """Logits at the last token of whole forward passes, one row for each set of patches."""
        count = len(rows)
        inputs: dict[str, Any] = {
            key: value.expand(count, *value.shape[1:]) for key, value in self.row.inputs.items()
        }
        placed = [(number, patch) for number, row in enumerate(rows) for patch in row]

        def body(hooks: OwnedHooks, call: Callable[[], Any]) -> Tensor:
            for tokens in {self._width(patch.site) for _, patch in placed}:
                own = [(row, patch) for row, patch in placed if self._width(patch.site) == tokens]
                sites, act = patching(own, tokens)
                acting(hooks, self.reft.model, sites, act, lambda site: count)
            self._last_token_alone(hooks)
            return logits_of(call())[:, -1].detach()

        with torch.no_grad():
            return run_row(self.reft, self.row, {**inputs, **self.without_cache}, body)

    def _width(self, site: SweptSite) -> int:
        """How many tokens a site's prompt has."""
        return self.row.layouts[site.place.stream].width

    def _keep_states(self, hooks: OwnedHooks, hidden: dict[int, Tensor], extras: dict[int, int]) -> None:
        """Note what enters each block, what leaves the last, and what else they return."""
        assert self.stack is not None
        count, names = len(self.stack), self.stack.paths

        def entering(number: int) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                main = get_input(module, args, kwargs, (), names[number])
                hidden[number] = main[0].detach().clone()

            return hook

        def leaving(number: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                extras[number] = extras_of(output)
                if number == count - 1:
                    hidden[count] = get_output(output, (), names[number])[0].detach().clone()

            return hook

        for number, block in enumerate(self.stack.blocks):
            hooks.on_input(block, entering(number))
            hooks.on_output(block, leaving(number))

    def _last_token_alone(self, hooks: OwnedHooks) -> None:
        """Make logits for the last token only."""
        if self._head is None:
            return

        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            tensor = get_input(module, args, kwargs, (), str(self._head))
            if tensor.dim() != 3:
                return None
            return put_input(module, args, kwargs, (), tensor[:, -1:], str(self._head))

        hooks.on_input(self.reft.model.get_submodule(self._head), hook)

    @contextlib.contextmanager
    def some_logits(
        self, tokens: tuple[int, ...] | None, rows: Sequence[Sequence[Patch]]
    ) -> Iterator[Callable[[Tensor], Tensor]]:
        """Unembed only some tokens inside a `with` block, where that is the same for them.

        Args:
            tokens: which; None for all.
            rows: the patches of the runs; those at the head itself are as wide as the vocabulary.

        Yields:
            What turns logits of those tokens into logits of all, which are 0 for the others.
        """
        head = None if self._head is None else self.reft.model.get_submodule(self._head)
        acts = [bound.site.module for bound in self.reft.edits]
        acts += [patch.site.site.module for row in rows for patch in row]
        if tokens is None or type(head) is not nn.Linear or self._head in acts or "forward" in vars(head):
            yield lambda logits: logits
            return
        chosen = sorted(set(tokens))
        weight, bias = head.weight[chosen], None if head.bias is None else head.bias[chosen]

        def spread(logits: Tensor) -> Tensor:
            whole = logits.new_zeros(*logits.shape[:-1], head.weight.shape[0])
            whole[..., chosen] = logits
            return whole

        head.__dict__["forward"] = lambda hidden: nn.functional.linear(hidden, weight, bias)
        try:
            yield spread
        finally:
            del head.__dict__["forward"]


def logits_of(output: Any) -> Tensor:
    """The logits `(row, token, vocab)` that a model returned."""
    return get_output(output, (), "the model's output")
