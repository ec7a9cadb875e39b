"""reftlab: declarative interventions on any PyTorch model, trained, explained and composed.

    import reftlab as rl

    model, tokenizer = rl.load_model("smollm2-135m-instruct")
    graph = rl.InterventionGraph(
        rl.Edit("emoji", at="blocks[15].output", positions="last", intervention=rl.LoReFT(rank=4)),
    )
    reft = graph.bind(model, tokenizer)
    rl.train(reft, examples, epochs=30, learning_rate=4e-3)
    rl.explain(reft, examples).save("emoji.html")

Everything below is imported when it is first used, so that `import reftlab` stays light.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "reftlab.errors": (
        "AddressError", "ArtifactError", "BindError", "ConfigError", "DataError", "GraphError",
        "InterventionError", "ModelError", "PositionError", "ReftlabError", "RunError",
        "UntouchedEditWarning",
    ),
    "reftlab.address": (
        "After", "All", "Every", "First", "Generated", "Given", "Indices", "Joined", "Last", "PerRow",
        "Position", "Span", "Token", "Union", "parse_path", "parse_position", "portable_names",
    ),
    "reftlab.interventions": (
        "Adapter", "Add", "BoundlessSwap", "Clamp", "ConsReFT", "DiReFT", "Erase", "Function", "Gated",
        "Intervention", "LoReFT", "LobiReFT", "MaskedSwap", "Mean", "NoReFT", "NodiReFT", "Noise",
        "OrthonormalBasis", "PCASwap", "ProjectOut", "ReFTr1", "RotatedSwap", "SAEEdit", "Scale", "SoftGate",
        "SparseAutoencoder", "Steer", "Subtract", "Swap", "Zero",
    ),
    "reftlab.graph": (
        "Condition", "Edit", "InterventionGraph", "Measure", "Read", "Source", "cosine", "gate", "norm",
        "probability", "projection",
    ),
    "reftlab.store": ("load_sae",),
    "reftlab.runtime.cone": ("Cone", "ConeStore"),
    "reftlab.runtime": ("BoundModel", "Inspection", "Reading", "inspect", "load"),
    "reftlab.collecting": ("Activations", "collect"),
    "reftlab.sweeping": (
        "PathResult", "SweepResult", "answer_log_probability", "answer_logit", "answer_probability",
        "kl_divergence", "logit_diff", "sweep", "sweep_paths",
    ),
    "reftlab.training": (
        "Evaluation", "Example", "TrainResult", "answer_loss", "evaluate", "format_prompt", "read_examples",
        "reply", "train", "training_batch",
    ),
    "reftlab.models": ("load_model",),
    "reftlab.experiment": ("Experiment",),
    "reftlab.probing": (
        "Amnesic", "DescriptionLength", "FittedProbe", "Inlp", "MeanDifference", "ProbeChange", "ProbeMap",
        "amnesic", "class_directions", "control_labels", "description_length", "inlp", "linear_parts",
        "probe", "probe_change",
    ),
    "reftlab.explaining": (
        "Composition", "Contexts", "DataLens", "DirectEffects", "DoseResponse", "EditAngles", "Explanation",
        "Faithfulness", "InterchangeAccuracy", "Interference", "LeaveOneOut", "Mediation", "ShapleyValues",
        "SubspaceAngles", "composition", "direct_effect", "dose_response", "driving_contexts", "edit_angles",
        "explain", "faithfulness", "fit_lens", "interchange_accuracy", "interference", "leave_one_out",
        "mediate", "promoted_tokens", "shapley", "subspace_angles",
    ),
}  # fmt: skip

_PACKAGES = {home.split(".")[1] for home in _HOMES} | {"compat", "measuring", "plotting"}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"reftlab.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'reftlab' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
