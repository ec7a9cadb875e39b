"""Training on the causal cone ends at the numbers of plain training, and says where it could not."""

import contextlib

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

import reftlab as rl
from reftlab.runtime.cone import ConeRunner
from reftlab.training.on_cone import runner_for, visits_all

from .conftest import PAIRS, bind, make_graph, make_model, make_tokenizer

SETTINGS = {"learning_rate": 2e-2, "batch_size": 2, "progress": False}
LOW = rl.Edit("low", at="blocks[0].output", positions="last", intervention=rl.LoReFT(rank=4))
HIGH = rl.Edit("high", at="blocks[1].mlp.output", positions="last(2)", intervention=rl.DiReFT(rank=2))


def state(reft):
    return {name: tensor.detach().clone() for name, tensor in reft.interventions.state_dict().items()}


def assert_same(one, other, tolerance=1e-5):
    assert state(one).keys() == state(other).keys()
    for name, tensor in state(one).items():
        torch.testing.assert_close(state(other)[name], tensor, atol=tolerance, rtol=tolerance)


def both(make, pairs=PAIRS, cone=True, **settings):
    """The same training on the cone and plainly, which must come to the same; both results."""
    torch.manual_seed(1)
    quick = make()
    torch.manual_seed(1)
    plain = make()
    start = state(plain)
    options = {**SETTINGS, "epochs": 2, **settings}
    on_cone = rl.train(quick, pairs, cone=cone, **options)
    plainly = rl.train(plain, pairs, cone=False, **options)
    assert_same(plain, quick)
    assert any(not torch.equal(tensor, start[name]) for name, tensor in state(plain).items())
    # AdamW hides the gradients' size; the curve shows it.
    for line in ("loss", "gradient_norm"):
        expected, got = plainly.to_frame()[line].dropna(), on_cone.to_frame()[line].dropna()
        assert got.tolist() == pytest.approx(expected.tolist(), rel=2e-4)
    assert plainly.on_cone == 0
    assert plainly.why_plain[0] == "cone=False"
    return on_cone, plainly


@pytest.mark.parametrize("side", ["left", "right"])
def test_training_on_the_cone_comes_to_the_numbers_of_plain_training(side):
    result, plain = both(lambda: bind(rl.InterventionGraph(LOW, HIGH)), evaluation=PAIRS[:3], side=side)
    assert result.on_cone == result.steps == 6
    assert result.why_plain == ()
    assert "on the cone" in repr(result)
    assert "on the cone" not in repr(plain)
    measured, expected = (one.to_frame()["evaluation_loss"].dropna() for one in (result, plain))
    assert len(measured) == 2
    assert measured.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize(("batch_size", "accumulated"), [(1, 5), (2, 2), (3, 2)])
