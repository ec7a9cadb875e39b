"""An edit on a model with PEFT's LoRA, and both trained together."""

import copy
import warnings

import pytest
import torch
from torch import nn

import reftlab as rl
from tests.contracts.wrapped import (
    LORA_PATH,
    RAW,
    assert_acts_as_a_hook,
    graph,
    hooked,
    last_columns,
    learner,
    with_lora,
)
from tests.models import batch_of, build_model
from tests.oracle import assert_close, plain_read
from tests.training.conftest import PAIRS, make_model, make_tokenizer


def lora_of(model):
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_an_edit_on_a_model_with_lora_equals_a_plain_hook(task):
    model = with_lora(build_model("llama"), task_type=task).eval()
    assert_acts_as_a_hook(model, model, model.get_base_model().model.layers[1], LORA_PATH)
    batch, reft = batch_of(), graph(LORA_PATH).bind(model)
    with torch.no_grad():
        by_place = reft(batch["input_ids"], batch["attention_mask"]).logits
        assert by_place.equal(reft(**batch).logits)


def test_lora_is_part_of_what_a_site_holds_and_its_parts_are_sites_too():
    model = with_lora(build_model("llama")).eval()
    batch, projection = batch_of(), model.get_base_model().model.layers[1].self_attn.q_proj
    path = "base_model.model.model.layers[1].self_attn.q_proj"
    reft = graph(LORA_PATH).bind(model)
    for site, module in (
        (path, projection),
        (f"{path}.base_layer", projection.base_layer),
        (f"{path}.lora_A.default", projection.lora_A["default"]),
    ):
        got = reft.read(f"{site}.output @ last", **batch)[f"{site}.output @ last"]
        wanted = plain_read(model, module, batch)
        rows = zip(wanted, last_columns(batch), strict=True)
        assert_close(got[:, 0], torch.stack([row[column] for row, (column,) in rows]))
    inner, outer = (plain_read(model, m, batch) for m in (projection.base_layer, projection))
    assert not torch.allclose(inner, outer, atol=1e-3)


def test_an_edit_stays_where_the_adapter_is_turned_off():
    model, bare = with_lora(build_model("llama")).eval(), build_model("llama")
    reft, batch = graph(LORA_PATH).bind(model), batch_of()
    with model.disable_adapter(), torch.no_grad():
        got = reft(**batch).logits
    with hooked(bare.model.layers[1], batch), torch.no_grad():
        expected = bare(**batch).logits
    assert_close(got, expected)


def test_training_leaves_lora_alone_unless_asked():
    model = with_lora(make_model())
    before = copy.deepcopy(lora_of(model))
    rl.train(learner(model), PAIRS, epochs=2, progress=False)
    after = lora_of(model)
    assert all(after[name].equal(before[name]) and after[name].requires_grad for name in before)


def test_lora_and_edit_trained_together_equal_a_loop_written_by_hand():
    model = with_lora(make_model())
    reft, twin = learner(model), learner(with_lora(make_model()))
    rows = [row for row in PAIRS if len(row[0].split()) == 4]
    # One batch of the same prompts' length, so that the loop needs no collator.
    tokenizer = make_tokenizer()
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in rows]
    answers = [[*tokenizer(answer)["input_ids"], tokenizer.eos_token_id] for _, answer in rows]
    assert [(len(p), len(a)) for p, a in zip(prompts, answers, strict=True)] == [(4, 2), (4, 2)]
    settings = {"epochs": 3, "learning_rate": 0.01, "batch_size": 2, "schedule": "constant"}
    rl.train(reft, rows, train_model=True, progress=False, **settings)

    other, built = twin.model.train(), twin.interventions["edit"]
    own = [p for p in built.parameters() if p.requires_grad]
    learned = [*own, *lora_of(other).values()]
    optimizer = torch.optim.AdamW(learned, lr=0.01, weight_decay=0.0)
    ids = torch.tensor([p + a for p, a in zip(prompts, answers, strict=True)])

    def edit(module, args, output):
        new = output.clone()
        new[:, 3] = built(output[:, 3])
        return new

    other.get_base_model().model.layers[1].register_forward_hook(edit)
    for _ in range(3):
        logits = other(input_ids=ids).logits
        nn.functional.cross_entropy(logits[:, 3:5].flatten(0, 1), ids[:, 4:6].flatten()).backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    start = lora_of(with_lora(make_model()))
    for name, parameter in lora_of(model).items():
        assert_close(parameter, lora_of(other)[name])
        assert not torch.allclose(parameter, start[name])
    for name, tensor in reft.interventions["edit"].state_dict().items():
        assert_close(tensor, built.state_dict()[name])
    assert all(parameter.grad is None for parameter in reft.parameters())


