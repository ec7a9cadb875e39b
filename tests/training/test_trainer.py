"""Training changes the interventions and nothing else, learns, and survives being interrupted."""

import copy
import json
import math
import random
from dataclasses import fields

import numpy as np
import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

import reftlab as rl

from .conftest import PAIRS, batch_loss, bind, make_graph, make_model, make_tokenizer

SETTINGS = {"learning_rate": 2e-2, "batch_size": 2, "progress": False}


def state(reft: rl.BoundModel) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in reft.interventions.state_dict().items()}


def test_training_lowers_the_loss_until_the_answers_come_back():
    reft = bind(make_graph(at="blocks[*].output"))
    before = rl.answer_loss(reft, PAIRS)
    result = rl.train(reft, PAIRS, epochs=150, learning_rate=3e-2, batch_size=5, progress=False)
    assert rl.answer_loss(reft, PAIRS) < before / 10
    assert rl.reply(reft, [p for p, _ in PAIRS], max_new_tokens=8) == [a for _, a in PAIRS]
    assert result.steps == 150
    assert len(result.history) == 150


def test_only_interventions_change_and_everything_else_is_left_as_it_was(reft, users_call):
    weights = copy.deepcopy(reft.model.state_dict())
    before = state(reft)
    reft.model.lm_head.weight.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in reft.named_parameters()}
    pairs = list(PAIRS)
    torch.manual_seed(7)
    python, numpy, drawn = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    rl.train(reft, pairs, epochs=1, **SETTINGS)
    assert pairs == PAIRS
    assert all(torch.equal(tensor, weights[name]) for name, tensor in reft.model.state_dict().items())
    assert all(not torch.equal(tensor, before[name]) for name, tensor in state(reft).items())
    assert {name: p.requires_grad for name, p in reft.named_parameters()} == wanted
    assert all(p.grad is None for p in reft.parameters())
    assert not reft.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in reft.modules())
    assert random.getstate() == python
    assert np.array_equal(np.random.get_state()[1], numpy)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_the_first_step_is_the_one_that_adamw_makes_on_the_answer_loss():
    reft, twin = bind(), bind()
    rl.train(reft, PAIRS, epochs=1, learning_rate=1e-2, batch_size=5, schedule="constant", progress=False)
    optimiser = torch.optim.AdamW(twin.interventions.parameters(), lr=1e-2, weight_decay=0.0)
    batch_loss(twin, PAIRS).backward()
    torch.nn.utils.clip_grad_norm_(twin.interventions.parameters(), 1.0)
    optimiser.step()
    for name, tensor in state(reft).items():
        torch.testing.assert_close(tensor, state(twin)[name], atol=1e-5, rtol=1e-4)


def test_batches_padded_left_and_right_train_to_the_same_numbers():
    trained = []
    for side in ("left", "right"):
        reft = bind()
        rl.train(reft, PAIRS, epochs=2, side=side, **SETTINGS)
        trained.append(state(reft))
    for name, tensor in trained[0].items():
        torch.testing.assert_close(tensor, trained[1][name], atol=1e-4, rtol=1e-3)


class Interrupt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [5, 7])
def test_an_interrupted_training_resumes_to_the_very_same_result(tmp_path, step):
    """Dropout is on, so that the state of the random numbers counts as well."""
    options = {"epochs": 4, "save_strategy": "steps", "save_steps": 2, "evaluation": PAIRS[:2], **SETTINGS}
    whole = bind(make_graph(dropout=0.3))
    result = rl.train(whole, PAIRS, folder=tmp_path / "whole", **options)
    broken = bind(make_graph(dropout=0.3))
    with pytest.raises(KeyboardInterrupt):
        rl.train(broken, PAIRS, folder=tmp_path / "broken", callbacks=[Interrupt(step)], **options)
    assert not any(module._forward_hooks for module in broken.modules())
    again = bind(make_graph(dropout=0.3))
    resumed = rl.train(again, PAIRS, folder=tmp_path / "broken", resume=True, **options)
    assert resumed.resumed_from == (4 if step == 5 else 6)
    assert resumed.steps == result.steps == 12
    assert all(torch.equal(tensor, state(whole)[name]) for name, tensor in state(again).items())
    seen = ["step", "epoch", "loss", "learning_rate", "gradient_norm"]
    assert resumed.to_frame()[seen].equals(result.to_frame()[seen])


def test_a_checkpoint_holds_no_weight_of_the_model_and_one_cut_short_is_passed_over(tmp_path):
    rl.train(bind(), PAIRS, epochs=3, folder=tmp_path, **SETTINGS)
    kept = sorted(tmp_path.glob("checkpoint-*"))
    assert [path.name for path in kept] == ["checkpoint-6", "checkpoint-9"]
    names = {path.name for path in kept[1].iterdir()}
    assert "interventions.safetensors" in names
    assert not {"model.safetensors", "pytorch_model.bin"} & names
    assert sum(path.stat().st_size for path in kept[1].iterdir()) < 60_000
    (kept[1] / "reftlab.json").unlink()
    result = rl.train(bind(), PAIRS, epochs=3, folder=tmp_path, resume=True, **SETTINGS)
    assert result.resumed_from == 6


