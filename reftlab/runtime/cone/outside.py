"""What lies outside the cone: computed once, kept by content, and put together for each batch."""

from __future__ import annotations

import contextlib
import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from reftlab.runtime.attention import backend_of
from reftlab.runtime.cone.room import Room, Taken
from reftlab.runtime.cone.stack import BlockStack, extras_of
from reftlab.runtime.cone.store import ConeStore
from reftlab.runtime.digest import ADAPTER_SWITCHES
from reftlab.runtime.hooks import OwnedHooks, StopForward, turn_of
from reftlab.runtime.window import IGNORED_LABEL

if TYPE_CHECKING:
    from reftlab.runtime.model import BoundModel

__all__ = ["Outside", "Part"]

_TOGETHER = 16
"""How many tokens' keys and values make one entry; examples share the entries of their common beginning."""

_PARTS = 1024
"""A tensor's numbers are summed in so many parts, so that numbers that change places are seen."""


@dataclass(frozen=True)
class Part:
    """One row, and which of its tokens are in the cone.

    Attributes:
        ids: its real tokens.
        labels: its label, or -100.
        start: the first token in the cone.
        stop: the token after the last one.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    start: int
    stop: int

    @property
    def answered(self) -> tuple[bool, ...]:
        """Whether each token belongs to the answer, which begins with the first label."""
        first = next((n for n, label in enumerate(self.labels) if label != IGNORED_LABEL), len(self.labels))
        return tuple(number >= first for number in range(len(self.labels)))

    @property
    def suffix(self) -> tuple[int, ...]:
        """The tokens in the cone."""
        return self.ids[self.start : self.stop]


class Outside:
    """Finds the values outside the cone, or makes them with the bare model.

    Args:
        reft: the bound model, whose bare model runs.
        stack: its blocks.
        store: where values are kept.

    Attributes:
        extras: for each block how many values it returns behind the hidden state; see `skipping`.
    """

    def __init__(self, reft: BoundModel, stack: BlockStack, store: ConeStore) -> None:
        self._reft, self._stack, self._store = reft, stack, store
        self.extras: list[int] = []
        self._full = False
        self._versions: tuple[int, ...] = ()
        self._state: Any = None
        self._identity = b""
        self._room = Room()
        self._samples: list[Tensor] = []
        self._seen: list[Tensor] = []
        self._switches: list[Any] = []

    def gather(
        self, parts: Sequence[Part], count: int, device: torch.device
    ) -> tuple[Taken | None, Float[Tensor, "row inside width"]]:
        """The values of a batch, for a cone whose first block is `count`.

        Returns:
            Keys and values of the tokens before the cone in the blocks from `count` on, `(block, two, row,
            head, before, k)`, padded on the left, or None where there are none; and what leaves block
            `count - 1` at the cone's tokens, padded on the right (of width 0 where the cone begins with the
            first block).
        """
        keys, found = self._found(parts, count)
        if len(self.extras) < count:
            # A store that another bound model has filled: what blocks return is not known yet.
            self._pass([replace(parts[0], start=0, stop=1)], count)
        past = None
        if count < len(self._stack):
            past = self._past(parts, [before for before, _ in keys], found, device)
        if not count:
            return past, torch.empty(len(parts), 0, 0, device=device)
        return past, _hidden(parts, [inside for _, inside in keys], found, device)

    def fill(self, parts: Sequence[Part], count: int) -> bool:
        """Make and keep what a batch needs; whether there was room for all of it."""
        self._found(parts, count)
        return not self._full

    def _found(
        self, parts: Sequence[Part], count: int
    ) -> tuple[list[tuple[list[bytes], bytes]], dict[bytes, Tensor]]:
        """The names of each row's entries, and the entries."""
        root = self._root(count)
        keys = [_keys(root, part) for part in parts]
        found: dict[bytes, Tensor] = {}
        missing = []
        for row, (before, inside) in enumerate(keys):
            wanted = [*(before if count < len(self._stack) else ()), *((inside,) if count else ())]
            for key in wanted:
                value = found.get(key)
                value = self._store.get(key) if value is None else value
                if value is None:
                    missing.append(row)
                    break
                found[key] = value
        if missing:
            made = self._make([parts[row] for row in missing], [keys[row] for row in missing], count)
            found = {**made, **found}
        return keys, found

    def _past(
        self,
        parts: Sequence[Part],
        keys: Sequence[list[bytes]],
        found: dict[bytes, Tensor],
        device: torch.device,
    ) -> Taken | None:
        """Keys and values of all rows."""
        width = max(part.start for part in parts)
        if not width:
            return None
        one = next(found[before[0]] for before in keys if before)
        blocks, two, heads, _, size = one.shape
        shape = blocks, two, len(parts), heads, width, size
        taken = self._room.take(shape, one.dtype, device)
        past = taken.values
        for row, (part, before) in enumerate(zip(parts, keys, strict=True)):
            past[:, :, row, :, : width - part.start] = 0
            for number, key in enumerate(before):
                value, begin = found[key], width - part.start + number * _TOGETHER
                past[:, :, row, :, begin : begin + value.shape[3]] = value.to(device, non_blocking=True)
        return taken

    def _root(self, count: int) -> bytes:
        """What entries of this model, as it is now, begin with."""
        model = self._reft.model
        tensors = (*model.parameters(), *model.buffers())
        versions = tuple(
            number for t in tensors for number in (id(t), t.data_ptr(), 0 if t.is_inference() else t._version)
        )
        if versions != self._versions:
            self._versions, self._samples = versions, [_sample(t) for t in tensors]
            self._switches = [module for module in model.modules() if "_active_adapter" in vars(module)]
        config, kind = getattr(model, "config", None), self._reft.device.type
        seen = _together(self._samples)
        state = (
            versions,
            backend_of(config),
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
            [tuple(str(vars(layer).get(name)) for name in ADAPTER_SWITCHES) for layer in self._switches],
        )
        if state != self._state or not all(map(torch.equal, seen, self._seen)):
            facts = (type(model).__name__, str(config), state, [_sums(t) for t in tensors])
            self._state, self._seen = state, seen
            self._identity = hashlib.blake2b(repr(facts).encode(), digest_size=16).digest()
        return hashlib.blake2b(self._identity + count.to_bytes(4), digest_size=16).digest()

    def _make(
        self, parts: Sequence[Part], keys: Sequence[tuple[list[bytes], bytes]], count: int
    ) -> dict[bytes, Tensor]:
        """Run the bare model on some rows, and keep what lies outside their cones."""
        cache, hidden = self._pass(parts, count)
        made: dict[bytes, Tensor] = {}
        for row, (part, (before, inside)) in enumerate(zip(parts, keys, strict=True)):
            if cache is not None:
                for number, key in enumerate(before):
                    if key in made:
                        continue
                    begin = number * _TOGETHER
                    end = min(begin + _TOGETHER, part.start)
                    made[key] = torch.stack(
                        [
                            torch.stack([layer.keys[row, :, begin:end], layer.values[row, :, begin:end]])
                            for layer in cache.layers[count:]
                        ]
                    )
            if hidden is not None:
                made[inside] = hidden[row, part.start : part.stop].clone()
        for key, value in made.items():
            # Once there was no room nothing more is kept: whether a later entry still fits would depend on
            # the order of visits, and so would its last digits.
            self._full = self._full or not self._store.put(key, value)
        return made

    @torch.no_grad()
    def _pass(self, parts: Sequence[Part], count: int) -> tuple[Any, Tensor | None]:
        """One pass of the bare model: its cache, and what leaves block `count - 1`."""
        from transformers import DynamicCache

        reft, model = self._reft, self._reft.model
        width, device = max(part.stop for part in parts), reft.device
        ids, mask = (torch.zeros(len(parts), width, dtype=torch.long) for _ in range(2))
        for row, part in enumerate(parts):
            ids[row, : part.stop] = torch.tensor(part.ids[: part.stop])
            mask[row, : part.stop] = 1
        inputs: dict[str, Any] = {
            "input_ids": ids.to(device),
            "attention_mask": mask.to(device),
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0).to(device),
        }
        inputs = {name: value for name, value in inputs.items() if name in reft._calls._takes}
        needs_past = count < len(self._stack) and any(part.start for part in parts)
        cache = DynamicCache() if needs_past else None
        inputs |= {"past_key_values": cache, "use_cache": True} if needs_past else {"use_cache": False}
        last = len(self._stack) - 1 if needs_past else count - 1
        hidden: list[Tensor] = []
        extras: list[int] = []

        def see(number: int) -> Any:
            def act(module: Any, args: Any, output: Any) -> None:
                extras.append(extras_of(output))
                if number == count - 1:
                    hidden.append(output[0] if isinstance(output, tuple) else output)
                if number == last:
                    raise StopForward

            return act

        with turn_of(model), OwnedHooks(model) as hooks:
            for number, block in enumerate(self._stack.blocks[: last + 1]):
                hooks.on_output(block, see(number))
            with contextlib.suppress(StopForward):
                model(**inputs)
        if len(extras) > len(self.extras):
            self.extras = extras
        return cache, hidden[0] if hidden else None


