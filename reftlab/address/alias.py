"""Portable names for the places that most transformers have.

| alias | place |
|---|---|
| `blocks[i].output`, `blocks[i].input` | the residual stream after or before block i |
| `blocks[i].attn.output` | what attention returns, before it is added to the residual stream |
| `blocks[i].attn.heads` | the heads' results side by side, before the output projection |
| `blocks[i].mlp.output` | what the MLP returns, before it is added to the residual stream |
| `embed.output` | the embeddings that enter the first block |
| `final_norm.output` | what the last norm hands to the unembedding |
| `unembed`, `unembed.output` | the logits |

Some families do more before the addition: Gemma 3 normalises both results first, GPT-2 and BERT
apply dropout. The alias is the value before that.

A module of the model that has the alias's name itself always wins, so a raw path never changes
its meaning.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from reftlab.address.path import Child, SitePath, Step, parse_path
from reftlab.errors import AddressError, did_you_mean

__all__ = ["ALIASES", "Family", "family_of", "head_name", "portable_names", "translate"]


@dataclass(frozen=True)
class Family:
    """Where one model family keeps the named places.

    `blocks`, `embed` and `final_norm` are module paths inside the backbone, `attn`, `mlp` and
    `heads` sites inside one block.
    """

    blocks: str
    embed: str
    final_norm: str
    attn: str
    mlp: str
    heads: str


_LLAMA = Family(
    blocks="layers",
    embed="embed_tokens",
    final_norm="norm",
    attn="self_attn.output",
    mlp="mlp.output",
    heads="self_attn.o_proj.input",
)
_GPT2 = Family(
    blocks="h",
    embed="drop",
    final_norm="ln_f",
    attn="attn.output",
    mlp="mlp.output",
    heads="attn.c_proj.input",
)
_BERT = Family(
    blocks="encoder.layer",
    embed="embeddings",
    final_norm="encoder.layer[-1].output.LayerNorm",
    attn="attention.output.dense.output",
    mlp="output.dense.output",
    heads="attention.output.dense.input",
)

_GEMMA3 = replace(
    _LLAMA,
    blocks="language_model.layers",
    embed="language_model.embed_tokens",
    final_norm="language_model.norm",
)

FAMILIES: dict[str, Family] = {
    "gemma3": _GEMMA3,
    "llama": _LLAMA,
    "qwen3": _LLAMA,
    "gemma3_text": _LLAMA,
    "gpt2": _GPT2,
    "bert": _BERT,
}
"""Families by `config.model_type`."""

ALIASES = ("blocks", "embed", "final_norm", "unembed")
_INSIDE_BLOCK = ("attn", "mlp")


def family_of(model: nn.Module) -> Family | None:
    """The family entry for a model, or None where it has none and raw paths are the way."""
    return FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))


def is_alias(path: SitePath, model: nn.Module) -> bool:
    """Whether the path begins with an alias that no module of the model hides."""
    first = path.steps[0] if path.steps else None
    return isinstance(first, Child) and first.name in ALIASES and not hasattr(model, first.name)


def translate(path: SitePath, model: nn.Module) -> SitePath:
    """Turn an alias into the model's own path; any other path comes back as it is.

    Raises:
        AddressError: the model's family is not known, or it has no such place.
    """
    if not is_alias(path, model):
        return path
    family = family_of(model)
    if family is None:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise AddressError(
            f"{str(path)!r} is a portable name, and reftlab has no entry for {kind!r} "
            f"(it has {', '.join(sorted(FAMILIES))}); use the model's own path, "
            "`reftlab inspect` lists them"
        )
    first, rest = path.steps[0], path.steps[1:]
    assert isinstance(first, Child)
    if first.name == "unembed":
        return replace(path, steps=_unembedding(model, path) + rest, side=path.side or "output")
    prefix = _backbone(model)
    if first.name != "blocks":
        return replace(path, steps=_steps(prefix + getattr(family, first.name)) + rest)
    return _inside_blocks(path, family, prefix)


def portable_names(model: nn.Module) -> dict[str, str]:
    """Portable names that this model understands, with the raw path that each stands for."""
    family = family_of(model)
    if family is None:
        return {}
    names = [f"{name}.output" for name in ("embed", "final_norm")]
    names += ["blocks[*].output", *(f"blocks[*].{part}.output" for part in _INSIDE_BLOCK)]
    names.append("blocks[*].attn.heads")
    if _output_embeddings(model) is not None:
        names.append("unembed")
    return {name: str(translate(parse_path(name), model)) for name in names}


def _inside_blocks(path: SitePath, family: Family, prefix: str) -> SitePath:
    rest = path.steps[1:]
    number: tuple[Step, ...] = ()
    if rest and not isinstance(rest[0], Child):
        number, rest = rest[:1], rest[1:]
    block = _steps(prefix + family.blocks) + number
    if not rest:
        return replace(path, steps=block)
    part = rest[0].name if isinstance(rest[0], Child) else str(rest[0])
    if part not in _INSIDE_BLOCK:
        raise AddressError(
            f"{str(path)!r}: a block's portable parts are attn and mlp, not {part!r}."
            + (did_you_mean(part, _INSIDE_BLOCK) or " Use the model's own path for other modules.")
        )
    if rest[1:] == (Child("heads"),) and part == "attn":
        return _append(path, block, parse_path(family.heads))
    if rest[1:] or path.side != "output":
        raise AddressError(
            f"{str(path)!r}: say 'blocks[i].{part}.output'"
            + (" or 'blocks[i].attn.heads'" if part == "attn" else "")
        )
    return _append(path, block, parse_path(getattr(family, part)))


def _append(path: SitePath, block: tuple[Step, ...], inner: SitePath) -> SitePath:
    return SitePath(block + inner.steps, inner.side, path.leaf or inner.leaf)


def _steps(module: str) -> tuple[Step, ...]:
    return parse_path(f"{module}.output").steps


def _backbone(model: nn.Module) -> str:
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    getter: Any = getattr(model, "get_output_embeddings", lambda: None)
    found = getter()
    return found if isinstance(found, nn.Module) else None


def head_name(model: nn.Module) -> str | None:
    """Name of the module that makes the logits, or None where the model has none."""
    module = _output_embeddings(model)
    names = (name for name, candidate in model.named_modules() if candidate is module)
    return None if module is None else next(names, None)


def _unembedding(model: nn.Module, path: SitePath) -> tuple[Step, ...]:
    name = head_name(model)
    if name is not None:
        return _steps(name)
    raise AddressError(
        f"{str(path)!r}: {type(model).__name__} has no unembedding; load it with its language-model head"
    )
