"""pyreft's names: `import reftlab.compat.pyreft as pyreft` in place of `import pyreft`.

| pyreft | natively |
|---|---|
| `ReftConfig(representations=...)` | `rl.InterventionGraph(rl.Edit(...))` |
| `get_reft_model(model, reft_config)` | `graph.bind(model, tokenizer)` |
| `make_last_position_supervised_data_module` | `positions="last"` in the edit |
| `ReftTrainerForCausalLM(...).train()` | `rl.train(reft, [(prompt, answer), ...])` |
| `reft_model.generate(prompt, unit_locations=..., intervene_on_prompt=True)` | `reft.generate(**prompt)` |
| `reft_model.save(...)`, `ReftModel.load(...)` | `reft.save(folder)`, `rl.load(folder, model)` |

Every class's docstring says its native way. What is not here raises an error that does.
"""

from __future__ import annotations

import enum
from typing import Any, NoReturn

from torch import nn

from reftlab.compat.config import IntervenableConfig
from reftlab.compat.data import (
    ReftDataCollator,
    get_intervention_locations,
    make_last_position_supervised_chat_data_module,
    make_last_position_supervised_data_module,
    make_multiple_position_supervised_data_module,
    parse_positions,
)
from reftlab.compat.imports import load_artifact
from reftlab.compat.model import IntervenableModel
from reftlab.compat.reft_interventions import (
    ConsreftIntervention,
    DireftIntervention,
    LobireftIntervention,
    LoreftIntervention,
    NodireftIntervention,
    NoreftIntervention,
)
from reftlab.compat.trainer import (
    ReftTrainer,
    ReftTrainerForCausalLM,
    ReftTrainerForSequenceClassification,
)
from reftlab.errors import ConfigError

__all__ = [
    "ConsreftIntervention",
    "DireftIntervention",
    "LobireftIntervention",
    "LoreftIntervention",
    "NodireftIntervention",
    "NoreftIntervention",
    "ReftConfig",
    "ReftDataCollator",
    "ReftModel",
    "ReftTrainer",
    "ReftTrainerForCausalLM",
    "ReftTrainerForSequenceClassification",
    "ReftType",
    "TaskType",
    "get_intervention_locations",
    "get_reft_model",
    "load_artifact",
    "make_last_position_supervised_chat_data_module",
    "make_last_position_supervised_data_module",
    "make_multiple_position_supervised_data_module",
    "parse_positions",
]


class ReftType(enum.StrEnum):
    """Kinds of adapters; natively the class of the intervention, `rl.LoReFT`."""

    LOREFT = "LOREFT"
    NLOREFT = "NOREFT"


class TaskType(enum.StrEnum):
    """Kinds of tasks, which nothing here depends on; natively the model says what it is for."""

    SEQ_CLS = "SEQ_CLS"
    CAUSAL_LM = "CAUSAL_LM"


class ReftConfig(IntervenableConfig):
    """All interventions of a model; natively `rl.InterventionGraph(...)`. See `IntervenableConfig`."""


class ReftModel(IntervenableModel):
    """A model with interventions; natively `graph.bind(model, tokenizer)`. See `IntervenableModel`."""


def get_reft_model(
    model: nn.Module, reft_config: Any, set_device: bool = True, disable_model_grads: bool = True
) -> ReftModel:
    """Put interventions into a model; natively `graph.bind(model, tokenizer)`.

    Args:
        model: the model.
        reft_config: a `ReftConfig`.
        set_device: has no effect; interventions are always put on the device of their site.
        disable_model_grads: whether to freeze the model; without, what learns of it (LoRA) goes on learning.
    """
    learning = [p for p in model.parameters() if p.requires_grad]
    reft_model = ReftModel(reft_config, model)
    if not disable_model_grads:
        for parameter in learning:
            parameter.requires_grad_(True)
    return reft_model


_DATASETS = "give rl.train (prompt, answer) pairs, or read them with rl.read_examples(file)"
_ELSEWHERE = {
    **dict.fromkeys(
        [f"Reft{kind}Dataset" for kind in ("", "Raw", "Supervised", "Generation", "Classification")],
        _DATASETS + "; positions are the edit's, positions='first(5)+last(5)'",
    ),
    **dict.fromkeys(
        ["ReftPreferenceDataset", "ReftRewardDataset", "ReftRewardCollator"],
        "give a Trainer of your own reft as its model; rl.train learns answers only",
    ),
    "ReftTrainerForCausalLMDistributed": "rl.train(reft, examples), which trains on one device",
}


def __getattr__(name: str) -> NoReturn:
    if name in _ELSEWHERE:
        raise ConfigError(f"pyreft's {name} is not supported; the native way: {_ELSEWHERE[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[Any]:
    return sorted(__all__)
