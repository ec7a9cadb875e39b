"""Edits of which it is known by construction what matters."""

from __future__ import annotations

import torch

import reftlab as rl
from tests.explaining.conftest import bound, set_directions, vocabulary

PROMPTS = [
    "the sea",
    "a cat and a dog",
    "snow on a hill",
    "who goes there",
    "b",
    "ten to one",
    "up",
    "by and by",
]
METRIC = rl.logit_diff("z", "q")
WIDE = "blocks[2].mlp"


def logit_direction(model, tokenizer):
    """The direction along which `METRIC` grows, of length 1."""
    head = model.get_output_embeddings().weight.detach()
    z, q = (tokenizer.convert_tokens_to_ids(letter) for letter in "zq")
    return torch.nn.functional.normalize(head[z] - head[q], dim=0)


def one_useful_dimension(model, tokenizer, seed=0):
    """Four dimensions before the last MLP's final matrix: one that it turns into `METRIC`, and three of its
    null space, which nothing after it can see. The useful one is first by gain, or third, as the seed says."""
    generator = torch.Generator().manual_seed(seed)
    matrix = model.model.layers[2].mlp.down_proj.weight.detach()
    wide = matrix.shape[1]
    null = torch.linalg.svd(matrix.double()).Vh[len(matrix) :].float()
    mixed = torch.linalg.qr(torch.randn(3, len(null), generator=generator).T).Q.T @ null
    useful = torch.nn.functional.normalize(
        torch.linalg.pinv(matrix) @ logit_direction(model, tokenizer), dim=0
    )
    place = 2 * (seed % 2)
    write = torch.cat([mixed[:place], useful[None], mixed[place:]])
    read = torch.linalg.qr(torch.randn(wide, 4, generator=generator)).Q.T
    edit = rl.Edit(
        "e", at="model.layers[2].mlp.down_proj.input", positions="last", intervention=rl.LoReFT(rank=4)
    )
    reft = bound(model, tokenizer, edit)
    bias = torch.where(torch.arange(4) == place, 6.0, 3.0)
    set_directions(reft.interventions["e"], write, torch.tensor([0.4, 0.3, 0.2, 0.1]), read, bias)
    assert len(matrix) < wide
    assert vocabulary() == model.config.vocab_size
    return reft, place


def with_amounts(built, write, amounts):
    """Make a LoReFT add always the same: `amounts` along the rows of `write`."""
    read = torch.zeros_like(write)
    set_directions(built, write, torch.zeros(len(write)), read, amounts)
