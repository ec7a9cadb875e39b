"""Hooks that belong to one forward call.

Torch hooks stay on a module until somebody removes them. reftlab puts its own on just before a
call and takes just those off again when the call ends, however it ends; nobody else's are touched.

One case needs them longer. Gradient checkpointing runs parts of the forward pass a second time
during the backward pass, and edits inside such a part must happen again, the same way. A call
that noticed a checkpoint around one of its edits therefore *lingers*: its hooks stay, but act only
while a backward pass is running, and they go when that backward pass ends or the autograd graph is
thrown away.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from reftlab.errors import RunError

__all__ = ["GraphMark", "OwnedHooks", "StopForward", "foreign_hooks", "marked", "turn_of"]

_KNOWN = ("transformers.", "reftlab.")

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
OnInput = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Arguments | None]
OnOutput = Callable[[nn.Module, tuple[Any, ...], Any], Any]


class StopForward(BaseException):
    """Ends a forward pass early, once everything that was asked for has been read.

    Not an `Exception`, so that a model that catches those does not swallow it.
    """


_turns: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_making_turns = threading.Lock()


def turn_of(model: nn.Module) -> threading.RLock:
    """The lock of a model: threads that put hooks on it do so one after the other."""
    with _making_turns:
        return _turns.setdefault(model, threading.RLock())


class OwnedHooks:
    """The hooks of one call on one model: `add_*`, then use as a context manager."""

    _lingering: weakref.WeakKeyDictionary[nn.Module, list[OwnedHooks]] = weakref.WeakKeyDictionary()

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.handles: list[RemovableHandle] = []
        self.active = True
        self._paused = False
        self._thread = threading.get_ident()
        self._tracks_grad = torch.is_grad_enabled()
        self._mark: GraphMark | None = None

    def on_input(self, module: nn.Module, act: OnInput, first: bool = False) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return act(module, args, kwargs) if self._may_act() else None

        self.handles.append(module.register_forward_pre_hook(hook, prepend=first, with_kwargs=True))

    def on_output(self, module: nn.Module, act: OnOutput) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return act(module, args, output) if self._may_act() else None

        self.handles.append(module.register_forward_hook(hook))
        # transformers' recorders of hidden states stay on a model once asked for; they come last, so
        # that they record what the edits made in every call, as they do in the first.
        for key, other in list(module._forward_hooks.items()):
            if str(getattr(other, "__module__", "")).startswith("transformers."):
                module._forward_hooks.move_to_end(key)  # type: ignore[attr-defined]

    def remember(self, value: Tensor) -> Tensor:
        """Tell the hooks that `value` now stands in the model; call it with every edited tensor."""
        if self.active and self._tracks_grad and _inside_checkpoint():
            if self._mark is None:
                self._mark = GraphMark()
                weakref.finalize(self._mark, _remove, self.handles)
            if torch.is_grad_enabled():
                return marked(value, self._mark)
        return value

    def hold(self, output: Any) -> None:
        """Tie hooks that must linger to the autograd graph of what the call returned.

        Inside a checkpoint of the reentrant kind there is no graph that an edited tensor could be
        tied to; the graph of the whole output lives as long as its backward pass may come.
        """
        if self._mark is not None:
            for tensor in _tensors(output):
                if tensor.grad_fn is not None:
                    metadata: Any = tensor.grad_fn.metadata
                    metadata.setdefault("reftlab", []).append(self._mark)

    def __enter__(self) -> OwnedHooks:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.active = False
        if kind is None and self._mark is not None:
            self._lingering.setdefault(self.model, []).append(self)
            # From here on only the autograd graph holds the mark; when that goes, the hooks go.
            self._alive = weakref.ref(self._mark)
            self._mark = None
        else:
            _remove(self.handles)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave calls of the model alone that an intervention itself makes, inside a `with` block."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def _may_act(self) -> bool:
        if self._paused:
            return False
        if self.active:
            # Another thread's call of the same model is none of this one's.
            return threading.get_ident() == self._thread
        if not _in_backward():
            return False
        others = [hooks for hooks in self._lingering.get(self.model, []) if hooks.handles]
        self._lingering[self.model] = others
        if len(others) > 1:
            raise RunError(
                f"{len(others)} forward passes of this model are waiting for their backward pass under "
                "gradient checkpointing, and the recomputed layers cannot tell which one they belong "
                "to; run backward() after each forward pass, or turn gradient checkpointing off"
            )
        torch.autograd.Variable._execution_engine.queue_callback(self._finish)  # type: ignore[attr-defined]
        return True

    def _finish(self) -> None:
        _remove(self.handles)


class GraphMark:
    """Lives as long as the autograd graph that holds it."""


def marked(value: Tensor, mark: GraphMark) -> Tensor:
    """The same value; `mark` now lives at least as long as the graph behind it may be differentiated."""
    found: Tensor = _Marked.apply(value, mark)
    return found


class _Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, mark: GraphMark) -> Tensor:
        ctx.mark = mark
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradients[0], None


def foreign_hooks(module: nn.Module) -> list[Any]:
    """A module's hooks that are neither transformers' nor reftlab's own."""
    hooks = (
        *module._forward_hooks.values(), *module._forward_pre_hooks.values(),
        *module._backward_hooks.values(), *module._backward_pre_hooks.values(),
    )  # fmt: skip
    return [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith(_KNOWN)]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        # Forgotten only once it is off, so that an interruption in between leaves it to be taken off again.
        handles[-1].remove()
        handles.pop()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined]


def _inside_checkpoint() -> bool:
    """Whether a forward pass that should track gradients is inside a checkpoint.

    The reentrant kind turns gradients off inside; the other kind watches the tensors that
    autograd saves, as `torch.autograd.graph.saved_tensors_hooks` does.
    """
    if not torch.is_grad_enabled():
        return True
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None  # type: ignore[attr-defined]
