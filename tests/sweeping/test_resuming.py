"""A sweep that was stopped goes on where it stopped, and no cell of another sweep is taken for its own."""

import copy
import functools
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import peft
import pytest
import torch

import reftlab as rl
from reftlab.runtime.digest import model_digest
from reftlab.sweeping.recognising import UnrecognisedError, fingerprint
from tests.models import build
from tests.sweeping.by_hand import difference, prompts
from tests.sweeping.interrupted import run

METRIC = rl.logit_diff(7, 9)


@pytest.fixture
def passes(monkeypatch):
    """The shape of the tokens of each forward pass of a Llama, but for those on shapes alone."""
    rows = []
    kind = type(build("llama"))
    forward = kind.forward

    @functools.wraps(forward)
    def counting(self, *args, **kwargs):
        if not kwargs["input_ids"].is_meta:
            rows.append(tuple(kwargs["input_ids"].shape))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", counting)
    return rows


def stopping(after):
    """A metric that is interrupted once it has measured so many batches, the two unpatched runs among them."""
    batches = []

    def metric(logits):
        batches.append(len(logits))
        if after is not None and len(batches) > after:
            raise KeyboardInterrupt
        return difference(logits)

    metric.key, metric.batches = "difference", batches
    return metric


def test_finished_cells_are_not_computed_again(tmp_path, passes):
    model = build("llama")
    clean, corrupt = prompts(rows=2)
    sweep = functools.partial(rl.sweep, model, clean, corrupt, batch_size=4, progress=False)
    whole = sweep(metric=METRIC)
    cells = whole.counts["cells computed"]
    stopped = stopping(5)
    with pytest.raises(KeyboardInterrupt):
        sweep(metric=stopped, folder=tmp_path)
    done = sum(stopped.batches[2:-1])
    assert 0 < done < cells / 2

    rest = stopping(None)
    found = sweep(metric=rest, folder=tmp_path)
    assert found.counts["cells computed"] == cells - done == sum(rest.batches) - 4
    assert found.counts["cells found on disk"] >= done
    np.testing.assert_allclose(found.values, whole.values, atol=1e-5)

    passes.clear()
    again = sweep(metric=stopping(None), folder=tmp_path)
    assert passes == []
    assert again.counts == {"cells found on disk": whole.values.size}
    np.testing.assert_array_equal(again.values, found.values)
    np.testing.assert_array_equal(again.clean, whole.clean)
    assert again.to_frame().equals(found.to_frame())


def test_a_finished_pair_costs_nothing_and_the_next_one_goes_on(tmp_path, passes):
    model = build("llama")
    clean, corrupt = prompts(rows=2)
    sweep = functools.partial(rl.sweep, model, clean, corrupt, batch_size=64, progress=False)
    stopped = stopping(5)
    with pytest.raises(KeyboardInterrupt):
        sweep(metric=stopped, folder=tmp_path)
    assert len(stopped.batches) == 6  # two runs and a batch in each pair, of which the last was lost
    passes.clear()
    found = sweep(metric=stopping(None), folder=tmp_path)
    # The second pair's two runs, its batch, and the check.
    assert len(passes) == 4
    np.testing.assert_allclose(found.values, sweep(metric=METRIC).values, atol=1e-5)


def test_attribution_may_be_asked_for_later_without_running_cells_again(tmp_path):
    model = build("llama")
    clean, corrupt = prompts()
    sweep = functools.partial(rl.sweep, model, clean, corrupt, metric=METRIC, folder=tmp_path, progress=False)
    first = sweep()
    second = sweep(attribution=True)
    assert second.counts == {"cells found on disk": 33}
    np.testing.assert_array_equal(first.values, second.values)
    third = sweep(attribution=True)
    np.testing.assert_array_equal(second.estimates, third.estimates)
    alone = sweep(attribution=True, exact=False)
    np.testing.assert_array_equal(second.estimates, alone.estimates)


def other_weights(model, arguments):
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 4] += 1e-3


def other_prompt(model, arguments):
    arguments["clean"] = {"input_ids": arguments["clean"]["input_ids"].clone()}
    arguments["clean"]["input_ids"][0, -1] += 1


def other_edit(model, arguments):
    edit = rl.Edit("half", at="blocks[1].mlp.output", positions="all", intervention=rl.Scale(0.5))
    arguments["model"] = rl.InterventionGraph(edit).bind(model)


def hook(model, arguments):
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: 0.5 * output)


