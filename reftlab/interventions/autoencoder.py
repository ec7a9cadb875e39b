"""Sparse autoencoders as interventions: reconstruct a vector, or change single features of it.

Symbols, for a vector `h` of `width` numbers and an autoencoder of m features:
`z` (m) are the features' activations, of which few are above 0; `W_enc` (width × m) and `b_enc` (m)
encode; `W_dec` (m × width) and `b_dec` (width) decode; `θ` (m) are thresholds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reftlab.errors import InterventionError
from reftlab.interventions.base import Intervention, as_matrix, as_vector, check_width, flag, number

__all__ = ["SAEEdit", "SparseAutoencoder"]


class SparseAutoencoder(Intervention):
    """Replace the vector by its reconstruction from sparse features.

        decode(z) = z W_dec + b_dec,   z = p [p > θ],   p = relu((h − b_dec) W_enc + b_enc)

    Without thresholds θ is 0, the standard autoencoder; with them it is a JumpReLU autoencoder.
    With `center=False` b_dec is not subtracted first. The weights are fixed; `SAEEdit` changes
    features. `load_sae` reads files.

    Bricken et al., "Towards Monosemanticity" (2023, transformer-circuits.pub); thresholds:
    Rajamanoharan et al., "Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse
    Autoencoders" (2024, arXiv:2407.14435), section 3.

    Args:
        encoder: W_enc, `(width, m)`.
        encoder_bias: b_enc, `(m,)`.
        decoder: W_dec, `(m, width)`.
        decoder_bias: b_dec, `(width,)`.
        threshold: θ, `(m,)`; 0 unless given.
        center: whether b_dec is subtracted before encoding.

    >>> sae = SparseAutoencoder(torch.eye(2), torch.zeros(2), torch.eye(2), torch.zeros(2))
    >>> sae.encode(torch.tensor([[3.0, -1.0]])).tolist()
    [[3.0, 0.0]]
    """

    encoder: Tensor
    encoder_bias: Tensor
    decoder: Tensor
    decoder_bias: Tensor
    threshold: Tensor | None

    def __init__(
        self,
        encoder: Tensor | Sequence[Sequence[float]],
        encoder_bias: Tensor | Sequence[float],
        decoder: Tensor | Sequence[Sequence[float]],
        decoder_bias: Tensor | Sequence[float],
        threshold: Tensor | Sequence[float] | None = None,
        center: bool = True,
    ) -> None:
        super().__init__()
        matrix = as_matrix(encoder, "encoder")
        width, features = matrix.shape
        found = {
            "encoder": matrix,
            "encoder_bias": as_vector(encoder_bias, "encoder_bias"),
            "decoder": as_matrix(decoder, "decoder"),
            "decoder_bias": as_vector(decoder_bias, "decoder_bias"),
            "threshold": as_vector(threshold, "threshold"),
        }
        expected = {
            "encoder_bias": (features,),
            "decoder": (features, width),
            "decoder_bias": (width,),
            "threshold": (features,),
        }
        for name, tensor in found.items():
            if name in expected and tensor is None and name != "threshold":
                raise InterventionError(f"{name}=None: expected numbers of shape {expected[name]}")
            if name in expected and tensor is not None and tuple(tensor.shape) != expected[name]:
                raise InterventionError(
                    f"{name} has the shape {tuple(tensor.shape)}; an encoder of shape {(width, features)} "
                    f"needs {expected[name]}"
                )
            # The weights are large and fixed: neither copied here nor saved besides the arguments.
            self.register_buffer(name, tensor, persistent=False)
        self.center = flag(center, "center")

    @property
    def features(self) -> int:
        """Number of features m."""
        return int(self.encoder.shape[1])

    def setup(self, width: int) -> None:
        check_width(self.decoder, "decoder", width)

    def encode(
        self, vectors: Float[Tensor, "n width"], chosen: Int[Tensor, " k"] | None = None
    ) -> Float[Tensor, "n k"]:
        """The activations z of all features, or of the chosen ones alone, in their order."""
        which = slice(None) if chosen is None else chosen
        centred = vectors.float() - self.decoder_bias.float() if self.center else vectors.float()
        before = centred @ self.encoder[:, which].float() + self.encoder_bias[which].float()
        active = torch.relu(before)
        # SAELens takes thresholds below 0 as 0, which relu has done already.
        return active if self.threshold is None else active * (before > self.threshold[which])

    def describe(self) -> str:
        """One short line, `SparseAutoencoder(2304 to 16384, JumpReLU)`."""
        kind = "ReLU" if self.threshold is None else "JumpReLU"
        return f"SparseAutoencoder({self.encoder.shape[0]} to {self.features}, {kind})"

    def decode(self, activations: Float[Tensor, "n features"]) -> Float[Tensor, "n width"]:
        """The vectors that activations stand for."""
        return activations.float() @ self.decoder.float() + self.decoder_bias.float()

    def forward(
        self, base: Float[Tensor, "n width"], source: Float[Tensor, "n width"] | None = None
    ) -> Float[Tensor, "n width"]:
        return self.decode(self.encode(base))


class SAEEdit(Intervention):
    """Change single features of a sparse autoencoder, and leave the rest of the vector alone.

        h + (z′ − z) W_dec        or, without the error term,        z′ W_dec + b_dec

    `z` are the features of `h`, `z′` the changed ones. The first form adds back what the
    autoencoder does not reconstruct, `h − decode(z)`, so that an edit that changes no feature
    changes nothing; only the named features need be worked out for it. `subspace=` confines the
    change to some features.

    Templeton et al., "Scaling Monosemanticity" (2024, transformer-circuits.pub), for set features
    with the error term; Marks et al., "Sparse Feature Circuits" (2024, arXiv:2403.19647), for
    ablations and swaps of features.

    Args:
        sae: the autoencoder, from `load_sae` or of one's own.
        set: new activation by feature number.
        scale: factor by feature number.
        ablate: features set to 0.
        swap: features that take the source's activations, or "all".
        error_term: whether what the autoencoder does not reconstruct is kept.

    >>> sae = SparseAutoencoder(torch.eye(2), torch.zeros(2), torch.eye(2), torch.zeros(2))
    >>> SAEEdit(sae, set={1: 5.0}).build(width=2)(torch.tensor([[3.0, -1.0]])).tolist()
    [[3.0, 4.0]]
    """

    takes_source = "optional"
    takes_subspace = "basis"
    _chosen: Tensor | None
    _set_to: Tensor
    _scaled_by: Tensor

    def __init__(
        self,
        sae: SparseAutoencoder,
        *,
        set: Mapping[Any, float] | None = None,
        scale: Mapping[Any, float] | None = None,
        ablate: Sequence[int] | None = None,
        swap: Sequence[int] | Literal["all"] | None = None,
        error_term: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(sae, SparseAutoencoder):
            raise InterventionError(f"sae={sae!r}: expected a SparseAutoencoder, as load_sae returns one")
        self.sae = sae
        self.set, self.scale = self._amounts(set, "set"), self._amounts(scale, "scale")
        self.ablate = None if ablate is None else self._numbers(ablate, "ablate")
        self.swap: list[int] | Literal["all"] | None
        self.swap = swap if swap is None or swap == "all" else self._numbers(swap, "swap")  # type: ignore[assignment]
        self.error_term = flag(error_term, "error_term")
        named = [*(self.set or ()), *(self.scale or ()), *(self.ablate or ())]
        swapped = dict.fromkeys(range(sae.features) if self.swap == "all" else self.swap or ())
        twice = sorted(n for n, count in Counter(named).items() if count > 1 or n in swapped)
        if twice:
            raise InterventionError(
                f"feature {twice[0]} is changed in two ways; name it in one of set=, scale=, ablate=, swap="
            )
        if not named and not self.swap:
            raise InterventionError("SAEEdit changes nothing; give set=, scale=, ablate= or swap=")
        # In the order set, scaled, ablated, swapped; where all are swapped there is nothing to choose.
        chosen = None if self.swap == "all" else torch.tensor([*named, *(self.swap or ())])
        amounts = [torch.tensor(list((group or {}).values())) for group in (self.set, self.scale)]
        for name, tensor in (("_chosen", chosen), ("_set_to", amounts[0]), ("_scaled_by", amounts[1])):
            self.register_buffer(name, tensor, persistent=False)

    def _number(self, value: Any, argument: str) -> int:
        # JSON knows no whole numbers as keys.
        feature = int(value) if isinstance(value, str) and value.isdecimal() else value
        if type(feature) is not int or not 0 <= feature < self.sae.features:
            raise InterventionError(
                f"{argument} names feature {value!r}; features are numbered 0 to {self.sae.features - 1}"
            )
        return feature

    def _numbers(self, values: Any, argument: str) -> list[int]:
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise InterventionError(f"{argument}={values!r}: expected numbers of features, as in [3, 7]")
        return list(dict.fromkeys(self._number(value, argument) for value in values))

    def _amounts(self, values: Any, argument: str) -> dict[int, float] | None:
        if values is None:
            return None
        if not isinstance(values, Mapping):
            raise InterventionError(f"{argument}={values!r}: expected numbers by feature, as in {{3: 8.0}}")
        return {
            self._number(key, argument): number(value, f"{argument}[{key!r}]")
            for key, value in values.items()
        }

    @property
    def directions(self) -> int:
        """Number of features."""
        return self.sae.features

    def setup(self, width: int) -> None:
        self.sae = self.sae.build(width)

    def check_source(self, given: bool) -> None:
        if given != bool(self.swap):
            wrong = "has a source but no swap=" if given else f"needs source= for swap={self.swap!r}"
            raise InterventionError(f"SAEEdit {wrong}; features in swap= take the source's activations")

    def forward(
        self,
        base: Float[Tensor, "n width"],
        source: Float[Tensor, "n width"] | None = None,
        *,
        subspace: Bool[Tensor, "n features"] | None = None,
    ) -> Float[Tensor, "n width"]:
        which = slice(None) if self._chosen is None else self._chosen
        if self.error_term:
            start, before = base, self.sae.encode(base, self._chosen)
        else:
            # Without the error term the change is one of the reconstruction.
            every = self.sae.encode(base)
            start, before = self.sae.decode(every), every[:, which]
        change = self._after(before, source) - before
        if subspace is not None:
            change = change * subspace[:, which]
        return start + change @ self.sae.decoder[which].float()

    def _after(self, before: Tensor, source: Tensor | None) -> Tensor:
        """The new activations `(n, k)` of the features that change, from those before."""
        if self._chosen is None:
            assert source is not None
            return self.sae.encode(source)
        counts = [len(group or ()) for group in (self.set, self.scale, self.ablate, self.swap)]
        fixed, scaled, ablated, swapped = before.split(counts, dim=1)
        fixed = self._set_to.to(before).expand_as(fixed)
        scaled = scaled * self._scaled_by.to(before)
        if self.swap:
            assert source is not None
            swapped = self.sae.encode(source, self._chosen[-counts[-1] :])
        return torch.cat([fixed, scaled, torch.zeros_like(ablated), swapped], dim=1)
