"""Models that another library has wrapped: where their weights are, what is called, and what was compiled.

PEFT, `torch.compile` and DDP put a model into one of their own; accelerate puts a function into the place
of each module's `forward`, which fetches the weights that lie elsewhere. Both leave torch's hooks
alone, so edits need only know the few things that are asked here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["device_of", "eagerly", "entrances", "forget_wrapping", "hidden_memo", "is_dispatched", "value_of"]

_KEPT_AS = {"peft": ("base_model", "model"), "torch": ("_orig_mod", "module"), "accelerate": ("module",)}
"""Under which names the wrappers of each package keep what they wrap."""


def entrances(model: nn.Module) -> list[nn.Module]:
    """The modules of which one is called first in a forward pass: the model, and what it wraps.

    A wrapper's `generate` calls the wrapped model, and a wrapper's `forward` may pass by the hooks of
    what it wraps, as PEFT's does; whoever wants to see each pass begin must watch all of them.
    """
    found = [model]
    while (inner := _wrapped(found[-1])) is not None:
        found.append(inner)
    return found


def device_of(*modules: nn.Module) -> torch.device:
    """Where the first of these modules that can tell wants its inputs.

    A module whose weights accelerate keeps on another device or on disk has them on the meta device
    between its calls; its hook knows where they go when it runs.
    """
    seen: list[torch.device] = []
    for module in modules:
        for inner in module.modules():
            for hook in _hooks(inner):
                if getattr(hook, "execution_device", None) is not None:
                    return torch.device(hook.execution_device)
            for tensor in (*inner.parameters(recurse=False), *inner.buffers(recurse=False)):
                if not tensor.is_meta:
                    return tensor.device
                seen.append(tensor.device)
    return seen[0] if seen else torch.device("cpu")


def is_dispatched(model: nn.Module) -> bool:
    """Whether accelerate has put the model's parts where they are, so that nobody else may move it."""
    return any(vars(module).get("_hf_hook") is not None for module in model.modules())


def value_of(model: nn.Module, name: str) -> Tensor:
    """The numbers of a parameter, fetched where they lie if they are not in the model now."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    tensor: Tensor = getattr(module, leaf)
    if tensor.is_meta:
        for hook in _hooks(module):
            stored = getattr(hook, "weights_map", None)
            if stored is not None:
                return torch.as_tensor(stored[leaf])
    return tensor.detach()


def hidden_memo(model: nn.Module) -> dict[int, Any]:
    """What `copy.deepcopy` must leave out of a copy of shapes: accelerate's hooks, which hold weights."""
    return {
        id(hook): None for module in model.modules() if (hook := vars(module).get("_hf_hook")) is not None
    }


def forget_wrapping(model: nn.Module) -> None:
    """Give the modules of a copy their own `forward` back, which accelerate or torch.compile replaced."""
    for module in model.modules():
        own = vars(module)
        if "_old_forward" in own:
            own["forward"] = own.pop("_old_forward")
        elif _compiled(own.get("forward")) and "_orig_mod" not in module._modules:
            del own["forward"]


def eagerly(model: nn.Module) -> AbstractContextManager[Any]:
    """Run what is compiled in a model as plain Python inside a `with` block.

    Compiled code keeps the hooks that stood when it was traced, or is compiled anew for each call whose
    hooks are others; edits come and go with every call.
    """
    # Nothing is compiled where torch's compiler was never loaded, and loading it takes seconds.
    if "torch._dynamo" not in sys.modules or not _has_compiled(model):
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _has_compiled(model: nn.Module) -> bool:
    # Asked in every call, and several times as fast as by `modules()`.
    waiting = [model]
    while waiting:
        own = waiting.pop().__dict__
        if own.get("_compiled_call_impl") is not None or _compiled(own.get("forward")):
            return True
        waiting += [child for child in own["_modules"].values() if child is not None]
    return False


def _compiled(function: Any) -> bool:
    return hasattr(function, "_torchdynamo_orig_callable")


def _wrapped(module: nn.Module) -> nn.Module | None:
    """What a wrapper of a package that is known here wraps; None where the module is no such wrapper."""
    names = _KEPT_AS.get(type(module).__module__.partition(".")[0], ())
    return next((module._modules[name] for name in names if module._modules.get(name) is not None), None)


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Accelerate's hooks on a module, which it chains where there are several."""
    hook = vars(module).get("_hf_hook")
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))
