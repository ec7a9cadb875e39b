"""What the tests of wrapped models share: an edit, its oracle, and a model with LoRA."""

from __future__ import annotations

import pytest
import torch

import reftlab as rl
from tests.models import WIDTH, batch_of, hook_count
from tests.oracle import assert_close, columns_by_hand, plain_edit
from tests.training.conftest import make_tokenizer

RAW = "model.layers[1].output"
LORA_PATH = f"base_model.model.{RAW}"
VECTOR = torch.linspace(-3.0, 3.0, WIDTH)


def graph(at=RAW, intervention=None, positions="last"):
    return rl.InterventionGraph(
        rl.Edit("edit", at=at, positions=positions, intervention=intervention or rl.Add(VECTOR))
    )


def last_columns(batch):
    return columns_by_hand(batch["attention_mask"], lambda real: [real[-1]])


def hooked(module, batch, change=None):
    """One plain hook on the last token of each row, which adds VECTOR where no `change` is given."""
    change = change or (lambda base, source, numbers: base + VECTOR)
    return plain_edit(module, batch["attention_mask"], last_columns(batch), change)


def assert_acts_as_a_hook(wrapped, oracle, block, at):
    """Forward and generate of an edit on `wrapped` equal a plain hook on `block` of the model `oracle`."""
    reft = graph(at).bind(wrapped)
    assert graph("blocks[1].output").bind(wrapped).edits[0].site == reft.edits[0].site
    for side in ("right", "left"):
        batch = batch_of((7, 4, 9), side)
        with torch.no_grad():
            got = reft(**batch).logits
            with hooked(block, batch):
                expected = oracle(**batch).logits
            bare = oracle(**batch).logits
        real = batch["attention_mask"].bool()
        assert_close(got[real], expected[real])
        assert not torch.allclose(got[real], bare[real], atol=1e-2)
    batch = batch_of((4, 6), "left")
    options = {"max_new_tokens": 5, "do_sample": False}
    got = reft.generate(**batch, **options)
    with hooked(block, batch):
        expected = oracle.generate(**batch, **options)
    assert got.equal(expected)
    assert not got.equal(oracle.generate(**batch, **options))
    assert hook_count(wrapped) == 0


def with_lora(model, **options):
    peft = pytest.importorskip("peft")
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(**{**settings, **options}))


def learner(model, at=LORA_PATH):
    torch.manual_seed(1)
    return graph(at, rl.LoReFT(rank=2)).bind(model, make_tokenizer())
