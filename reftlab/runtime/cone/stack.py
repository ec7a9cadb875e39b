"""The chain of blocks of a causal language model: what can be skipped in it, and how that is done."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from reftlab.address import head_name, parse_path, resolve
from reftlab.address.alias import family_of, innermost
from reftlab.runtime.calls import continues_texts
from reftlab.runtime.hooks import foreign_hooks
from reftlab.runtime.modes import saves_activations
from reftlab.runtime.wrapped import entrances, is_dispatched

__all__ = ["CANNOT_ENTER", "BlockStack", "extras_of", "reasons_against", "skipping"]

CANNOT_ENTER = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError)
"""What a model raises that cannot be run on some of its blocks, rows and tokens."""


_GLOBAL_HOOKS = frozenset(
    f"_global_{kind}_hooks" for kind in ("forward", "forward_pre", "backward", "backward_pre")
)


@dataclass(frozen=True)
class BlockStack:
    """The blocks of a model, in the order in which they run.

    Attributes:
        paths: the blocks' names, as `model.named_modules()` spells them.
        blocks: the blocks.
        head: name of the module that makes the logits.
        before: names of the modules before the first block whose outputs are the blocks' input.
        after: names of the modules after the last block, the final norm and the head.
    """

    paths: tuple[str, ...]
    blocks: tuple[nn.Module, ...]
    head: str
    before: tuple[str, ...]
    after: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.blocks)

    @classmethod
    def of(cls, model: nn.Module) -> BlockStack | None:
        """The stack of a model, or None where its chain of blocks is not known."""
        head, paths = head_name(model), _paths(model)
        if head is None or not paths:
            return None
        family = family_of(model)
        stack = None if family is None else family.stacks.get("")
        before = _sites(model, "embed.output")
        norm = () if stack is None or stack.final_norm is None else _sites(model, "final_norm.output")
        return cls(paths, tuple(model.get_submodule(path) for path in paths), head, before, (*norm, head))

    def stands_in(self, model: nn.Module) -> bool:
        """Whether the model's blocks are still these."""
        try:
            return all(map(is_, map(model.get_submodule, self.paths), self.blocks))
        except AttributeError:
            return False

    def block_of(self, module: str) -> int | None:
        """Which block a module is, or is inside of; None where it is in none."""
        for number, path in enumerate(self.paths):
            if module == path or module.startswith(f"{path}."):
                return number
        return None


def _sites(model: nn.Module, path: str) -> tuple[str, ...]:
    if family_of(model) is None:
        return ()
    return tuple(site.module for site in resolve(parse_path(path), model) if site.side == "output")


def _paths(model: nn.Module) -> tuple[str, ...]:
    """The blocks' names: by the family's table, or the one list of as many modules as there are layers."""
    family = family_of(model)
    if family is not None:
        if "" not in family.stacks:
            return ()
        return tuple(site.module for site in resolve(parse_path("blocks[*].output"), model))
    config: Any = getattr(innermost(model), "config", None)
    count = getattr(config, "num_hidden_layers", None)
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    return tuple(f"{lists[0]}.{number}" for number in range(count)) if len(lists) == 1 and count else ()


