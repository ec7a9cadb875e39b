"""Portable names for the places that most transformers have.

| alias | place |
|---|---|
| `blocks[i].output`, `blocks[i].input` | the residual stream after or before block i |
| `blocks[i].attn.output` | what attention returns, before it is added to the residual stream |
| `blocks[i].attn.heads` | the heads' results side by side, before the output projection |
| `blocks[i].attn.q`, `.k`, `.v` | queries, keys or values of all heads, as they leave their projection |
| `blocks[i].attn.scores`, `.pattern` | what enters attention's softmax and what comes out of it |
| `blocks[i].mlp.output` | what the MLP returns, before it is added to the residual stream |
| `embed.output` | the embeddings that enter the first block |
| `final_norm.output` | what the last norm hands to the unembedding |
| `unembed`, `unembed.output` | the logits |

A model of two stacks says which: `encoder.blocks[i].output`, `decoder.blocks[i].output` (T5, BART,
Whisper), `text.blocks[i].output`, `vision.blocks[i].output` (CLIP). Their decoders have
`blocks[i].cross_attn` besides, with the same names inside as `attn`.

Some families do more before the addition: Gemma 3 normalises both results first, GPT-2 and BERT
apply dropout. The alias is the value before that. Norms of queries and keys and rotary embeddings
come after `attn.q` and `attn.k`.

Wrappers (PEFT, DDP, `torch.compile`, a module of one's own) are looked through. A module of the
model that has the alias's name itself always wins, so a raw path never changes its meaning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn

from torch import nn

from reftlab.address.families import FAMILIES, Family, Stack
from reftlab.address.path import Child, Entries, SitePath, Step, parse_path
from reftlab.errors import AddressError, did_you_mean

__all__ = ["ALIASES", "family_of", "head_name", "inner_model", "innermost", "portable_names", "translate"]

ALIASES = ("blocks", "embed", "final_norm", "unembed")
_OF_A_STACK = ALIASES[:3]
_STACKS = tuple(dict.fromkeys(name for family in FAMILIES.values() for name in family.stacks if name))
_INSIDE_BLOCK = ("attn", "mlp", "cross_attn")
_INSIDE_ATTENTION = ("output", "heads", "q", "k", "v", "scores", "pattern")


def inner_model(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The one Hugging Face model that `model` is or wraps, with its path; None where there is none."""
    found = list(_outermost("", model))
    return found[0] if len(found) == 1 else None


def innermost(model: nn.Module) -> Any:
    """The one Hugging Face model that `model` is or wraps, or `model` itself where there is none."""
    found = inner_model(model)
    return model if found is None else found[1]


def family_of(model: nn.Module) -> Family | None:
    """The family entry for a model, or None where it has none and raw paths are the way."""
    return FAMILIES.get(_kind(model))


def is_alias(path: SitePath, model: nn.Module) -> bool:
    """Whether the path begins with an alias that no module of the model hides."""
    head = _head(path)
    if head is None:
        return False
    owner: nn.Module | None = model
    for name in head:
        owner = None if owner is None else owner._modules.get(name)
    return owner is None


def translate(path: SitePath, model: nn.Module) -> SitePath:
    """Turn an alias into the model's own path; any other path comes back as it is.

    Raises:
        AddressError: the model's family is not known, or it has no such place.
    """
    if not is_alias(path, model):
        return path
    family, head = family_of(model), _head(path)
    assert head is not None
    if family is None:
        raise AddressError(
            f"{str(path)!r} is a portable name, and reftlab has no entry for {_kind(model)!r} "
            f"(it has {', '.join(sorted(FAMILIES))}); use the model's own path, "
            "`reftlab inspect` lists them"
        )
    rest = path.steps[len(head) :]
    if head == ("unembed",):
        return replace(path, steps=_unembedding(model, path) + rest, side=path.side or "output")
    stack = _stack(path, family, head, model).under(_backbone(model))
    if head[-1] != "blocks":
        site = stack.embed if head[-1] == "embed" else stack.final_norm
        return _moved(path, rest, site, model)
    return _inside_blocks(path, rest, stack, model)


def portable_names(model: nn.Module) -> dict[str, str]:
    """Portable names that this model understands, with the raw path that each stands for."""
    family = family_of(model)
    if family is None:
        return {}
    names: list[str] = []
    for prefix, stack in family.stacks.items():
        own = ["embed.output", *(["final_norm.output"] if stack.final_norm else []), "blocks[*].output"]
        own += [f"blocks[*].{part}" for part in stack.parts]
        names += [f"{prefix}.{name}".removeprefix(".") for name in own]
    if _output_embeddings(model) is not None:
        names.append("unembed")
    paths = {name: translate(parse_path(name), model) for name in names}
    return {name: str(path) for name, path in paths.items() if _exists(model, path.steps)}


def _head(path: SitePath) -> tuple[str, ...] | None:
    """The steps of an alias before its numbers, `("blocks",)` or `("encoder", "blocks")`."""
    names = [step.name if isinstance(step, Child) else "" for step in path.steps[:2]]
    if names and names[0] in ALIASES:
        return (names[0],)
    if len(names) == 2 and names[0] in _STACKS and names[1] in _OF_A_STACK:
        return (names[0], names[1])
    return None


