"""TransformerLens 2, with HookedTransformer: passes may begin above the first block (`start_at_layer`).

Its user can so keep what lies below an edit by hand; both this and plain hooks are timed. Works on which the
version does not bear are timed with TransformerLens 4 alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_llama_weights
from works import (
    BLOCK,
    BLOCKS,
    CELLS_TIMED,
    FORWARD,
    LONG,
    MAP,
    READ_BLOCK,
    READING,
    SHORT,
    Bench,
    LoReFT,
    batch,
    cell_batches,
    ioi,
    lens_hooks,
    lens_site,
    load,
    logit_difference,
    stepper,
    tokens_to_read,
)

bare, tokenizer = load()


def hooked_transformer() -> HookedTransformer:
    """Its own conversion of Llama weights; `from_pretrained` knows models by their names on the hub alone."""
    own = bare.config
    config = HookedTransformerConfig(
        d_model=own.hidden_size,
        d_head=own.head_dim,
        n_heads=own.num_attention_heads,
        d_mlp=own.intermediate_size,
        n_layers=own.num_hidden_layers,
        n_ctx=512,
        eps=own.rms_norm_eps,
        d_vocab=own.vocab_size,
        act_fn="silu",
        n_key_value_heads=own.num_key_value_heads,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=own.head_dim,
        rotary_base=own.rope_theta,
        final_rms=True,
        gated_mlp=True,
        device="cpu",
        dtype=torch.float32,
        default_prepend_bos=False,
    )
    made = HookedTransformer(config, tokenizer=tokenizer)
    made.load_state_dict(convert_llama_weights(bare, config), strict=False)
    return made.eval().requires_grad_(False)


model = hooked_transformer()


def logits_of(residual: Tensor, kept: int) -> Tensor:
    """Logits of the last tokens, from the residual stream after the last block."""
    return model.unembed(model.ln_final(residual[:, -kept:]))


def upwards(residual: Tensor, block: int) -> Tensor:
    """The residual stream after the last block, from what leaves `block`."""
    if block == BLOCKS - 1:
        return residual
    return model(residual, start_at_layer=block + 1, stop_at_layer=BLOCKS)


def training(work: str, repeats: int) -> Callable[[Bench], None]:
    def do(bench: Bench) -> None:
        data = batch(work)
        target = data.labels[:, data.prompt :].flatten()
        with torch.no_grad():
            kept = model(data.ids, stop_at_layer=BLOCK + 1)

        def edited(hidden: Tensor, edit: LoReFT) -> Tensor:
            new = hidden.clone()
            new[:, data.last] = edit(hidden[:, data.last])
            return new

        def loss(logits: Tensor) -> Tensor:
            return torch.nn.functional.cross_entropy(logits[:, -data.kept : -1].flatten(0, 1), target)

        def hooks(edit: LoReFT) -> list[Any]:
            return [(lens_site(BLOCK), lambda hidden, hook: edited(hidden, edit))]

        def full(edit: LoReFT) -> Tensor:
            return loss(model.run_with_hooks(data.ids, fwd_hooks=hooks(edit)))

        def few(edit: LoReFT) -> Tensor:
            top = model.run_with_hooks(data.ids, fwd_hooks=hooks(edit), stop_at_layer=BLOCKS)
            return loss(logits_of(top, data.kept))

        def from_kept(edit: LoReFT) -> Tensor:
            return loss(logits_of(upwards(edited(kept, edit), BLOCK), data.kept))

        def step(value: Callable[[LoReFT], Tensor]) -> Callable[[], float]:
            edit = LoReFT()
            return stepper(lambda: value(edit), edit.parameters())

        ways = {
            "logits only where labelled": step(few),
            "from residuals kept by hand (start_at_layer)": step(from_kept),
        }
        if work == SHORT:
            ways["all logits"] = step(full)
        bench.check_losses(work, ways)
        bench.time(work, ways, repeats, warm=0)

    return do


class Map:
    def __init__(self) -> None:
        self.clean, self.corrupt, self.answers = ioi(tokenizer)

    def cache(self, ids: Tensor) -> Any:
        names = [lens_site(block) for block in range(BLOCKS)]
        return model.run_with_cache(ids, names_filter=names)[1]

    def cell(self, cache: Any, block: int, token: int) -> Tensor:
        def patch(hidden: Tensor, hook: Any) -> Tensor:
            hidden[:, token] = cache[lens_site(block)][:, token]
            return hidden

        top = model.run_with_hooks(self.corrupt, fwd_hooks=[(lens_site(block), patch)], stop_at_layer=BLOCKS)
        return logit_difference(logits_of(top, 1)[:, -1], self.answers)

    def rows(self) -> Tensor:
        """A row for each cell, many rows in one whole pass, by hand."""
        cache, maps = self.cache(self.clean), []
        for some in cell_batches():
            hooks = lens_hooks(some, cache)
            ids = self.corrupt.expand(len(some), -1)
            top = model.run_with_hooks(ids, fwd_hooks=hooks, stop_at_layer=BLOCKS)
            maps.append(logit_difference(logits_of(top, 1)[:, -1], self.answers))
        return torch.cat(maps)

    def from_middle(self) -> Tensor:
        """The cells of a block as rows of a pass that begins above it, by hand."""
        clean, corrupt, maps = self.cache(self.clean), self.cache(self.corrupt), []
        tokens = torch.arange(14)
        for block in range(BLOCKS):
            patched = corrupt[lens_site(block)].repeat(14, 1, 1)
            patched[tokens, tokens] = clean[lens_site(block)][0, tokens]
            top = upwards(patched, block)
            maps.append(logit_difference(logits_of(top, 1)[:, -1], self.answers))
        return torch.cat(maps)


def patching(bench: Bench) -> None:
    with torch.inference_mode():
        grid = Map()
        ways = {
            "batched, a row per cell, by hand": grid.rows,
            "14 cells a pass that begins above their block, by hand": grid.from_middle,
        }
        cache = grid.cache(grid.clean)
        some = lambda: [grid.cell(cache, *cell) for cell in CELLS_TIMED]  # noqa: E731
        bench.time_map({"one forward per cell, by hand": some}, ways)


def reading(bench: Bench) -> None:
    ids = tokens_to_read()
    read = lambda: model(ids, stop_at_layer=READ_BLOCK + 1)  # noqa: E731
    with torch.inference_mode():
        bench.time_reading(lambda: bare(ids, use_cache=False), "stop_at_layer", read)


def forward(bench: Bench) -> None:
    ids = tokens_to_read()
    edit = LoReFT()

    def change(hidden: Tensor, hook: Any) -> Tensor:
        hidden[:, -1] = edit(hidden[:, -1])
        return hidden

    with torch.inference_mode():
        ways = {
            "bare": lambda: bare(ids, use_cache=False),
            "its model without hooks": lambda: model(ids),
            "one edit": lambda: model.run_with_hooks(ids, fwd_hooks=[(lens_site(BLOCK), change)]),
        }
        bench.time(FORWARD, ways, repeats=3)


if __name__ == "__main__":
    Bench.of("transformer_lens_2").run(
        {
            SHORT: training(SHORT, 3),
            LONG: training(LONG, 1),
            MAP: patching,
            READING: reading,
            FORWARD: forward,
        }
    )