def test_accumulated_gradients_are_the_plain_ones(batch_size, accumulated):
    result, plain = both(
        lambda: bind(rl.InterventionGraph(LOW, HIGH)), batch_size=batch_size,
        gradient_accumulation_steps=accumulated, weight_decay=0.1,
    )  # fmt: skip
    assert result.steps == plain.steps
    assert result.on_cone == 2 * -(-len(PAIRS) // batch_size)


def test_dropout_inside_of_edits_draws_the_same_numbers():
    result, _ = both(lambda: bind(make_graph(at="blocks[0].output", dropout=0.4)))
    assert result.on_cone == result.steps


def test_tasks_sources_of_one_run_conditions_and_gates_train_to_the_same():
    when = rl.cosine("blocks[0].output @ last", "blocks[0].output @ first") > 0.2
    edits = (
        rl.Edit("a", at="blocks[0].output", positions="last", intervention=rl.LoReFT(2), tasks=["a"]),
        rl.Edit("b", at="blocks[1].output", positions="last", intervention=rl.DiReFT(2), tasks=["b"], when=when),
        rl.Edit(
            "c", at="blocks[1].mlp.output", positions="last", intervention=rl.LoReFT(2), tasks=["a", "b"],
            when=rl.gate("blocks[0].output @ last", sparsity=0.1),
        ),
    )  # fmt: skip
    tasks = ["a", "a", "b", "a+b", "b"]
    rows = [rl.Example(p, a, task=task) for (p, a), task in zip(PAIRS, tasks, strict=True)]
    result, _ = both(lambda: bind(rl.InterventionGraph(*edits)), rows)
    assert result.on_cone == result.steps
    assert result.to_frame()["penalty"].notna().any()


def test_positions_of_each_example_are_its_own():
    rows = [rl.Example(p, a, positions={"low": [n % len(p.split())]}) for n, (p, a) in enumerate(PAIRS)]
    result, _ = both(lambda: bind(rl.InterventionGraph(LOW)), rows)
    assert result.on_cone == result.steps


def test_examples_with_inputs_of_other_runs_train_plainly():
    swap = rl.Edit(
        "swap",
        at="blocks[0].output",
        positions="last",
        intervention=rl.RotatedSwap(2),
        source=rl.Read(run="other"),
    )
    rows = [rl.Example(p, a, sources={"other": q}) for (p, a), (q, _) in zip(PAIRS, PAIRS[::-1], strict=True)]
    result, _ = both(lambda: bind(rl.InterventionGraph(rl.Source("other"), swap)), rows)
    assert result.on_cone == 0
    assert "run" in result.why_plain[0]


BUDGETS = {"nothing": (0, 0), "a little": (5000, 0), "a file": (0, "1MB"), "both": (3000, 4000)}


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_a_store_of_ones_own_is_kept_to_its_budgets_and_changes_nothing(budget, tmp_path):
    store = rl.ConeStore(*budget, folder=tmp_path)
    result, _ = both(lambda: bind(rl.InterventionGraph(LOW, HIGH)), cone=store)
    assert result.on_cone == result.steps
    assert store.in_memory <= store.memory
    assert store.on_disk <= store.disk
    assert (len(store) > 0) == (budget != (0, 0))
    assert bool(store.on_disk) == (budget in ((0, "1MB"), (3000, 4000)))


class Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("memory", "step"), [("1MB", 7), (12_000, 5), (0, 5)], ids=["all kept", "some kept", "none kept"]
)
def test_an_interrupted_training_on_the_cone_resumes_bit_for_bit(tmp_path, step, memory):
    options = {"epochs": 3, "save_strategy": "steps", "save_steps": 4, "evaluation": PAIRS[:2], **SETTINGS}
    graph = make_graph(at="blocks[0].output", dropout=0.3)
    whole, broken, again = bind(graph), bind(graph), bind(graph)

    def store():
        return rl.ConeStore(memory=memory, disk=0)

    result = rl.train(whole, PAIRS, folder=tmp_path / "whole", cone=store(), **options)
    with pytest.raises(KeyboardInterrupt):
        rl.train(
            broken, PAIRS, folder=tmp_path / "broken", callbacks=[Interrupt(step)], cone=store(), **options
        )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in broken.modules())
    assert not any("forward" in vars(m) for m in broken.model.modules())
    resumed = rl.train(again, PAIRS, folder=tmp_path / "broken", resume=True, cone=store(), **options)
    assert resumed.resumed_from == 4
    assert resumed.on_cone == result.steps - resumed.resumed_from
    assert all(torch.equal(tensor, state(whole)[name]) for name, tensor in state(again).items())


def test_a_plain_training_can_be_resumed_on_the_cone(tmp_path):
    options = {"epochs": 3, "save_strategy": "steps", "save_steps": 4, **SETTINGS}
    graph = rl.InterventionGraph(LOW)
    whole, broken, again = bind(graph), bind(graph), bind(graph)
    rl.train(whole, PAIRS, folder=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        rl.train(broken, PAIRS, folder=tmp_path / "broken", callbacks=[Interrupt(5)], cone=False, **options)
    rl.train(again, PAIRS, folder=tmp_path / "broken", resume=True, **options)
    assert_same(whole, again)


@pytest.mark.parametrize("wrong", ["yes", None, 1, 0, {"memory": 3}], ids=repr)
def test_a_cone_that_is_no_choice_is_refused(wrong, users_call):
    with pytest.raises(rl.DataError, match=r"^cone=.*: expected True, False or an rl\.ConeStore"):
        rl.train(bind(), PAIRS, cone=wrong, **SETTINGS)


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32, n_embd=32, n_layer=3, n_head=4, n_positions=32, initializer_range=0.3, resid_pdrop=0.2,
        embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def test_a_base_with_dropout_trains_plainly_and_is_evaluated_on_the_cone():
    def make():
        return rl.InterventionGraph(LOW).bind(gpt2(), make_tokenizer())

    result, plain = both(make, evaluation=PAIRS[:3])
    assert result.on_cone == 0
    assert len(result.why_plain) == 1
    assert "dropout in the base model" in result.why_plain[0]
    assert result.evaluation_loss == pytest.approx(plain.evaluation_loss, rel=1e-5)


def with_a_hook():
    reft = bind(rl.InterventionGraph(LOW))
    reft.model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 1.5)
    return reft


