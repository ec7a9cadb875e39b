"""Generation with a bound model's edits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from reftlab.errors import RunError
from reftlab.graph import BASE
from reftlab.runtime.options import Options
from reftlab.runtime.sources import Sources
from reftlab.runtime.window import Layout

if TYPE_CHECKING:
    from reftlab.runtime.model import BoundModel

__all__ = ["generate"]


def generate(
    model: BoundModel,
    options: Options,
    sources: Mapping[str, Mapping[str, Any]] | None,
    reads: Mapping[str, Any] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call the model's own `generate` with its edits; see `BoundModel.generate`."""
    if not hasattr(model.model, "generate"):
        raise RunError(f"{type(model.model).__name__} has no generate")
    if "prompt" in kwargs:
        raise RunError("generate takes whole prompts; prompt= is for forward calls that cover a part of one")
    named = dict(kwargs) if not args else {"input_ids": args[0], **kwargs}
    if "inputs" in named:
        named["input_ids"] = named.pop("inputs")
    if not model._active_edits(options) and not sources and not reads:
        options.check_tasks(model._calls.rows(named))
        return model.model.generate(*args, **kwargs)
    if named.get("guidance_scale", 1) not in (None, 1):
        raise RunError(
            f"guidance_scale={named['guidance_scale']}: classifier-free guidance runs the model on a "
            "second prompt, of which the edits know nothing; leave it out"
        )
    if named.get("attention_mask") is None and isinstance(named.get("input_ids"), torch.Tensor):
        named["attention_mask"] = model._calls.mask_of(named)
    # A compiled decoding step would be traced once and keep the edits of its first token.
    kwargs.setdefault("disable_compile", True)
    layout = Layout.of(named, causal=False, open=True)
    if layout is None and not model._calls.has_decoder:
        raise RunError("generate needs input_ids or inputs_embeds, (row, token)")
    with torch.no_grad():
        supplies = Sources(model, options, named, sources, reads, generating=True).supplies()
        run = model._run(BASE, {"tokens": layout} if layout else {}, supplies, options)
        past = model._calls.past(named)
        for bound in () if model._calls.knows_cache(named) else run.edits:
            if run.starts_before(bound, past):
                raise RunError(
                    f"edit {bound.key!r} acts on tokens that past_key_values hold already, and this "
                    "bound model did not make them; generate without past_key_values"
                )
        output = model._call(run, model.model.generate, args, kwargs)
    if past == 0:
        run.check_generated()
    return output