def test_resuming_with_other_settings_or_data_is_refused_by_name(tmp_path):
    rl.train(bind(), PAIRS, epochs=1, folder=tmp_path, **SETTINGS)
    with pytest.raises(rl.DataError, match=r"learning_rate=0\.02, and now it is 0\.5"):
        rl.train(bind(), PAIRS, epochs=1, folder=tmp_path, resume=True, **SETTINGS | {"learning_rate": 0.5})
    with pytest.raises(rl.DataError, match="data="):
        rl.train(bind(), PAIRS[::-1], epochs=1, folder=tmp_path, resume=True, **SETTINGS)
    with pytest.raises(rl.DataError, match="graph="):
        rl.train(bind(make_graph(dropout=0.5)), PAIRS, epochs=1, folder=tmp_path, resume=True, **SETTINGS)
    with pytest.raises(rl.DataError, match="needs the folder"):
        rl.train(bind(), PAIRS, resume=True)


def test_resuming_where_nothing_was_saved_starts_from_the_beginning(tmp_path):
    result = rl.train(bind(), PAIRS, epochs=1, folder=tmp_path, resume=True, **SETTINGS)
    assert result.resumed_from is None
    assert result.steps == 3


def test_evaluation_is_the_exact_answer_loss_after_every_epoch(reft):
    result = rl.train(reft, PAIRS, epochs=2, evaluation=PAIRS[:3], **SETTINGS)
    measured = result.to_frame()["evaluation_loss"].dropna()
    assert measured.index.tolist() == [2, 5]
    assert measured.iloc[-1] == pytest.approx(rl.answer_loss(reft, PAIRS[:3]), abs=1e-5)
    assert result.evaluation_loss == measured.iloc[-1]


def test_the_best_checkpoint_can_be_kept_instead_of_the_last(tmp_path):
    reft = bind()
    other = [(prompt, "what what what") for prompt, _ in PAIRS]
    result = rl.train(
        reft, PAIRS, epochs=8, evaluation=other, folder=tmp_path, load_best_model_at_end=True, **SETTINGS
    )
    best = result.to_frame()["evaluation_loss"].min()
    assert best < result.evaluation_loss
    assert rl.answer_loss(reft, other) == pytest.approx(best, abs=1e-5)


def test_a_bfloat16_model_trains_with_float32_interventions():
    reft = bind(dtype=torch.bfloat16)
    before = rl.answer_loss(reft, PAIRS)
    rl.train(reft, PAIRS, epochs=20, **SETTINGS)
    assert {p.dtype for p in reft.interventions.parameters()} == {torch.float32}
    assert {p.dtype for p in reft.model.parameters()} == {torch.bfloat16}
    assert rl.answer_loss(reft, PAIRS) < before / 2


