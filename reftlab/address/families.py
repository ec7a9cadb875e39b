"""Where each model family keeps the places that the portable names stand for.

A table: adding a family is adding an entry, and `tests/families` compares every entry with plain
hooks. Module names are those of transformers 5, as its `named_modules()` spells them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["FAMILIES", "Family", "Stack"]

Fused = Literal["", "joined", "grouped"]


@dataclass(frozen=True)
class Stack:
    """One stack of blocks; paths are relative to the backbone, those in `parts` to a block.

    Attributes:
        blocks: the list of blocks.
        embed: site of the vectors that enter the first block.
        final_norm: site of what the last norm returns, or None where there is none.
        parts: sites inside a block by portable name: `attn.output`, `attn.heads`, `attn.q`,
            `attn.k`, `attn.v`, `attn.scores`, `attn.pattern`, the same with `cross_attn`, `mlp.output`.
        fused: how one projection holds queries, keys and values, empty where there are three:
            `joined` is all queries, all keys, all values; `grouped` is, for each head of keys, the
            queries that share it, the key and the value.
    """

    blocks: str
    embed: str
    final_norm: str | None
    parts: Mapping[str, str]
    fused: Fused = ""

    def under(self, prefix: str) -> Stack:
        """The same stack one module deeper."""
        norm = None if self.final_norm is None else prefix + self.final_norm
        return replace(self, blocks=prefix + self.blocks, embed=prefix + self.embed, final_norm=norm)


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        stacks: its stacks by the prefix that a portable name begins with, `encoder`, `decoder`,
            `text` or `vision`; the empty one where there is only one stack.
        note: why some names mean nothing here, for the error message.
    """

    stacks: Mapping[str, Stack]
    note: str = ""


def _attention(
    module: str, project: str, queries: str, output: str = "", name: str = "attn"
) -> dict[str, str]:
    """Parts of an attention module.

    Args:
        module: the module that runs the softmax.
        project: the output projection.
        queries: the projections of queries, keys and values, `{}` standing for q, k or v; or the one
            for all three.
        output: site of the result before the residual stream, the module's output unless given.
        name: portable name, `attn` or `cross_attn`.
    """
    return {
        f"{name}.output": output or f"{module}.output",
        f"{name}.heads": f"{project}.input",
        **{f"{name}.{part}": f"{queries.format(part)}.output" for part in "qkv"},
        f"{name}.scores": f"{module}.scores",
        f"{name}.pattern": f"{module}.pattern",
    }


_SEPARATE = _attention("self_attn", "self_attn.o_proj", "self_attn.{}_proj")
_LLAMA = Stack("layers", "embed_tokens.output", "norm.output", {**_SEPARATE, "mlp.output": "mlp.output"})
_PHI3 = replace(
    _LLAMA,
    parts={
        **_attention("self_attn", "self_attn.o_proj", "self_attn.qkv_proj"),
        "mlp.output": "mlp.output",
    },
    fused="joined",
)
_GPT2 = Stack(
    "h",
    "drop.output",
    "ln_f.output",
    {**_attention("attn", "attn.c_proj", "attn.c_attn"), "mlp.output": "mlp.output"},
    fused="joined",
)
_GPT_NEOX = Stack(
    "layers",
    "emb_dropout.output",
    "final_layer_norm.output",
    {
        **_attention("attention", "attention.dense", "attention.query_key_value"),
        "mlp.output": "mlp.output",
    },
    fused="grouped",
)
_FALCON = Stack(
    "h",
    "word_embeddings.output",
    "ln_f.output",
    {
        **_attention("self_attention", "self_attention.dense", "self_attention.query_key_value"),
        "mlp.output": "mlp.output",
    },
    fused="grouped",
)
# Bloom's attention and MLP add the residual stream themselves, so that their results before it are
# those of their last projections.
_BLOOM = Stack(
    "h",
    "word_embeddings_layernorm.output",
    "ln_f.output",
    {
        **_attention(
            "self_attention",
            "self_attention.dense",
            "self_attention.query_key_value",
            output="self_attention.dense.output",
        ),
        "mlp.output": "mlp.dense_4h_to_h.output",
    },
    fused="grouped",
)
_MAMBA = Stack("layers", "embeddings.output", "norm_f.output", {})

