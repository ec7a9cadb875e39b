"""Sparse autoencoders read from the files of SAELens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from reftlab import ArtifactError, load_sae
from reftlab import interventions as iv
from tests.interventions.catalog import WIDTH, autoencoder
from tests.interventions.test_autoencoder import close, decoded, encoded

# Written as SAELens 6 writes them: every field of its config, and the names of its state.
CONFIG: dict[str, Any] = {
    "d_in": WIDTH, "d_sae": 9, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
    "normalize_activations": "none", "reshape_activations": "none", "architecture": "standard",
    "metadata": {"sae_lens_version": "6.0.0", "model_name": "gpt2-small", "hook_name": "blocks.8.hook_resid_pre"},
}  # fmt: skip
# As versions before 6 wrote them.
OLD_CONFIG: dict[str, Any] = {
    "architecture": "standard", "d_in": WIDTH, "d_sae": 9, "activation_fn_str": "relu", "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False, "context_size": 128, "model_name": "gpt2-small", "hook_name": "blocks.8.hook_resid_pre",
    "hook_layer": 8, "hook_head_index": None, "prepend_bos": True, "normalize_activations": "none", "dtype": "torch.float32",
}  # fmt: skip


def written(folder: Path, config: dict[str, Any], **more: Any) -> iv.SparseAutoencoder:
    """Write an autoencoder as SAELens does, and return the one that it is."""
    jumps = config.get("architecture") == "jumprelu"
    sae = autoencoder(threshold=jumps, center=config.get("apply_b_dec_to_input", True))
    state = {"W_enc": sae.encoder, "b_enc": sae.encoder_bias, "W_dec": sae.decoder, "b_dec": sae.decoder_bias}
    state |= {"threshold": sae.threshold} if jumps else {}
    state = {k: v.contiguous() for k, v in (state | more).items() if v is not None}
    save_file(state, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return sae


@pytest.mark.parametrize("base", [CONFIG, OLD_CONFIG], ids=["saelens 6", "before"])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
@pytest.mark.parametrize("center", [False, True], ids=["plain", "centred"])
def test_what_saelens_saved_is_loaded(tmp_path: Path, base: Any, architecture: str, center: bool) -> None:
    config = base | {"architecture": architecture, "apply_b_dec_to_input": center}
    sae, h = written(tmp_path, config), torch.randn(7, WIDTH)
    for path in (tmp_path, str(tmp_path), tmp_path / "sae_weights.safetensors"):
        loaded = load_sae(path).build(WIDTH)
        close(loaded.encode(h), encoded(sae, h))
        close(loaded(h), decoded(sae, encoded(sae, h)))


def test_defaults_of_old_configs_are_those_of_saelens(tmp_path: Path) -> None:
    written(tmp_path, {"d_in": WIDTH, "d_sae": 9}, scaling_factor=torch.ones(9))
    loaded = load_sae(tmp_path)
    assert loaded.center
    assert loaded.threshold is None


def test_half_precision_weights_and_logarithmic_thresholds_are_read(tmp_path: Path) -> None:
    sae = written(
        tmp_path, CONFIG | {"architecture": "jumprelu"}, threshold=None, log_threshold=torch.full((9,), -1.0)
    )
    np.testing.assert_allclose(load_sae(tmp_path).threshold.numpy(), np.exp(-1.0), rtol=1e-6)
    written(tmp_path, CONFIG, W_enc=sae.encoder.bfloat16())
    assert load_sae(tmp_path).encoder.dtype == torch.float32


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (
            {"architecture": "topk"},
            "architecture='topk' is not supported; supported is 'standard', 'jumprelu'",
        ),
        ({"architecture": "gated"}, "architecture='gated'"),
        ({"architecture": "transcoder"}, "architecture='transcoder'"),
        ({"activation_fn": "topk"}, "activation_fn='topk'"),
        ({"activation_fn_str": "tanh-relu"}, "activation_fn_str='tanh-relu'"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm'"),
        ({"normalize_activations": "expected_average_only_in"}, "normalize_activations="),
        (
            {"finetuning_scaling_factor": True},
            "finetuning_scaling_factor=True is not supported; it must be off",
        ),
        ({"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input='yes'"),
    ],
)
def test_an_autoencoder_of_another_mathematics_is_refused(tmp_path: Path, changed: Any, named: str) -> None:
    written(tmp_path, CONFIG)
    (tmp_path / "cfg.json").write_text(json.dumps(CONFIG | changed))
    with pytest.raises(ArtifactError, match=named):
        load_sae(tmp_path)


def test_files_that_are_missing_or_damaged_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"there is no file .*sae_weights\.safetensors"):
        load_sae(tmp_path)
    written(tmp_path, CONFIG | {"architecture": "jumprelu"}, threshold=None)
    with pytest.raises(ArtifactError, match="lacks 'threshold'; a JumpReLU autoencoder has W_enc"):
        load_sae(tmp_path)
    written(tmp_path, CONFIG, W_gate=torch.zeros(2))
    with pytest.raises(ArtifactError, match="has 'W_gate'"):
        load_sae(tmp_path)
    written(tmp_path, CONFIG, b_enc=torch.zeros(4))
    with pytest.raises(ArtifactError, match=r"encoder_bias has the shape \(4,\)"):
        load_sae(tmp_path)
    (tmp_path / "sae_weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        load_sae(tmp_path)
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(ArtifactError, match="is not JSON"):
        load_sae(tmp_path)
    (tmp_path / "cfg.json").write_text("[]")
    with pytest.raises(ArtifactError, match="no settings by name"):
        load_sae(tmp_path)
