"""pyvene's ready-made interventions; each docstring says the native way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftlab.compat.bases import (
    BasisAgnosticIntervention,
    ConstantSourceIntervention,
    DistributedRepresentationIntervention,
    LocalistRepresentationIntervention,
    TrainableIntervention,
)
from reftlab.compat.builtin import BuiltIn, RotateLayer, find, rotation
from reftlab.errors import InterventionError
from reftlab.interventions import (
    Add,
    BoundlessSwap,
    MaskedSwap,
    Mean,
    Noise,
    PCASwap,
    RotatedSwap,
    SAEEdit,
    Scale,
    SparseAutoencoder,
    Subtract,
    Swap,
    Zero,
)
from reftlab.interventions import Intervention as Native

__all__ = [
    "AdditionIntervention",
    "AutoencoderIntervention",
    "BoundlessRotatedSpaceIntervention",
    "CollectIntervention",
    "JumpReLUAutoencoderIntervention",
    "LowRankRotatedSpaceIntervention",
    "NoiseIntervention",
    "PCARotatedSpaceIntervention",
    "PyveneBoundlessSwap",
    "RotatedSpaceIntervention",
    "SigmoidMaskIntervention",
    "SigmoidMaskRotatedSpaceIntervention",
    "SkipIntervention",
    "SubtractionIntervention",
    "VanillaIntervention",
    "ZeroIntervention",
]


class _WithSource(BuiltIn, LocalistRepresentationIntervention):
    """Edits that take a source's vectors, or `source_representation` in their place."""

    kind: type[Native]
    constant: type[Native]

    def native(self) -> Native:
        value = self.source_representation
        # The vector of one token; pyvene spreads it over the others in the same way.
        return self.kind() if value is None else self.constant(value.detach().flatten())  # type: ignore[call-arg]


class VanillaIntervention(_WithSource):
    """Interchange intervention; natively `rl.Swap()`, or `rl.Mean(vector)` for a constant."""

    kind, constant = Swap, Mean


class AdditionIntervention(_WithSource, BasisAgnosticIntervention):
    """Add the source, or a constant; natively `rl.Add()` and `rl.Add(vector)`."""

    kind, constant = Add, Add


class SubtractionIntervention(_WithSource, BasisAgnosticIntervention):
    """Subtract the source, or a constant; natively `rl.Subtract()` and `rl.Subtract(vector)`."""

    kind, constant = Subtract, Subtract


class SkipIntervention(_WithSource, BasisAgnosticIntervention):
    """Give a block's output its input; natively `rl.Swap()` with `source=rl.Read("blocks[i].input")`."""

    kind, constant = Swap, Mean


class ZeroIntervention(BuiltIn, ConstantSourceIntervention, LocalistRepresentationIntervention):
    """Zero ablation; natively `rl.Zero()`."""

    def native(self) -> Native:
        return Zero()


class CollectIntervention(BuiltIn, ConstantSourceIntervention):
    """Read vectors and change nothing; natively `rl.Read(...)` and `reft.read(...)`."""

    def native(self) -> Native:
        return Scale(1.0)


class NoiseIntervention(BuiltIn, ConstantSourceIntervention, LocalistRepresentationIntervention):
    """Add fixed Gaussian noise; natively `rl.Noise(std=0.13)`.

    pyvene draws it for four tokens, one after the other, with numpy; here each token number has its
    own, by `rl.Noise`, for as many tokens as there are. The standard deviation is the same.

    Args:
        noise_level: standard deviation; pyvene reads it as `noise_leve`, which is taken too.
    """

    def native(self) -> Native:
        level = self.kwargs.get("noise_level", self.kwargs.get("noise_leve", 0.13462981581687927))
        return Noise(std=float(level))


class _Rotated(BuiltIn, TrainableIntervention, DistributedRepresentationIntervention):
    @property
    def rotate_layer(self) -> RotateLayer:
        return RotateLayer(self.work().basis)

    def native_state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        columns = rotation(tensors)
        if columns is None:
            self._unreadable(tensors)
        return {"basis.weight": columns, **self._more(tensors)}

    def _more(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}


class RotatedSpaceIntervention(_Rotated):
    """Distributed alignment search; natively `rl.RotatedSwap()` with `subspace=`."""

    def native(self) -> Native:
        return RotatedSwap()


class LowRankRotatedSpaceIntervention(_Rotated):
    """Distributed alignment search in a few directions; natively `rl.RotatedSwap(rank=4)`."""

    def native(self) -> Native:
        return RotatedSwap(rank=self.rank())


