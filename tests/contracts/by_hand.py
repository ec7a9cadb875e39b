"""GPT-2 and Llama written out from their weights, with any value of the pass replaced by another.

Nothing here is a module and nothing is hooked: one row of tokens goes in, and every value that a site
stands for has its name. Pre-norm GPT-2: Radford et al., "Language Models are Unsupervised Multitask
Learners" (2019). Llama: Touvron et al. (2023, arXiv:2302.13971) with grouped queries, Ainslie et al.
(2023, arXiv:2305.13245), and rotary embeddings, Su et al. (2021, arXiv:2104.09864).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers as hf
from torch import Tensor

VOCABULARY, WIDTH, LAYERS, HEADS, KEY_VALUE_HEADS, HIDDEN = 120, 24, 2, 4, 2, 40
LLAMA_HEAD, GPT2_HEAD = 10, WIDTH // HEADS
"""Llama's heads are wider here than width / heads, so that the two cannot be taken for each other."""

Values = dict[str, Tensor]
Forward = Callable[[Mapping[str, Tensor], Tensor, Mapping[str, Tensor]], Values]


class _Pass:
    """The values of one pass by their sites; what is given takes the place of what is computed."""

    def __init__(self, weights: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
        self.weights, self.given = weights, given
        self.values: Values = {}

    def at(self, site: str, computed: Tensor) -> Tensor:
        self.values[site] = self.given.get(site, computed)
        return self.values[site]

    def matrix(self, name: str) -> Tensor:
        return self.weights[f"{name}.weight"]

    def bias(self, name: str) -> Tensor:
        return self.weights[f"{name}.bias"]


def _by_head(joined: Tensor, size: int) -> Tensor:
    """`(token, head · size)` as `(head, token, size)`."""
    return joined.reshape(len(joined), -1, size).transpose(0, 1)


def _attended(run: _Pass, block: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the heads find, `(token, head · size)`, from queries, keys and values `(head, token, size)`."""
    hidden_keys = torch.ones(q.shape[1], k.shape[1]).triu(1).bool()
    scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[2])).masked_fill(hidden_keys, -torch.inf)
    weights = run.at(f"{block}.attn.scores", scores).exp()
    pattern = run.at(f"{block}.attn.pattern", weights / weights.sum(-1, keepdim=True))
    return run.at(f"{block}.attn.heads", (pattern @ v).transpose(0, 1).flatten(1))


def gpt2(weights: Mapping[str, Tensor], ids: Tensor, given: Mapping[str, Tensor]) -> Values:
    """The values of a GPT-2's pass by site, `(token, width)` or `(head, query, key)`.

    Args:
        weights: the model's parameters by name.
        ids: token ids of one row, `(token,)`.
        given: values to take in place of those that the pass computes, by site.
    """
    run = _Pass(weights, given)

    def norm(name: str, h: Tensor) -> Tensor:
        centred = h - h.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return run.at(f"{name}.output", centred / spread * run.matrix(name) + run.bias(name))

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ run.matrix(name) + run.bias(name)

    words = run.at("transformer.wte.output", run.matrix("transformer.wte")[ids])
    h = run.at("embed.output", words + run.matrix("transformer.wpe")[: len(ids)])
    for layer in range(LAYERS):
        name, block = f"transformer.h.{layer}", f"blocks[{layer}]"
        h = run.at(f"{block}.input", h)
        q, k, v = linear(f"{name}.attn.c_attn", norm(f"{name}.ln_1", h)).split(WIDTH, dim=1)
        q, k, v = (run.at(f"{block}.attn.{n}", t) for n, t in (("q", q), ("k", k), ("v", v)))
        heads = _attended(run, block, *(_by_head(t, GPT2_HEAD) for t in (q, k, v)))
        h = h + run.at(f"{block}.attn.output", linear(f"{name}.attn.c_proj", heads))
        x = run.at(f"{name}.mlp.c_fc.output", linear(f"{name}.mlp.c_fc", norm(f"{name}.ln_2", h)))
        x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        x = run.at(f"{name}.mlp.c_proj.input", x)
        h = run.at(f"{block}.output", h + run.at(f"{block}.mlp.output", linear(f"{name}.mlp.c_proj", x)))
    h = run.at("final_norm.output", norm("transformer.ln_f", h))
    run.at("unembed", h @ run.matrix("lm_head").T)
    return run.values


def llama(weights: Mapping[str, Tensor], ids: Tensor, given: Mapping[str, Tensor]) -> Values:
    """The values of a Llama's pass; as `gpt2`."""
    run = _Pass(weights, given)

    def norm(name: str, h: Tensor) -> Tensor:
        size = (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return run.at(f"{name}.output", h / size * run.matrix(name))

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ run.matrix(name).T

    h = run.at("embed.output", run.matrix("model.embed_tokens")[ids])
    for layer in range(LAYERS):
        name, block = f"model.layers.{layer}", f"blocks[{layer}]"
        h = run.at(f"{block}.input", h)
        x = norm(f"{name}.input_layernorm", h)
        q, k, v = (run.at(f"{block}.attn.{n}", linear(f"{name}.self_attn.{n}_proj", x)) for n in "qkv")
        q, k, v = _turned(_by_head(q, LLAMA_HEAD)), _turned(_by_head(k, LLAMA_HEAD)), _by_head(v, LLAMA_HEAD)
        shares = HEADS // KEY_VALUE_HEADS
        heads = _attended(run, block, q, k.repeat_interleave(shares, 0), v.repeat_interleave(shares, 0))
        h = h + run.at(f"{block}.attn.output", linear(f"{name}.self_attn.o_proj", heads))
        x = norm(f"{name}.post_attention_layernorm", h)
        gate = run.at(f"{name}.mlp.gate_proj.output", linear(f"{name}.mlp.gate_proj", x))
        up = run.at(f"{name}.mlp.up_proj.output", linear(f"{name}.mlp.up_proj", x))
        x = run.at(f"{name}.mlp.down_proj.input", gate / (1 + (-gate).exp()) * up)
        h = run.at(f"{block}.output", h + run.at(f"{block}.mlp.output", linear(f"{name}.mlp.down_proj", x)))
    h = run.at("final_norm.output", norm("model.norm", h))
    run.at("unembed", linear("lm_head", h))
    return run.values


def _turned(vectors: Tensor) -> Tensor:
    """Rotary embeddings of `(head, token, size)`: number i and number i + size/2 turn together."""
    half = vectors.shape[2] // 2
    angles = torch.arange(vectors.shape[1])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    a, b = vectors[..., :half], vectors[..., half:]
    turned = (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin())
    return torch.cat(turned, dim=-1)


FORWARDS: dict[str, Forward] = {"gpt2": gpt2, "llama": llama}
HEAD_SIZES = {"gpt2": GPT2_HEAD, "llama": LLAMA_HEAD}


@functools.cache
@torch.random.fork_rng(devices=[])
def two_layers(family: str) -> Any:
    """A two-layer model of random weights, none of them 0 or 1; the same one each time."""
    torch.manual_seed(3)
    if family == "gpt2":
        model: Any = hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=HIDDEN, n_positions=32,
                initializer_range=0.3, tie_word_embeddings=False, bos_token_id=1, eos_token_id=None, pad_token_id=0,
            )
        )  # fmt: skip
    else:
        model = hf.LlamaForCausalLM(
            hf.LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
                num_key_value_heads=KEY_VALUE_HEADS, head_dim=LLAMA_HEAD, intermediate_size=HIDDEN,
                max_position_embeddings=32, initializer_range=0.3, rms_norm_eps=1e-6, bos_token_id=1,
                eos_token_id=None, pad_token_id=0,
            )
        )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@functools.cache
def weights_of(family: str) -> dict[str, Tensor]:
    """The parameters of `two_layers`, by name."""
    return {name: parameter.detach() for name, parameter in two_layers(family).named_parameters()}


def forward(family: str, ids: Tensor, given: Mapping[str, Tensor] | None = None) -> Values:
    """All values of the pass of `two_layers(family)` over one row of token ids `(token,)`."""
    with torch.no_grad():
        return FORWARDS[family](weights_of(family), ids, given or {})
