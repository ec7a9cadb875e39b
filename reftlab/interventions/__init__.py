"""The mathematics of edits: tensors only, no model, no string."""

from reftlab.interventions.adapter import Adapter, Gated
from reftlab.interventions.autoencoder import SAEEdit, SparseAutoencoder
from reftlab.interventions.base import Affine, Intervention, intervention_types
from reftlab.interventions.basis import OrthonormalBasis
from reftlab.interventions.erase import Erase, ProjectOut
from reftlab.interventions.gate import SoftGate
from reftlab.interventions.mask import BoundlessSwap, MaskedSwap
from reftlab.interventions.reft import ConsReFT, DiReFT, LobiReFT, LoReFT, NodiReFT, NoReFT
from reftlab.interventions.rotate import PCASwap, RotatedSwap
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
from reftlab.interventions.steer import ReFTr1, Steer

__all__ = [
    "Adapter",
    "Add",
    "Affine",
    "BoundlessSwap",
    "Clamp",
    "ConsReFT",
    "DiReFT",
    "Erase",
    "Function",
    "Gated",
    "Intervention",
    "LoReFT",
    "LobiReFT",
    "MaskedSwap",
    "Mean",
    "NoReFT",
    "NodiReFT",
    "Noise",
    "OrthonormalBasis",
    "PCASwap",
    "ProjectOut",
    "ReFTr1",
    "RotatedSwap",
    "SAEEdit",
    "Scale",
    "SoftGate",
    "SparseAutoencoder",
    "Steer",
    "Subtract",
    "Swap",
    "Zero",
    "intervention_types",
]