def without_a_cone():
    edit = rl.Edit("edit", at="embed.output", positions="first", intervention=rl.LoReFT(rank=2))
    return bind(rl.InterventionGraph(edit))


PLAIN = {
    "a foreign hook": (with_a_hook, {}, "carries a hook of its own"),
    "an edit of everything": (without_a_cone, {}, "acts before block 0"),
    "label smoothing": (bind, {"label_smoothing_factor": 0.1}, "label smoothing"),
    "gradient checkpointing": (bind, {"gradient_checkpointing": True}, "gradient checkpointing"),
}


@pytest.mark.parametrize(("make", "options", "reason"), PLAIN.values(), ids=PLAIN)
def test_where_everything_must_run_it_does_and_the_result_says_why(make, options, reason):
    result, _ = both(make, **options)
    assert result.on_cone == 0
    assert reason in "; ".join(result.why_plain)
    assert "on the cone" not in repr(result)


def test_mixed_precision_trains_on_the_cone_as_near_to_float32_as_it_does_plainly():
    losses = {}
    for name, options in {
        "cone": {"bf16": True},
        "plain": {"bf16": True, "cone": False},
        "exact": {},
    }.items():
        torch.manual_seed(1)
        graph = rl.InterventionGraph(LOW, HIGH)
        result = rl.train(bind(graph), PAIRS, epochs=2, evaluation=PAIRS[:3], **SETTINGS, **options)
        assert (result.on_cone > 0) is (name != "plain")
        curve = result.to_frame()
        losses[name] = torch.tensor([*curve["loss"].dropna(), *curve["evaluation_loss"].dropna()])
    errors = {name: float((losses[name] - losses["exact"]).abs().max()) for name in ("cone", "plain")}
    assert 0 < errors["cone"] <= 2 * errors["plain"]


