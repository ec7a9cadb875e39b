"""Every cell of a sweep is the number of one forward pass with plain hooks."""

import contextlib
import functools

import numpy as np
import pytest
import torch

import reftlab as rl
from tests.models import HEAD_SIZE, WIDTH, build, hook_count
from tests.sweeping.by_hand import (
    CAUSAL,
    SHARED,
    blocks_of,
    changing,
    difference,
    last_logits,
    patched,
    patched_map,
    prompts,
    value_at,
)

METRIC = rl.logit_diff(7, 9)
sweep = functools.partial(rl.sweep, metric=METRIC, progress=False)


def close(found, wanted, atol=1e-5):
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), atol=atol, rtol=0)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("family", CAUSAL)
def test_block_outputs_are_patched_as_by_one_hooked_pass_per_cell(family, direction):
    model = build(family)
    clean, corrupt = prompts()
    found = sweep(model, clean, corrupt, direction=direction)
    base, source = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
    close(found.values[0, :, 0], patched_map(model, list(blocks_of(model)), "output", base, source))
    close(found.clean, [difference(last_logits(model, clean))])
    close(found.corrupt, [difference(last_logits(model, corrupt))])
    assert found.why == ()


@pytest.mark.parametrize("family", CAUSAL)
def test_cells_that_cannot_matter_are_not_run_and_are_counted(family):
    model = build(family)
    clean, corrupt = prompts()
    found = sweep(model, clean, corrupt)
    blocks, tokens = len(blocks_of(model)), 11
    assert list(found.counts.values()) == [
        blocks * SHARED,
        tokens - SHARED - 1,
        blocks * (tokens - SHARED) - (tokens - SHARED - 1),
    ]
    assert (found.effect[0, :, 0, :SHARED] == 0).all()


@pytest.mark.parametrize(
    ("family", "parts"),
    [
        ("llama", {"attn.output": "self_attn", "mlp.output": "mlp", "attn.k": "self_attn.k_proj"}),
        ("gemma3", {"attn.output": "self_attn", "mlp.output": "mlp", "attn.q": "self_attn.q_proj"}),
        ("gpt2", {"attn.output": "attn", "mlp.output": "mlp"}),
        ("gpt_neox", {"attn.output": "attention", "mlp.output": "mlp"}),
        ("mixtral", {"attn.v": "self_attn.v_proj", "mlp.output": "mlp"}),
        ("bloom", {"mlp.output": "mlp.dense_4h_to_h"}),
        ("falcon", {"attn.output": "self_attention", "mlp.output": "mlp"}),
        ("falcon_multi_query", {"mlp.output": "mlp"}),
    ],
)
def test_sites_inside_blocks_are_patched_there(family, parts):
    model = build(family)
    clean, corrupt = prompts(seed=4)
    found = sweep(model, clean, corrupt, [f"blocks[*].{part}" for part in parts])
    for number, module in enumerate(parts.values()):
        modules = [block.get_submodule(module) for block in blocks_of(model)]
        wanted = patched_map(model, modules, "output", corrupt, clean)
        close(found.values[0, 3 * number : 3 * number + 3, 0], wanted)
    assert found.why == ()


@pytest.mark.parametrize("cone", [True, False])
def test_values_that_a_model_adds_to_in_place_are_those_from_before(cone):
    model = build("falcon")  # whose MLP's output becomes that of the block
    clean, corrupt = prompts(8, seed=4)
    modules = [block.mlp for block in blocks_of(model)]
    filled = sweep(model, clean, None, "blocks[*].mlp.output", kind="ablate", fill="mean", cone=cone)
    for block, module in enumerate(modules):
        mean = value_at(model, module, "output", clean)[0].mean(0, keepdim=True)
        runs = [patched(model, module, "output", clean, [t], mean) for t in range(8)]
        close(filled.values[0, block, 0], torch.stack([difference(run) for run in runs]))
    swapped = sweep(model, clean, corrupt, "blocks[*].mlp.output", cone=cone)
    close(swapped.values[0, :, 0], patched_map(model, modules, "output", corrupt, clean))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logits_are_swept_as_any_site(family):
    model = build(family)
    clean, corrupt = prompts(6)
    found = sweep(model, clean, corrupt, ["unembed", "blocks[2].mlp.output"])
    mlp = blocks_of(model)[2].mlp
    close(found.values[0, 0, 0], patched_map(model, [model.lm_head], "output", corrupt, clean)[0])
    close(found.values[0, 1, 0], patched_map(model, [mlp], "output", corrupt, clean)[0])
    close(found.values[0, 0, 0, -1], found.clean[0])
    assert found.why == ()


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon_alibi"])
def test_the_ends_of_the_chain_and_inputs_of_blocks_are_swept_too(family):
    model = build(family)
    clean, corrupt = prompts(seed=2)
    found = sweep(model, clean, corrupt, ["embed.output", "blocks[1].input", "final_norm.output"])
    inner = model.model if family == "llama" else model.transformer
    ends = [inner.embed_tokens, inner.norm] if family == "llama" else [None, inner.ln_f]
    ends[0] = {"gpt2": lambda: inner.drop, "falcon_alibi": lambda: inner.word_embeddings}.get(
        family, lambda: ends[0]
    )()
    close(found.values[0, 0, 0], patched_map(model, ends[:1], "output", corrupt, clean)[0])
    close(found.values[0, 1, 0], patched_map(model, [blocks_of(model)[1]], "input", corrupt, clean)[0])
    close(found.values[0, 2, 0], patched_map(model, ends[1:], "output", corrupt, clean)[0])
    assert found.why == ()


