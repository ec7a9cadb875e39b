"""What pyvene's interventions are made of: base classes, and what runs a user's own subclass.

pyvene: Wu et al., "pyvene: A Library for Understanding and Improving PyTorch Models via
Interventions" (2024, arXiv:2403.07809).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from reftlab.errors import InterventionError
from reftlab.interventions import Intervention as Native

__all__ = [
    "BasisAgnosticIntervention",
    "ConstantSourceIntervention",
    "DistributedRepresentationIntervention",
    "Intervention",
    "InterventionOutput",
    "LocalistRepresentationIntervention",
    "SharedWeightsTrainableIntervention",
    "SourcelessIntervention",
    "TrainableIntervention",
    "UsersOwn",
]

_Own = TypeVar("_Own", bound="Intervention")


@dataclass
class InterventionOutput:
    """What a user's intervention may return in place of a tensor; natively it keeps more as attributes.

    Attributes:
        output: the new vectors.
        latent: anything else, kept in `IntervenableModel.full_intervention_outputs`.
    """

    output: Any = None
    latent: Any = None


class LocalistRepresentationIntervention(nn.Module):
    """Mark of interventions that act on each number by itself; natively `takes_subspace = "features"`."""

    is_repr_distributed = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()


class DistributedRepresentationIntervention(nn.Module):
    """Mark of interventions with a basis; natively `takes_subspace = "basis"`."""

    is_repr_distributed = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()


class Intervention(nn.Module):
    """Base class of interventions; the native way is a subclass of `rl.Intervention`.

    A subclass of one's own has a `forward(base, source, subspaces)` on vectors `(row, unit, width)`,
    or on `(row, unit · width)`, all units of a row joined, unless it is made with
    `keep_last_dim=True` or is a `LocalistRepresentationIntervention`.

    Args:
        embed_dim: length of the vectors; a class that a representation names is given that of its site.
        keep_last_dim: see above.
        subspace_partition: what the numbers in `subspaces=` stand for: for each of them
            `[start, stop]` or a list of directions.
        source_representation: `(width,)`, in place of a source.
    """

    trainable = False
    use_fast = False
    is_source_constant = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.kwargs = kwargs
        self.described: Native | None = None
        self.keep_last_dim: bool = kwargs.get("keep_last_dim", False)
        self.subspace_partition = _partition(kwargs.get("subspace_partition"))
        width = kwargs.get("embed_dim")
        if width is None:
            self.embed_dim: Tensor | None = None
            self.interchange_dim: Tensor | None = None
        else:
            self.register_buffer("embed_dim", torch.tensor(int(width)))
            self.register_buffer("interchange_dim", torch.tensor(int(width)))
        self.source_representation: Tensor | None = None
        if kwargs.get("source_representation") is not None:
            self.set_source_representation(kwargs["source_representation"])

    def set_source_representation(self, source_representation: Tensor) -> None:
        """Take these vectors in place of a source's; natively `rl.Add(vector)` and the like."""
        self.is_source_constant = True
        self.source_representation = source_representation

    def set_interchange_dim(self, interchange_dim: Any) -> None:
        """Say how many of the first directions to act in; natively `Edit(..., subspace=range(k))`.

        Ready-made interventions keep to them; a `forward` of one's own finds it as `interchange_dim`.
        """
        self.interchange_dim = torch.as_tensor(interchange_dim)

    def native(self) -> Native:
        """The description of the native intervention that does this one's work."""
        return UsersOwn(self)

    def description(self) -> Native:
        """What `native` says, or what a saved intervention was made with."""
        return self.described if self.described is not None else self.native()

    def __getitem__(self: _Own, place: int) -> _Own:
        """The intervention itself; older pyvene kept it in a pair with its hook, `interventions[key][0]`."""
        if place != 0:
            raise InterventionError(f"interventions[key][{place}]: there is only the intervention, [0]")
        return self

    def forward(self, base: Tensor, source: Tensor | None = None, subspaces: Any = None) -> Any:
        """The new vectors; for subclasses to write."""
        raise NotImplementedError(f"{type(self).__name__} does not say what forward does")


class TrainableIntervention(Intervention):
    """Base class of interventions that learn; natively any `rl.Intervention` with parameters."""

    trainable = True

    def tie_weight(self, linked_intervention: Intervention) -> None:
        """Not supported; natively `Edit(..., share="name")`."""
        raise InterventionError('tie_weight is not supported; the native way is Edit(..., share="name")')


class ConstantSourceIntervention(Intervention):
    """Base class of interventions that need no source run; natively `takes_source = "no"`."""

    is_source_constant = True


class SourcelessIntervention(Intervention):
    """Base class of interventions without a source; natively `takes_source = "no"`."""

    is_source_constant = True


class BasisAgnosticIntervention(Intervention):
    """Base class that pyvene gives to additions and the like; it says nothing natively."""

    basis_agnostic = True


class SharedWeightsTrainableIntervention(TrainableIntervention):
    """Base class of interventions with shared weights; natively `Edit(..., share="name")`."""

    shared_weights = True


class UsersOwn(Native):
    """Run a `forward(base, source, subspaces)` that was written for pyvene.

    forward(base, source, subspaces)

    Attributes:
        inner: the user's module, with its parameters.
        units: vectors of each row in the coming call, None where rows differ.
        subspaces: what the coming call gives, one list a row.
        returned: what it returned besides vectors.
    """

    takes_source = "optional"

    def __init__(self, inner: Intervention) -> None:
        super().__init__()
        self.inner = inner
        self.units: int | None = None
        self.subspaces: Any = None
        self.returned: list[InterventionOutput] = []

    def forward(self, base: Tensor, source: Tensor | None = None) -> Tensor:
        apart = self.inner.keep_last_dim or isinstance(self.inner, LocalistRepresentationIntervention)
        units = self.units or 1

        def shaped(vectors: Tensor) -> Tensor:
            # A copy, since pyvene's habit is to write in place.
            grouped = vectors.reshape(-1, units, vectors.shape[-1]).clone()
            return grouped if apart else grouped.flatten(1)

        constant = self.inner.is_source_constant or source is None
        result = self.inner(shaped(base), None if constant else shaped(source), self.subspaces)  # type: ignore[arg-type]
        if isinstance(result, InterventionOutput):
            self.returned.append(result)
            result = result.output
        if not isinstance(result, Tensor) or result.numel() != base.numel():
            shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise InterventionError(
                f"{type(self.inner).__name__}.forward returned {shape} for vectors "
                f"{tuple(shaped(base).shape)}; it must return as many"
            )
        return result.reshape(base.shape)


def _partition(given: Any) -> list[list[int]] | None:
    """Directions by number of subspace; two whole numbers are a range, as in pyvene."""
    if given is None:
        return None
    parts = [list(part) for part in given]
    if not all(type(n) is int for part in parts for n in part):
        raise InterventionError(
            f"subspace_partition={given!r}: expected [start, stop] or directions for each subspace"
        )
    return [list(range(part[0], part[1])) if len(part) == 2 else part for part in parts]