_BERT_ATTENTION = {
    "attn.output": "attention.output.dense.output",
    "attn.heads": "attention.output.dense.input",
    "attn.q": "attention.self.query.output",
    "attn.k": "attention.self.key.output",
    "attn.v": "attention.self.value.output",
    "attn.scores": "attention.self.scores",
    "attn.pattern": "attention.self.pattern",
}
_BERT = Stack(
    "encoder.layer",
    "embeddings.output",
    "encoder.layer[-1].output.LayerNorm.output",
    {**_BERT_ATTENTION, "mlp.output": "output.dense.output"},
)
_DISTILBERT = Stack(
    "transformer.layer",
    "embeddings.output",
    "transformer.layer[-1].output_layer_norm.output",
    {**_attention("attention", "attention.out_lin", "attention.{}_lin"), "mlp.output": "ffn.output"},
)
_MODERNBERT = Stack(
    "layers",
    "embeddings.output",
    "final_norm.output",
    {**_attention("attn", "attn.Wo", "attn.Wqkv"), "mlp.output": "mlp.output"},
    fused="joined",
)
_XLNET = Stack(
    "layer",
    "layer[0].input",
    "layer[-1].ff.layer_norm.output",
    {
        "attn.scores": "rel_attn.scores",
        "attn.pattern": "rel_attn.pattern",
        "mlp.output": "ff.layer_2.output",
    },
)

_T5_SELF = _attention("layer[0].SelfAttention", "layer[0].SelfAttention.o", "layer[0].SelfAttention.{}")
_T5_CROSS = _attention(
    "layer[1].EncDecAttention", "layer[1].EncDecAttention.o", "layer[1].EncDecAttention.{}", name="cross_attn"
)
_T5_MLP = {"mlp.output": "layer[-1].DenseReluDense.output"}
_T5 = Stack("block", "block[0].input", "final_layer_norm.output", {**_T5_SELF, **_T5_MLP})
_BART_SELF = _attention("self_attn", "self_attn.out_proj", "self_attn.{}_proj")
_BART_CROSS = _attention("encoder_attn", "encoder_attn.out_proj", "encoder_attn.{}_proj", name="cross_attn")
_BART = Stack(
    "layers",
    "layernorm_embedding.output",
    "layers[-1].final_layer_norm.output",
    {**_BART_SELF, "mlp.output": "fc2.output"},
)
_WHISPER = replace(_BART, embed="layers[0].input", final_norm="layer_norm.output")

_VIT = Stack(
    "layers",
    "embeddings.output",
    "layernorm.output",
    {
        **_attention("attention", "attention.o_proj", "attention.{}_proj"),
        "mlp.output": "mlp.output",
    },
)
_CLIP_TEXT = Stack(
    "encoder.layers",
    "embeddings.output",
    "final_layer_norm.output",
    {**_BART_SELF, "mlp.output": "mlp.output"},
)
_CLIP_VISION = replace(_CLIP_TEXT, embed="pre_layrnorm.output", final_norm="post_layernorm.output")
_RESNET = Stack("encoder.stages", "embedder.output", None, {})


def _two_stacks(stack: Stack, cross: Mapping[str, str]) -> Family:
    decoder = replace(stack, parts={**stack.parts, **cross})
    return Family({"encoder": stack.under("encoder."), "decoder": decoder.under("decoder.")})


def _one(stack: Stack, note: str = "") -> Family:
    return Family({"": stack}, note)


FAMILIES: dict[str, Family] = {
    "bart": _two_stacks(_BART, _BART_CROSS),
    "bert": _one(_BERT),
    "bloom": _one(_BLOOM),
    "clip": Family({"text": _CLIP_TEXT.under("text_model."), "vision": _CLIP_VISION.under("vision_model.")}),
    "clip_text_model": _one(_CLIP_TEXT),
    "clip_vision_model": _one(_CLIP_VISION),
    "distilbert": _one(_DISTILBERT),
    "falcon": _one(_FALCON),
    "gemma2": _one(_LLAMA),
    "gemma3": _one(_LLAMA.under("language_model.")),
    "gemma3_text": _one(_LLAMA),
    "gpt2": _one(_GPT2),
    "gpt_neox": _one(_GPT_NEOX),
    "gpt_oss": _one(_LLAMA),
    "llama": _one(_LLAMA),
    "mamba": _one(_MAMBA, "a Mamba block has one mixer, 'layers[i].mixer', and neither attention nor an MLP"),
    "mistral": _one(_LLAMA),
    "mixtral": _one(_LLAMA),
    "modernbert": _one(_MODERNBERT),
    "olmo2": _one(_LLAMA),
    "phi3": _one(_PHI3),
    "qwen2": _one(_LLAMA),
    "qwen3": _one(_LLAMA),
    "qwen3_moe": _one(_LLAMA),
    "resnet": _one(_RESNET, "its blocks are the stages, made of convolutions"),
    "roberta": _one(_BERT),
    "t5": _two_stacks(_T5, _T5_CROSS),
    "vit": _one(_VIT),
    "whisper": _two_stacks(_WHISPER, _BART_CROSS),
    "xlnet": _one(
        _XLNET,
        "XLNet's attention projects with parameters of its own, not with modules, and adds the residual "
        "stream before it returns",
    ),
}
"""Families by `config.model_type`."""
