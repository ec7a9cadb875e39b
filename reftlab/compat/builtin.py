"""What pyvene's and pyreft's ready-made interventions share: a native intervention that does the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from reftlab.compat.bases import Intervention
from reftlab.errors import ArtifactError, InterventionError
from reftlab.interventions import Intervention as Native
from reftlab.interventions import OrthonormalBasis

__all__ = ["BuiltIn", "RotateLayer", "Wrapped", "as_intervention", "directions_of", "find", "rotation"]


class RotateLayer:
    """A learned rotation as pyvene shows it: `weight` `(width, directions)` has orthonormal columns."""

    def __init__(self, basis: OrthonormalBasis) -> None:
        self.basis = basis

    @property
    def weight(self) -> Tensor:
        return self.basis()

    def parameters(self) -> Iterator[nn.Parameter]:
        """What an optimiser is given."""
        return self.basis.parameters()

    def __call__(self, vectors: Tensor) -> Tensor:
        return vectors.to(self.weight.dtype) @ self.weight


class BuiltIn(Intervention):
    """An intervention whose work a native one does.

    Where the width is known (`embed_dim=`), the native intervention is built at once and its
    parameters are this module's own; else the model's site gives it when the graph is bound.

    Attributes:
        built: the native intervention with its parameters, or None before it is known.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.built: Native | None = None
        self.attached_source: Tensor | None = None
        if self.embed_dim is not None and self._complete():
            self.attach(self.native().build(int(self.embed_dim)))

    @property
    def acts_alone(self) -> bool:
        """Whether it acts in a call that gives it no source."""
        return self.is_source_constant

    def _complete(self) -> bool:
        """Whether everything that building takes is known."""
        return True

    def attach(self, built: Native) -> None:
        """Take a built native intervention as one's own."""
        self.attached_source = self.source_representation
        if self.built is not built:
            self.built = built

    def work(self) -> Any:
        """The built native intervention.

        Raises:
            InterventionError: it is not built yet.
        """
        if self.built is None:
            raise InterventionError(
                f"{type(self).__name__} has no numbers yet; give embed_dim=, or put it in a model first"
            )
        return self.built

    def confined(self) -> list[int] | None:
        """The directions that `set_interchange_dim` leaves to the edit, or None for all.

        Raises:
            InterventionError: it was given something else than one number.
        """
        if self.interchange_dim is None:
            return None
        given = torch.as_tensor(self.interchange_dim)
        if given.numel() != 1:
            raise InterventionError(
                f"set_interchange_dim({given.tolist()}): {type(self).__name__} takes one number, that of the "
                f"first directions; the native way to choose others is Edit(..., subspace={given.tolist()})"
            )
        count, directions = int(given), self.work().directions
        whole = self.embed_dim is not None and count == int(self.embed_dim)
        return None if whole or (directions is not None and count >= directions) else list(range(count))

    def rank(self) -> Any:
        """`low_rank_dimension`, which the representation or the intervention gives."""
        given = self.kwargs.get("low_rank_dimension")
        if given is None:
            raise InterventionError(f"{type(self).__name__} needs low_rank_dimension=, as in 4")
        return int(given)

    def forward(self, base: Tensor, source: Tensor | None = None, subspaces: Any = None) -> Any:
        """The new vectors for `(…, width)`; `subspaces` is a list of directions for each first index."""
        built = self.work()
        width = base.shape[-1]
        flat, from_there = base.reshape(-1, width), None
        if source is not None:
            from_there = source.expand_as(base).reshape(-1, width)
        mask = None
        if subspaces is not None:
            mask = torch.zeros(base.shape[0], built.directions, dtype=torch.bool, device=base.device)
            for row, chosen in enumerate(subspaces):
                mask[row, directions_of(self, chosen)] = True
            mask = mask.repeat_interleave(len(flat) // base.shape[0], 0)
        return built.edited(flat, from_there, subspace=mask).reshape(base.shape)

    def native_state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The native intervention's tensors from those of a saved pyvene intervention."""
        if tensors:
            self._unreadable(tensors)
        return {}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Take the tensors of a saved pyvene intervention, or this class's own."""
        if any(name.startswith("built.") for name in state_dict):
            return super().load_state_dict(state_dict, strict, assign)
        self.work().load_state_dict(self.native_state(state_dict), strict=False)
        return None

    def _unreadable(self, tensors: Mapping[str, Tensor]) -> NoReturn:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise ArtifactError(
            f"{type(self).__name__} cannot be read from {shapes}; it was saved by another class"
        )


class _Callable(Intervention):
    """A plain function as an intervention; natively `rl.Function(function)`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(keep_last_dim=True)
        self.function = function

    def forward(self, base: Tensor, source: Tensor | None = None, subspaces: Any = None) -> Any:
        return self.function(base, source) if subspaces is None else self.function(base, source, subspaces)


class Wrapped(BuiltIn):
    """A native intervention in a representation; natively `rl.Edit(..., intervention=...)`."""

    def __init__(self, native: Native) -> None:
        super().__init__(keep_last_dim=True)
        self.described = native
        self.is_source_constant = not _runs(native, given=True)

    @property
    def acts_alone(self) -> bool:
        return _runs(self.description(), given=False)

    def set_source_representation(self, source_representation: Tensor) -> None:
        """Not supported; natively `rl.Add(vector)` and the like, made with the vector."""
        name = type(self.described).__name__
        raise InterventionError(f"{name} is native, so make it with its vector, as in rl.Add(vector)")


def _runs(native: Native, given: bool) -> bool:
    """Whether a native intervention runs with a source (`given`), or without one."""
    try:
        native.check_source(given)
    except InterventionError:
        return False
    return True


def as_intervention(value: Any, metadata: Mapping[str, Any]) -> Intervention:
    """The intervention that a representation names: an object, a class, or a function.

    Raises:
        InterventionError: it is none of them, the class cannot be made from the representation, or is a
            ready-made one with another `forward`.
    """
    _check_forward(value if isinstance(value, type) else type(value))
    if isinstance(value, type) and issubclass(value, Intervention):
        try:
            return value(**metadata)
        except KeyError as error:
            raise InterventionError(
                f"{value.__name__} needs {error.args[0]!r}; give it in the representation, or make the "
                f"intervention yourself, {value.__name__}(embed_dim=..., {error.args[0]}=...)"
            ) from error
    if isinstance(value, Intervention):
        return value
    if isinstance(value, Native):
        return Wrapped(value)
    if callable(value) and not isinstance(value, type):
        return _Callable(value)
    raise InterventionError(
        f"intervention={value!r}: expected one such as VanillaIntervention, made or as a class, a function "
        "of (base, source), or a subclass of reftlab.compat.pyvene.Intervention; one of pyvene's own "
        "classes does not run here"
    )


def _check_forward(kind: type) -> None:
    """Refuse a ready-made intervention with a `forward` of its own, which the native one would pass by."""
    if not issubclass(kind, BuiltIn) or kind.forward is BuiltIn.forward:
        return
    ready = next(base for base in kind.__mro__ if getattr(base, "forward", None) is BuiltIn.forward)
    raise InterventionError(
        f"{kind.__name__} has a forward of its own, which would never be called: {ready.__name__} is "
        "ready-made, and a native intervention does its work. Write it as a subclass of "
        "SourcelessIntervention, TrainableIntervention or another base class that says nothing of forward, "
        "or of rl.Intervention"
    )


def directions_of(intervention: Intervention, chosen: Any) -> list[int]:
    """The directions that one row's `subspaces` entry stands for, by the partition where there is one."""
    numbers = [chosen] if isinstance(chosen, int) else [int(n) for n in chosen]
    parts = intervention.subspace_partition
    if parts is None:
        return sorted(set(numbers))
    wrong = [n for n in numbers if not 0 <= n < len(parts)]
    if wrong:
        raise InterventionError(
            f"subspaces has {wrong[0]}, and subspace_partition has {len(parts)} parts, numbered from 0"
        )
    return sorted({direction for n in numbers for direction in parts[n]})


def find(tensors: Mapping[str, Tensor], *names: str) -> Tensor | None:
    """The first of several names that a saved intervention has, in float32."""
    return next((tensors[name].float() for name in names if name in tensors), None)


def rotation(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The orthonormal columns `(width, directions)` of a saved rotation, or None where there is none.

    They stand there as they are (`rotate_layer`), or as the parameter and the base point of
    `torch.nn.utils.parametrizations.orthogonal`, which torch itself turns into columns again.
    """
    columns = find(tensors, "rotate_layer", "rotate_layer.weight")
    if columns is not None:
        return columns
    place = "rotate_layer.parametrizations.weight."
    original, base = find(tensors, f"{place}original"), find(tensors, f"{place}0.base")
    if original is None or base is None:
        return None
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.linalg.qr(torch.ones_like(original)).Q)
    nn.utils.parametrizations.orthogonal(layer)
    layer.load_state_dict(
        {"parametrizations.weight.original": original, "parametrizations.weight.0.base": base}
    )
    weight: Tensor = layer.weight.detach()
    return weight