@pytest.mark.parametrize(
    ("family", "project"), [("llama", "self_attn.o_proj"), ("gpt2", "attn.c_proj"), ("bloom", None)]
)
def test_heads_are_patched_one_by_one(family, project):
    model = build(family)
    clean, corrupt = prompts(seed=3)
    found = sweep(model, clean, corrupt, "blocks[*].attn.heads", heads=True)
    modules = [block.get_submodule(project or "self_attention.dense") for block in blocks_of(model)]
    size = HEAD_SIZE if family == "llama" else WIDTH // 4
    for head in range(4):
        wanted = patched_map(model, modules, "input", corrupt, clean, slice(head * size, (head + 1) * size))
        close(found.values[0, :, head], wanted)
    assert found.heads == (0, 1, 2, 3)


def test_a_fused_projections_queries_are_patched_by_head():
    model = build("gpt2")
    clean, corrupt = prompts(seed=3)
    found = sweep(model, clean, corrupt, "blocks[*].attn.k", heads=True)
    modules = [block.attn.c_attn for block in blocks_of(model)]
    for head in range(4):
        keys = slice(WIDTH + 8 * head, WIDTH + 8 * head + 8)
        close(found.values[0, :, head], patched_map(model, modules, "output", corrupt, clean, keys))


@pytest.mark.parametrize("family", ["mamba", "bert"])
def test_where_no_cone_holds_whole_passes_give_the_same_numbers_and_the_reason_is_told(family):
    model = build(family)
    clean, corrupt = prompts(seed=1)
    found = sweep(model, clean, corrupt)
    close(found.values[0, :, 0], patched_map(model, list(blocks_of(model)), "output", corrupt, clean))
    assert {"mamba": "recurrent state", "bert": "bidirectional"}[family] in found.why[0]
    assert found.why[0] in repr(found)


def test_an_encoder_decoder_is_swept_on_its_decoders_tokens():
    model = build("t5")
    clean, corrupt = prompts(6, seed=1)
    decoder = torch.tensor([[0, 5, 17, 44]])
    sides = [{**side, "decoder_input_ids": decoder} for side in (clean, corrupt)]
    found = sweep(model, *sides, "decoder.blocks[*].output")
    for block, module in enumerate(model.decoder.block):
        values = value_at(model, module, "output", sides[0])[0]
        runs = [patched(model, module, "output", sides[1], [t], values[[t]]) for t in range(4)]
        close(found.values[0, block, 0], torch.stack([difference(run) for run in runs]))
    assert "encoder" in " ".join(found.why)


def test_cone_and_whole_passes_agree_and_the_cone_can_be_left_out():
    model = build("llama")
    clean, corrupt = prompts()
    whole = sweep(model, clean, corrupt, cone=False, batch_size=1)
    close(sweep(model, clean, corrupt).values, whole.values)
    assert whole.why == ("cone=False",)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_the_size_of_a_batch_changes_no_number(batch_size):
    model = build("gemma3")
    clean, corrupt = prompts()
    found = sweep(model, clean, corrupt, batch_size=batch_size)
    close(found.values, sweep(model, clean, corrupt).values)


def test_bfloat16_cells_are_as_close_to_float32_as_bfloat16_passes_are():
    model = build("llama")
    clean, corrupt = prompts()
    exact = sweep(model, clean, corrupt).values
    low = build("llama").bfloat16()
    found = sweep(low, clean, corrupt)
    whole = sweep(low, clean, corrupt, cone=False)
    assert found.why == ()
    assert np.abs(found.values - exact).max() <= 1.5 * np.abs(whole.values - exact).max() + 0.02


