"""What a call's arguments say of its tokens: where they stand, and what a cache holds already."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from reftlab.errors import RunError
from reftlab.runtime.window import Layout

__all__ = ["Calls", "past_length"]


class Calls:
    """Reads the arguments of one model's calls, and remembers whose prompt a cache holds.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._caches: weakref.WeakKeyDictionary[Any, Layout] = weakref.WeakKeyDictionary()

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments by name."""
        names = inspect.signature(self._model.forward).parameters
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def layout(self, named: Mapping[str, Any], prompt: Mapping[str, Any] | None = None) -> Layout | None:
        """Where the prompts of a call stand; None where its arguments have no token axis.

        Args:
            named: the call's arguments by name.
            prompt: those of the whole prompt, where the call covers only a part of it.

        Raises:
            RunError: the call continues a cache whose prompt is not known.
        """
        causal = bool(getattr(self._model, "can_generate", lambda: False)())
        if prompt is not None:
            layout = Layout.of(prompt, causal=causal, open=True)
            if layout is None:
                raise RunError("prompt= must hold the whole prompt's input_ids, (row, token)")
            return layout
        if past_length(named) == 0:
            return Layout.of(named, causal=causal)
        cache = named.get("past_key_values")
        if cache in self._caches:
            return self._caches[cache]
        raise RunError(
            "this call continues past_key_values that this bound model did not make, so it cannot know "
            "where the prompt is; give the tokenizer's output for the whole prompt as prompt="
        )

    def remember(self, output: Any, layout: Layout | None) -> None:
        """Note whose prompt a new cache holds, so that later steps with it know their place."""
        cache = getattr(output, "past_key_values", None)
        if layout is not None and hasattr(cache, "get_seq_length") and cache not in self._caches:
            self._caches[cache] = replace(layout, open=True)

    def window(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int, int] | None:
        """Rows, first column, and the column after the last, that one pass covers."""
        named = self.named(args, kwargs)
        for name in ("input_ids", "inputs_embeds"):
            value = named.get(name)
            if isinstance(value, Tensor) and value.dim() >= 2:
                start = past_length(named)
                return value.shape[0], start, start + value.shape[1]
        return None

    def mask_of(self, ids: Tensor) -> Tensor:
        """The mask that `generate` would make up, by its rule: padding is known unless it ends texts."""
        config = getattr(self._model, "generation_config", None)
        pad, ends = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        if pad is None or pad in ends or not bool((ids == pad).any()):
            return torch.ones_like(ids)
        return (ids != pad).long()


def past_length(named: Mapping[str, Any]) -> int:
    """How many columns the call's cache holds already."""
    cache: Any = named.get("past_key_values")
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
