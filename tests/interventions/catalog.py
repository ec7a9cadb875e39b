"""One of every intervention, for the promises that all of them make."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reftlab import InterventionError
from reftlab import interventions as iv

WIDTH = 6


def autoencoder(threshold: bool = True, center: bool = True) -> iv.SparseAutoencoder:
    made = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made)

    weights = [draw(WIDTH, 9), draw(9), draw(9, WIDTH), draw(WIDTH)]
    return iv.SparseAutoencoder(*weights, threshold=draw(9).abs() if threshold else None, center=center)


def rotation(rows: int) -> Tensor:
    return torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2))).Q[:rows]


def catalog() -> dict[str, Any]:
    """Descriptions of everything that can be written to a file, by what `describe` calls them."""
    values = torch.arange(1.0, WIDTH + 1)
    everything = [
        *(kind(3) for kind in (iv.LoReFT, iv.NoReFT, iv.DiReFT, iv.NodiReFT, iv.ConsReFT, iv.LobiReFT)),
        iv.Swap(), iv.Zero(), iv.Scale(0.3), iv.Add(values), iv.Add(), iv.Subtract(2.0), iv.Mean(values),
        iv.Noise(0.5, seed=3), iv.Clamp(-0.5, 0.5),
        iv.RotatedSwap(), iv.RotatedSwap(2), iv.BoundlessSwap(5.0, 0.5, sparsity=0.3),
        iv.MaskedSwap(), iv.MaskedSwap(True, temperature_start=2.0, temperature_end=0.02, sparsity=0.2),
        iv.PCASwap(rotation(3)), iv.PCASwap(rotation(3), mean=values, scale=values),
        autoencoder(), autoencoder(threshold=False, center=False),
        iv.SAEEdit(autoencoder(), set={1: 4.0, 7: -1.0}, scale={2: 3.0}, ablate=[3], swap=[0, 8]),
        iv.SAEEdit(autoencoder(), set={1: 4.0}, error_term=False),
        iv.SAEEdit(autoencoder(), swap="all"),
        iv.Erase(rotation(2).T, rotation(2), values), iv.ProjectOut(torch.stack([values, values**2]), values),
        iv.Steer(values, 0.5), iv.Steer(values, -0.5, norm_matched=True),
        iv.ReFTr1(2, sparsity=0.1), iv.ReFTr1(amount=3.0), iv.Adapter(2), iv.Adapter(3, activation=None),
        iv.Gated(iv.LoReFT(2), sparsity=0.1), iv.Gated(iv.Swap()), iv.Gated(iv.Gated(iv.RotatedSwap(2))),
    ]  # fmt: skip
    return {f"{number}-{made.describe()}": made for number, made in enumerate(everything)}


CATALOG = catalog()


def built(made: Any) -> Any:
    """A built copy whose parameters are all drawn at random, so that none is at a neutral start."""
    edit = made.build(WIDTH)
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in edit.parameters():
            parameter.normal_()
    return edit


def needs_source(made: iv.Intervention) -> bool:
    try:
        made.check_source(False)
    except InterventionError:
        return True
    return False


def source_of(edit: Any, base: Tensor) -> Tensor | None:
    """Vectors for edits that need a source."""
    if not needs_source(edit):
        return None
    return torch.randn(base.shape, generator=torch.Generator().manual_seed(9)).to(base)


def close(got: Tensor, expected: Any, tolerance: float = 1e-5) -> None:
    """Equal within `tolerance`, absolute and relative, compared in float64."""
    expected = torch.as_tensor(expected).detach().double()
    torch.testing.assert_close(got.detach().double(), expected, rtol=tolerance, atol=tolerance)