class _Tempered(BuiltIn, TrainableIntervention):
    def get_temperature(self) -> Tensor:
        """The present temperature; natively `intervention.temperature`."""
        temperature: Tensor = self.work().temperature
        return temperature

    def set_temperature(self, temp: Any) -> None:
        """Set the temperature; natively `rl.train` does it, by the intervention's `schedule`."""
        self.work().temperature.fill_(float(temp))


class PyveneBoundlessSwap(BoundlessSwap):
    """Boundless distributed alignment search with pyvene's boundary.

        h + Rᵀ(m ⊙ (R s − R h)),   mᵢ = σ(i/T) σ((β width − i)/T),   β clamped to [0.001, 1]

    As `BoundlessSwap`, but for two details that trained artifacts depend on: direction i stands at
    i, so that direction 0 is swapped by half at most, and `β` itself is learned, 0.5 at first. `rl.load`
    reads a graph with it once `reftlab.compat.pyvene` is imported.
    """

    def setup(self, width: int) -> None:
        super().setup(width)
        self.boundary = nn.Parameter(torch.full((1,), 0.5))

    @property
    def learned_width(self) -> float:
        """How many directions lie left of the boundary, β width."""
        return float(self.boundary.detach().float().clamp(1e-3, 1.0)) * float(self.width or 0)

    def mask(self) -> Float[Tensor, " width"]:
        """How far each direction is swapped, m, at the present temperature."""
        assert self.width is not None
        share = self.boundary.float().clamp(1e-3, 1.0)
        places = torch.arange(self.width, device=share.device).float()
        return torch.sigmoid(places / self.temperature) * torch.sigmoid(
            (share * self.width - places) / self.temperature
        )

    def penalty(self) -> Float[Tensor, ""] | None:
        """`sparsity · β`, None without sparsity."""
        return self.sparsity * self.boundary.float().clamp(1e-3, 1.0).sum() if self.sparsity else None


