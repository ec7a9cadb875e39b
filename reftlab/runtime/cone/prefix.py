"""A key-value cache of tokens that stand still, and attention that neither copies nor differentiates it.

What continues an ordinary cache joins its own keys and values to those before them, spreads them over
the query heads of their group, and takes gradients of all of them. Of a prefix outside the cone none
of that is needed: one product of the queries with the cached keys and one of the pattern with the
cached values say all, and gradients are taken of the queries, and of the new keys and values, alone.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftlab.address.alias import innermost
from reftlab.runtime.attention import BACKEND, PREFIX, backend_of, configs_of
from reftlab.runtime.hooks import GraphMark, marked

__all__ = ["PrefixAttention", "Segment", "check_attended", "placeholder"]

_EXACT = (torch.float32, torch.float64)
"""Half precision stays with fused kernels, which keep scores in float32."""
_FEW = 64
"""Of more new tokens the scores outweigh the keys, and the fused kernel never holds them."""

_switching = threading.Lock()
_switched: dict[int, int] = {}
"""How many passes, of several threads or models, want a configuration switched; by its id."""

KeysValues = tuple[Float[Tensor, "_ _ token _"], Float[Tensor, "_ _ token _"]]


class Segment(NamedTuple):
    """Rows of equal length among packed tokens, one behind the other.

    Attributes:
        rows: how many.
        keys, values: of the tokens before each row's first, `(1, shared, before, k or v)`.
    """

    rows: int
    keys: Tensor
    values: Tensor


class PrefixAttention:
    """A model's attention over tokens that stand still.

    Args:
        blocks: the blocks of a causal language model.
        model: the whole of it.

    Attributes:
        usable: whether the model's own attention may be replaced; False once it was found not to be so.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self.usable = bool(getattr(innermost(model), "_supports_attention_backend", False))
        self._configs, self._of_blocks = configs_of(model), configs_of(*blocks)

    def applies(self, like: Tensor) -> bool:
        """Whether `attending` changes anything.

        Args:
            like: some of the cached keys or values.
        """
        fused = {backend_of(config) for config in self._of_blocks} == {"sdpa"}
        exact = like.dtype in _EXACT and not torch.is_autocast_enabled(like.device.type)
        return self.usable and fused and exact

    def cache_of(
        self,
        layers: Sequence[KeysValues],
        packed: Sequence[Sequence[Segment]] = (),
        mark: GraphMark | None = None,
    ) -> Any:
        """A key-value cache of given contents, for a pass that continues it, inside `attending` or not.

        Its layers keep everything, whatever sliding windows the model has: masks count from the first
        token, and shut out what a window does not reach.

        Args:
            layers: keys and values of each block; one row may be expanded to all rows.
            packed: for each block what its tokens are, where they are not a row's tokens from the first
                uncached one on, but those of many rows one behind the other; inside `attending` alone.
            mark: lives as long as anything may be differentiated that was computed from the layers.
        """
        from transformers import DynamicCache

        found, kind = DynamicCache(), _layer_class()
        config = next(iter(self._of_blocks), None)
        for keys, values in layers:
            # Put there as they are: `update` would copy them.
            layer = kind(config)
            layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
            layer.keys, layer.values, layer.mark = keys, values, mark
            found.layers.append(layer)
        for layer, segments in zip(found.layers, packed, strict=False):
            layer.segments = tuple(segments)
        return found

    @contextlib.contextmanager
    def attending(self, like: Tensor) -> Iterator[None]:
        """Run attention over such caches as this file does, where it can, inside a `with` block.

        Other calls of the model, from other threads too, run as they would.

        Args:
            like: some of the cached keys or values.
        """
        if not self.applies(like):
            yield
            return
        _register()
        configs = [config for config in self._configs if backend_of(config) == "sdpa"]
        with _switching:
            for config in configs:
                _switched[id(config)] = _switched.get(id(config), 0) + 1
                setattr(config, BACKEND, PREFIX)
        try:
            yield
        finally:
            with _switching:
                for config in configs:
                    _switched[id(config)] -= 1
                    if not _switched[id(config)]:
                        del _switched[id(config)]
                        # Somebody may have chosen another in between.
                        if getattr(config, BACKEND) == PREFIX:
                            setattr(config, BACKEND, "sdpa")


def check_attended(found: Any) -> None:
    """Refuse a pass in which a block left its cached tokens unseen.

    Args:
        found: the cache, if there was one.

    Raises:
        RuntimeError: some block's attention was not this file's.
    """
    for number, layer in enumerate(() if found is None else found.layers):
        if layer.owed:
            raise RuntimeError(f"the attention of block {number} did not look at its cached tokens")


def placeholder(rows: int, heads: int, tokens: int, width: int, like: Tensor) -> Tensor:
    """Keys of a block that is left out: they say how many tokens there are, and take no memory."""
    return torch.zeros(1, 1, 1, 1, dtype=like.dtype, device=like.device).expand(rows, heads, tokens, width)


