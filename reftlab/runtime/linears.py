"""Which linear module makes what stands at a site."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from reftlab.runtime.leaf import get_output
from reftlab.runtime.modes import evaluating
from reftlab.runtime.places import BoundEdit
from reftlab.runtime.scan import example_inputs, moved, skeleton
from reftlab.runtime.wrapped import device_of, eagerly

__all__ = ["linears_of"]


def linears_of(model: nn.Module, example: Any, edits: Sequence[BoundEdit]) -> dict[str, str]:
    """The linear module that makes what each edit finds at its site, by the edit's key.

    One pass over an example tells, on shapes alone where the model can run without values. An edit whose
    site is no such output, or one that is used elsewhere too, is left out.

    Args:
        model: the model.
        example: inputs for the pass, as for `scan`.
        edits: the edits, at outputs.
    """
    args, kwargs = example_inputs(model, example)
    try:
        return _makers(skeleton(model), edits, *moved((args, kwargs), torch.device("meta")))
    except Exception:  # any failure here means that this model needs values to run, as in `scan`
        with torch.random.fork_rng():
            return _makers(model, edits, *moved((args, kwargs), device_of(model)))


def _makers(model: nn.Module, edits: Sequence[BoundEdit], args: Any, kwargs: Any) -> dict[str, str]:
    """By edit, the module whose output, unchanged and not used in between, is the edit's site."""
    from transformers.pytorch_utils import Conv1D

    uses, found, handles, calls = _Uses(), {}, [], dict[str, int]()

    def made(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            if isinstance(output, Tensor):
                uses.made[id(output)] = (name, output, output._version)

        return hook

    def returned(edit: BoundEdit) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = get_output(output, edit.site.leaf, str(edit.site))
            name, same, version = uses.made.get(id(tensor), ("", None, 0))
            if same is tensor and tensor._version == version and id(tensor) not in uses.used:
                found[edit.key] = name

        return hook

    modules = {edit.site.module for edit in edits}
    for name, module in model.named_modules():
        around = [outer for outer in modules if name == outer or name.startswith(f"{outer}.")]
        if around and isinstance(module, nn.Linear | Conv1D):
            handles.append(module.register_forward_hook(made(name)))
    for edit in edits:
        handles.append(model.get_submodule(edit.site.module).register_forward_hook(returned(edit)))
    try:
        with evaluating(model), torch.no_grad(), eagerly(model), uses:
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {key: name for key, name in found.items() if calls[name] == 1}


class _Uses(TorchFunctionMode):
    """Notes which of some tensors any function takes that does not simply return them."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[str, Tensor, int]] = {}
        self.used: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") != "__get__":
            for value in _flat((*args, *(kwargs or {}).values())):
                if isinstance(value, Tensor) and id(value) in self.made and result is not value:
                    self.used.add(id(value))
        return result


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value
