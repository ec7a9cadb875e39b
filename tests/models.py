"""Tiny random models of every family, inputs for them, and a tokenizer of whole words."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "bert")
CAUSAL = tuple(family for family in FAMILIES if family != "bert")

VOCABULARY, WIDTH, LAYERS, HEADS, KEY_VALUE_HEADS, HEAD_SIZE = 200, 32, 3, 4, 2, 12
PAD = 0
IMAGE, PATCH, MELS, FRAMES = 24, 8, 16, 20

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None,
    "tie_word_embeddings": False,
}  # fmt: skip
_PLAIN: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "max_position_embeddings": 64, "initializer_range": 0.15, "pad_token_id": PAD,
}  # fmt: skip
_SHARED: dict[str, Any] = {**_PLAIN, **_TEXT, "num_key_value_heads": KEY_VALUE_HEADS}
_GROUPED: dict[str, Any] = {**_SHARED, "head_dim": HEAD_SIZE}
_SLIDING: dict[str, Any] = {
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "sliding_window": 8,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_FALCON: dict[str, Any] = {
    **_TEXT, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "max_position_embeddings": 64, "initializer_range": 0.15,
}  # fmt: skip
_BOTH_STACKS: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "init_std": 0.15, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 3,
}  # fmt: skip
_TOWER: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "image_size": IMAGE, "patch_size": PATCH,
}  # fmt: skip


class GruTagger(nn.Module):
    """A recurrent network that labels each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_words, self.rnn = nn.Embedding(VOCABULARY, WIDTH), nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed_words(input_ids))[0])


ZOO: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_GROUPED)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_GROUPED, **_EXPERTS)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_SHARED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_GROUPED)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(
            **_GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, mlp_only_layers=[2]
        )
    ),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**_GROUPED, **_SLIDING, query_pre_attn_scalar=HEAD_SIZE)
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**_GROUPED, **_SLIDING, query_pre_attn_scalar=HEAD_SIZE)
    ),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_SHARED)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**_SHARED)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=64,
            initializer_range=0.15, pad_token_id=PAD, bos_token_id=1, eos_token_id=None,
        )
    ),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**{**_PLAIN, **_TEXT})),
    "gpt_oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**_GROUPED, **_SLIDING, **_EXPERTS)),
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(**_FALCON, new_decoder_architecture=True, num_kv_heads=KEY_VALUE_HEADS)
    ),
    "falcon_multi_query": lambda: hf.FalconForCausalLM(hf.FalconConfig(**_FALCON)),
    "falcon_alibi": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(**_FALCON, multi_query=False, alibi=True, parallel_attn=False)
    ),
    "bloom": lambda: hf.BloomForCausalLM(
        hf.BloomConfig(**_TEXT, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS, initializer_range=0.15)
    ),
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(
            **_TEXT, hidden_size=WIDTH, num_hidden_layers=LAYERS, state_size=8, initializer_range=0.15
        )
    ),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**_PLAIN)),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**_PLAIN)),
    "distilbert": lambda: hf.DistilBertForMaskedLM(
        hf.DistilBertConfig(
            vocab_size=VOCABULARY, dim=WIDTH, n_layers=LAYERS, n_heads=HEADS, hidden_dim=48,
            max_position_embeddings=64, initializer_range=0.15, pad_token_id=PAD,
        )
    ),
    "modernbert": lambda: hf.ModernBertForMaskedLM(
        hf.ModernBertConfig(
            **_PLAIN, local_attention=8, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
        )
    ),
    "xlnet": lambda: hf.XLNetLMHeadModel(
        hf.XLNetConfig(**_TEXT, d_model=WIDTH, n_layer=LAYERS, n_head=HEADS, d_inner=48, initializer_range=0.15)
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCABULARY, d_model=WIDTH, d_kv=HEAD_SIZE, d_ff=48, num_layers=LAYERS, num_heads=HEADS,
            pad_token_id=PAD, eos_token_id=None, decoder_start_token_id=PAD,
        )
    ),
    "bart": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(**_BOTH_STACKS, max_position_embeddings=64, forced_eos_token_id=None)
    ),
    "whisper": lambda: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            **_BOTH_STACKS, max_source_positions=FRAMES, max_target_positions=64, num_mel_bins=MELS,
            suppress_tokens=None, begin_suppress_tokens=None,
        )
    ),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**_TOWER, initializer_range=0.15)),
    "clip": lambda: hf.CLIPModel(
        hf.CLIPConfig(
            text_config={**_PLAIN, "projection_dim": 16, "bos_token_id": 1, "eos_token_id": 2},
            vision_config={**_TOWER, "projection_dim": 16},
            projection_dim=16,
        )
    ),
    "resnet": lambda: hf.ResNetForImageClassification(
        hf.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16, 16], depths=[1, 2, 1], layer_type="basic", num_labels=3
        )
    ),
    "gru": GruTagger,
    "mlp": lambda: nn.Sequential(nn.Linear(WIDTH, 48), nn.ReLU(), nn.Linear(48, WIDTH), nn.Tanh()),
}  # fmt: skip
"""Builders by name; `gru` and `mlp` are plain torch."""