CHANGES = {
    "hook": hook,
    "weights": other_weights,
    "prompt": other_prompt,
    "edit": other_edit,
    "metric": lambda model, arguments: arguments.update(metric=rl.logit_diff(7, 10)),
    "direction": lambda model, arguments: arguments.update(direction="noise"),
    "sites": lambda model, arguments: arguments.update(sites="blocks[*].mlp.output"),
    "kind": lambda model, arguments: arguments.update(kind="ablate"),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_another_sweep_in_the_same_folder_is_computed_anew(tmp_path, change):
    model = build("llama")
    clean, corrupt = prompts()
    arguments = {"model": model, "clean": clean, "corrupt": corrupt, "metric": METRIC, "progress": False}
    rl.sweep(**arguments, folder=tmp_path)
    CHANGES[change](model, arguments)
    found = rl.sweep(**arguments, folder=tmp_path)
    assert "cells found on disk" not in found.counts
    np.testing.assert_array_equal(found.values, rl.sweep(**arguments).values)


def test_a_finished_ablation_to_the_mean_runs_nothing_either(tmp_path, passes):
    clean, _ = prompts(rows=2)
    sweep = functools.partial(
        rl.sweep,
        build("llama"),
        clean,
        kind="ablate",
        fill="mean",
        metric=METRIC,
        folder=tmp_path,
        progress=False,
    )
    first = sweep()
    passes.clear()
    np.testing.assert_array_equal(sweep().values, first.values)
    assert passes == []


def test_resume_false_forgets_what_is_there(tmp_path):
    clean, corrupt = prompts()
    sweep = functools.partial(
        rl.sweep, build("llama"), clean, corrupt, metric=METRIC, folder=tmp_path, progress=False
    )
    sweep()
    assert "cells found on disk" not in sweep(resume=False).counts
    assert sweep().counts == {"cells found on disk": 33}


def test_a_damaged_file_is_named(tmp_path):
    clean, corrupt = prompts()
    sweep = functools.partial(
        rl.sweep, build("llama"), clean, corrupt, metric=METRIC, folder=tmp_path, progress=False
    )
    sweep()
    path = next(tmp_path.glob("*/pair00000-cells*.safetensors"))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(rl.ArtifactError, match=r"pair00000-cells.*cannot be read.*delete it"):
        sweep()
    path.unlink()
    assert sweep().counts["cells found on disk"] < 33


def test_a_function_that_cannot_be_recognised_is_not_kept(tmp_path):
    clean, corrupt = prompts()
    holder = object()

    def metric(logits, held=holder):
        return difference(logits)

    with pytest.raises(rl.DataError, match=r"cannot be recognised again.*attribute `key`"):
        rl.sweep(build("llama"), clean, corrupt, metric=metric, folder=tmp_path, progress=False)


ANSWER = 7
OTHERS = [9, 10]


def of_others(logits):
    return logits[:, OTHERS].mean(-1)


def with_globals(logits):
    return logits[:, ANSWER] - of_others(logits)


def with_nested_code(logits):
    return torch.stack([(lambda row: row[ANSWER])(row) for row in logits])


used = None  # a module of the user's, in one test


class Logit:
    """A metric with a number of its own."""

    def __init__(self, answer):
        self.answer = answer

    def measure(self, logits):
        return logits[:, self.answer]


def keyword_only(answer):
    def metric(logits, *, answer=answer):
        return logits[:, answer]

    return metric


def closing_over(answer):
    return lambda logits: logits[:, answer]


def calling(helper):
    return lambda logits: helper(logits)


def with_attribute(answer):
    def metric(logits):
        return logits[:, metric.answer]

    metric.answer = answer
    return metric


def weighed(weights):
    return lambda logits: (logits * weights).sum(-1)


ON_ONE_LINE = [lambda logits: logits[:, 7], lambda logits: logits[:, 10]]
OTHER_METRICS = {
    "lambdas on one line": tuple(ON_ONE_LINE),
    "keyword-only defaults": (keyword_only(7), keyword_only(10)),
    "closures": (closing_over(7), closing_over(10)),
    "closures of helpers": (calling(closing_over(7)), calling(closing_over(10))),
    "attributes": (with_attribute(7), with_attribute(10)),
    "partials": tuple(functools.partial(lambda logits, n: logits[:, n], n=n) for n in (7, 10)),
    "tensors": tuple(weighed(torch.eye(200)[n]) for n in (7, 10)),
    "keys": (stopping(None), with_attribute(10)),
}


@pytest.mark.parametrize("which", list(OTHER_METRICS))
def test_a_metric_of_ones_own_finds_its_own_cells_and_no_others(tmp_path, which):
    clean, corrupt = prompts()
    sweep = functools.partial(rl.sweep, build("llama"), clean, corrupt, progress=False)
    one, other = OTHER_METRICS[which]
    first, second = (sweep(metric=metric, folder=tmp_path) for metric in (one, other))
    assert "cells found on disk" not in second.counts
    np.testing.assert_array_equal(second.values, sweep(metric=other).values)
    again = sweep(metric=one, folder=tmp_path)
    assert again.counts == {"cells found on disk": 33}
    np.testing.assert_array_equal(again.values, first.values)


@pytest.mark.parametrize("metric", [with_globals, with_nested_code])
@pytest.mark.parametrize(
    ("name", "value"), [("ANSWER", 11), ("OTHERS", [12]), ("of_others", with_nested_code)]
)
def test_a_metric_whose_globals_have_changed_is_another(tmp_path, monkeypatch, metric, name, value):
    clean, corrupt = prompts()
    sweep = functools.partial(rl.sweep, build("llama"), clean, corrupt, metric=metric, progress=False)
    sweep(folder=tmp_path)
    assert sweep(folder=tmp_path).counts == {"cells found on disk": 33}
    monkeypatch.setitem(globals(), name, value)
    found = sweep(folder=tmp_path)
    concerned = name == "ANSWER" or metric is with_globals
    assert ("cells found on disk" not in found.counts) == concerned
    np.testing.assert_array_equal(found.values, sweep().values)


@pytest.mark.parametrize("where", ["closure", "global"])
def test_what_a_metric_takes_from_a_module_of_the_users_counts_and_installed_packages_by_name(
    monkeypatch, where
):
    helpers, inner = types.ModuleType("helpers"), types.ModuleType("helpers.inner")
    helpers.inner, helpers.unused, inner.measure = inner, object(), of_others
    monkeypatch.setitem(globals(), "used", helpers)

    def of_closure(logits):
        return helpers.inner.measure(torch.log_softmax(logits, -1)) + np.pi * torch.nn.functional.relu(
            logits[:, 0]
        )

    def of_global(logits):
        return used.inner.measure(logits) + np.pi

    metric = of_closure if where == "closure" else of_global
    first = fingerprint(metric)
    assert fingerprint(metric) == first
    inner.measure = with_globals
    second = fingerprint(metric)
    assert second != first
    inner.measure = object()
    with pytest.raises(UnrecognisedError, match=r"(helpers|used)\.inner\.measure is or holds a object"):
        fingerprint(metric)


@pytest.mark.parametrize("metric", [Logit(7).measure, calling(Logit(7).measure), calling(Logit)])
def test_what_hangs_on_an_object_of_the_users_asks_for_a_key(tmp_path, metric):
    clean, corrupt = prompts()
    with pytest.raises(rl.DataError, match=r"cannot be recognised again.*attribute `key`"):
        rl.sweep(build("llama"), clean, corrupt, metric=metric, folder=tmp_path, progress=False)


def test_an_adapter_that_is_switched_off_makes_another_sweep(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build("llama"), config).eval()
    clean, corrupt = prompts()
    sweep = functools.partial(rl.sweep, model, clean, corrupt, metric=METRIC, progress=False)
    on = sweep(folder=tmp_path)
    with model.disable_adapter():
        off = sweep(folder=tmp_path)
        assert "cells found on disk" not in off.counts
        np.testing.assert_array_equal(off.values, sweep().values)
    assert np.abs(off.values - on.values).max() > 1e-3
    assert sweep(folder=tmp_path).counts == {"cells found on disk": 33}


def test_a_digest_tells_models_by_class_configuration_weights_buffers_and_adapters():
    model = build("llama")
    seen = [model_digest(model), model_digest(build("gpt2"))]
    assert model_digest(copy.deepcopy(model)) == seen[0]
    model.model.layers[1].mlp.up_proj.weight.data[2, 3] += 1e-4
    seen.append(model_digest(model))
    model.model.rotary_emb.inv_freq[0] += 1e-4
    seen.append(model_digest(model))
    model.config.rms_norm_eps = 1e-3
    seen.append(model_digest(model))
    model.model.layers[0].mlp.act_fn = torch.nn.ReLU()
    seen.append(model_digest(model))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    seen.append(model_digest(adapted))
    with adapted.disable_adapter():
        seen.append(model_digest(adapted))
    assert len(set(seen)) == len(seen)
    assert model_digest(adapted) == seen[-2]


def test_a_killed_process_loses_no_finished_cell(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.sweeping.interrupted", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env=environment,
    )
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("*/pair00000-cells*.safetensors"))) < 3:
            assert process.poll() is None, "the sweep ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    found = run(tmp_path)
    assert found.counts["cells found on disk"] >= 9
    clean, corrupt = prompts(rows=2)
    whole = rl.sweep(build("llama"), clean, corrupt, metric=METRIC, progress=False)
    np.testing.assert_allclose(found.values, whole.values, atol=1e-5)
    assert not list(tmp_path.glob("*/*.partial"))