@cache
def _layer_class() -> Any:
    from transformers.cache_utils import DynamicLayer

    class PrefixLayer(DynamicLayer):
        """Hands its tokens to attention beside the new ones, not joined to them."""

        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config, self.owed = config, False
            self.segments: tuple[Segment, ...] = ()
            self.mark: GraphMark | None = None

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            switched = getattr(self.config, BACKEND, None) == PREFIX
            if self.segments and not switched:
                raise RuntimeError("packed tokens can be looked at by no other attention")
            if not switched or not (self.segments or self.get_seq_length()):
                found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
                return found
            key_states.prefix = self  # type: ignore[attr-defined]
            self.owed = True
            return key_states, value_states

    return PrefixLayer


@cache
def _register() -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        prefix = getattr(key, "prefix", None)
        if prefix is not None:
            prefix.owed = False
            if query.shape[2] > _FEW and not prefix.segments:
                key, value = torch.cat([prefix.keys, key], 2), torch.cat([prefix.values, value], 2)
                prefix = None
        if prefix is None:
            plain: tuple[Tensor, None] = sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, **kwargs
            )
            return plain
        if kwargs.get("position_bias") is not None or kwargs.get("dropout"):
            raise RuntimeError("position biases and dropout are left to the model's own attention")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if prefix.segments:
            return _attend_packed(query * scale, key, value, prefix.segments, attention_mask), None
        found = _attend(query * scale, key, value, prefix.keys, prefix.values, attention_mask)
        if prefix.mark is not None and found.requires_grad:
            found = marked(found, prefix.mark)
        return found, None

    AttentionInterface.register(PREFIX, attend)
    AttentionMaskInterface.register(PREFIX, sdpa_mask)


def _attend_packed(
    query: Float[Tensor, "1 head token k"],
    key: Float[Tensor, "1 shared token k"],
    value: Float[Tensor, "1 shared token v"],
    segments: Sequence[Segment],
    mask: Tensor | None,
) -> Float[Tensor, "1 token head v"]:
    """Each segment's rows among themselves; `mask` is that of one row, whose last tokens are theirs."""
    total = sum(segment.rows * segment.keys.shape[2] for segment in segments) + query.shape[2]
    # All rows end with the prompt, so each is as long as it, cached tokens and own ones together.
    length = total // sum(segment.rows for segment in segments)
    begin, found = 0, []
    for segment in segments:
        rows, own = segment.rows, length - segment.keys.shape[2]
        here = slice(begin, begin + rows * own)
        new = [part[0, :, here].unflatten(1, (rows, own)).transpose(0, 1) for part in (query, key, value)]
        old = [part.expand(rows, -1, -1, -1) for part in (segment.keys, segment.values)]
        seen = None if mask is None else mask[:, :, mask.shape[2] - own :]
        found.append(_attend(new[0], new[1], new[2], old[0], old[1], seen).flatten(0, 1))
        begin = here.stop
    return torch.cat(found)[None]


def _attend(
    query: Float[Tensor, "row head token k"],
    key: Float[Tensor, "row shared token k"],
    value: Float[Tensor, "row shared token v"],
    keys: Float[Tensor, "row shared before k"],
    values: Float[Tensor, "row shared before v"],
    mask: Tensor | None,
) -> Float[Tensor, "row token head v"]:
    """softmax([Q Kᵀ_prefix, Q Kᵀ]) [V_prefix; V], query heads of a group side by side.

    Args:
        query: already scaled; its heads are a multiple of the keys'.
        key, value: of the tokens that run.
        keys, values: of the prefix; one row may be expanded to all rows.
        mask: `(row, 1, token, before + token)`, true where a token is seen, or what to add to the scores;
            causal unless given.
    """
    rows, heads, tokens, _ = query.shape
    shared, before = key.shape[1], keys.shape[2]
    grouped = query.reshape(rows, shared, heads // shared * tokens, -1)
    scores = torch.cat([_times(grouped, keys.mT), grouped @ key.mT], -1).view(rows, heads, tokens, -1)
    if mask is None and tokens > 1:
        mask = torch.ones(tokens, before + tokens, dtype=torch.bool, device=key.device).tril(before)
    if mask is not None:
        # The lowest number and not -inf: a padding token sees nothing, and its row must stay finite.
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    pattern = scores.softmax(-1).view(*grouped.shape[:3], -1)
    mixed = _times(pattern[..., :before], values) + pattern[..., before:] @ value
    return mixed.reshape(rows, heads, tokens, -1).transpose(1, 2).contiguous()


def _times(
    left: Float[Tensor, "row shared n a"], right: Float[Tensor, "row shared a b"]
) -> Float[Tensor, "row shared n b"]:
    """The product of both; where one row of the right was expanded to all rows, one product and no copy."""
    rows, shared, count, _ = left.shape
    if rows == 1 or right.stride(0):
        return left @ right
    together = left.transpose(0, 1).reshape(shared, rows * count, -1) @ right[0]
    return together.view(shared, rows, count, -1).transpose(0, 1)
