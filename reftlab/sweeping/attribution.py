"""Attribution patching: all cells at once, to first order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from reftlab.errors import DataError
from reftlab.runtime.hooks import OwnedHooks
from reftlab.sweeping.metric import Measured
from reftlab.sweeping.passes import Passes, Patch, acting, logits_of, run_row
from reftlab.sweeping.sites import SweptSite

__all__ = ["estimated", "gradients"]


def gradients(passes: Passes, sites: Sequence[SweptSite], measured: Measured) -> dict[str, Tensor]:
    """The metric's gradient at each site in the run that is changed, `(token, width)`.

    Args:
        passes: the prompt's passes.
        sites: where.
        measured: the metric.

    Raises:
        DataError: the metric's number carries no gradient.
    """
    kept: dict[str, Tensor] = {}

    def track(site: SweptSite, tensor: Tensor) -> Tensor:
        # The first site begins the graph, so that frozen models have one, and nothing before it is kept.
        tracked = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        kept[site.name] = tracked
        # A copy, as a model that adds to its hidden state in place would make another tensor of this one.
        return tracked.clone()

    def body(hooks: OwnedHooks, call: Callable[[], Any]) -> Tensor:
        acting(hooks, passes.reft.model, sites, track, lambda site: 1)
        return measured(logits_of(call())[:, -1])

    with torch.enable_grad():
        value = run_row(passes.reft, passes.row, {**passes.row.inputs, **passes.without_cache}, body)
        if not value.requires_grad:
            raise DataError(
                "attribution needs a metric that can be differentiated; its number carries no gradient"
            )
        names = list(kept)
        found = torch.autograd.grad(value.sum(), [kept[name] for name in names], allow_unused=True)
    return {
        name: torch.zeros_like(kept[name][0]) if gradient is None else gradient[0].detach()
        for name, gradient in zip(names, found, strict=True)
    }


def estimated(gradient: Tensor, own: Tensor, patch: Patch | None) -> float:
    """The effect of a patch to first order: gradient · (new − own), summed over its tokens and features.

    Args:
        gradient: of the metric at the site, `(token, width)`.
        own: what the run has at the site, `(token, width)`.
        patch: what is put in its place; None where that changes nothing.

    Source: Nanda, "Attribution Patching: Activation Patching At Industrial Scale" (2023); Kramár et
    al., "AtP*: An efficient and scalable method for localizing LLM behaviour to components" (2024),
    equation 2.
    """
    if patch is None:
        return 0.0
    slope, before = gradient[patch.columns], own[patch.columns]
    if patch.features is not None:
        features = patch.features.to(slope.device)
        slope, before = slope[:, features], before[:, features]
    return float((slope.double() * (patch.values.double() - before.double())).sum())
