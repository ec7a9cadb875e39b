"""pyvene's component names that have a portable place: `block_output` with `layer=3`."""

from __future__ import annotations

from typing import Any

from reftlab.errors import AddressError, did_you_mean

__all__ = ["COMPONENTS", "component_path"]

COMPONENTS = {
    "block_input": "blocks[{}].input",
    "block_output": "blocks[{}].output",
    "mlp_output": "blocks[{}].mlp.output",
    "attention_output": "blocks[{}].attn.output",
    "attention_value_output": "blocks[{}].attn.heads",
    "attention_weight": "blocks[{}].attn.pattern",
    "query_output": "blocks[{}].attn.q",
    "key_output": "blocks[{}].attn.k",
    "value_output": "blocks[{}].attn.v",
}
"""Portable paths by the names of pyvene's model cards (0.1.8); `{}` is the block."""


def component_path(component: Any, layer: Any) -> str:
    """The portable path of a component; `head_` before a name says that `heads=` will choose some.

    Raises:
        AddressError: no such component, or no block's number.

    >>> component_path("head_attention_value_output", 3)
    'blocks[3].attn.heads'
    """
    name = str(component).removeprefix("head_")
    if name not in COMPONENTS:
        raise AddressError(
            f"at={component!r} with layer={layer!r}: expected one of pyvene's components, "
            f"{', '.join(COMPONENTS)}; "
            f"a path such as 'blocks[3].output' says its layer itself.{did_you_mean(name, COMPONENTS)}"
        )
    if type(layer) is not int:
        raise AddressError(f"layer={layer!r}: expected the number of a block")
    return COMPONENTS[name].format(layer)
