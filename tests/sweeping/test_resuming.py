"""A sweep that was stopped goes on where it stopped, and no cell of another sweep is taken for its own."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import reftlab as rl
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
    assert len(passes) == 4  # the second pair's two runs, its batch, and the check of the batch's first row
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


CHANGES = {
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
