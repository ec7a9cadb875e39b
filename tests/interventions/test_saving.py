"""What is learned or fitted to vectors, bound to a model, saved, and loaded without those vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import reftlab as rl
from reftlab import interventions as iv
from tests.interventions.catalog import needs_source
from tests.models import batch_of
from tests.oracle import assert_close, randomise


def descriptions(width: int) -> dict[str, Any]:
    made = torch.Generator().manual_seed(3)
    vectors, labels = torch.randn(60, width, generator=made), torch.arange(60) % 2
    vectors[labels == 1] += 1.0
    weights = [torch.randn(*shape, generator=made) for shape in ((width, 12), (12,), (12, width), (width,))]
    sae = iv.SparseAutoencoder(*weights, threshold=torch.full((12,), 0.5))
    everything = [
        iv.RotatedSwap(3), iv.BoundlessSwap(), iv.MaskedSwap(True), iv.PCASwap.fit(vectors, 4, standardise=True),
        sae, iv.SAEEdit(sae, set={3: 9.0}), iv.SAEEdit(sae, swap=[1, 2]), iv.Erase.fit(vectors, labels),
        iv.ProjectOut.fit(vectors, labels), iv.Steer.fit(vectors[::2], vectors[1::2], 0.3, norm_matched=True),
        iv.ReFTr1(2), iv.Adapter(4), iv.Gated(iv.LoReFT(2), 0.1), iv.Gated(iv.SAEEdit(sae, swap="all")),
    ]  # fmt: skip
    return {f"{number}-{type(one).__name__}": one for number, one in enumerate(everything)}


NAMES = list(descriptions(32))


def bound(llama: Any, intervention: Any) -> rl.BoundModel:
    source = rl.Read(at="blocks[0].output", positions="last") if needs_source(intervention) else None
    edit = rl.Edit("mine", at="blocks[1].output", positions="last", intervention=intervention, source=source)
    return rl.InterventionGraph(edit).bind(llama)


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_edit_does_what_the_saved_one_did(name: str, llama: Any, tmp_path: Path) -> None:
    reft, batch = bound(llama, descriptions(llama.config.hidden_size)[name]), batch_of()
    randomise(reft)
    with torch.no_grad():
        expected = reft(**batch).logits
        assert (expected - llama(**batch).logits).abs().max() > 1e-4
        again = rl.load(reft.save(tmp_path / "edit"), llama)
        assert_close(again(**batch).logits, expected, 1e-6)
    assert again.graph == reft.graph


def test_large_weights_are_stored_once(llama: Any, tmp_path: Path) -> None:
    width = llama.config.hidden_size
    sae = iv.SparseAutoencoder(
        torch.randn(width, 500), torch.zeros(500), torch.randn(500, width), torch.zeros(width)
    )
    folder = bound(llama, iv.SAEEdit(sae, ablate=[2])).save(tmp_path / "edit")
    saved = load_file(folder / "interventions.safetensors")
    numbers = sum(tensor.numel() for name, tensor in saved.items() if name.endswith("decoder"))
    assert numbers == 500 * width
    assert (folder / "interventions.safetensors").stat().st_size < 4 * (2 * 500 * width + 500 + width) + 4000


def test_half_precision_models_are_edited_in_float32(llama: Any) -> None:
    width = llama.config.hidden_size
    model = type(llama)(llama.config).to(torch.bfloat16).eval()
    model.load_state_dict(llama.state_dict())
    batch = batch_of()
    for name, made in descriptions(width).items():
        reft = bound(model, made)
        with torch.no_grad():
            logits = reft(**batch).logits
        assert logits.dtype == torch.bfloat16, name
        assert torch.isfinite(logits).all(), name
