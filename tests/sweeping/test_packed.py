"""Rows that are packed one behind the other are each the run that they are alone."""

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reftlab as rl
from reftlab.runtime.cone import prefix
from reftlab.sweeping.packed import Packed
from reftlab.sweeping.schedule import Job, packed
from tests.models import VOCABULARY, build
from tests.sweeping.by_hand import blocks_of, patched_map, prompts
from tests.sweeping.test_cells import close
from tests.sweeping.test_schedule import JOBS

sweep = functools.partial(rl.sweep, metric=rl.logit_diff(7, 9), progress=False)


@pytest.fixture
def packs(monkeypatch):
    """Each batch's numbers of packed rows, one for each first token."""
    found = []
    own, logits = prefix._attend_packed, Packed.logits

    def attending(query, key, value, segments, mask):
        found[-1].append([segment.rows for segment in segments])
        return own(query, key, value, segments, mask)

    def noting(self, *args, **kwargs):
        found.append([])
        result = logits(self, *args, **kwargs)
        assert self.attention.usable
        return result

    monkeypatch.setattr(prefix, "_attend_packed", attending)
    monkeypatch.setattr(Packed, "logits", noting)
    return found


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gemma3", "gpt2", "gpt_neox", "mixtral", "phi3", "olmo2"]
)
def test_all_cells_are_one_batch_and_each_is_a_hooked_pass(family, packs):
    model = build(family)
    clean, corrupt = prompts()
    found = sweep(model, clean, corrupt, ["blocks[*].input", "blocks[*].output"])
    modules = list(blocks_of(model))
    wanted = [patched_map(model, modules, side, corrupt, clean) for side in ("input", "output")]
    close(found.values[0, :, 0], torch.cat(wanted))
    assert found.why == ()
    assert len(packs) == 1
    # Three tokens are the same in both prompts; all others begin rows, fewer in the first block.
    assert len(packs[0][-1]) == 8
    assert sum(packs[0][-1]) > sum(packs[0][0])


@pytest.mark.parametrize("size", [1, 4, 7])
def test_no_batch_has_more_rows_than_it_may(packs, size):
    model = build("llama")
    clean, corrupt = prompts()
    found = sweep(model, clean, corrupt, batch_size=size)
    assert max(sum(rows) for batch in packs for rows in batch) == size
    close(found.values[0, :, 0], patched_map(model, list(blocks_of(model)), "output", corrupt, clean))


def test_several_runs_of_one_cell_are_packed_too(packs):
    clean, _ = prompts()
    run = functools.partial(sweep, build("llama"), clean, kind="noise", samples=3, batch_size=200)
    close(run().values, run(cone=False).values)
    assert packs


def test_positions_of_several_tokens_begin_with_their_first(packs):
    clean, corrupt = prompts()
    run = functools.partial(sweep, build("llama"), clean, corrupt, positions=["last(3)", "last(5)", "last"])
    close(run().values, run(cone=False).values)
    assert packs


@pytest.mark.parametrize("reason", ["edit", "inside", "long", "eager", "half"])
def test_what_is_not_packed_is_right_as_well(packs, reason):
    model = build("llama")
    if reason == "eager":
        model.set_attn_implementation("eager")
    if reason == "half":
        model.double().bfloat16()
    edit = rl.Edit("half", at="blocks[1].output", positions="all", intervention=rl.Scale(0.5))
    bound = rl.InterventionGraph(*[edit] * (reason == "edit")).bind(model)
    clean, corrupt = prompts(70 if reason == "long" else 11)
    sites = ["blocks[*].output", "blocks[*].mlp.output"] if reason == "inside" else "blocks[*].output"
    positions = ["last", "first(9)"] if reason == "long" else "all"
    run = functools.partial(sweep, bound, clean, corrupt, sites, positions=positions)
    close(run().values, run(cone=False).values, atol=5e-2 if reason == "half" else 1e-5)
    assert not any(packs)


