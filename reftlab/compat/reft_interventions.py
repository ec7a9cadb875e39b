"""pyreft's interventions; each docstring says the native way.

pyreft: Wu et al., "ReFT: Representation Finetuning for Language Models" (2024, arXiv:2404.03592).
Parameters are float32 here, whatever `dtype=` says. `dropout=` drops some of the r amounts, where
pyreft drops numbers of the whole new vector, and only in training mode. Directions given as
`subspaces=` confine the edit, where pyreft's own classes ignore them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from reftlab.compat.bases import (
    DistributedRepresentationIntervention,
    SourcelessIntervention,
    TrainableIntervention,
)
from reftlab.compat.builtin import BuiltIn, RotateLayer, find, rotation
from reftlab.errors import ArtifactError
from reftlab.interventions import ConsReFT, DiReFT, LobiReFT, LoReFT, NodiReFT, NoReFT
from reftlab.interventions import Intervention as Native

__all__ = [
    "ConsreftIntervention",
    "DireftIntervention",
    "LobireftIntervention",
    "LoreftIntervention",
    "NodireftIntervention",
    "NoreftIntervention",
]


class _Reft(BuiltIn, SourcelessIntervention, TrainableIntervention, DistributedRepresentationIntervention):
    """What pyreft's interventions take.

    Args:
        embed_dim: width of the vectors.
        low_rank_dimension: number of directions r.
        act_fn: f, such as `relu`; None or `linear` for the identity.
        dropout: probability of dropping each of the r amounts during training.
        dtype: has no effect; the parameters are float32.
        add_bias: has no effect; the two biases of a difference are one.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "keep_last_dim": True})

    def _complete(self) -> bool:
        return self.kwargs.get("low_rank_dimension") is not None

    @property
    def dropout(self) -> float:
        return float(self.kwargs.get("dropout") or 0.0)

    @property
    def activation(self) -> str | None:
        given = self.kwargs.get("act_fn")
        return None if given == "linear" else given


class _Learned(_Reft):
    @property
    def learned_source(self) -> nn.Linear:
        """W and b; natively `intervention.linear`."""
        return self.work().linear

    def _linear(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weight = find(tensors, "weight", "learned_source.weight")
        bias = find(tensors, "bias", "learned_source.bias")
        if weight is None or bias is None:
            self._unreadable(tensors)
        return {"linear.weight": weight, "linear.bias": bias}


class _Turned(_Reft):
    @property
    def rotate_layer(self) -> RotateLayer:
        """R transposed; natively `intervention.basis`."""
        return RotateLayer(self.work().basis)

    def _basis(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        columns = rotation(tensors)
        if columns is None:
            self._unreadable(tensors)
        return {"basis.weight": columns}


class _Free(_Learned):
    @property
    def proj_layer(self) -> nn.Linear:
        """W2; natively `intervention.projection`."""
        return self.work().projection

    def native_state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        projection = find(tensors, "proj_layer.weight")
        if projection is None:
            self._unreadable(tensors)
        return {**self._linear(tensors), "projection.weight": projection}


class LoreftIntervention(_Learned, _Turned):
    """LoReFT, `h + Rᵀ(f(W h + b) − R h)`; natively `rl.LoReFT(rank=4)`. Arguments as for all of them."""

    def native(self) -> Native:
        return LoReFT(self.rank(), activation=self.activation, dropout=self.dropout)

    def native_state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**self._linear(tensors), **self._basis(tensors)}


class DireftIntervention(_Learned, _Turned):
    """`h + Rᵀ f(W h + b)`; natively `rl.DiReFT(rank=4)`."""

    def native(self) -> Native:
        return DiReFT(self.rank(), activation=self.activation, dropout=self.dropout)

    def native_state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**self._linear(tensors), **self._basis(tensors)}


class NoreftIntervention(_Free):
    """`h + W2ᵀ(f(W1 h + b) − W2 h)`; natively `rl.NoReFT(rank=4)`."""

    def native(self) -> Native:
        return NoReFT(self.rank(), activation=self.activation, dropout=self.dropout)

    def native_state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        state, second = super().native_state(tensors), find(tensors, "proj_layer.bias")
        if second is None:
            return state
        if self.activation is not None:
            raise ArtifactError(
                f"NoreftIntervention was saved with a bias beside W2 and has act_fn={self.activation!r}; the "
                "two biases are one only without an activation, so it cannot be imported"
            )
        return {**state, "linear.bias": state["linear.bias"] - second}


class NodireftIntervention(_Free):
    """`h + W2ᵀ f(W1 h + b)`; natively `rl.NodiReFT(rank=4)`."""

    def native(self) -> Native:
        return NodiReFT(self.rank(), activation=self.activation, dropout=self.dropout)


class _Constant(_Turned):
    @property
    def learned_source(self) -> nn.Parameter:
        """b; natively `intervention.target`."""
        return self.work().target

    def native_state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        target = find(tensors, "learned_source")
        if target is None:
            self._unreadable(tensors)
        return {**self._basis(tensors), "target": target}


class ConsreftIntervention(_Constant):
    """`h + Rᵀ(b − R h)`; natively `rl.ConsReFT(rank=4)`."""

    def native(self) -> Native:
        return ConsReFT(self.rank())


class LobireftIntervention(_Constant):
    """`h + Rᵀ b`; natively `rl.LobiReFT(rank=4)`."""

    def native(self) -> Native:
        return LobiReFT(self.rank(), dropout=self.dropout)