def _sums(tensor: Tensor) -> bytes:
    """Sums of a tensor's bits, part by part, which tell contents apart that begin at the same address."""
    widths = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
    values = tensor.detach().contiguous().view(-1)
    values = values.view(widths.get(values.element_size(), torch.int64))
    even = len(values) // _PARTS * _PARTS
    sums = torch.cat([values[:even].view(_PARTS, even // _PARTS).sum(1), values[even:].long()])
    return hashlib.blake2b(sums.cpu().numpy().tobytes(), digest_size=16).digest()


def _sample(tensor: Tensor) -> Tensor:
    """A few of a tensor's numbers, as they are now whenever they are looked at."""
    return tensor.detach()[tuple(slice(None, None, max(1, size // 4)) for size in tensor.shape)]


def _together(samples: Sequence[Tensor]) -> list[Tensor]:
    """All samples of one kind side by side, to be compared at once."""
    kinds: dict[Any, list[Tensor]] = {}
    for sample in samples:
        kinds.setdefault((sample.dtype, sample.device), []).append(sample.reshape(-1))
    return [torch.cat(several) for several in kinds.values()]


def _keys(root: bytes, part: Part) -> tuple[list[bytes], bytes]:
    """The names of a row's entries: of each group of tokens before the cone, and of those in it."""
    chain, before = root, []
    for begin in range(0, part.start, _TOGETHER):
        group = array("q", part.ids[begin : min(begin + _TOGETHER, part.start)])
        chain = hashlib.blake2b(chain + group.tobytes(), digest_size=16).digest()
        before.append(chain)
    inside = hashlib.blake2b(chain + b"in" + array("q", part.suffix).tobytes(), digest_size=16).digest()
    return before, inside


def _hidden(
    parts: Sequence[Part], keys: Sequence[bytes], found: dict[bytes, Tensor], device: torch.device
) -> Tensor:
    width = max(len(part.suffix) for part in parts)
    one = found[keys[0]]
    hidden = torch.zeros(len(parts), width, one.shape[-1], dtype=one.dtype, device=device)
    for row, key in enumerate(keys):
        hidden[row, : found[key].shape[0]] = found[key].to(device, non_blocking=True)
    return hidden