class BoundlessRotatedSpaceIntervention(_Rotated, _Tempered):
    """Boundless distributed alignment search; natively `rl.BoundlessSwap()`.

    Natively the temperature falls by itself in `rl.train`, and the boundary's penalty is `sparsity=`.
    """

    def native(self) -> Native:
        return PyveneBoundlessSwap(temperature_start=50.0, temperature_end=0.1, sparsity=0.0)

    @property
    def intervention_boundaries(self) -> nn.Parameter:
        """The learned share of the directions; natively `intervention.learned_width`."""
        return self.work().boundary

    def get_boundary_parameters(self) -> nn.Parameter:
        """The learned share of the directions."""
        return self.intervention_boundaries

    def set_intervention_boundaries(self, intervention_boundaries: float) -> None:
        """Set the share of the directions that are swapped, 0 to 1."""
        with torch.no_grad():
            self.intervention_boundaries.fill_(float(intervention_boundaries))

    def _more(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        share, temperature = find(tensors, "intervention_boundaries"), find(tensors, "temperature")
        if share is None or temperature is None:
            self._unreadable(tensors)
        return {"boundary": share.reshape(1), "temperature": temperature.reshape(())}


class SigmoidMaskRotatedSpaceIntervention(_Rotated, _Tempered):
    """Swap rotated directions as far as a learned mask says; natively `rl.MaskedSwap(rotated=True)`."""

    def native(self) -> Native:
        return MaskedSwap(rotated=True, temperature_start=50.0, temperature_end=0.1)

    def attach(self, built: Any) -> None:
        """Take a built native intervention as one's own."""
        if self.built is not built:
            # Every direction is swapped almost wholly at first, as in pyvene.
            with torch.no_grad():
                built.logits.fill_(100.0)
        super().attach(built)

    @property
    def masks(self) -> nn.Parameter:
        """The learned mask before the sigmoid; natively `intervention.logits`."""
        return self.work().logits

    def _more(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _mask_state(self, tensors, "masks")


class SigmoidMaskIntervention(_Tempered, LocalistRepresentationIntervention):
    """Swap features as far as a learned mask says; natively `rl.MaskedSwap()`."""

    def native(self) -> Native:
        return MaskedSwap(temperature_start=0.01, temperature_end=0.01)

    @property
    def mask(self) -> nn.Parameter:
        """The learned mask before the sigmoid; natively `intervention.logits`."""
        return self.work().logits

    def native_state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _mask_state(self, tensors, "mask")


def _mask_state(intervention: BuiltIn, tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    mask, temperature = find(tensors, name), find(tensors, "temperature")
    if mask is None or temperature is None:
        intervention._unreadable(tensors)
    return {"logits": mask, "temperature": temperature.reshape(())}


class PCARotatedSpaceIntervention(BuiltIn, BasisAgnosticIntervention, DistributedRepresentationIntervention):
    """Swap principal components; natively `rl.PCASwap.fit(vectors)`.

    What the components leave out stays the base's here; in pyvene it is lost. With as many
    components as features the two are the same.

    Args:
        pca: a fitted scikit-learn PCA, of which `components_` are taken.
        pca_mean, pca_std: `(width,)`.
    """

    def native(self) -> Native:
        missing = [name for name in ("pca", "pca_mean", "pca_std") if self.kwargs.get(name) is None]
        if missing:
            raise InterventionError(f"PCARotatedSpaceIntervention needs {missing[0]}=")
        numbers = [self.kwargs["pca"].components_, self.kwargs["pca_mean"], self.kwargs["pca_std"]]
        return PCASwap(*(torch.as_tensor(n).float() for n in numbers))


class _Coder(BuiltIn, TrainableIntervention):
    """Swaps of an autoencoder's features. The weights are fixed when the model is made."""

    center: bool
    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    threshold: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        size = kwargs.get("latent_dim") or kwargs.get("low_rank_dimension")
        if size is None or self.embed_dim is None:
            raise InterventionError(
                f"{type(self).__name__} needs embed_dim= and latent_dim= or low_rank_dimension=, and then "
                "its weights by load_state_dict, before it goes into a representation as intervention=; "
                "natively rl.SAEEdit(rl.load_sae(folder), swap='all')"
            )
        width, size = int(self.embed_dim), int(size)
        shapes = {"W_enc": (width, size), "W_dec": (size, width), "b_enc": (size,), "b_dec": (width,)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("threshold", torch.zeros(size))

    def _complete(self) -> bool:
        return False

    def native(self) -> Native:
        threshold = None if self.center else self.threshold
        sae = SparseAutoencoder(self.W_enc, self.b_enc, self.W_dec, self.b_dec, threshold, center=self.center)
        return SAEEdit(sae, swap=self._swapped(), error_term=False)

    def _swapped(self) -> Any:
        return "all"

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Take weights under pyvene's names; before the model is made, for they are fixed then."""
        if self.built is not None:
            raise InterventionError(f"{type(self).__name__}: load the weights before the model is made")
        own = self.named_weights(state_dict)
        missing = [name for name in ("W_enc", "W_dec", "b_enc", "b_dec") if own.get(name) is None]
        if missing:
            self._unreadable(state_dict)
        for name, tensor in own.items():
            if tensor is not None:
                getattr(self, name).copy_(tensor)
        return None

    def named_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """The weights by their names here."""
        return {name: find(tensors, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}


class JumpReLUAutoencoderIntervention(_Coder):
    """Swap features of a JumpReLU autoencoder; natively `rl.SAEEdit(rl.load_sae(folder), swap="all")`.

    All features are swapped unless `set_interchange_dim` or `subspaces=` says less; pyvene swaps the
    first `embed_dim` of them unless told. Load the weights before the model is made; they are fixed here.
    """

    center = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "keep_last_dim": True})


class AutoencoderIntervention(_Coder):
    """Swap one feature of an autoencoder; natively `rl.SAEEdit(sae, swap=[7], error_term=False)`.

    `set_interchange_dim` says which feature or features. Load the weights before the model is made;
    they are fixed here, where pyvene may train them.
    """

    center = True

    def set_interchange_dim(self, interchange_dim: Any) -> None:
        """Say which features are swapped, before the model is made; natively `swap=`.

        Raises:
            InterventionError: the model is made, and with it what is swapped.
        """
        if self.built is not None:
            raise InterventionError(
                f"{type(self).__name__}: set_interchange_dim before the model is made; the native way to "
                "swap others then is another rl.Edit with rl.SAEEdit(sae, swap=...)"
            )
        super().set_interchange_dim(interchange_dim)

    def confined(self) -> None:
        """None, since `swap=` says already which features there are."""

    def _swapped(self) -> Any:
        return [int(n) for n in torch.as_tensor(self.interchange_dim).flatten()]

    def named_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        into, out = "autoencoder.encoder.0.", "autoencoder.decoder.0."
        weights = [find(tensors, f"{part}weight") for part in (into, out)]
        return {
            "W_enc": None if weights[0] is None else weights[0].T,
            "W_dec": None if weights[1] is None else weights[1].T,
            "b_enc": find(tensors, f"{into}bias"),
            "b_dec": find(tensors, f"{out}bias"),
        }
