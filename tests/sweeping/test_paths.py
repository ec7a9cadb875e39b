"""Direct paths between heads, against runs in which everything else is held by plain hooks."""

import contextlib
import functools
import types

import numpy as np
import pytest

import reftlab as rl
from tests.models import HEAD_SIZE, WIDTH, build, hook_count
from tests.sweeping.by_hand import blocks_of, changing, difference, last_logits, prompts, value_at

METRIC = rl.logit_diff(7, 9)
sweep_paths = functools.partial(rl.sweep_paths, metric=METRIC, progress=False)

NAMES = {
    "llama": ("self_attn", "self_attn.o_proj", "mlp"),
    "gemma3": ("self_attn", "self_attn.o_proj", "mlp"),
    "gpt2": ("attn", "attn.c_proj", "mlp"),
    "gpt_neox": ("attention", "attention.dense", "mlp"),
    "falcon": ("self_attention", "self_attention.dense", "mlp"),
}


class Held:
    """A run's values, and hooks that hold modules to them."""

    def __init__(self, model, family, inputs):
        self.model, self.family, self.inputs = model, family, inputs
        self.attention, self.project, self.mlp = NAMES[family]
        self.size = HEAD_SIZE if family in ("llama", "gemma3") else WIDTH // 4

    def module(self, block, name):
        return blocks_of(self.model)[block].get_submodule(name)

    def value(self, block, name, side="output"):
        return value_at(self.model, self.module(block, name), side, self.inputs)

    def holding(self, block, name, features=slice(None)):
        """A hook that holds a module, or some of its features, to the values of the run without hooks."""
        kept = self.value(block, name)

        def hold(tensor):
            tensor[..., features] = kept[..., features]
            return tensor

        return changing(self.module(block, name), "output", hold)

    def putting(self, block, head, tokens, new):
        features = slice(head * self.size, (head + 1) * self.size)

        def put(tensor):
            tensor[:, tokens, features] = new[:, tokens, features]
            return tensor

        return changing(self.module(block, self.project), "input", put)

    def inputs_but(self, block, letter):
        """Hooks that hold those of queries, keys and values that are not `letter`."""
        others = [other for other in "qkv" if letter not in ("all", other)]
        if self.family == "gpt2":
            starts = {other: slice(WIDTH * n, WIDTH * n + WIDTH) for n, other in enumerate("qkv")}
            return [self.holding(block, "attn.c_attn", starts[other]) for other in others]
        return [self.holding(block, f"self_attn.{other}_proj") for other in others]


def path_by_hand(model, family, base, source, sender, receiver, letter="all", tokens=slice(None)):
    """The metric with one path patched: a run with all else held, then a run with the receiver's result."""
    held = Held(model, family, base)
    (sending, head), (hearing, other) = sender, receiver
    sent = value_at(model, held.module(sending, held.project), "input", source)
    between = range(sending, hearing)
    # Every value is taken before the first hook stands.
    holds = [held.holding(block, held.mlp) for block in between]
    holds += [held.holding(block, held.attention) for block in between if block > sending]
    holds += held.inputs_but(hearing, letter)
    with contextlib.ExitStack() as stack:
        for hold in (held.putting(sending, head, tokens, sent), *holds):
            stack.enter_context(hold)
        heard = value_at(model, held.module(hearing, held.project), "input", base)
    with held.putting(hearing, other, slice(None), heard):
        return float(difference(last_logits(model, base)))


def check(family, direction, letter, positions="all", tokens=slice(None)):
    model = build(family)
    clean, corrupt = prompts(9, seed=8)
    found = sweep_paths(model, clean, corrupt, inputs=letter, direction=direction, positions=positions)
    base, source = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
    frame = found.to_frame().set_index(["sender_block", "sender_head", "receiver_block", "receiver_head"])
    assert len(frame) == 3 * 4 * 4
    for sender, receiver in [((0, 1), (1, 2)), ((0, 3), (2, 0)), ((1, 0), (2, 3)), ((0, 2), (2, 2))]:
        wanted = path_by_hand(model, family, base, source, sender, receiver, letter, tokens)
        assert frame.loc[(*sender, *receiver), "value"] == pytest.approx(wanted, abs=2e-5)
    assert float(np.nanmax(np.abs(found.effect))) > 1e-3
    assert hook_count(model) == 0


