"""Penalties of interventions are part of the loss, and interventions are told how far training is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import reftlab as rl
from reftlab.interventions import Gated, Intervention, MaskedSwap

from .conftest import PAIRS, batch_loss, bind

QUIET: dict[str, Any] = {"schedule": "constant", "progress": False, "seed": 0}


class Weighed(Intervention):
    """Add a learned vector, penalised by its square, and remember what it is told.

    h + v
    """

    def __init__(self, weight: float = 0.0) -> None:
        super().__init__()
        self.weight = weight
        self.told: list[float] = []

    def setup(self, width: int) -> None:
        self.vector = torch.nn.Parameter(torch.linspace(-1.0, 1.0, width))

    def forward(self, base: Any, source: Any = None) -> Any:
        return base + self.vector

    def penalty(self) -> Any:
        return self.weight * self.vector.square().sum() if self.weight else None

    def schedule(self, progress: float) -> None:
        self.told.append(progress)


class Listener(TrainerCallback):
    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.logs.append(dict(logs))


def weighed(weight: float, at: str = "blocks[1].output", **more: Any) -> rl.BoundModel:
    edit = rl.Edit("push", at=at, positions="last", intervention=Weighed(weight), **more)
    return bind(rl.InterventionGraph(edit))


@pytest.mark.parametrize(
    ("batch_size", "accumulated"), [(5, 1), (1, 5)], ids=["one batch", "five accumulated"]
)
def test_a_step_is_the_one_on_answer_loss_and_penalty(batch_size: int, accumulated: int) -> None:
    reft, twin = weighed(0.5), weighed(0.5)
    listener = Listener()
    rl.train(
        reft, PAIRS, epochs=1, learning_rate=1e-2, batch_size=batch_size, callbacks=[listener],
        gradient_accumulation_steps=accumulated, optim="sgd", max_grad_norm=0.0, **QUIET,
    )  # fmt: skip
    answers, penalty = batch_loss(twin, PAIRS), twin.interventions["push"].penalty()
    (answers + penalty).backward()
    with torch.no_grad():
        expected = twin.interventions["push"].vector - 1e-2 * twin.interventions["push"].vector.grad
    torch.testing.assert_close(reft.interventions["push"].vector.detach(), expected, atol=1e-5, rtol=1e-5)
    assert len(listener.logs) == 1
    assert listener.logs[0]["loss"] == pytest.approx(answers.item(), rel=1e-4)
    assert listener.logs[0]["penalty"] == pytest.approx(penalty.item(), rel=1e-5)


def test_the_loss_that_is_reported_is_the_answers_alone() -> None:
    reft, listener = weighed(0.5), Listener()
    before = rl.answer_loss(reft, PAIRS)
    result = rl.train(
        reft,
        PAIRS,
        epochs=4,
        learning_rate=1e-3,
        batch_size=5,
        callbacks=[listener],
        logging_steps=2,
        **QUIET,
    )
    assert result.history[0].loss == pytest.approx(before, rel=0.05)
    penalties = [log["penalty"] for log in listener.logs]
    square = reft.interventions["push"].vector.square().sum().item()
    assert len(penalties) == 2
    assert penalties[0] > penalties[1] > 0.5 * square


def test_without_penalties_nothing_is_logged_of_them() -> None:
    listener = Listener()
    rl.train(weighed(0.0), PAIRS, epochs=1, learning_rate=1e-3, batch_size=5, callbacks=[listener], **QUIET)
    assert listener.logs
    assert all("penalty" not in log for log in listener.logs)


def test_interventions_are_told_before_each_step_how_much_is_done() -> None:
    reft = weighed(0.0)
    rl.train(reft, PAIRS, epochs=2, learning_rate=1e-3, batch_size=2, **QUIET)
    # 2 epochs of 3 steps; the last word is that all is done.
    assert reft.interventions["push"].told == pytest.approx([number / 6 for number in range(7)])


def test_a_resumed_training_goes_on_where_the_schedule_stopped(tmp_path: Any) -> None:
    settings = {"learning_rate": 1e-3, "batch_size": 5, "folder": tmp_path, **QUIET}

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = state.global_step == 2
            return control

    first = weighed(0.5)
    rl.train(first, PAIRS, epochs=4, callbacks=[Stop()], **settings)
    assert first.interventions["push"].told == pytest.approx([0, 0.25, 0.5])
    second, whole = weighed(0.5), weighed(0.5)
    rl.train(second, PAIRS, epochs=4, resume=True, **settings)
    assert second.interventions["push"].told == pytest.approx([0.5, 0.75, 1.0])
    rl.train(whole, PAIRS, epochs=4, **{**settings, "folder": None})
    torch.testing.assert_close(
        second.interventions["push"].vector, whole.interventions["push"].vector, atol=1e-6, rtol=1e-6
    )


def test_a_shared_intervention_is_penalised_once() -> None:
    listener = Listener()
    shared = weighed(0.5, at="blocks[0,2].output", share="both")
    square = shared.interventions["both"].vector.square().sum().item()
    rl.train(shared, PAIRS, epochs=1, learning_rate=0.0, batch_size=5, callbacks=[listener], **QUIET)
    assert listener.logs[0]["penalty"] == pytest.approx(0.5 * square, rel=1e-5)


def test_a_sparse_gate_shuts_where_its_edit_does_no_good() -> None:
    def opening(sparsity: float) -> float:
        torch.manual_seed(0)
        edit = rl.Edit(
            "gated",
            at="blocks[1].output",
            positions="all",
            intervention=Gated(rl.LoReFT(2), sparsity=sparsity),
        )
        reft = bind(rl.InterventionGraph(edit))
        rl.train(reft, PAIRS, epochs=30, learning_rate=3e-2, batch_size=5, **QUIET)
        rl.answer_loss(reft, PAIRS)
        return reft.interventions["gated"].gate.opening.value().item()

    assert opening(5.0) < 0.1 < opening(0.0)


def test_temperatures_end_where_they_should_and_are_saved(tmp_path: Any) -> None:
    edit = rl.Edit(
        "mask", at="blocks[1].output", positions="last",
        intervention=Gated(MaskedSwap(temperature_start=3.0, temperature_end=0.5)),
        source=rl.Read(at="blocks[0].output", positions="last"),
    )  # fmt: skip
    reft = bind(rl.InterventionGraph(edit))
    rl.train(reft, PAIRS, epochs=2, learning_rate=1e-2, batch_size=5, **QUIET)
    assert reft.interventions["mask"].inner.temperature.item() == pytest.approx(0.5)
    again = rl.load(reft.save(tmp_path / "mask"), reft.model, reft.tokenizer)
    assert again.interventions["mask"].inner.temperature.item() == pytest.approx(0.5)
    assert rl.answer_loss(again, PAIRS) == pytest.approx(rl.answer_loss(reft, PAIRS), rel=1e-6)
