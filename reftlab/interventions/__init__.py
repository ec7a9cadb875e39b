"""The mathematics of edits: tensors only, no model, no string."""

from reftlab.interventions.base import Affine, Intervention, intervention_types
from reftlab.interventions.basis import OrthonormalBasis
from reftlab.interventions.reft import ConsReFT, DiReFT, LobiReFT, LoReFT, NodiReFT, NoReFT
from reftlab.interventions.simple import (
    Add,
    Clamp,
    Function,
    Mean,
    Noise,
    Scale,
    Subtract,
    Swap,
    Zero,
)

__all__ = [
    "Add",
    "Affine",
    "Clamp",
    "ConsReFT",
    "DiReFT",
    "Function",
    "Intervention",
    "LoReFT",
    "LobiReFT",
    "Mean",
    "NoReFT",
    "NodiReFT",
    "Noise",
    "OrthonormalBasis",
    "Scale",
    "Subtract",
    "Swap",
    "Zero",
    "intervention_types",
]
