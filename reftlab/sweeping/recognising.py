"""What tells a function from all others: its code, and every value that the code takes from elsewhere."""

from __future__ import annotations

import dis
import functools
import hashlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reftlab.runtime.digest import digest_of

__all__ = ["UnrecognisedError", "fingerprint"]

_PLAIN = (type(None), type(...), bool, int, float, complex, str, bytes, range)
_OF_TORCH = (torch.dtype, torch.device, torch.layout, torch.Size)


class UnrecognisedError(Exception):
    """A function holds something that cannot be told from another of its kind."""


def fingerprint(function: Any) -> str:
    """A hash of what a function computes, as far as can be told without running it.

    It covers the code, defaults, closures, attributes, the globals that the code names, the object that a
    method is bound to, and all of this again for each function of the user's among them. Installed packages
    count as their names and versions.

    Raises:
        UnrecognisedError: one of these is no plain value, tensor, array, function or module.
    """
    return hashlib.sha256(_Teller().told(function).encode()).hexdigest()


class _Teller:
    """Writes values down; of those inside each other it notes where it has been."""

    def __init__(self) -> None:
        self._met: dict[int, int] = {}

    def told(self, value: Any, name: str = "the function") -> str:
        kind = type(value)
        if kind in _PLAIN or isinstance(value, _OF_TORCH):
            return f"{kind.__name__} {value!r}"
        if kind is Tensor or kind is torch.nn.Parameter:
            return f"tensor {digest_of([value])}"
        if isinstance(value, np.generic) or (kind is np.ndarray and not value.dtype.hasobject):
            held = np.asarray(value)
            return f"{kind.__name__} {held.dtype} {held.shape} {hashlib.sha256(held.tobytes()).hexdigest()}"
        if isinstance(value, types.ModuleType):
            return _module(value)
        installed = _installed_as(value)
        if installed:
            return installed
        if id(value) in self._met:
            return f"again {self._met[id(value)]}"
        self._met[id(value)] = len(self._met)
        return self._made_of(value, name)

    def _made_of(self, value: Any, name: str) -> str:
        kind = type(value)
        if kind in (tuple, list):
            return f"{kind.__name__} [{self._several(value, name)}]"
        if kind in (set, frozenset):
            return f"{kind.__name__} {sorted(self.told(item, name) for item in value)}"
        if kind is dict:
            return f"dict [{self._several(value, name)}] [{self._several(value.values(), name)}]"
        if kind is types.FunctionType:
            return self._function(value)
        if kind is types.MethodType:
            return f"method {self.told(value.__func__, name)} of {self.told(value.__self__, name)}"
        if kind is functools.partial:
            return f"partial {self._several([value.func, value.args, value.keywords], name)}"
        raise UnrecognisedError(f"{name} is or holds a {kind.__name__}")

    def _several(self, values: Any, name: str) -> str:
        return ", ".join(self.told(value, name) for value in values)

    def _function(self, function: types.FunctionType) -> str:
        code = function.__code__
        held: dict[str, Any] = {
            "defaults": function.__defaults__,
            "keywords": function.__kwdefaults__,
            "attributes": vars(function),
        }
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                held[name] = cell.cell_contents
            except ValueError as error:
                raise UnrecognisedError(f"{name!r} has no value yet") from error
        known, built_in = function.__globals__, vars(sys.modules["builtins"])
        for kind, name in sorted(_taken(code)):
            if kind == "global" and (name in known or name in built_in):
                held[f"global {name}"] = known[name] if name in known else built_in[name]
            elif kind == "import" and not _is_installed(name):
                raise UnrecognisedError(f"it imports {name!r} when it is called")
        attributes = sorted(name for kind, name in _taken(code) if kind == "attribute")
        for name, value in list(held.items()):
            if isinstance(value, types.ModuleType):
                held |= _members(name, value, attributes)
        around = [_code(code)]
        around += [f"{name} = {self.told(value, name)}" for name, value in held.items()]
        return "function " + "; ".join(around)


def _code(code: types.CodeType) -> str:
    """Code without where it stands."""
    parts = [
        code.co_code.hex(), code.co_exceptiontable.hex(),
        code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags,
        code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars,
    ]  # fmt: skip
    return f"code {parts!r} [{', '.join(map(_constant, code.co_consts))}]"


def _constant(value: Any) -> str:
    if isinstance(value, types.CodeType):
        return _code(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(_constant, value))})"
    if isinstance(value, frozenset):
        return f"{sorted(map(_constant, value))}"
    return f"{type(value).__name__} {value!r}"


def _taken(code: types.CodeType) -> set[tuple[str, str]]:
    """The globals, attributes and imports that code, and code inside it, names."""
    found: set[tuple[str, str]] = set()
    for instruction in dis.get_instructions(code):
        operation = instruction.opname
        if operation in ("LOAD_GLOBAL", "LOAD_NAME"):
            found.add(("global", str(instruction.argval)))
        elif operation in ("LOAD_ATTR", "LOAD_METHOD"):
            found.add(("attribute", str(instruction.argval)))
        elif operation == "IMPORT_NAME":
            found.add(("import", str(instruction.argval)))
    for constant in _inner(code):
        found |= _taken(constant)
    return found


def _inner(code: types.CodeType) -> Iterator[types.CodeType]:
    return (constant for constant in code.co_consts if isinstance(constant, types.CodeType))


def _members(name: str, module: types.ModuleType, attributes: list[str]) -> dict[str, Any]:
    """What code may take from a module of the user's, and from the modules in it."""
    found: dict[str, Any] = {}
    waiting, met = [(name, module)], {module.__name__}
    while waiting:
        name, module = waiting.pop()
        if _is_installed(module.__name__):
            continue
        for attribute in attributes:
            value = vars(module).get(attribute)
            if isinstance(value, types.ModuleType) and value.__name__ not in met:
                met.add(value.__name__)
                waiting.append((f"{name}.{attribute}", value))
            elif attribute in vars(module):
                found[f"{name}.{attribute}"] = value
    return found


def _module(module: types.ModuleType) -> str:
    top = sys.modules.get(module.__name__.partition(".")[0])
    return f"module {module.__name__} {getattr(top, '__version__', '')}"


def _installed_as(value: Any) -> str:
    """Under which name an installed package, or Python, has an object; empty where none does."""
    if isinstance(value, np.ufunc):
        return f"numpy {np.__version__} {value.__name__}"
    if isinstance(value, types.BuiltinFunctionType):
        owner = value.__self__
        if owner is None or isinstance(owner, types.ModuleType | type):
            return f"builtin {getattr(owner, '__name__', '')} {value.__module__} {value.__qualname__}"
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or not _is_installed(module):
        return ""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return f"{_module(sys.modules[module])} {name}" if found is value else ""


def _is_installed(name: str) -> bool:
    """Whether a module is Python's own or of an installed package, whose code nobody changes by the way."""
    top = name.partition(".")[0]
    if top == "__main__":
        return False
    if top in sys.stdlib_module_names or top == __name__.partition(".")[0]:
        return True
    path = Path(str(getattr(sys.modules.get(top), "__file__", None) or ""))
    return bool({"site-packages", "dist-packages"}.intersection(path.parts))