def test_edits_stay_in_force_in_every_run():
    model = build("llama")
    clean, corrupt = prompts(seed=6)
    graph = rl.InterventionGraph(
        rl.Edit("half", at="blocks[1].mlp.output", positions="all", intervention=rl.Scale(0.5)),
        rl.Edit("double", at="blocks[0].output", positions="last", intervention=rl.Scale(2.0)),
        rl.Edit("again", at="blocks[2].output", positions="last(2)", intervention=rl.Scale(1.5)),
    )
    found = sweep(graph.bind(model), clean, corrupt)
    blocks = blocks_of(model)

    def scaled(factor, tokens):
        def act(tensor):
            tensor[:, tokens] *= factor
            return tensor

        return act

    with (
        changing(blocks[1].mlp, "output", scaled(0.5, slice(None))),
        changing(blocks[0], "output", scaled(2.0, slice(-1, None))),
        changing(blocks[2], "output", scaled(1.5, slice(-2, None))),
    ):
        wanted = patched_map(model, list(blocks), "output", corrupt, clean)
    close(found.values[0, :, 0], wanted)
    assert found.why == ()
    assert np.abs(found.values - sweep(model, clean, corrupt).values).max() > 0.1


EDITED = {
    "embed.output": ("model.embed_tokens", "output", ""),
    "blocks[1].input": ("model.layers.1", "input", "acts at a block's input"),
    "blocks[1].output": ("model.layers.1", "output", ""),
    "blocks[1].attn.q": ("model.layers.1.self_attn.q_proj", "output", ""),
    "blocks[2].attn.heads": ("model.layers.2.self_attn.o_proj", "input", ""),
    "blocks[2].mlp.output": ("model.layers.2.mlp", "output", ""),
    "final_norm.output": ("model.norm", "output", ""),
    "unembed": ("lm_head", "output", "acts at the head"),
    "unembed.input": ("lm_head", "input", "acts at the head"),
}


@pytest.mark.parametrize("positions", ["all", "last(2)"])
@pytest.mark.parametrize("at", list(EDITED))
def test_an_edit_at_any_site_acts_in_every_row_of_every_cell(at, positions):
    model = build("llama")
    clean, corrupt = prompts(9, seed=6)
    module, side, why = EDITED[at]
    edit = rl.Edit("half", at=at, positions=positions, intervention=rl.Scale(0.5))
    found = sweep(rl.InterventionGraph(edit).bind(model), clean, corrupt)

    def halve(tensor):
        tensor[:, slice(None) if positions == "all" else slice(-2, None)] *= 0.5
        return tensor

    with changing(model.get_submodule(module), side, halve):
        wanted = patched_map(model, list(blocks_of(model)), "output", corrupt, clean)
    close(found.values[0, :, 0], wanted)
    assert [reason for reason in found.why if why in reason] if why else found.why == ()


def test_an_edit_where_rows_would_enter_makes_whole_passes():
    model = build("llama")
    clean, corrupt = prompts(seed=6)
    edit = rl.Edit("half", at="blocks[1].input", positions="all", intervention=rl.Scale(0.5))
    found = sweep(rl.InterventionGraph(edit).bind(model), clean, corrupt)
    with changing(blocks_of(model)[1], "input", lambda tensor: tensor * 0.5):
        wanted = patched_map(model, list(blocks_of(model)), "output", corrupt, clean)
    close(found.values[0, :, 0], wanted)
    assert "'half'" in found.why[0]


@contextlib.contextmanager
def doubling_if_loud(model, threshold):
    """Doubles block 1's output at the last token where block 0's is longer there than the threshold."""
    first, second = blocks_of(model)[:2]
    norms = []

    def listen(tensor):
        norms.append(float(tensor[0, -1].norm()))
        return tensor

    def double(tensor):
        tensor[:, -1] *= 2.0 if norms[-1] > threshold else 1.0
        return tensor

    with changing(first, "output", listen), changing(second, "output", double):
        yield norms


def test_an_edit_with_a_condition_makes_whole_passes():
    model = build("llama")
    clean, corrupt = prompts(seed=6)
    mlp = blocks_of(model)[0].mlp
    values = value_at(model, mlp, "output", clean)[0]
    with doubling_if_loud(model, 0.0) as norms:
        last_logits(model, corrupt)
        patched(model, mlp, "output", corrupt, [10], values[[10]])
    threshold = sum(norms) / 2  # between the two, so that the patch decides
    edit = rl.Edit(
        "loud", at="blocks[1].output", positions="last", intervention=rl.Scale(2.0),
        when=rl.norm("blocks[0].output") > threshold,
    )  # fmt: skip
    found = sweep(rl.InterventionGraph(edit).bind(model), clean, corrupt, "blocks[0].mlp.output")
    with doubling_if_loud(model, threshold) as norms:
        wanted = patched_map(model, [mlp], "output", corrupt, clean)
    assert {norm > threshold for norm in norms} == {False, True}
    close(found.values[0, :, 0], wanted)
    assert "'loud'" in found.why[0]


