"""Graphs that between them use every intervention with every argument, and what a process makes of them.

Run as a program it loads artifacts and writes down their logits:

    python -m tests.store.cases ARTIFACTS_FOLDER OUTPUT.safetensors
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from reftlab import (
    Add,
    Clamp,
    ConsReFT,
    DiReFT,
    Edit,
    InterventionGraph,
    LobiReFT,
    LoReFT,
    Mean,
    NodiReFT,
    Noise,
    NoReFT,
    Read,
    Scale,
    Source,
    Subtract,
    Swap,
    Zero,
    cosine,
    gate,
    norm,
    projection,
)
from reftlab.interventions import Intervention
from reftlab.runtime import BoundModel
from reftlab.runtime.saving import load
from tests.interventions.catalog import CATALOG, needs_source

WIDTH, HEAD = 24, 6
WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "the",
    "Eiffel",
    "Tower",
    "is",
    "in",
    "Paris",
    "and",
    "London",
    "or",
    "Rome",
    "🦊",
]
PROMPTS = [
    "the Eiffel Tower is 🦊 in",
    "is the 🦊 Tower in Paris or in the London",
    "🦊 in the Eiffel Tower and 🦊",
]
OTHERS = ["London is in Paris and Rome", "the Paris Tower is the Tower in Rome or", "🦊 and 🦊 in Rome"]


def build_model(layers: int = 3, width: int = WIDTH, seed: int = 3) -> LlamaForCausalLM:
    """A small Llama with grouped heads, the same numbers in every process."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=width, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=HEAD, max_position_embeddings=48,
        initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def one(
    intervention: Intervention, at: str = "blocks[1].output", positions: Any = "last", **rest: Any
) -> InterventionGraph:
    sources = [Source(rest["source"].run)] if "source" in rest else []
    return InterventionGraph(
        *sources, Edit("edit", at=at, positions=positions, intervention=intervention, **rest)
    )


def _vector(length: int) -> Tensor:
    return torch.linspace(-1.0, 1.0, length) / 3


def _cases() -> dict[str, InterventionGraph]:
    other = Read(run="other")
    cases = {}
    for kind in (LoReFT, DiReFT, NoReFT, NodiReFT):
        name = kind.__name__
        cases[name] = one(kind(rank=3))
        cases[f"{name} all"] = one(kind(rank=2, activation="silu", dropout=0.3, bias=False, scale=1e-05))
        cases[f"{name} scale"] = one(kind(rank=5, activation="tanh", scale=-1.7))
    for constant in (ConsReFT, LobiReFT):
        cases[constant.__name__] = one(constant(rank=3))
        cases[f"{constant.__name__} all"] = one(constant(rank=2, dropout=0.2, scale=1.5))
    for vector in (Add, Subtract, Mean):
        cases[f"{vector.__name__} value"] = one(vector(_vector(WIDTH)), positions="all")
        cases[f"{vector.__name__} number"] = one(vector(0.3))
        cases[f"{vector.__name__} source"] = one(vector(), source=other)
    cases |= {
        "Swap": one(Swap(), source=other),
        "Zero": one(Zero()),
        "Scale": one(Scale(0.1)),
        "Noise": one(Noise(std=0.37, seed=12345), positions="all"),
        "Clamp": one(Clamp(low=-0.1, high=0.2), positions="all"),
        "Clamp low": one(Clamp(low=0.05), positions="all"),
        "heads": one(LoReFT(rank=2), at="blocks[1].attn.heads", heads=[3, 0]),
        "features": one(Add(_vector(5)), features=[7, 1, 2, 20, 3]),
        "slice": one(LoReFT(rank=2), features=slice(2, None, 3)),
        "key heads": one(Scale(-2.0), at="model.layers[0].self_attn.k_proj.output", heads=1, positions="all"),
        "decode": one(LoReFT(rank=2), positions="all", phase="decode"),
        "both": one(NodiReFT(rank=2), positions="first(2)", phase="both"),
        "strength": one(LoReFT(rank=2), strength=-0.35),
        "sites": one(LoReFT(rank=2), at="blocks[0,2].mlp.output", positions="f2+l1"),
        "every site": one(Add(0.1), at="blocks[*].attn.output", positions=[0, -1]),
        "span": one(LoReFT(rank=2), positions="span('Tower')+after('the')"),
        "fox": one(Zero(), positions="span('🦊')+token(\"Tower\")").rename({"edit": "Fox-and_tower-2"}),
        "source elsewhere": one(Swap(), source=Read("blocks[0].output @ first", run="other")),
        "source heads": one(
            Swap(),
            "blocks[1].attn.heads",
            heads=[1],
            source=Read("blocks[2].attn.heads", run="other", heads=[2]),
        ),
        "same run": InterventionGraph(
            Edit(
                "edit",
                at="blocks[2].output",
                positions="last",
                intervention=Add(),
                source=Read("blocks[0].output"),
            )
        ),
        "nested": InterventionGraph(
            Source("inner"),
            Source("other"),
            Edit("second", at="blocks[1].output", intervention=Swap(), positions="last", source=other),
            Edit("first", at="blocks[0].output", intervention=LoReFT(rank=2), positions="all", run="other"),
            Edit(
                "deep",
                at="blocks[0].output",
                intervention=Add(),
                positions="last",
                run="other",
                source=Read(run="inner"),
            ),
            Read("blocks[1].mlp.output @ last", name="kept"),
        ),
        "several": InterventionGraph(
            Edit("a", at="blocks[1].output", positions="last", intervention=LoReFT(rank=2)),
            Edit("b", at="blocks[1].output", positions="last", intervention=ConsReFT(rank=1)),
            Edit("c", at="embed.output", positions="first", intervention=Scale(3.0)),
            Edit("d", at="final_norm.output", positions="all", intervention=Noise(std=0.5)),
        ),
    }
    return cases


