"""Where every model of the zoo keeps its places, written by hand from `print(model)` and the sources.

Nothing here comes from reftlab: these are the raw modules and features that plain hooks take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from tests.models import HEAD_SIZE, HEADS, KEY_VALUE_HEADS, WIDTH, ZOO

Axes = Literal["rtf", "trf", "rchw", "rf"]
BLOCK = 1


@dataclass(frozen=True)
class Raw:
    """One tensor in a forward pass.

    Attributes:
        module: path of the module.
        side: whether it is what the module takes or returns.
        features: the features that are meant, all where None.
        axes: `rtf` row token feature, `trf` token first, `rchw` feature maps, `rf` one vector a row.
        masked: whether its tokens are those of the attention mask.
    """

    module: str
    side: Literal["output", "input"] = "output"
    features: tuple[int, ...] | None = None
    axes: Axes = "rtf"
    masked: bool = True


def into(module: str) -> Raw:
    return Raw(module, "input")


def _joined(counts: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """Features of [queries | keys | values] of these widths."""
    starts = (0, counts[0], counts[0] + counts[1])
    return {
        part: tuple(range(start, start + n)) for part, start, n in zip("qkv", starts, counts, strict=True)
    }


def _interleaved(groups: int, queries: int, size: int) -> dict[str, tuple[int, ...]]:
    """Features of [queries of a group, its key, its value], group after group."""
    found: dict[str, list[int]] = {"q": [], "k": [], "v": []}
    at = 0
    for _ in range(groups):
        for part in ["q"] * queries + ["k", "v"]:
            found[part] += range(at, at + size)
            at += size
    return {part: tuple(features) for part, features in found.items()}


SMALL = WIDTH // HEADS
ALL_HEADS = _joined((WIDTH, WIDTH, WIDTH))


def _attn(block: str, module: str, project: str, separate: str, name: str = "attn") -> dict[str, Raw]:
    return {
        f"{name}.output": Raw(f"{block}.{module}"),
        f"{name}.heads": into(f"{block}.{project}"),
        **{f"{name}.{part}": Raw(f"{block}.{separate.format(part)}") for part in "qkv"},
    }


def _fused(
    block: str, module: str, project: str, fused: str, parts: dict[str, tuple[int, ...]]
) -> dict[str, Raw]:
    return {
        **_attn(block, module, project, fused),
        **{f"attn.{part}": Raw(f"{block}.{fused}", features=parts[part]) for part in "qkv"},
    }


def _sites(embed: Raw, block: str, norm: str, inside: dict[str, Raw], head: str = "") -> dict[str, Raw]:
    sites = {
        "embed.output": embed,
        f"blocks[{BLOCK}].input": into(block),
        f"blocks[{BLOCK}].output": Raw(block),
    }
    sites |= {f"blocks[{BLOCK}].{name}": raw for name, raw in inside.items()}
    sites |= {"final_norm.output": Raw(norm)} if norm else {}
    return sites | ({"unembed": Raw(head)} if head else {})


def _llama() -> dict[str, Raw]:
    block = f"model.layers.{BLOCK}"
    inside = _attn(block, "self_attn", "self_attn.o_proj", "self_attn.{}_proj") | {
        "mlp.output": Raw(f"{block}.mlp")
    }
    return _sites(Raw("model.embed_tokens"), block, "model.norm", inside, "lm_head")


def _phi3() -> dict[str, Raw]:
    block = f"model.layers.{BLOCK}"
    narrow = KEY_VALUE_HEADS * SMALL
    inside = _fused(
        block, "self_attn", "self_attn.o_proj", "self_attn.qkv_proj", _joined((WIDTH, narrow, narrow))
    )
    inside["mlp.output"] = Raw(f"{block}.mlp")
    return _sites(Raw("model.embed_tokens"), block, "model.norm", inside, "lm_head")


def _gpt2() -> dict[str, Raw]:
    block = f"transformer.h.{BLOCK}"
    inside = _fused(block, "attn", "attn.c_proj", "attn.c_attn", ALL_HEADS) | {
        "mlp.output": Raw(f"{block}.mlp")
    }
    return _sites(Raw("transformer.drop"), block, "transformer.ln_f", inside, "lm_head")


def _gpt_neox() -> dict[str, Raw]:
    block = f"gpt_neox.layers.{BLOCK}"
    parts = _interleaved(HEADS, 1, SMALL)
    inside = _fused(block, "attention", "attention.dense", "attention.query_key_value", parts)
    inside["mlp.output"] = Raw(f"{block}.mlp")
    return _sites(Raw("gpt_neox.emb_dropout"), block, "gpt_neox.final_layer_norm", inside, "lm_head")


def _falcon(parts: dict[str, tuple[int, ...]]) -> dict[str, Raw]:
    block = f"transformer.h.{BLOCK}"
    inside = _fused(block, "self_attention", "self_attention.dense", "self_attention.query_key_value", parts)
    inside["mlp.output"] = Raw(f"{block}.mlp")
    return _sites(Raw("transformer.word_embeddings"), block, "transformer.ln_f", inside, "lm_head")


def _bloom() -> dict[str, Raw]:
    sites = _falcon(_interleaved(HEADS, 1, SMALL))
    sites["embed.output"] = Raw("transformer.word_embeddings_layernorm")
    sites[f"blocks[{BLOCK}].attn.output"] = Raw(f"transformer.h.{BLOCK}.self_attention.dense")
    sites[f"blocks[{BLOCK}].mlp.output"] = Raw(f"transformer.h.{BLOCK}.mlp.dense_4h_to_h")
    return sites


def _bert(backbone: str, head: str) -> dict[str, Raw]:
    block, last = f"{backbone}.encoder.layer.{BLOCK}", f"{backbone}.encoder.layer.2"
    inside = {
        "attn.output": Raw(f"{block}.attention.output.dense"),
        "attn.heads": into(f"{block}.attention.output.dense"),
        "attn.q": Raw(f"{block}.attention.self.query"),
        "attn.k": Raw(f"{block}.attention.self.key"),
        "attn.v": Raw(f"{block}.attention.self.value"),
        "mlp.output": Raw(f"{block}.output.dense"),
    }
    return _sites(Raw(f"{backbone}.embeddings"), block, f"{last}.output.LayerNorm", inside, head)


def _distilbert() -> dict[str, Raw]:
    block = f"distilbert.transformer.layer.{BLOCK}"
    inside = _attn(block, "attention", "attention.out_lin", "attention.{}_lin") | {
        "mlp.output": Raw(f"{block}.ffn")
    }
    norm = "distilbert.transformer.layer.2.output_layer_norm"
    return _sites(Raw("distilbert.embeddings"), block, norm, inside, "vocab_projector")


def _modernbert() -> dict[str, Raw]:
    block = f"model.layers.{BLOCK}"
    inside = _fused(block, "attn", "attn.Wo", "attn.Wqkv", ALL_HEADS) | {"mlp.output": Raw(f"{block}.mlp")}
    return _sites(Raw("model.embeddings"), block, "model.final_norm", inside, "decoder")


def _xlnet() -> dict[str, Raw]:
    block = f"transformer.layer.{BLOCK}"
    inside = {"mlp.output": Raw(f"{block}.ff.layer_2")}
    norm = "transformer.layer.2.ff.layer_norm"
    sites = _sites(into("transformer.layer.0"), block, norm, inside)
    # Token first inside, row first again before the head.
    return {name: replace(raw, axes="trf") for name, raw in sites.items()} | {"unembed": Raw("lm_loss")}


def _mamba() -> dict[str, Raw]:
    return _sites(Raw("backbone.embeddings"), f"backbone.layers.{BLOCK}", "backbone.norm_f", {}, "lm_head")


def _two(stacks: dict[str, dict[str, Raw]], unmasked: tuple[str, ...], head: str = "") -> dict[str, Raw]:
    sites: dict[str, Raw] = {}
    for stack, own in stacks.items():
        for name, raw in own.items():
            across = stack == "decoder" and name.endswith(("cross_attn.k", "cross_attn.v"))
            masked = ("encoder" if across else stack) not in unmasked
            sites[f"{stack}.{name}"] = replace(raw, masked=masked)
    return sites | ({"unembed": Raw(head, masked=False)} if head else {})


def _t5() -> dict[str, Raw]:
    stacks = {}
    for stack in ("encoder", "decoder"):
        block = f"{stack}.block.{BLOCK}"
        own, cross = f"{block}.layer.0", f"{block}.layer.1"
        inside = _attn(own, "SelfAttention", "SelfAttention.o", "SelfAttention.{}")
        if stack == "decoder":
            inside |= _attn(cross, "EncDecAttention", "EncDecAttention.o", "EncDecAttention.{}", "cross_attn")
        number = 2 if stack == "decoder" else 1
        inside["mlp.output"] = Raw(f"{block}.layer.{number}.DenseReluDense")
        stacks[stack] = _sites(into(f"{stack}.block.0"), block, f"{stack}.final_layer_norm", inside)
    return _two(stacks, ("decoder",), "lm_head")


def _bart(embed: Callable[[str], Raw], norm: str, unmasked: tuple[str, ...], head: str) -> dict[str, Raw]:
    stacks = {}
    for stack in ("encoder", "decoder"):
        block = f"model.{stack}.layers.{BLOCK}"
        inside = _attn(block, "self_attn", "self_attn.out_proj", "self_attn.{}_proj")
        if stack == "decoder":
            inside |= _attn(
                block, "encoder_attn", "encoder_attn.out_proj", "encoder_attn.{}_proj", "cross_attn"
            )
        inside["mlp.output"] = Raw(f"{block}.fc2")
        stacks[stack] = _sites(embed(f"model.{stack}"), block, f"model.{stack}.{norm}", inside)
    return _two(stacks, unmasked, head)


def _vit() -> dict[str, Raw]:
    block = f"vit.layers.{BLOCK}"
    inside = _attn(block, "attention", "attention.o_proj", "attention.{}_proj") | {
        "mlp.output": Raw(f"{block}.mlp")
    }
    sites = _sites(Raw("vit.embeddings"), block, "vit.layernorm", inside)
    return {name: replace(raw, masked=False) for name, raw in sites.items()}


def _clip() -> dict[str, Raw]:
    ends = {"text": ("embeddings", "final_layer_norm"), "vision": ("pre_layrnorm", "post_layernorm")}
    stacks = {}
    for stack, (embed, norm) in ends.items():
        tower = f"{stack}_model"
        block = f"{tower}.encoder.layers.{BLOCK}"
        inside = _attn(block, "self_attn", "self_attn.out_proj", "self_attn.{}_proj")
        inside["mlp.output"] = Raw(f"{block}.mlp")
        stacks[stack] = _sites(Raw(f"{tower}.{embed}"), block, f"{tower}.{norm}", inside)
    sites = _two(stacks, ("vision",))
    norm = "vision.final_norm.output"
    return sites | {norm: replace(sites[norm], axes="rf")}


def _resnet() -> dict[str, Raw]:
    sites = _sites(Raw("resnet.embedder"), f"resnet.encoder.stages.{BLOCK}", "", {})
    return {name: replace(raw, axes="rchw", masked=False) for name, raw in sites.items()}


TABLE: dict[str, dict[str, Raw]] = {
    **{name: _llama() for name in ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")},
    **{name: _llama() for name in ("gemma2", "gemma3", "olmo2", "gpt_oss")},
    "phi3": _phi3(),
    "gpt2": _gpt2(),
    "gpt_neox": _gpt_neox(),
    "falcon": _falcon(_interleaved(KEY_VALUE_HEADS, HEADS // KEY_VALUE_HEADS, SMALL)),
    "falcon_multi_query": _falcon(_interleaved(1, HEADS, SMALL)),
    "falcon_alibi": _falcon(_interleaved(HEADS, 1, SMALL)),
    "bloom": _bloom(),
    "mamba": _mamba(),
    "bert": _bert("bert", "cls.predictions.decoder"),
    "roberta": _bert("roberta", "lm_head.decoder"),
    "distilbert": _distilbert(),
    "modernbert": _modernbert(),
    "xlnet": _xlnet(),
    "t5": _t5(),
    "bart": _bart(
        lambda s: Raw(f"{s}.layernorm_embedding"), "layers.2.final_layer_norm", ("decoder",), "lm_head"
    ),
    "whisper": _bart(lambda s: into(f"{s}.layers.0"), "layer_norm", ("encoder", "decoder"), "proj_out"),
    "vit": _vit(),
    "clip": _clip(),
    "resnet": _resnet(),
    "gru": {"embed_words.output": Raw("embed_words", masked=False), "rnn.output": Raw("rnn", masked=False)},
    "mlp": {"[0].output": Raw("0", axes="rf"), "[2].input": replace(into("2"), axes="rf")},
}
"""Sites of each model by the name that a user types; raw paths for the two without aliases."""

assert set(TABLE) == set(ZOO)

_STACK_OF = {"t5": ("encoder", "decoder"), "bart": ("encoder", "decoder"), "whisper": ("encoder", "decoder")}
STACKS: dict[str, tuple[str, ...]] = dict.fromkeys(TABLE, ("",)) | _STACK_OF | {"clip": ("text", "vision")}

HEAD_SIZES = dict.fromkeys(TABLE, SMALL) | dict.fromkeys(
    ("llama", "mistral", "mixtral", "qwen3", "qwen3_moe", "gemma2", "gemma3", "gpt_oss", "t5"), HEAD_SIZE
)
GENERATES = tuple(name for name in TABLE if "unembed" in TABLE[name] and name not in (
    "bert", "roberta", "distilbert", "modernbert", "xlnet"
))  # fmt: skip

MISSING: dict[str, str] = {
    "mamba": "a mixer, no attention and no MLP",
    "xlnet": "attention projects with bare parameters and returns a normed residual stream",
    "vit": "a classifier, no vocabulary",
    "clip": "two towers, no vocabulary",
    "resnet": "convolutions",
    "gru": "plain torch: raw paths only",
    "mlp": "plain torch: raw paths only",
}
"""Why a model lacks the places that its table does not list."""

NO_GENERATION: dict[str, str] = {
    **dict.fromkeys(
        ("bert", "roberta", "distilbert", "modernbert"), "fills in masks, does not continue texts"
    ),
    "xlnet": "generation appends a dummy token in each step, so columns shift",
    **dict.fromkeys(("vit", "clip", "resnet", "gru", "mlp"), "does not generate"),
}
