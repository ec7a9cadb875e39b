"""Reading and editing a raw module with one plain torch hook."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.families.table import Axes, Raw

Act = Callable[[Tensor], Tensor | None]


def standard(tensor: Tensor, axes: Axes) -> Tensor:
    """As (row, token, feature)."""
    if axes == "trf":
        return tensor.transpose(0, 1)
    if axes == "rchw":
        return tensor.flatten(2).transpose(1, 2)
    return tensor[:, None] if axes == "rf" else tensor


def as_it_was(tensor: Tensor, axes: Axes, like: Tensor) -> Tensor:
    if axes == "trf":
        return tensor.transpose(0, 1)
    if axes == "rchw":
        return tensor.transpose(1, 2).reshape(like.shape)
    return tensor[:, 0] if axes == "rf" else tensor


@contextlib.contextmanager
def plain_hook(model: nn.Module, raw: Raw, act: Act) -> Iterator[None]:
    """Show `act` a raw tensor's chosen features, `(row, token, feature)`; what it returns takes their place."""
    module = model.get_submodule(raw.module)

    def changed(tensor: Tensor) -> Tensor | None:
        whole = standard(tensor, raw.axes).clone()
        chosen = list(range(whole.shape[-1])) if raw.features is None else list(raw.features)
        new = act(whole[..., chosen])
        if new is None:
            return None
        whole[..., chosen] = new
        return as_it_was(whole, raw.axes, tensor)

    def on_output(module: nn.Module, args: Any, output: Any) -> Any:
        new = changed(output if isinstance(output, Tensor) else output[0])
        if new is None:
            return None
        return new if isinstance(output, Tensor) else (new, *output[1:])

    def on_input(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            new = changed(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = changed(kwargs["hidden_states"])
        return None if new is None else (args, {**kwargs, "hidden_states": new})

    if raw.side == "output":
        handle = module.register_forward_hook(on_output)
    else:
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def read_by_hand(model: nn.Module, raw: Raw, inputs: dict[str, Tensor]) -> Tensor:
    """The tensor in a bare forward pass, `(row, token, feature)`."""
    kept: list[Tensor] = []
    with plain_hook(model, raw, lambda tensor: kept.append(tensor)), torch.no_grad():  # type: ignore[func-returns-value]
        model(**inputs)
    assert len(kept) == 1
    return kept[0]


def real_columns(raw: Raw, inputs: dict[str, Tensor], tokens: int) -> list[list[int]]:
    """Each row's real tokens by hand."""
    mask = inputs.get("attention_mask")
    if not raw.masked or mask is None:
        return [list(range(tokens))] * next(iter(inputs.values())).shape[0]
    return [[place for place, real in enumerate(row) if real] for row in mask.tolist()]


def last_columns(raw: Raw, inputs: dict[str, Tensor], tokens: int) -> list[list[int]]:
    """Each row's last real token by hand."""
    return [columns[-1:] for columns in real_columns(raw, inputs, tokens)]


def edit_by_hand(
    raw: Raw, columns: list[list[int]], change: Callable[[Tensor], Tensor], *, first_pass_only: bool = False
) -> Act:
    """An act for `plain_hook` that changes the vectors at these columns of each row."""
    passes = 0

    def act(tensor: Tensor) -> Tensor | None:
        nonlocal passes
        passes += 1
        if first_pass_only and passes > 1:
            return None
        new = tensor.clone()
        for row, chosen in enumerate(columns):
            for column in chosen:
                # generate asks some models for the last column's logits alone.
                at = column if tensor.shape[1] > 1 else 0
                new[row, at] = change(tensor[row, at][None])[0]
        return new

    return act


def answer_of(output: Any) -> Tensor:
    """The main tensor of what a model returns."""
    return output if isinstance(output, Tensor) else output[0]