@pytest.mark.parametrize("letter", ["all", "q", "k", "v"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_path_is_what_the_receiver_hears_with_all_else_held(family, letter):
    check(family, "denoise", letter)


@pytest.mark.parametrize("family", ["gemma3", "gpt_neox", "falcon"])
def test_norms_behind_heads_and_parallel_blocks_do_their_part(family):
    check(family, "noise", "all")


def test_senders_may_be_changed_at_some_tokens_only():
    check("llama", "noise", "all", positions=[5, 8], tokens=[5, 8])


def test_edits_stay_in_force_along_paths():
    model = build("llama")
    clean, corrupt = prompts(9, seed=8)
    graph = rl.InterventionGraph(
        rl.Edit("half", at="blocks[1].mlp.output", positions="all", intervention=rl.Scale(0.5)),
        rl.Edit("more", at="blocks[0].output", positions="last", intervention=rl.Scale(1.5)),
    )
    found = sweep_paths(graph.bind(model), clean, corrupt)

    def more(tensor):
        tensor[:, -1] *= 1.5
        return tensor

    first, second = blocks_of(model)[:2]
    with changing(first, "output", more), changing(second.mlp, "output", lambda tensor: tensor * 0.5):
        # A change that leaves block 0 meets the edit there before any later head hears it.
        for sender, receiver in [((1, 3), (2, 1)), ((1, 0), (2, 3))]:
            wanted = path_by_hand(model, "llama", corrupt, clean, sender, receiver)
            place = 4 * sender[0] + sender[1], 4 * receiver[0] + receiver[1]
            assert found.values[0][place] == pytest.approx(wanted, abs=2e-5)


def test_equal_prompts_have_nothing_to_send_and_are_done_at_once(tmp_path, monkeypatch):
    clean, _ = prompts(6)
    model, steps, calls = build("llama"), [], []
    bar = contextlib.nullcontext(types.SimpleNamespace(update=steps.append))
    monkeypatch.setattr("reftlab.sweeping.paths.tqdm", lambda **named: bar)

    def metric(logits):
        calls.append(len(logits))
        return difference(logits)

    metric.key = "difference"
    found = sweep_paths(model, clean, clean, metric=metric, folder=tmp_path)
    np.testing.assert_array_equal(found.effect[0, :4, 4:], 0.0)
    assert sum(steps) == 48
    calls.clear()
    again = sweep_paths(model, clean, clean, metric=metric, folder=tmp_path)
    assert calls == []
    assert sum(steps) == 96
    np.testing.assert_array_equal(again.values, found.values)


def test_several_pairs_have_means_intervals_and_a_figure():
    model = build("llama")
    clean, corrupt = prompts(9, rows=3)
    found = sweep_paths(model, clean, corrupt, inputs="q")
    singles = [
        sweep_paths(model, {"input_ids": a[None]}, {"input_ids": b[None]}, inputs="q").effect[0]
        for a, b in zip(clean["input_ids"], corrupt["input_ids"], strict=True)
    ]
    np.testing.assert_allclose(found.effect, np.array(singles), atol=1e-5)
    np.testing.assert_allclose(found.mean(), np.mean(singles, axis=0), atol=1e-5)
    low, high = found.interval()
    spread = 4.302653 * np.std(singles, axis=0, ddof=1) / np.sqrt(3)  # t, 97.5 %, 2 degrees of freedom
    np.testing.assert_allclose(high - low, 2 * spread, atol=1e-5)
    assert "n = 3" in found.plot().get_suptitle().replace("\n", " ")
    assert found.top(4)["effect"].abs().is_monotonic_decreasing
    assert "3 pairs" in repr(found)


def test_only_later_blocks_hear_and_only_those_asked_for():
    model = build("llama")
    clean, corrupt = prompts(9)
    found = sweep_paths(model, clean, corrupt, senders=[(1, 0), (0, 2)], receivers=[(1, 1), (2, 3)])
    whole = sweep_paths(model, clean, corrupt)
    assert np.isnan(found.values[0]).tolist() == [[True, False], [False, False]]
    np.testing.assert_allclose(found.values[0, 1, 0], whole.values[0, 2, 5], atol=1e-6)


def test_a_stopped_sweep_of_paths_goes_on_where_it_stopped(tmp_path, monkeypatch):
    model = build("llama")
    clean, corrupt = prompts(9)
    calls = []

    def metric(logits):
        calls.append(len(logits))
        if stop and sum(calls) > stop:
            raise KeyboardInterrupt
        return difference(logits)

    metric.key = "difference"
    stop = 20
    arguments = {"metric": metric, "batch_size": 5, "folder": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        sweep_paths(model, clean, corrupt, **arguments)
    stop, done = 0, sum(calls) - calls[-1] - 2
    calls.clear()
    found = sweep_paths(model, clean, corrupt, **arguments)
    assert sum(calls) - 2 == 48 - done
    np.testing.assert_allclose(found.values, sweep_paths(model, clean, corrupt).values, atol=1e-6)
    calls.clear()
    again = sweep_paths(model, clean, corrupt, **arguments)
    assert calls == []
    np.testing.assert_array_equal(again.values, found.values)


def test_models_and_heads_that_cannot_be_used_are_named():
    clean, corrupt = prompts(9)
    with pytest.raises(rl.RunError, match=r"'blocks\[\*\]\.attn\.heads', which MambaForCausalLM"):
        sweep_paths(build("mamba"), clean, corrupt)
    with pytest.raises(rl.RunError, match=r"chain of blocks.*bidirectional"):
        sweep_paths(build("bert"), clean, corrupt)
    with pytest.raises(rl.DataError, match=r"senders: \(3, 0\) is no head; .* to \(2, 3\)"):
        sweep_paths(build("llama"), clean, corrupt, senders=[(3, 0)])
    with pytest.raises(rl.DataError, match="inputs='z': expected 'q' or 'k'"):
        sweep_paths(build("llama"), clean, corrupt, inputs="z")
    with pytest.raises(rl.DataError, match="is in an earlier block than a receiver"):
        sweep_paths(build("llama"), clean, corrupt, senders=[(2, 0)], receivers=[(1, 0)])
    with pytest.raises(rl.DataError, match="corrupt is None"):
        sweep_paths(build("llama"), clean, None)
