"""Attention scores and patterns: what goes into an attention module's softmax and what comes out.

Fused kernels never hold the pattern, so a call that reads or edits one runs attention in
transformers' own eager form, whatever backend the model was loaded with, and goes back to that
backend afterwards. The softmax is then seen by a torch function mode, in any family, with the
family's own scaling, soft caps, sinks and masks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from reftlab.errors import RunError

__all__ = ["BACKEND", "PREFIX", "SoftmaxWatch", "attending", "backend_of", "configs_of"]

Change = Callable[[Tensor], Tensor]

BACKEND = "_attn_implementation_internal"
"""Where a configuration keeps the name of its attention backend, its own and no other's."""
PREFIX = "reftlab_prefix"
"""What transformers knows the attention of `reftlab.runtime.cone.prefix` by, which stands in for `sdpa`."""
_SOFTMAX = frozenset((torch.softmax, functional.softmax, Tensor.softmax, torch.special.softmax))


class SoftmaxWatch(TorchFunctionMode):
    """Shows the softmax of the attention module that is running to whoever asked for it.

    `attending` puts it around the model's call; tell it with `begin` and `end` which module is running.
    """

    def __init__(self) -> None:
        super().__init__()
        self._now: tuple[Change, Change] | None = None

    def begin(self, on_scores: Change, on_pattern: Change) -> None:
        """An attention module begins; its next softmax is the one that is meant."""
        self._now = (on_scores, on_pattern)

    def end(self, site: str) -> None:
        """The module has ended.

        Raises:
            RunError: it ran no softmax that torch could see.
        """
        unseen, self._now = self._now is not None, None
        if unseen:
            raise RunError(
                f"{site}: this module ran no softmax that can be watched, so it has no attention scores or "
                "pattern to read or edit; its attention kernel may have no eager form"
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._now is None or func not in _SOFTMAX:
            return func(*args, **kwargs)
        (on_scores, on_pattern), self._now = self._now, None
        scores, rest = (args[0], args[1:]) if args else (kwargs.pop("input"), ())
        return on_pattern(func(on_scores(scores), *rest, **kwargs))


@contextlib.contextmanager
def attending(model: nn.Module, watch: SoftmaxWatch) -> Iterator[None]:
    """Run a Hugging Face model's attention in its eager form, and `watch` it, inside a `with` block."""
    # The public attribute would also set the configurations inside, each of which is its own here.
    before = [(config, getattr(config, BACKEND)) for config in configs_of(model)]
    try:
        for config, _ in before:
            setattr(config, BACKEND, "eager")
        with watch:
            yield
    finally:
        for config, backend in before:
            setattr(config, BACKEND, backend)


def configs_of(*modules: nn.Module) -> list[Any]:
    """The configurations that choose attention's backend in some modules and those inside them."""
    every = (getattr(inner, "config", None) for module in modules for inner in module.modules())
    return list({id(c): c for c in every if isinstance(getattr(c, BACKEND, None), str)}.values())


def backend_of(config: Any) -> str:
    """The attention backend that a configuration's model was given, whatever stands in for it just now."""
    backend = getattr(config, BACKEND, None) or ""
    return "sdpa" if backend == PREFIX else str(backend)
