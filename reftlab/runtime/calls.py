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
from reftlab.runtime.wrapped import entrances

__all__ = ["Calls", "Layouts", "continues_texts"]

Layouts = dict[str, Layout]
Window = tuple[int, int, int]


class Calls:
    """Reads the arguments of one model's calls, and remembers whose prompt a cache holds.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = _inner(entrances(model)[-1])
        self._names = _names(model) or _names(self._model)
        self._takes = frozenset((*_names(self._model), *self._names))
        self.has_decoder = bool(getattr(getattr(self._model, "config", None), "is_encoder_decoder", False))
        self._ends: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._caches: weakref.WeakKeyDictionary[Any, Layouts] = weakref.WeakKeyDictionary()

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments by name."""
        return {**dict(zip(self._names, args, strict=False)), **kwargs}

    def layouts(self, named: Mapping[str, Any], prompt: Mapping[str, Any] | None = None) -> Layouts:
        """Where the prompts of a call stand, by stream; a stream that its arguments lack is left out.

        Args:
            named: the call's arguments by name.
            prompt: those of the whole prompt, where the call covers only a part of it.

        Raises:
            RunError: the call continues a cache whose prompt is not known, or `prompt` is no prompt
                of this call.
        """
        causal = not self.has_decoder and continues_texts(self._model)
        if prompt is not None:
            return {"tokens": self._whole_prompt(named, prompt, causal)}
        if self.past(named) == 0:
            own = Layout.of(named, causal=causal)
            decoder = Layout.of_decoder(named) if self.has_decoder else None
            found = {} if own is None else {"tokens": own}
            return found if decoder is None else {**found, "decoder": decoder}
        cache = _cache(named)
        if cache in self._caches:
            return self._caches[cache]
        raise RunError(
            "this call continues past_key_values that this bound model did not make, so it cannot know "
            "where the prompt is; give the tokenizer's output for the whole prompt as prompt="
        )

    def _whole_prompt(self, named: Mapping[str, Any], prompt: Any, causal: bool) -> Layout:
        layout = Layout.of(prompt, causal=causal, open=True) if isinstance(prompt, Mapping) else None
        if layout is None:
            raise RunError(
                "prompt= must be the tokenizer's output for the whole prompt, input_ids (row, token)"
            )
        tokens = _tokens(named)
        if tokens is not None and tokens.shape[0] != layout.rows:
            raise RunError(f"prompt= has {layout.rows} rows and this call {tokens.shape[0]}; give as many")
        return layout

    def remember(self, output: Any, layouts: Layouts, continues: bool) -> None:
        """Note whose prompt a cache holds, so that later steps with it know their place."""
        if continues:
            return
        parts = (
            output
            if isinstance(output, tuple)
            else (_cache(vars(output) if hasattr(output, "__dict__") else {}),)
        )
        for cache in parts:
            if layouts and hasattr(cache, "get_seq_length"):
                self._ends.setdefault(cache, next(iter(layouts.values())).width)
                self._caches[cache] = {name: replace(layout, open=True) for name, layout in layouts.items()}

    def knows_cache(self, named: Mapping[str, Any]) -> bool:
        """Whether the call's cache is empty, or one that this object has filled."""
        return self.past(named) == 0 or _cache(named) in self._caches

    def rows(self, named: Mapping[str, Any]) -> int | None:
        """How many rows a call has, or None where its arguments do not tell."""
        tokens = _tokens(named)
        return None if tokens is None else tokens.shape[0]

    def tokens(self, named: Mapping[str, Any]) -> int:
        """How many tokens a call has in each row; 0 where its arguments do not tell."""
        tokens = _tokens(named)
        return 0 if tokens is None else tokens.shape[1]

    def past(self, named: Mapping[str, Any]) -> int:
        """How many columns the call's cache holds already.

        Raises:
            RunError: the cache does not tell, as those of state-space models, and is not known.
        """
        cache = _cache(named)
        if not hasattr(cache, "get_seq_length"):
            return 0
        try:
            return int(cache.get_seq_length())
        except ValueError as error:
            if not cache.has_previous_state():
                return 0
            known = self._ends.get(cache)
            if known is None:
                raise RunError(
                    f"this call continues a {type(cache).__name__} that does not say how many tokens it has "
                    "seen, and this bound model did not make it; begin with a call of this bound model"
                ) from error
            return known

    def passed(self, named: Mapping[str, Any], windows: Mapping[str, Window]) -> None:
        """Note where a pass ended, for caches that do not say how many columns they hold."""
        cache = _cache(named)
        if windows and hasattr(cache, "get_seq_length"):
            self._ends[cache] = list(windows.values())[-1][2]

    def windows(self, named: Mapping[str, Any]) -> dict[str, Window]:
        """By stream, the rows, the first column, and the column after the last, that one pass covers.

        Raises:
            RunError: the pass takes some tokens again, so that it covers no window.
        """
        again = [name for name in ("mems", "target_mapping") if named.get(name) is not None]
        if again:
            raise RunError(
                f"{type(self._model).__name__}: a pass with {again[0]} takes some of its tokens again, so "
                "that positions have no place in it; generation with edits and mems are not possible here"
            )
        past = self.past(named)
        found: dict[str, Window] = {}
        for stream, tokens in (("tokens", _tokens(named)), ("decoder", _decoder_tokens(named))):
            if tokens is not None and (stream == "tokens" or self.has_decoder):
                start = past if stream == "decoder" or not self.has_decoder else 0
                found[stream] = (tokens.shape[0], start, start + tokens.shape[1])
        return found

    def decoder_prompt(self, named: Mapping[str, Any]) -> Layout | None:
        """The decoder's prompt of a generation, which only its first pass shows."""
        return Layout.of_decoder(named, open=True) if self.has_decoder else None

    def forward_inputs(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a call's arguments that another forward pass on the same inputs takes.

        Labels stay, since they say where the prompt ends.
        """
        left_out = ("past_key_values", "cache_params", "use_cache")
        return {key: value for key, value in named.items() if key in self._takes and key not in left_out}

    def numbered(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs of one pass with the position ids that `generate` would give them."""
        mask = inputs.get("attention_mask")
        wanted = "position_ids" in self._takes and not self.has_decoder
        if (
            not wanted
            or inputs.get("position_ids") is not None
            or not isinstance(mask, Tensor)
            or mask.dim() != 2
        ):
            return inputs
        return {**inputs, "position_ids": (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_caches": None, "_ends": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {
            **state,
            "_caches": weakref.WeakKeyDictionary(),
            "_ends": weakref.WeakKeyDictionary(),
        }

    def mask_of(self, named: Mapping[str, Any]) -> Tensor:
        """The mask that `generate` makes up, by its rule: padding is known unless it ends texts too."""
        ids: Tensor = named["input_ids"]
        configs = (named.get("generation_config"), getattr(self._model, "generation_config", None))

        def setting(name: str) -> Any:
            if named.get(name) is not None:
                return named[name]
            values = (getattr(config, name, None) for config in configs)
            return next((value for value in values if value is not None), None)

        pad, ends = setting("pad_token_id"), setting("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        if pad is None or pad in ends or not bool((ids == pad).any()):
            return torch.ones_like(ids)
        return (ids != pad).long()


def continues_texts(model: nn.Module) -> bool:
    """Whether the model is one that can be asked for an answer."""
    return bool(getattr(model, "can_generate", lambda: False)())


def _cache(named: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments or results, under either of its names."""
    found = named.get("past_key_values")
    return named.get("cache_params") if found is None else found


def _inner(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside wrappers such as DDP, or the model itself."""
    found: Any = model
    for _ in range(4):
        if hasattr(found, "can_generate"):
            return found  # type: ignore[no-any-return]
        names = [
            n for n in ("module", "base_model", "model") if isinstance(getattr(found, n, None), nn.Module)
        ]
        if not names:
            return model
        found = getattr(found, names[0])
    return model


def _names(model: nn.Module) -> list[str]:
    """Names of the arguments that a model's forward takes by place."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _tokens(named: Mapping[str, Any]) -> Tensor | None:
    values = (named.get(name) for name in ("input_ids", "inputs_embeds"))
    return next((value for value in values if isinstance(value, Tensor) and value.dim() >= 2), None)


def _decoder_tokens(named: Mapping[str, Any]) -> Tensor | None:
    values = (named.get(name) for name in ("decoder_input_ids", "decoder_inputs_embeds", "labels"))
    return next((value for value in values if isinstance(value, Tensor) and value.dim() >= 2), None)