def test_a_model_that_learns_itself_is_run_whole():
    peft = pytest.importorskip("peft")

    def make():
        torch.manual_seed(3)
        model = peft.get_peft_model(make_model(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
        return rl.InterventionGraph(LOW).bind(model, make_tokenizer())

    result, _ = both(make, train_model=True)
    assert result.on_cone == 0
    assert result.why_plain == ("parameters of the model itself learn (train_model=True)",)


def test_a_frozen_lora_trains_on_the_cone():
    peft = pytest.importorskip("peft")

    def make():
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        return rl.InterventionGraph(LOW).bind(peft.get_peft_model(make_model(), config), make_tokenizer())

    result, _ = both(make)
    assert result.on_cone == result.steps


def test_a_bfloat16_model_trains_on_the_cone():
    reft = bind(rl.InterventionGraph(LOW), torch.bfloat16)
    before = rl.answer_loss(reft, PAIRS)
    result = rl.train(reft, PAIRS, epochs=12, **SETTINGS)
    assert result.on_cone == result.steps
    assert rl.answer_loss(reft, PAIRS) < before / 2


def test_penalties_and_schedules_are_those_of_plain_training():
    edit = rl.Edit(
        "mask",
        at="blocks[1].output",
        positions="last",
        intervention=rl.Gated(rl.LoReFT(rank=2), sparsity=0.05),
    )
    result, plain = both(lambda: bind(rl.InterventionGraph(LOW, edit)))
    assert result.on_cone == result.steps
    got, expected = (one.to_frame()["penalty"].dropna().tolist() for one in (result, plain))
    assert len(got) > 0
    assert got == pytest.approx(expected, rel=1e-4)


def test_what_was_kept_does_not_stay_with_the_bound_model_or_the_folder(tmp_path):
    reft = bind(rl.InterventionGraph(LOW))
    names = set(vars(reft))
    rl.train(reft, PAIRS, epochs=1, folder=tmp_path, cone=rl.ConeStore(0, "1MB", tmp_path), **SETTINGS)
    assert set(vars(reft)) - {"_is_accelerate_prepared"} == names
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {"checkpoint"}
    assert "cone" not in reft.facts["training"]


def test_two_trainings_share_a_store():
    store = rl.ConeStore("1MB", 0)
    model = make_model()
    refts = [rl.InterventionGraph(LOW).bind(model, make_tokenizer()) for _ in range(2)]
    rl.train(refts[0], PAIRS, epochs=1, cone=store, **SETTINGS)
    kept = len(store)
    assert kept > 0
    result = rl.train(refts[1], PAIRS, epochs=1, cone=store, **SETTINGS)
    assert result.on_cone == result.steps
    assert len(store) == kept


class Tamper(TrainerCallback):
    """Change the base in the middle of a training, past torch's count of changes."""

    def __init__(self, model):
        self.model = model

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            self.model.model.layers[0].mlp.down_proj.weight.data.mul_(3.0)


def test_a_base_that_somebody_changes_while_training_is_computed_anew():
    quick, plain = (bind(rl.InterventionGraph(LOW)) for _ in range(2))
    options = {**SETTINGS, "epochs": 4}
    result = rl.train(quick, PAIRS, callbacks=[Tamper(quick.model)], **options)
    rl.train(plain, PAIRS, callbacks=[Tamper(plain.model)], cone=False, **options)
    assert result.on_cone == result.steps
    assert_same(plain, quick)


def arguments(tmp_path, **options):
    from transformers import TrainingArguments

    return TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **options)


def test_all_examples_are_prepared_only_where_all_are_visited(tmp_path):
    assert visits_all(arguments(tmp_path, num_train_epochs=1.0), 100)
    assert not visits_all(arguments(tmp_path, num_train_epochs=0.5), 100)
    steps = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert visits_all(arguments(tmp_path, max_steps=13, **steps), 100)
    assert not visits_all(arguments(tmp_path, max_steps=12, **steps), 100)


def test_less_than_an_epoch_trains_to_the_same_numbers():
    result, _ = both(lambda: bind(rl.InterventionGraph(LOW)), epochs=0.5)
    assert result.on_cone == result.steps == 2
    result, _ = both(lambda: bind(rl.InterventionGraph(LOW)), max_steps=2)
    assert result.on_cone == result.steps == 2


def test_several_processes_and_noisy_embeddings_are_reasons(tmp_path, monkeypatch):
    reft = bind()
    given = arguments(tmp_path)
    assert isinstance(runner_for(reft, True, train_model=False, arguments=given)[0], ConeRunner)
    noisy = arguments(tmp_path, neftune_noise_alpha=5.0)
    runner, why = runner_for(reft, True, train_model=False, arguments=noisy)
    assert runner is None
    assert "noise" in why[0]
    monkeypatch.setattr(type(given), "world_size", property(lambda self: 2))
    runner, why = runner_for(reft, True, train_model=False, arguments=given)
    assert runner is None
    assert "processes" in why[0]


def test_answer_losses_of_an_explanation_are_the_plain_runs():
    from reftlab.measuring import AnswerRuns

    reft = bind(rl.InterventionGraph(LOW, HIGH))
    batch = rl.training_batch(reft, PAIRS)
    accepts = frozenset(("input_ids", "attention_mask", "position_ids", "labels"))
    losses = AnswerRuns(reft, [batch], accepts)
    for off in ((), ("low",), ("high",), ("low", "high")):
        with torch.no_grad(), reft.disabled(*off) if off else contextlib.nullcontext():
            logits = reft(**batch).logits[:, :-1].log_softmax(-1)
            rows, columns = (batch["labels"][:, 1:] != -100).nonzero().unbind(1)
            expected = -logits[rows, columns, batch["labels"][rows, columns + 1]]
            torch.testing.assert_close(losses(), expected, rtol=1e-5, atol=1e-5)
    assert losses.example_of.tolist() == rows.tolist()
