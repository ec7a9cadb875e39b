"""Sparse autoencoders: encoding, and changing features."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reftlab import InterventionError
from reftlab import interventions as iv
from tests.interventions import catalog
from tests.interventions.catalog import WIDTH, autoencoder

CHANGES: dict[str, Any] = {"set": {1: 4.0, 7: -1.0}, "scale": {2: 3.0}, "ablate": [3], "swap": [0, 8]}


def encoded(sae: iv.SparseAutoencoder, h: Tensor) -> Any:
    """Activations by the definition, in float64."""
    w, b, shift = (t.double().numpy() for t in (sae.encoder, sae.encoder_bias, sae.decoder_bias))
    before = (h.double().numpy() - (shift if sae.center else 0.0)) @ w + b
    theta = 0.0 if sae.threshold is None else sae.threshold.double().numpy()
    return np.where((before > theta) & (before > 0), before, 0.0)


def decoded(sae: iv.SparseAutoencoder, z: Any) -> Any:
    return z @ sae.decoder.double().numpy() + sae.decoder_bias.double().numpy()


close = partial(catalog.close, tolerance=1e-4)
KINDS = pytest.mark.parametrize("threshold", [False, True], ids=["relu", "jumprelu"])
CENTERS = pytest.mark.parametrize("center", [False, True], ids=["plain", "centred"])


@KINDS
@CENTERS
def test_an_autoencoder_encodes_and_decodes_as_defined(threshold: bool, center: bool) -> None:
    sae, h = autoencoder(threshold, center).build(WIDTH), torch.randn(20, WIDTH)
    z = encoded(sae, h)
    assert 0.1 < (z > 0).mean() < 0.9
    close(sae.encode(h), z)
    close(sae.encode(h, torch.tensor([5, 0])), z[:, [5, 0]])
    close(sae.decode(sae.encode(h)), decoded(sae, z))
    close(sae(h), decoded(sae, z))


@KINDS
@pytest.mark.parametrize("error_term", [True, False])
def test_named_features_change_and_the_error_is_added_back(threshold: bool, error_term: bool) -> None:
    sae, h, s = autoencoder(threshold), torch.randn(20, WIDTH), torch.randn(20, WIDTH)
    edit = iv.SAEEdit(sae, **CHANGES, error_term=error_term).build(WIDTH)
    z, other = encoded(sae, h), encoded(sae, s)
    changed = z.copy()
    changed[:, 1], changed[:, 7], changed[:, 3] = 4.0, -1.0, 0.0
    changed[:, 2] *= 3.0
    changed[:, [0, 8]] = other[:, [0, 8]]
    error = h.double().numpy() - decoded(sae, z) if error_term else 0.0
    close(edit(h, s), decoded(sae, changed) + error)


@pytest.mark.parametrize("error_term", [True, False])
def test_all_features_can_take_the_sources_activations(error_term: bool) -> None:
    sae, h, s = autoencoder(), torch.randn(9, WIDTH), torch.randn(9, WIDTH)
    edit = iv.SAEEdit(sae, swap="all", error_term=error_term).build(WIDTH)
    error = h.double().numpy() - decoded(sae, encoded(sae, h)) if error_term else 0.0
    close(edit(h, s), decoded(sae, encoded(sae, s)) + error)
    chosen = torch.rand(9, 9) < 0.5
    mixed = np.where(chosen.numpy(), encoded(sae, s), encoded(sae, h))
    close(edit.edited(h, s, subspace=chosen), decoded(sae, mixed) + error)


def test_ablating_features_that_are_silent_changes_nothing() -> None:
    sae = iv.SparseAutoencoder(torch.eye(3), torch.full((3,), -9.0), torch.eye(3), torch.zeros(3))
    h = torch.rand(4, 3)
    assert torch.equal(iv.SAEEdit(sae, ablate=[0, 2]).build(3)(h), h)


def test_an_edit_keeps_one_copy_of_the_weights_and_saves_none_of_them_twice() -> None:
    sae = autoencoder()
    edit = iv.SAEEdit(sae, ablate=[1]).build(WIDTH)
    assert edit.sae.encoder.data_ptr() == sae.encoder.data_ptr()
    assert not edit.state_dict()
    assert edit.describe() == "SAEEdit(sae=SparseAutoencoder(6 to 9, JumpReLU), ablate=[1])"


def test_a_source_and_a_swap_belong_together() -> None:
    sae = autoencoder()
    with pytest.raises(InterventionError, match=r"needs source= for swap=\[0\]"):
        iv.SAEEdit(sae, swap=[0]).check_source(False)
    with pytest.raises(InterventionError, match="has a source but no swap="):
        iv.SAEEdit(sae, ablate=[0]).check_source(True)
    iv.SAEEdit(sae, ablate=[0]).check_source(False)
    iv.SAEEdit(sae, swap="all").check_source(True)


@pytest.mark.usefixtures("users_call")
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "SAEEdit changes nothing"),
        ({"set": {9: 1.0}}, "set names feature 9; features are numbered 0 to 8"),
        ({"ablate": [-1]}, "ablate names feature -1"),
        ({"ablate": 3}, "ablate=3: expected numbers of features"),
        ({"swap": "some"}, "swap='some'"),
        ({"scale": [3]}, r"scale=\[3\]: expected numbers by feature"),
        ({"set": {3: "high"}}, r"set\[3\]='high'"),
        ({"set": {3: 1.0}, "ablate": [3]}, "feature 3 is changed in two ways"),
        ({"set": {3: 1.0}, "swap": "all"}, "feature 3 is changed in two ways"),
        ({"ablate": [0], "error_term": 1}, "error_term=1"),
    ],
)
def test_a_change_that_cannot_be_made_is_named(arguments: Any, named: str) -> None:
    with pytest.raises(InterventionError, match=named):
        iv.SAEEdit(autoencoder(), **arguments)


@pytest.mark.usefixtures("users_call")
def test_weights_that_do_not_fit_are_named() -> None:
    w, b = torch.randn(2, 3), torch.zeros(2)
    with pytest.raises(InterventionError, match=r"decoder has the shape \(2, 3\).*needs \(3, 2\)"):
        iv.SparseAutoencoder(w, torch.zeros(3), w, b)
    with pytest.raises(InterventionError, match="encoder_bias=None"):
        iv.SparseAutoencoder(w, None, w.T, b)
    with pytest.raises(InterventionError, match="decoder has 2 numbers, the vectors here have 5"):
        iv.SparseAutoencoder(w, torch.zeros(3), w.T, b).build(5)
    with pytest.raises(InterventionError, match="expected a SparseAutoencoder"):
        iv.SAEEdit(w, ablate=[0])
