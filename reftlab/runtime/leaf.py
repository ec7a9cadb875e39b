"""Taking one tensor out of what a module receives or returns, and putting another in its place."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from reftlab.errors import RunError

__all__ = ["get_input", "get_output", "put_input", "put_output"]

Keys = tuple[str | int, ...]

_MAIN_FIELDS = ("last_hidden_state", "logits", "sample", "hidden_states")


def get_output(value: Any, keys: Keys, site: str) -> Tensor:
    """The tensor at `keys` in a module's output, or its main tensor where there are none.

    Raises:
        RunError: there is no such tensor; the message lists what there is.
    """
    for key in keys or _main_key(value, site):
        value = _entry(value, key, site)
    return _tensor(value, site)


def put_output(value: Any, keys: Keys, new: Tensor, site: str) -> Any:
    """The module's output with that tensor replaced; the original is not changed."""
    return _replaced(value, keys or _main_key(value, site), new, site)


def get_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], keys: Keys, site: str
) -> Tensor:
    """The tensor at `keys` among a module's arguments, or its first one where there are none."""
    where, rest = _argument(module, args, kwargs, keys, site)
    value = args[where] if isinstance(where, int) else kwargs[where]
    for key in rest:
        value = _entry(value, key, site)
    return _tensor(value, site)


def put_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], keys: Keys, new: Tensor, site: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The module's arguments with that tensor replaced."""
    where, rest = _argument(module, args, kwargs, keys, site)
    if isinstance(where, int):
        return (*args[:where], _replaced(args[where], rest, new, site), *args[where + 1 :]), dict(kwargs)
    return args, {**kwargs, where: _replaced(kwargs[where], rest, new, site)}


def _argument(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], keys: Keys, site: str
) -> tuple[int | str, Keys]:
    """Where the wanted argument stands in this call: a place in `args` or a name in `kwargs`."""
    if not keys:
        if args and isinstance(args[0], Tensor):
            return 0, ()
        tensors = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
        if tensors:
            return ("hidden_states" if "hidden_states" in tensors else tensors[0]), ()
        raise RunError(f"{site}: the module was called without a tensor")
    names = list(inspect.signature(module.forward).parameters)
    key = keys[0]
    if isinstance(key, int):
        if 0 <= key < len(args):
            return key, keys[1:]
        key = names[key] if 0 <= key < len(names) else str(key)
    if key in kwargs:
        return key, keys[1:]
    if key in names and names.index(key) < len(args):
        return names.index(key), keys[1:]
    raise RunError(
        f"{site}: the module was called with {len(args)} positional arguments and "
        f"{', '.join(sorted(kwargs)) or 'no keyword arguments'}, not with {key!r}"
    )


def _main_key(value: Any, site: str) -> Keys:
    if isinstance(value, Tensor):
        return ()
    if isinstance(value, Mapping):
        tensors = [key for key, item in value.items() if isinstance(item, Tensor)]
        named = [key for key in _MAIN_FIELDS if key in tensors]
        if named or len(tensors) == 1:
            return ((named or tensors)[0],)
        raise RunError(
            f"{site}: say which of {', '.join(map(str, value))}, as in '{site}.{next(iter(value), '')}'"
        )
    if isinstance(value, tuple | list) and value and isinstance(value[0], Tensor):
        return (0,)
    raise RunError(f"{site}: the module returned {type(value).__name__}, in which no tensor comes first")


def _entry(value: Any, key: str | int, site: str) -> Any:
    if isinstance(value, Mapping) and key in value:
        return value[key]
    if isinstance(value, tuple | list) and isinstance(key, int) and -len(value) <= key < len(value):
        return value[key]
    if isinstance(key, str) and isinstance(value, tuple) and key in getattr(value, "_fields", ()):
        return getattr(value, key)
    raise RunError(f"{site}: there is no {key!r} in it; it is {_what(value)}")


def _replaced(value: Any, keys: Keys, new: Tensor, site: str) -> Any:
    if not keys:
        return new
    key, inner = keys[0], _replaced(_entry(value, keys[0], site), keys[1:], new, site)
    if isinstance(value, Mapping):
        changed: Any = copy.copy(value)
        changed[key] = inner
        return changed
    fields = getattr(value, "_fields", None)
    if fields is not None:
        return value._replace(**{key if isinstance(key, str) else fields[key]: inner})
    items = list(value)
    items[key] = inner  # type: ignore[index]
    return type(value)(items)


def _tensor(value: Any, site: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise RunError(f"{site} is {_what(value)}, not a tensor")
    return value


def _what(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with {', '.join(map(str, value))}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