def test_a_metric_of_ones_own_sees_the_whole_vocabulary(packs):
    model = build("gpt2")
    clean, corrupt = prompts()

    def entropy(logits):
        return torch.distributions.Categorical(logits=logits).entropy()

    found, plain = (sweep(model, clean, corrupt, metric=entropy, cone=cone) for cone in (True, False))
    np.testing.assert_allclose(found.values, plain.values, atol=1e-5)
    assert packs


def test_blocks_whose_arguments_are_unknown_are_run_on_a_staircase(monkeypatch):
    model = build("llama")
    block = type(model.model.layers[0])
    own, rotary = block.forward, type(model.model.rotary_emb)

    def forward(self, hidden, position_embeddings=None, **kwargs):
        return own(self, hidden, position_embeddings=position_embeddings[1:], **kwargs)

    def turning(self, *args, **kwargs):
        return torch.zeros(5, 3), *turn(self, *args, **kwargs)

    turn = rotary.forward
    monkeypatch.setattr(block, "forward", forward)
    monkeypatch.setattr(rotary, "forward", turning)
    clean, corrupt = prompts()
    found = sweep(model, clean, corrupt)
    close(found.values[0, :, 0], patched_map(model, list(blocks_of(model)), "output", corrupt, clean))


@pytest.mark.parametrize("size", [1, 2, 3, 5, None])
def test_batches_of_another_make_up_are_checked_and_have_a_way_out_too(monkeypatch, size):
    model = build("llama")
    attention, rotary = type(model.model.layers[0].self_attn), type(model.model.rotary_emb)
    own, turn = attention.forward, rotary.forward

    def turning(self, *args, **kwargs):
        return tuple(part[:, None] for part in turn(self, *args, **kwargs))

    def forward(self, hidden_states, position_embeddings=None, **kwargs):
        embeddings = tuple(part[:, 0] for part in position_embeddings)
        return own(self, hidden_states, position_embeddings=embeddings, **kwargs)

    monkeypatch.setattr(rotary, "forward", turning)
    monkeypatch.setattr(attention, "forward", forward)
    clean, corrupt = prompts()
    found = sweep(model, clean, corrupt, batch_size=size)
    close(found.values[0, :, 0], patched_map(model, list(blocks_of(model)), "output", corrupt, clean))
    assert not found.why


def test_a_model_that_cannot_be_entered_in_the_middle_is_run_whole():
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    torch.manual_seed(0)
    config = GPTBigCodeConfig(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=3, n_head=4)
    model = GPTBigCodeForCausalLM(config).eval()
    clean, corrupt = prompts()
    run = functools.partial(sweep, model, clean, corrupt, "transformer.h[*].output")
    found = run()
    close(found.values, run(cone=False).values)
    assert "cannot be entered in the middle" in found.why[0]


def test_two_threads_may_sweep_one_model():
    model = build("llama")
    clean, corrupt = prompts()
    bound = rl.InterventionGraph().bind(model)
    wanted = sweep(bound, clean, corrupt).values
    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(sweep, bound, clean, corrupt, batch_size=size) for size in (2, 3, 4, 5) * 4]
        for run in runs:
            close(run.result().values, wanted)
    assert model.config._attn_implementation == "sdpa"


@given(JOBS, st.one_of(st.none(), st.integers(1, 9)))
def test_every_job_is_in_one_batch_that_begins_with_its_first_token(jobs, size):
    batches = packed(jobs, 12, batch_size=size)
    assert sorted(job.cell for batch in batches for job in batch.jobs) == [job.cell for job in jobs]
    for batch in batches:
        assert batch.start == min(job.start for job in batch.jobs)
        rows = [job.rows for job in batch.jobs]
        assert size is None or sum(rows) <= max(size, *rows)
    assert len(batches) == 1 or size is not None


def test_what_a_machine_takes_at_once_bounds_a_batch():
    jobs = [Job(number, number % 10, 0, rows=40) for number in range(100)]
    sizes = [sum(job.rows * (50 - job.start) for job in batch.jobs) for batch in packed(jobs, 50)]
    assert len(sizes) > 1
    assert max(sizes) <= 4096 + 40 * 50
    assert max(sizes) - min(sizes) <= 2 * 40 * 50