@pytest.mark.filterwarnings("ignore:.*incompatible with gradient checkpointing")
def test_gradient_checkpointing_changes_no_number_of_lora_and_edit_trained_together():
    settings = {"epochs": 2, "learning_rate": 0.01, "batch_size": 5, "progress": False, "train_model": True}
    plain, saving = (learner(with_lora(make_model())) for _ in range(2))
    rl.train(plain, PAIRS, **settings)
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rl.train(saving, PAIRS, **settings)
    for name, tensor in {**lora_of(plain.model), **plain.interventions.state_dict()}.items():
        other = {**lora_of(saving.model), **saving.interventions.state_dict()}[name]
        assert_close(other, tensor)


def test_a_training_of_lora_and_edit_that_was_interrupted_goes_on_as_if_it_had_not_been(tmp_path):
    settings = {"learning_rate": 0.01, "batch_size": 5, "progress": False, "train_model": True, "epochs": 4}
    whole, first, second = (learner(with_lora(make_model())) for _ in range(3))
    rl.train(whole, PAIRS, **settings)
    rl.train(first, PAIRS, folder=tmp_path, **settings)
    for file in (tmp_path / "checkpoint-4").iterdir():
        file.unlink()
    result = rl.train(second, PAIRS, folder=tmp_path, resume=True, **settings)
    assert result.resumed_from == 3
    learned = {**lora_of(whole.model), **whole.interventions.state_dict()}
    again = {**lora_of(second.model), **second.interventions.state_dict()}
    for name, tensor in learned.items():
        assert_close(again[name], tensor, 1e-6)
    with pytest.raises(rl.DataError, match="train_model"):
        rl.train(
            learner(with_lora(make_model())),
            PAIRS,
            folder=tmp_path,
            resume=True,
            **{**settings, "train_model": False},
        )


def test_training_the_whole_model_or_nothing_of_it_is_refused():
    with pytest.raises(
        rl.RunError, match="train_model=True: every parameter of LlamaForCausalLM requires grad"
    ):
        rl.train(learner(make_model(), RAW), PAIRS, train_model=True)
    with pytest.raises(rl.RunError, match="train_model=True: no parameter of LlamaForCausalLM requires grad"):
        rl.train(learner(make_model().requires_grad_(False), RAW), PAIRS, train_model=True)


def test_saving_says_that_lora_must_be_saved_apart_and_loading_needs_it(tmp_path):
    peft = pytest.importorskip("peft")
    reft = learner(with_lora(make_model(), task_type="CAUSAL_LM"))
    rl.train(reft, PAIRS, epochs=3, learning_rate=0.02, progress=False, train_model=True)
    with pytest.warns(
        UserWarning, match=r"trained together with parameters of the model.*model\.save_pretrained"
    ):
        reft.save(tmp_path / "edit")
    reft.model.save_pretrained(tmp_path / "lora")
    wanted = rl.answer_loss(reft, PAIRS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = peft.PeftModel.from_pretrained(make_model(), tmp_path / "lora").eval()
        again = rl.load(tmp_path / "edit", model, make_tokenizer())
    assert rl.answer_loss(again, PAIRS) == pytest.approx(wanted, abs=1e-6)
    other = with_lora(make_model(), task_type="CAUSAL_LM")
    with pytest.warns(
        UserWarning, match="other weights.* trained together with the edits, so load those first"
    ):
        rl.load(tmp_path / "edit", other, make_tokenizer())