def _stack(path: SitePath, family: Family, head: tuple[str, ...], model: nn.Module) -> Stack:
    wanted = head[0] if len(head) == 2 else ""
    if wanted in family.stacks:
        return family.stacks[wanted]
    rest = str(path).removeprefix(f"{wanted}.")
    forms = _either([f"{name}.{rest}".removeprefix(".") for name in family.stacks])
    has = f"{len(family.stacks)} stacks of blocks" if not wanted else f"no {wanted}"
    raise AddressError(f"{str(path)!r}: {_kind(model)!r} has {has}; say {forms}")


def _moved(path: SitePath, rest: tuple[Step, ...], site: str | None, model: nn.Module) -> SitePath:
    """`embed` or `final_norm` as the model's own path, with whatever the user said behind it."""
    if site is None:
        _lacks(path, model)
    inner = parse_path(site)
    if inner.side == "output":
        return replace(path, steps=inner.steps + rest)
    if rest or path.side != "output":
        raise AddressError(
            f"{str(path)!r}: {_kind(model)!r} makes its embeddings in no single module; say '.output' for "
            f"what enters the first block, {site}"
        )
    return SitePath(inner.steps, inner.side, path.leaf)


def _inside_blocks(path: SitePath, rest: tuple[Step, ...], stack: Stack, model: nn.Module) -> SitePath:
    number: tuple[Step, ...] = ()
    if rest and not isinstance(rest[0], Child):
        number, rest = rest[:1], rest[1:]
    block = _steps(stack.blocks) + number
    if not rest:
        return replace(path, steps=block)
    part = rest[0].name if isinstance(rest[0], Child) else str(rest[0])
    if part not in _INSIDE_BLOCK:
        raise AddressError(
            f"{str(path)!r}: a block's portable parts are attn and mlp, not {part!r}."
            + (did_you_mean(part, _INSIDE_BLOCK[:2]) or " Use the model's own path for other modules.")
        )
    inside = SitePath(rest, None).module
    is_projection = inside in (f"{part}.{letter}" for letter in "qkv")
    name = inside if is_projection or path.side is None else f"{inside}.{path.side}"
    known = [f"{part}.{end}" for end in (("output",) if part == "mlp" else _INSIDE_ATTENTION)]
    if name not in known:
        raise AddressError(f"{str(path)!r}: say {_either([f'blocks[i].{form}' for form in known])}")
    if name not in stack.parts:
        _lacks(path, model)
    inner = parse_path(stack.parts[name])
    if is_projection and path.side == "input":
        return SitePath(block + inner.steps, "input", path.leaf)
    fused = inside[-1] if is_projection and stack.fused else ""
    return SitePath(block + inner.steps, inner.side, path.leaf or inner.leaf, fused)


def _lacks(path: SitePath, model: nn.Module) -> NoReturn:
    names = ", ".join(portable_names(model))
    family = family_of(model)
    note = f": {family.note}" if family is not None and family.note else ""
    raise AddressError(
        f"{str(path)!r}: {_kind(model)!r} has no such place{note}. It has {names}; "
        "for other modules use the model's own path"
    )


def _either(names: list[str]) -> str:
    quoted = [f"'{name}'" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def _kind(model: nn.Module) -> str:
    """The family's name in Hugging Face's words, or the class's where it is no such model."""
    owner = innermost(model)
    return getattr(getattr(owner, "config", None), "model_type", None) or type(owner).__name__


def _outermost(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    # PEFT's wrappers hand on every attribute of the model inside, so only what a class or an object has
    # of its own tells them apart from it.
    if hasattr(type(module), "base_model_prefix") and "config" in vars(module):
        yield name, module
        return
    for child, inner in module.named_children():
        yield from _outermost(f"{name}.{child}".removeprefix("."), inner)


def _exists(model: nn.Module, steps: tuple[Step, ...]) -> bool:
    owner: nn.Module | None = model
    for step in steps:
        if owner is None:
            break
        children = owner._modules
        if isinstance(step, Child):
            owner = children.get(step.name)
        else:
            number = step.numbers[0] if isinstance(step, Entries) else 0
            owner = list(children.values())[number] if -len(children) <= number < len(children) else None
    return owner is not None


def _steps(module: str) -> tuple[Step, ...]:
    return parse_path(f"{module}.output").steps


def _backbone(model: nn.Module) -> str:
    found = inner_model(model)
    if found is None:
        return ""
    name, inner = found
    prefix = getattr(inner, "base_model_prefix", "")
    own = f"{prefix}." if prefix and prefix in inner._modules else ""
    return f"{name}.{own}" if name else own


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    module = getattr(innermost(model), "get_output_embeddings", lambda: None)()
    return module if isinstance(module, nn.Module) else None


def head_name(model: nn.Module) -> str | None:
    """Name of the module that makes the logits, or None where the model has none."""
    module = _output_embeddings(model)
    names = (name for name, candidate in model.named_modules() if candidate is module)
    return None if module is None else next(names, None)


def _unembedding(model: nn.Module, path: SitePath) -> tuple[Step, ...]:
    name = head_name(model)
    if name is not None:
        return _steps(name)
    kind = type(innermost(model)).__name__
    raise AddressError(f"{str(path)!r}: {kind} has no unembedding; load it with its language-model head")
