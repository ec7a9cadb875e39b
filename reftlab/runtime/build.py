"""The built interventions of a bound model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from reftlab.errors import BindError
from reftlab.graph import Gate
from reftlab.interventions.gate import SoftGate
from reftlab.interventions.passing import PassMean
from reftlab.runtime.places import BoundEdit
from reftlab.runtime.wrapped import device_of

__all__ = ["Interventions", "built_for", "forget_pass", "gate_keys"]


class Interventions(nn.ModuleDict):
    """Built interventions by name.

    Unlike its base it takes names of its own methods, `values` or `train`; and its numbers stay
    float32 where the model is cast to another type, as training needs them.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        def kept(tensor: Tensor) -> Tensor:
            changed: Tensor = fn(tensor)
            return changed.float() if changed.is_floating_point() else changed

        return super()._apply(kept, recurse)

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


def built_for(
    edits: Iterable[BoundEdit], model: nn.Module, given: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """The interventions and soft gates of bound edits, new where `given` has none of the name."""
    built: dict[str, nn.Module] = {}
    for bound in edits:
        device = device_of(model.get_submodule(bound.site.module), model)
        if bound.module not in built:
            built[bound.module] = given.get(bound.module) or _built(bound, model).to(device)
        _check_directions(bound, built[bound.module])
        for key, gate in zip(gate_keys(bound), _gates(bound), strict=True):
            width = bound.when[gate.of].width
            if width == 0:
                raise BindError(f"edit {bound.key!r}: a gate cannot look at attention, whose width varies")
            if key not in built:
                built[key] = given.get(key) or SoftGate(width, gate.sparsity).to(device).train(model.training)
    return built


def gate_keys(bound: BoundEdit) -> list[str]:
    """Names of an edit's soft gates among the interventions."""
    return [f"{bound.key}(gate{number or ''})" for number in range(len(_gates(bound)))]


def _gates(bound: BoundEdit) -> tuple[Gate, ...]:
    return () if bound.edit.when is None else bound.edit.when.gates


def _check_directions(bound: BoundEdit, built: nn.Module) -> None:
    """Refuse a subspace that the intervention does not have."""
    count = getattr(built, "directions", None)
    wanted = [("subspace", bound.edit.subspace), *((f"tasks[{name!r}]", n) for name, n in bound.edit.tasks)]
    for what, numbers in wanted:
        if numbers is not None and (count is None or max(numbers) >= count):
            have = "no directions" if count is None else f"directions 0 to {count - 1}"
            raise BindError(
                f"edit {bound.key!r}: {what}={list(numbers)}, and {bound.edit.intervention.describe()} has "
                f"{have}"
            )


def forget_pass(intervention: nn.Module) -> None:
    """Drop what an intervention noted in its last pass, which may be one that it had no part in."""
    for module in intervention.modules():
        if isinstance(module, PassMean):
            module.start_pass()
            module.end_pass()


def _built(bound: BoundEdit, model: nn.Module) -> nn.Module:
    varies, built = not bound.width, None
    try:
        built = bound.edit.intervention.build(bound.width or 1)
    except ValueError as error:
        if not varies:
            raise type(error)(f"edit {bound.key!r} at {bound.site}: {error}") from error
    if varies and (built is None or any(t.dim() for t in (*built.parameters(), *built.buffers()))):
        raise BindError(
            f"edit {bound.key!r} at {bound.site}: attention scores and patterns are as wide as each call's "
            f"sequence is long, and {bound.edit.intervention.describe()} has numbers of a fixed width; use "
            "one without, such as Zero, Scale or Swap"
        )
    assert built is not None
    return built.train(model.training)