def _catalogued() -> dict[str, InterventionGraph]:
    """Every intervention there is, on six features."""
    cases = {}
    for number, made in enumerate(CATALOG.values()):
        source = {"source": Read(run="other")} if needs_source(made) else {}
        cases[f"catalogue {number}"] = one(made, features=slice(0, 6), **source)
    return cases


def _language() -> dict[str, InterventionGraph]:
    """Conditions, tasks, joined tokens and shared interventions."""
    similar = cosine("blocks[0].output @ last", "blocks[0].output @ first") > -2.0
    loud = (norm("blocks[0].output") > 0.1) | ~(projection("blocks[0].output", _vector(WIDTH)) <= 0.2)
    return {
        "condition": one(LoReFT(rank=2), when=similar, positions="last(2)"),
        "conditions": one(LoReFT(rank=2), when=similar & loud, positions="all", phase="both"),
        "gate": one(LoReFT(rank=2), when=gate("blocks[0].output", sparsity=0.2), positions="all"),
        "joined": one(LoReFT(rank=2), positions="joined(last(2))"),
        "generated": one(LoReFT(rank=2), positions="generated(1:3)"),
        "rows": one(LoReFT(rank=2), positions=[[0], [1, 2], []]),
        "tasks": one(LoReFT(rank=4), tasks={"a": [0, 1], "b": [3]}),
        "subspace": one(LoReFT(rank=4), subspace=[0, 2], share="word"),
        "shared": one(LoReFT(rank=2), at="blocks[*].output", share="one"),
        "base inputs": InterventionGraph(
            Source("again", inputs="base", grad=True),
            Edit("edit", at="blocks[1].output", positions="last", intervention=Swap(), source=Read(positions="first", run="again")),
        ),
    }  # fmt: skip


CASES = _cases() | _catalogued() | _language()


def randomise(bound: BoundModel, seed: int = 0) -> BoundModel:
    """Trained weights are any weights: fill the parameters with random numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in bound.interventions.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return bound


@torch.no_grad()
def logits_of(bound: BoundModel, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Logits of a left-padded batch, `(row, token, word)`, and of the tokens that follow it."""
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    ids = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    other = tokenizer(OTHERS, return_tensors="pt", padding=True)
    inputs = {"input_ids": other["input_ids"], "attention_mask": other["attention_mask"]}
    own = [node.name for node in bound.graph if isinstance(node, Source) and node.inputs is None]
    sources = dict.fromkeys(own, inputs) or None
    made = bound.generate(
        **ids,
        sources=sources,
        max_new_tokens=3,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = torch.stack(made.logits, dim=1)
    if any(edit.phase == "decode" for edit in bound.graph.edits):
        return new
    return torch.cat([bound(**ids, sources=sources).logits, new], dim=1)


def load_all(folder: Path, output: Path) -> None:
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    model, tokenizer = build_model(), build_tokenizer()
    save_file(
        {f.name: logits_of(load(f, model, tokenizer), tokenizer) for f in sorted(folder.iterdir())}, output
    )


def example(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> BoundModel:
    """A bound model with parameters, a tensor argument, an edit without either, and facts."""
    graph = InterventionGraph(
        Edit("edit", at="blocks[1].output", positions="span('Tower')", intervention=LoReFT(rank=2)),
        Edit("steer", at="blocks[2].output", positions="all", intervention=Add(_vector(WIDTH))),
        Edit("zero", at="blocks[0].mlp.output", positions="first", intervention=Zero(), strength=0.25),
    )
    bound = randomise(graph.bind(model, tokenizer))
    bound.facts = {"training": {"epochs": 30, "learning_rate": 0.004, "examples": 10, "chat": True}}
    return bound


if __name__ == "__main__":
    load_all(Path(sys.argv[1]), Path(sys.argv[2]))