def test_gradient_checkpointing_and_accumulation_train_to_the_same_numbers():
    plain, saving, split = bind(), bind(), bind()
    rl.train(plain, PAIRS[:4], epochs=3, **SETTINGS | {"batch_size": 4})
    names = [field.name for field in fields(TrainingArguments)]
    option = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in names)
    rl.train(saving, PAIRS[:4], epochs=3, **{option: True}, **SETTINGS | {"batch_size": 4})
    rl.train(split, PAIRS[:4], epochs=3, gradient_accumulation_steps=2, **SETTINGS | {"batch_size": 2})
    for name, tensor in state(plain).items():
        torch.testing.assert_close(state(saving)[name], tensor, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(state(split)[name], tensor, atol=1e-4, rtol=1e-3)


def test_what_cannot_be_trained_is_refused_with_a_reason(reft, users_call):
    with pytest.raises(rl.DataError, match=r"no argument 'learning_rat'.*Did you mean 'learning_rate'"):
        rl.train(reft, PAIRS, learning_rat=1.0)
    with pytest.raises(rl.DataError, match="example 0, 'who', has no answer"):
        rl.train(reft, ["who"])
    with pytest.raises(rl.DataError, match="cannot be used for training"):
        rl.train(reft, PAIRS, schedule="sometimes", progress=False)
    with pytest.raises(rl.DataError, match="not LlamaForCausalLM"):
        rl.train(reft.model, PAIRS)
    with pytest.raises(rl.DataError, match="needs a tokenizer"):
        rl.train(make_graph().bind(make_model()), PAIRS)
    frozen = rl.InterventionGraph(rl.Edit("off", at="blocks[0].output", intervention=rl.Zero()))
    with pytest.raises(rl.RunError, match=r"no edit has trainable numbers; the edits are 'off' \(Zero\)"):
        rl.train(frozen.bind(make_model(), make_tokenizer()), PAIRS)
    headless = make_graph().bind(make_model().model, make_tokenizer())
    with pytest.raises(rl.RunError, match="LlamaModel has no language-model loss"):
        rl.train(headless, PAIRS)


def test_a_loss_that_is_no_number_stops_the_training(reft):
    next(reft.interventions.parameters()).data.fill_(math.nan)
    with pytest.raises(rl.RunError, match="the loss became nan at step 1"):
        rl.train(reft, PAIRS, **SETTINGS)


def test_the_settings_are_noted_for_the_model_card(reft):
    result = rl.train(reft, PAIRS, epochs=2, seed=3, **SETTINGS)
    noted = reft.facts["training"]
    assert noted["learning_rate"] == 2e-2
    assert noted["steps"] == result.steps == 6
    assert noted["loss"] == result.loss
    assert noted["chat"] is False
    assert json.loads(json.dumps(noted)) == noted


def test_a_result_can_be_looked_at(reft):
    result = rl.train(reft, PAIRS, epochs=2, evaluation=PAIRS, **SETTINGS)
    (axes,) = result.plot().axes
    assert "nats" in axes.get_ylabel()
    assert len(axes.lines) == 2
    assert list(axes.lines[0].get_ydata()) == result.to_frame()["loss"].dropna().tolist()
    assert "6 steps" in repr(result)
    assert "evaluation_loss" in result._repr_html_()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("epochs", -3),
        ("epochs", "many"),
        ("epochs", math.nan),
        ("learning_rate", math.inf),
        ("learning_rate", "4e-3"),
        ("learning_rate", -1),
        ("batch_size", 0),
        ("batch_size", 1.5),
        ("seed", -1),
        ("seed", "x"),
        ("weight_decay", math.nan),
        ("warmup_steps", "some"),
    ],
)
def test_a_setting_that_cannot_be_is_named_with_its_value(reft, users_call, name, value):
    with pytest.raises(rl.DataError, match=f"{name}={value!r}: expected a"):
        rl.train(reft, PAIRS, **{name: value})


def test_settings_may_be_numbers_of_numpy_and_are_saved_as_plain_ones(reft, tmp_path, users_call):
    rl.train(reft, PAIRS, epochs=np.int64(1), learning_rate=np.float32(1e-3), progress=False)
    reft.save(tmp_path / "artifact")
    assert reft.facts["training"]["epochs"] == 1


def test_names_of_the_trainer_that_have_others_here_are_pointed_to(reft):
    with pytest.raises(rl.DataError, match="num_train_epochs is called epochs here"):
        rl.train(reft, PAIRS, num_train_epochs=3)


def test_a_folder_with_checkpoints_is_not_written_over(tmp_path):
    rl.train(bind(), PAIRS, epochs=1, folder=tmp_path, **SETTINGS)
    with pytest.raises(rl.DataError, match="holds checkpoints already; give resume=True"):
        rl.train(bind(), PAIRS, epochs=2, folder=tmp_path, **SETTINGS)
    (tmp_path / "file").touch()
    with pytest.raises(rl.DataError, match="is a file"):
        rl.train(bind(), PAIRS, folder=tmp_path / "file", **SETTINGS)


def test_a_checkpoint_belongs_to_one_model_and_to_every_number_of_its_graph(tmp_path):
    edits = [
        [rl.Edit("add", at="blocks[0].output", intervention=rl.Add([float(k)] * 32)), *make_graph()]
        for k in (0, 1)
    ]
    first, second = (bind(rl.InterventionGraph(*nodes)) for nodes in edits)
    rl.train(first, PAIRS, epochs=1, folder=tmp_path, **SETTINGS)
    with pytest.raises(rl.DataError, match="graph="):
        rl.train(second, PAIRS, epochs=1, folder=tmp_path, resume=True, **SETTINGS)
    with torch.no_grad():
        first.model.lm_head.weight.mul_(5)
    with pytest.raises(rl.DataError, match="model="):
        rl.train(first, PAIRS, epochs=1, folder=tmp_path, resume=True, **SETTINGS)


def test_nothing_can_be_trained_while_it_is_disabled_and_the_model_keeps_its_settings(reft):
    with reft.disabled("colour"), pytest.raises(rl.RunError, match="'colour' cannot learn there"):
        rl.train(reft, PAIRS, **SETTINGS)
    reft.model.config.use_cache = True
    rl.train(reft, PAIRS, epochs=1, gradient_checkpointing=True, **SETTINGS)
    assert reft.model.config.use_cache is True
    assert not reft.model.is_gradient_checkpointing
    assert not any(module._forward_hooks for module in reft.modules())


def test_an_intervention_under_two_names_is_kept_in_checkpoints(reft, tmp_path):
    [edit] = reft.graph.edits
    both = reft + reft.rename({edit.name: "again"})
    rl.train(both, PAIRS, epochs=1, folder=tmp_path, progress=False)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1
