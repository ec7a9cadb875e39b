"""pyvene's component names: a layer's number and a name, as a site of any model.

| component | site |
|---|---|
| `block_input`, `block_output` | `blocks[i].input`, `blocks[i].output` |
| `attention_input`, `attention_output` | what goes into attention; `blocks[i].attn.output` |
| `attention_value_output`, `head_attention_value_output` | `blocks[i].attn.heads` |
| `query_output`, `key_output`, `value_output`, with `head_` before them | `blocks[i].attn.q`, `.k`, `.v` |
| `attention_weight` | `blocks[i].attn.pattern` |
| `mlp_input`, `mlp_output` | what goes into the MLP; `blocks[i].mlp.output` |
| `mlp_activation` | what the MLP's activation function returns |

The names are those of pyvene's model cards (0.1.8). They work for every family that the portable
aliases know, which are more than pyvene's, and `head_` takes as many heads as the site has: keys
and values of grouped-query models have fewer. pyvene's fused queries, keys and values of GPT-NeoX
are thirds of the axis, which are no queries there; here they are the queries.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from reftlab.address import parse_path, resolve
from reftlab.address.components import COMPONENTS as PORTABLE
from reftlab.errors import AddressError, did_you_mean

__all__ = ["COMPONENTS", "Place", "site_of"]

_INSIDE = {
    "mlp_input": ("mlp.input", "intermediate.dense.input"),
    "mlp_activation": ("mlp.act_fn.output", "mlp.act.output", "intermediate.intermediate_act_fn.output"),
    "attention_input": (
        "self_attn.input",
        "attn.input",
        "attention.input",
        "self_attention.input",
    ),
}
_HEADS = ("attention_value_output", "query_output", "key_output", "value_output")

COMPONENTS = (*PORTABLE, *_INSIDE, *(f"head_{name}" for name in _HEADS))
"""Every name that `site_of` knows."""

# pyvene's card of a family that has no portable aliases here.
_GPT_NEO = {
    "block_input": "{}.input",
    "block_output": "{}.output",
    "mlp_output": "{}.mlp.output",
    "attention_output": "{}.attn.attention.resid_dropout.output",
    "attention_value_output": "{}.attn.attention.out_proj.input",
    "query_output": "{}.attn.attention.q_proj.output",
    "key_output": "{}.attn.attention.k_proj.output",
    "value_output": "{}.attn.attention.v_proj.output",
}


@dataclass(frozen=True)
class Place:
    """Where a component is.

    Attributes:
        at: site path.
        heads: whether its vectors are those of single heads.
    """

    at: str
    heads: bool = False


def site_of(component: str, layer: int, model: nn.Module) -> Place:
    """The site of a component.

    Args:
        component: a name from the table, or a path with its side, `model.layers[15].output`.
        layer: number of the block, for names from the table.
        model: the model.

    Raises:
        AddressError: it is neither, or the model has no such place.

    >>> COMPONENTS[1]
    'block_output'
    """
    if "." in str(component):
        return Place(str(parse_path(component)))
    plain = component.removeprefix("head_")
    if component not in COMPONENTS:
        raise AddressError(
            f"component {component!r}: expected one of {', '.join(COMPONENTS)}, or a path with its side such "
            f"as 'model.layers[15].output'.{did_you_mean(component, COMPONENTS)}"
        )
    if getattr(getattr(model, "config", None), "model_type", "") == "gpt_neo" and plain in _GPT_NEO:
        return Place(_GPT_NEO[plain].format(_neo_block(model, layer)), plain != component)
    if plain in _INSIDE:
        return Place(_inside(plain, layer, model))
    return Place(PORTABLE[plain].format(layer), plain != component)


def _neo_block(model: nn.Module, layer: int) -> str:
    return f"{'transformer.' if hasattr(model, 'transformer') else ''}h[{layer}]"


def _inside(component: str, layer: int, model: nn.Module) -> str:
    """The site of a part of a block that has no portable name: the first of its usual places."""
    if getattr(getattr(model, "config", None), "model_type", "") == "gpt_neo":
        block = _neo_block(model, layer)
    else:
        block = resolve(parse_path(f"blocks[{layer}].output"), model)[0].module
    module = resolve(parse_path(f"{block}.output"), model)[0].module
    for place in _INSIDE[component]:
        path = f"{module}.{place}"
        name = path.rpartition(".")[0]
        if name in {found for found, _ in model.named_modules()}:
            return path
    raise AddressError(
        f"component {component!r}: {type(model).__name__} has none of "
        f"{', '.join(f'{module}.{place}' for place in _INSIDE[component])}; name the module by its path"
    )
