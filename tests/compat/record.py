"""Write `tests/compat/data` with the real pyreft and pyvene; not run by the tests.

python -m venv old && old/bin/pip install pyreft==0.1.0 pyvene==0.1.8 transformers==4.45.1
old/bin/python -m tests.compat.record tests/compat/data          # and with 0.0.5 and 0.1.1: ... data dotted
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.compat.programs import PROGRAMS, REFT_KINDS, SWAP_KINDS, moved
from tests.compat.tiny import BASE, PAIR, PAIR_SOURCE, SOURCE, WIDTH, tiny_gpt2, tiny_llama


def record_programs(pyreft: Any, pv: Any) -> dict[str, torch.Tensor]:
    """What every program returns under the real libraries."""
    return {
        name: tensor.detach().clone().contiguous()
        for program in PROGRAMS
        for name, tensor in program(pyreft, pv).items()
    }


def record_artifacts(pyreft: Any, pv: Any, home: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Save one folder for each trainable intervention, and what a model with it computes."""
    found = {}
    place = {"sources->base": (None, [[[2, 5]]])}
    for name in ("LoreftIntervention", "ConsreftIntervention") if prefix else REFT_KINDS:
        torch.manual_seed(len(found))
        extra = {"dtype": torch.float32, "add_bias": name == "NoreftIntervention"}
        own = getattr(pyreft, name)(embed_dim=WIDTH, low_rank_dimension=3, **extra)
        moved(own)
        config = pyreft.ReftConfig(
            representations=[
                {"layer": 1, "component": "block_output", "low_rank_dimension": 3, "intervention": own}
            ]
        )
        model = pyreft.get_reft_model(tiny_llama(), config)
        model.save(str(home / f"{prefix}{name}"))
        found[f"{prefix}{name}"] = model(BASE, unit_locations=place)[1].logits.detach().clone()
    for name in SWAP_KINDS if not prefix else ():
        torch.manual_seed(len(found))
        entry = {"layer": 0, "component": "block_output", "low_rank_dimension": 3, "latent_dim": 24}
        config = pv.IntervenableConfig([{**entry, "intervention_type": getattr(pv, name)}])
        swap = pv.IntervenableModel(config, tiny_gpt2())
        own = next(iter(swap.interventions.values()))
        moved(own)
        if hasattr(own, "temperature"):
            own.set_temperature(torch.tensor(3.0))
        if name == "RotatedSpaceIntervention":
            own.set_interchange_dim(7)
        swap.save(str(home / name))
        found[name] = swap(BASE, [SOURCE], {"sources->base": 4})[1].logits.detach().clone()
    return found


def record_units(pv: Any, home: Path) -> dict[str, torch.Tensor]:
    """Save a rotation of two joined tokens, and one in parts, another part for each row."""
    torch.manual_seed(5)
    entry = {"layer": 0, "component": "block_output", "low_rank_dimension": 4}
    entry["intervention_type"] = pv.LowRankRotatedSpaceIntervention
    joined = pv.IntervenableModel({**entry, "max_number_of_units": 2}, tiny_gpt2())
    joined.save(str(home / "joined"))
    _, together = joined(BASE, [SOURCE], {"sources->base": ([[[1, 3]]], [[[2, 5]]])})
    parts = pv.IntervenableModel({**entry, "subspace_partition": [[0, 2], [2, 4]]}, tiny_gpt2())
    parts.save(str(home / "parts"))
    places = {"sources->base": ([[[2], [2]]], [[[2], [1]]])}
    _, apart = parts(PAIR, [PAIR_SOURCE], places, subspaces=[[[0], [1]]])
    return {"joined": together.logits.detach(), "parts": apart.logits[:, :3].detach().clone()}


def main() -> None:
    import pyreft
    import pyvene

    home = Path(sys.argv[1])
    if len(sys.argv) > 2:
        found = record_artifacts(pyreft, pyvene, home, "dotted_")
        save_file(found, home / "expected_dotted.safetensors")
        return
    found = record_programs(pyreft, pyvene) | record_artifacts(pyreft, pyvene, home)
    found |= record_units(pyvene, home)
    save_file(found, home / "expected.safetensors")


if __name__ == "__main__":
    main()
