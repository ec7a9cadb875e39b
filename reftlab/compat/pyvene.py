"""pyvene's names: `import reftlab.compat.pyvene as pv` in place of `import pyvene as pv`.

| pyvene | natively |
|---|---|
| `pv.IntervenableModel(config, model)` | `rl.InterventionGraph(rl.Edit(...)).bind(model)` |
| `pv_model(base, [source], {"sources->base": 4})` | `reft(**base, sources={"corrupt": source})` |
| `pv.CollectIntervention` | `reft.read("blocks[5].output @ last", **base)` |
| `pv_model.generate(base, intervene_on_prompt=True)` | `reft.generate(**base)` |

Every class's docstring says its native way. What is not here raises an error that does.
"""

from __future__ import annotations

from typing import Any, NoReturn

from reftlab.compat.bases import (
    BasisAgnosticIntervention,
    ConstantSourceIntervention,
    DistributedRepresentationIntervention,
    Intervention,
    InterventionOutput,
    LocalistRepresentationIntervention,
    SharedWeightsTrainableIntervention,
    SourcelessIntervention,
    TrainableIntervention,
)
from reftlab.compat.config import IntervenableConfig, RepresentationConfig
from reftlab.compat.imports import load_artifact
from reftlab.compat.interventions import (
    AdditionIntervention,
    AutoencoderIntervention,
    BoundlessRotatedSpaceIntervention,
    CollectIntervention,
    JumpReLUAutoencoderIntervention,
    LowRankRotatedSpaceIntervention,
    NoiseIntervention,
    PCARotatedSpaceIntervention,
    RotatedSpaceIntervention,
    SigmoidMaskIntervention,
    SigmoidMaskRotatedSpaceIntervention,
    SkipIntervention,
    SubtractionIntervention,
    VanillaIntervention,
    ZeroIntervention,
)
from reftlab.compat.model import IntervenableModel, IntervenableModelOutput
from reftlab.compat.utilities import (
    GET_LOC,
    build_intervenable_model,
    count_parameters,
    embed_to_distrib,
    format_token,
    set_seed,
    sigmoid_boundary,
    top_vals,
)
from reftlab.errors import ConfigError

__all__ = [
    "GET_LOC",
    "AdditionIntervention",
    "AutoencoderIntervention",
    "BasisAgnosticIntervention",
    "BoundlessRotatedSpaceIntervention",
    "CollectIntervention",
    "ConstantSourceIntervention",
    "DistributedRepresentationIntervention",
    "IntervenableConfig",
    "IntervenableModel",
    "IntervenableModelOutput",
    "Intervention",
    "InterventionOutput",
    "JumpReLUAutoencoderIntervention",
    "LocalistRepresentationIntervention",
    "LowRankRotatedSpaceIntervention",
    "NoiseIntervention",
    "PCARotatedSpaceIntervention",
    "RepresentationConfig",
    "RotatedSpaceIntervention",
    "SharedWeightsTrainableIntervention",
    "SigmoidMaskIntervention",
    "SigmoidMaskRotatedSpaceIntervention",
    "SkipIntervention",
    "SourcelessIntervention",
    "SubtractionIntervention",
    "TrainableIntervention",
    "VanillaIntervention",
    "ZeroIntervention",
    "build_intervenable_model",
    "count_parameters",
    "embed_to_distrib",
    "format_token",
    "load_artifact",
    "set_seed",
    "sigmoid_boundary",
    "top_vals",
]

_LOADERS = [
    f"create_{name}"
    for name in (
        "backpack_gpt2", "blip", "blip_itm", "gemma", "gpt2", "gpt2_lm", "gpt_neo", "gpt_neox", "gru",
        "gru_lm", "gru_classifier", "llama", "llava", "mistral", "mlp_classifier", "olmo", "qwen2",
    )
]  # fmt: skip
_ELSEWHERE = {
    **dict.fromkeys(
        _LOADERS,
        "load the model and its tokenizer with rl.load_model('gpt2') or transformers; any torch module works",
    ),
    "IntervenableRepresentationConfig": "use RepresentationConfig, its name since pyvene 0.1, or rl.Edit",
    "GRUConfig": "bind the graph to any torch GRU by its raw path",
    "CausalModel": "keep the causal model as a networkx.DiGraph or a function",
    "IntervenableNdifModel": "run where the model is; reftlab has no remote backend",
    **dict.fromkeys(
        ("harmonic_sigmoid_boundary", "closeness_to_permutation_loss", "random_permutation_matrix"),
        "use rl.BoundlessSwap or rl.MaskedSwap, or write the mathematics in a subclass of rl.Intervention",
    ),
    **dict.fromkeys(("sm", "lsm"), "use torch.softmax or torch.log_softmax"),
    "get_batch_size": "take len(batch['input_ids'])",
    "get_list_depth": "positions are one list of numbers for each row, positions={'edit': [[3], [4, 5]]}",
    "get_type_from_string": "name the class itself; a configuration never says which class to import",
    "create_directory": "reft.save makes the folder",
    "_do_intervention_by_swap": "use rl.Swap, rl.Add or rl.Subtract",
    "type_to_module_mapping": "use portable names such as 'blocks[3].mlp.output'; rl.inspect lists them",
    "type_to_dimension_mapping": "leave widths out; graph.bind(model) finds them",
}


def __getattr__(name: str) -> NoReturn:
    if name in _ELSEWHERE:
        raise ConfigError(f"pyvene's {name} is not supported; the native way: {_ELSEWHERE[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[Any]:
    return sorted(__all__)
