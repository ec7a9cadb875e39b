"""The peers' environments, and the embedded model written out as an ordinary folder that all of them load.

python analyses/benchmarks/peers/environments.py [PEER ...]

Everything goes to `out/bench/`, which git ignores. An environment whose list of packages has not changed is
left as it is.
"""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import sys
import venv
from pathlib import Path

CACHE = Path(__file__).resolve().parents[3] / "out" / "bench"
MODEL = CACHE / "model"
TORCH = "torch==2.13.0"

# One pip call each, in order. pyreft's own pins (seaborn 0.12.2, a profiler, a notebook server, a cloud file
# system) are of no use to its library code: it and pyvene go in without them, beside what they import.
_OLD_STACK = [
    "accelerate==1.1.1",
    "datasets==3.1.0",
    "huggingface-hub<1",
    "numpy",
    "protobuf",
    "sentencepiece",
]
_DRAWING = ["matplotlib", "seaborn", "networkx", "ipywidgets", "plotnine"]
PACKAGES: dict[str, list[list[str]]] = {
    "pyreft": [
        [TORCH, "transformers==4.45.1", *_OLD_STACK, *_DRAWING],
        ["--no-deps", "pyvene==0.1.8", "pyreft==0.1.0"],
    ],
    "pyvene": [
        [TORCH, "transformers==4.57.6", "accelerate", "datasets", "numpy", *_DRAWING, "sentencepiece"],
        ["--no-deps", "pyvene==0.1.8"],
    ],
    "adapters": [[TORCH, "adapters==1.3.0", "transformers==4.57.6"]],
    "peft": [[TORCH, "peft==0.21.2", "transformers==5.23.0"]],
    "nnsight": [[TORCH, "nnsight==0.8.1", "transformers==5.23.0", "accelerate"]],
    "transformer_lens": [[TORCH, "transformer-lens==4.3.0", "transformers==5.23.0"]],
    # The last with HookedTransformer, whose passes can begin above the first block; version 4 has lost it.
    "transformer_lens_2": [[TORCH, "transformer-lens==2.18.0", "transformers==4.57.6", "pyarrow<22"]],
}


def python(peer: str) -> Path:
    """The interpreter of a peer's environment; reftlab's own is the one that runs this file."""
    return Path(sys.executable) if peer == "reftlab" else CACHE / peer / "bin" / "python"


def make(peer: str) -> Path:
    """Makes a peer's environment unless it stands already, and returns its interpreter."""
    folder, steps = CACHE / peer, PACKAGES[peer]
    ready, wanted = folder / ".ready", hashlib.sha256(repr(steps).encode()).hexdigest()
    if ready.exists() and ready.read_text() == wanted:
        return python(peer)
    print(f"making out/bench/{peer}", flush=True)
    venv.create(folder, clear=True, with_pip=True)
    for packages in steps:
        subprocess.run([python(peer), "-m", "pip", "install", "-qq", *packages], check=True)
    ready.write_text(wanted)
    return python(peer)


def write_model() -> Path:
    """Writes the embedded model and its tokenizer as a folder, once."""
    if (MODEL / ".ready").exists():
        return MODEL
    import reftlab as rl

    loaded, tokenizer = rl.load_model()
    config = copy.deepcopy(loaded.config)
    # A model read from GGUF counts as quantized and refuses to be saved; the same weights in a fresh one not.
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, name):
            delattr(config, name)
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(MODEL)
    tokenizer.save_pretrained(MODEL)
    _name_as_before()
    (MODEL / ".ready").touch()
    return MODEL


def _name_as_before() -> None:
    """Adds what transformers 4 reads: it knows neither `rope_parameters` nor the new tokenizer class."""

    def changed(file: str, **more: object) -> None:
        path = MODEL / file
        path.write_text(json.dumps(json.loads(path.read_text()) | more, indent=2) + "\n")

    base = json.loads((MODEL / "config.json").read_text())["rope_parameters"]["rope_theta"]
    changed("config.json", rope_theta=base, torch_dtype="float32")
    changed("tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def main() -> None:
    for peer in sys.argv[1:] or PACKAGES:
        make(peer)
    write_model()


if __name__ == "__main__":
    main()