class LooksAhead(torch.nn.Module):
    """An MLP that looks at all tokens, which no list of families could know."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return self.inner(hidden) + hidden.mean(1, keepdim=True)


@pytest.mark.parametrize("part", ["", ".mlp"])
def test_a_model_that_breaks_the_cone_unseen_is_found_out_by_its_first_cells(part):
    model = build("llama")
    model.model.layers[1].mlp = LooksAhead(model.model.layers[1].mlp)
    clean, corrupt = prompts(rows=2)
    found = sweep(model, clean, corrupt, f"blocks[*]{part}.output")
    modules = [block.get_submodule(part[1:]) for block in blocks_of(model)]
    for row in (0, 1):
        pair = ({name: value[row : row + 1] for name, value in one.items()} for one in (corrupt, clean))
        close(found.values[row, :, 0], patched_map(model, modules, "output", *pair))
    assert "differed from a whole pass" in found.why[0]


class Counting(torch.nn.Embedding):
    """Knows how many rows the model was called with."""

    def forward(self, ids):
        self.rows = len(ids)
        return super().forward(ids)


class FirstRows(torch.nn.Module):
    """An MLP that adds to as many rows as the model was called with."""

    def __init__(self, inner, counting):
        super().__init__()
        self.inner = inner
        self.counting = [counting]

    def forward(self, hidden):
        added = torch.arange(len(hidden)) < self.counting[0].rows
        return self.inner(hidden) + added[:, None, None]


def test_what_goes_wrong_in_the_last_row_alone_is_found_out_too():
    model = build("llama")
    model.model.embed_tokens.__class__ = Counting
    model.model.layers[2].mlp = FirstRows(model.model.layers[2].mlp, model.model.embed_tokens)
    clean, corrupt = prompts()
    modules = [block.self_attn for block in blocks_of(model)]
    found = sweep(model, clean, corrupt, "blocks[*].attn.output")
    close(found.values[0, :, 0], patched_map(model, modules, "output", corrupt, clean))
    assert "differed from a whole pass" in found.why[0]
    # Packed rows are one row, as the model was called with.
    found = sweep(model, clean, corrupt)
    close(found.values[0, :, 0], patched_map(model, list(blocks_of(model)), "output", corrupt, clean))
    assert not found.why


@pytest.mark.parametrize(("edited", "checks"), [(False, 5), (True, 10)])
def test_each_kind_of_site_is_checked_and_each_prompt_where_edits_act(monkeypatch, edited, checks):
    model = build("llama")
    edit = rl.Edit("half", at="blocks[1].mlp.output", positions="all", intervention=rl.Scale(0.5))
    bound = rl.InterventionGraph(*[edit] * edited).bind(model)
    shapes = []
    forward = type(model).forward

    @functools.wraps(forward)
    def counting(self, *args, **kwargs):
        if not kwargs["input_ids"].is_meta:
            shapes.append((tuple(kwargs["input_ids"].shape), kwargs.get("past_key_values") is None))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counting)
    clean, corrupt = prompts(rows=2)
    sweep(bound, clean, corrupt, ["blocks[*].output", "blocks[*].attn.k"], batch_size=64)
    # Each pair's other run is a whole pass without a cache as well.
    whole = [shape for shape, uncached in shapes if uncached and shape[1] == 11]
    assert sum(rows for rows, _ in whole) == 2 + checks
    assert len(whole) < 2 + checks


def test_a_sweep_leaves_the_model_as_it_was():
    model = build("gpt2").train()
    model.transformer.h[1].eval()
    clean, corrupt = prompts()
    first = sweep(model, clean, corrupt, attribution=True)
    assert model.training
    assert not model.transformer.h[1].training
    assert model.transformer.h[2].training
    assert hook_count(model) == 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())
    close(first.values, sweep(model.eval(), clean, corrupt).values, atol=0)


def test_a_pass_that_fails_leaves_the_model_as_it_was():
    model = build("gpt2")
    clean, corrupt = prompts()

    def fails(logits):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sweep(model, clean, corrupt, metric=fails)
    assert hook_count(model) == 0
    assert not any("forward" in vars(module) for module in model.modules())