@torch.random.fork_rng(devices=[])
def build(name: str) -> Any:
    """A new model of the zoo in eval mode, the same numbers each time."""
    torch.manual_seed(11)
    model = ZOO[name]().eval()
    # Norms begin as the identity and biases as nothing, which would hide a vector taken one step too early.
    for parameter in model.parameters():
        if name not in FAMILIES and parameter.dim() == 1:
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def build_model(family: str) -> PreTrainedModel:
    """A new model in eval mode, the same numbers each time."""
    return build(family)


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own, for tests that change one."""
    return copy.deepcopy(model)


def batch_of(lengths: tuple[int, ...] = (7, 4, 9), side: str = "right", seed: int = 5) -> dict[str, Tensor]:
    """Random prompts of these lengths, padded to the longest on one side."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, place] = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def inputs_of(name: str, side: str = "right", lengths: tuple[int, ...] = (7, 4, 9)) -> dict[str, Tensor]:
    """Inputs for one forward pass of a model of the zoo, by the names of its arguments."""
    generator = torch.Generator().manual_seed(17)
    rows = len(lengths)
    if name == "mlp":
        return {"input": torch.randn(rows, WIDTH, generator=generator)}
    if name == "gru":
        return {"input_ids": batch_of(lengths, side)["input_ids"]}
    images = torch.randn(rows, 3, IMAGE, IMAGE, generator=generator)
    if name in ("vit", "resnet"):
        return {"pixel_values": images}
    if name == "clip":
        text = batch_of(lengths, side)
        # CLIP takes a text's vector at its largest token id, which in its vocabulary is the end of the text.
        ends = [int(row.nonzero().max()) for row in text["attention_mask"]]
        text["input_ids"][range(rows), ends] = VOCABULARY - 1
        return {**text, "pixel_values": images}
    decoder = {"decoder_input_ids": torch.randint(3, VOCABULARY, (rows, 5), generator=generator)}
    if name == "whisper":
        return {"input_features": torch.randn(rows, MELS, 2 * FRAMES, generator=generator), **decoder}
    return {**batch_of(lengths, side), **(decoder if name in ("t5", "bart") else {})}


def with_position_ids(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with positions counted from each row's first real token, as `generate` does."""
    places = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return {**batch, "position_ids": places}


def row_of(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of a batch alone and without its padding."""
    real = batch["attention_mask"][row].bool()
    return {key: value[row][real][None] for key, value in batch.items()}


def hook_count(model: torch.nn.Module) -> int:
    """How many forward hooks and pre-hooks stand on the model's modules, all together."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


WORDS = [
    "the",
    "Eiffel",
    "Tower",
    "is",
    "in",
    "Paris",
    "and",
    "London",
    "John",
    "Mary",
    "gave",
    "a",
    "book",
    "to",
    "friend",
    "said",
    "Question",
    "Answer",
    ":",
    ".",
    "where",
    "what",
    "who",
    "cat",
    "dog",
]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Tokens are words with the space before them; unknown words fall apart into letters."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["<pad>", "<s>", "</s>", "▁", *letters, *(f"▁{word}" for word in WORDS)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        grown = "▁"
        for letter in word:
            merges.append((grown, letter))
            grown += letter
            vocabulary.setdefault(grown, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(dict.fromkeys(merges))))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