def reasons_against(model: nn.Module, *, training: bool | None = None) -> tuple[str, ...]:
    """Why no part of a model's passes may be skipped, whatever the edits; empty where some may.

    Args:
        model: the bare model.
        training: whether dropout counts as active where a module is in training mode; the modules' own
            modes tell unless given.
    """
    inner = innermost(model)
    reasons = []
    if not continues_texts(entrances(model)[-1]) and not continues_texts(inner):
        reasons.append(
            f"{type(inner).__name__} looks at all tokens from each one (bidirectional attention), or is no "
            "causal language model"
        )
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        reasons.append(f"{type(inner).__name__} has an encoder, whose tokens all depend on each other")
    if getattr(inner, "_is_stateful", False):
        reasons.append(
            f"{type(inner).__name__} carries a recurrent state, which cannot be entered in the middle"
        )
    stack = BlockStack.of(model)
    if stack is None and not reasons:
        reasons.append(f"the chain of blocks of {type(inner).__name__} is not known")
    if any(getattr(config, "is_prompt_learning", False) for config in _adapters(model)):
        reasons.append("PEFT puts tokens of its own before each text")
    if stack is not None and _has_more(model, stack):
        reasons.append("a block runs more than once")
    if any(hooks for name, hooks in vars(nn.modules.module).items() if name in _GLOBAL_HOOKS):
        reasons.append("torch carries hooks of all modules, which would not see every pass")
    if is_dispatched(model):
        reasons.append("accelerate has spread the model over devices or disk")
    if any(_compiled(module) for module in model.modules()):
        reasons.append("the model is compiled, and compiled code cannot be entered in the middle")
    hooked = [name for name, module in model.named_modules() if foreign_hooks(module)]
    if hooked:
        reasons.append(
            f"{hooked[0] or 'the model'} carries a hook of its own, which would not see every pass"
        )
    if saves_activations(inner) and (inner.training if training is None else training):
        reasons.append("gradient checkpointing, which runs without a cache")
    dropout = _dropout(model, training)
    if dropout is not None:
        reasons.append(f"dropout in the base model ({dropout}), which makes each pass another")
    scaled = [name for name, module in model.named_modules() if _follows_length(module)]
    if scaled:
        reasons.append(f"{scaled[0]} turns all tokens by the length of the batch's longest row")
    return tuple(reasons)


def _dropout(model: nn.Module, training: bool | None) -> str | None:
    """The first place where dropout acts, or None."""
    for name, module in model.named_modules():
        if not (module.training if training is None else training):
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return f"{name}, p={module.p:g}"
        for key, value in vars(module).items():
            if ("drop" in key or "jitter" in key) and isinstance(value, float) and value > 0:
                return f"{name}.{key}, p={value:g}"
    return None


def _adapters(model: nn.Module) -> tuple[Any, ...]:
    """The configurations of PEFT's adapters, if it has wrapped the model."""
    found = getattr(model, "peft_config", None)
    return tuple(found.values()) if isinstance(found, dict) else ()


def _has_more(model: nn.Module, stack: BlockStack) -> bool:
    """Whether some block stands under several numbers, of which a path names only one."""
    whole = model.get_submodule(stack.paths[0].rpartition(".")[0])
    return isinstance(whole, nn.ModuleList) and len(whole) != len(stack)


def _follows_length(module: nn.Module) -> bool:
    """Whether a module's rotary frequencies depend on the whole batch: `dynamic` and `longrope`."""
    kind = getattr(module, "rope_type", None)
    kinds = kind.values() if isinstance(kind, dict) else (kind,)
    return any(isinstance(name, str) and ("dynamic" in name or name == "longrope") for name in kinds)


def _compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or vars(module).get("_compiled_call_impl") is not None


@contextlib.contextmanager
def skipping(
    stack: BlockStack, count: int, hidden: Float[Tensor, "row token width"], extras: Sequence[int]
) -> Iterator[None]:
    """Leave out the first blocks inside a `with` block: each returns `hidden` in place of its output.

    Hooks on the blocks themselves still act, so an edit or a read at the last skipped block's output
    finds its vectors.

    Args:
        stack: the model's blocks.
        count: how many of them are left out.
        hidden: what the last of them would return, `(row, token, width)`.
        extras: for each of them, how many values it returns behind the hidden state, or -1 where it
            returns a tensor and no tuple.
    """
    thread = threading.get_ident()

    def returning(block: nn.Module, extra: int) -> Any:
        value, own = hidden if extra < 0 else (hidden, *(None,) * extra), block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            # Another thread's call of the same model is none of this one's.
            return value if threading.get_ident() == thread else own(*args, **kwargs)

        return forward

    left_out = stack.blocks[:count]
    before = [vars(block).get("forward") for block in left_out]
    try:
        for block, extra in zip(left_out, extras, strict=True):
            vars(block)["forward"] = returning(block, extra)
        yield
    finally:
        for block, own in zip(left_out, before, strict=True):
            vars(block).pop("forward", None)
            if own is not None:
                vars(block)["forward"] = own


def extras_of(output: Any) -> int:
    """How many values a block returns behind the hidden state; -1 where it returns a tensor."""
    return len(output) - 1 if isinstance(output, tuple) else -1
