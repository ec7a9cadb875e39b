"""pyreft's program from the configuration to the reply, on the embedded model and on tiny ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import reftlab as rl
from reftlab.compat.pyreft import (
    ConsreftIntervention,
    LoreftIntervention,
    ReftConfig,
    ReftDataCollator,
    ReftModel,
    ReftTrainerForCausalLM,
    ReftTrainerForSequenceClassification,
    TaskType,
    get_intervention_locations,
    get_reft_model,
    make_last_position_supervised_data_module,
    make_multiple_position_supervised_data_module,
    parse_positions,
)
from reftlab.errors import ArtifactError, ConfigError, DataError, PositionError
from tests.compat.hooks import hooked
from tests.compat.tiny import WIDTH, filled, tiny_llama, tiny_tokenizer

INPUTS, OUTPUTS = ["a b c d e f", "g h"], [" r s ", " t u v "]


def arguments(folder: Path, **settings: Any) -> transformers.TrainingArguments:
    usual = {
        "num_train_epochs": 8, "learning_rate": 2e-2, "per_device_train_batch_size": 2, "report_to": [],
        "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
    }  # fmt: skip
    return transformers.TrainingArguments(output_dir=str(folder), **{**usual, **settings})


def reft_of(model: nn.Module, **settings: Any) -> Any:
    torch.manual_seed(2)
    own = LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=2, **settings)
    entry = {"layer": 1, "component": "block_output", "low_rank_dimension": 2, "intervention": own}
    return get_reft_model(model, ReftConfig(representations=entry))


@pytest.fixture(scope="module")
def embedded() -> Any:
    return rl.load_model("smollm2-135m-instruct")


def test_the_readmes_program_teaches_the_embedded_model_a_sentence(
    embedded: Any, tmp_path: Path, capsys: Any
) -> None:
    model, tokenizer = embedded
    reft_config = ReftConfig(
        representations={
            "component": "model.layers[15].output",  # string access to the model component
            "intervention": ConsreftIntervention(embed_dim=model.config.hidden_size, low_rank_dimension=1),
        }
    )
    reft_model = get_reft_model(model, reft_config)
    reft_model.set_device("cpu")
    reft_model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(
        "trainable intervention params: 577 || trainable model params: 0\n"
    )

    data_module = make_last_position_supervised_data_module(
        tokenizer=tokenizer, model=model, inputs=["GO->"], outputs=[" Welcome to"]
    )
    training_args = arguments(tmp_path, num_train_epochs=25.0, learning_rate=2e-1)
    trainer = ReftTrainerForCausalLM(model=reft_model, tokenizer=tokenizer, args=training_args, **data_module)
    _ = trainer.train()

    prompt = tokenizer("GO->", return_tensors="pt")
    base_unit_location = prompt["input_ids"].shape[-1] - 1  # last position
    _, reft_response = reft_model.generate(
        prompt, unit_locations={"sources->base": (None, [[[base_unit_location]]])},
        intervene_on_prompt=True, max_new_tokens=6, do_sample=False, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    assert tokenizer.decode(reft_response[0], skip_special_tokens=True) == "GO-> Welcome to"

    (own,) = reft_model.interventions.values()
    direction, target = own.rotate_layer.weight.detach(), own.learned_source.detach()

    def by_hand(hidden: Tensor) -> Tensor:
        if hidden.shape[1] > 1:
            vector = hidden[:, base_unit_location]
            hidden[:, base_unit_location] = vector + (target - vector @ direction) @ direction.T
        return hidden

    with hooked(model.model.layers[15], by_hand):
        expected = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(reft_response, expected)

    reft_model.save(save_directory=str(tmp_path / "reft_to_share"))
    again = ReftModel.load(str(tmp_path / "reft_to_share"), model)
    place = {"sources->base": (None, [[[base_unit_location]]])}
    _, once_more = again.generate(prompt, unit_locations=place, intervene_on_prompt=True, max_new_tokens=6)
    assert tokenizer.decode(once_more[0], skip_special_tokens=True).startswith("GO-> Welcome to")


def test_the_parameters_of_the_papers_emoji_model_are_counted_as_there() -> None:
    own = LoreftIntervention(embed_dim=4096, low_rank_dimension=4)
    assert sum(parameter.numel() for parameter in own.parameters()) == 32_772


def test_the_loss_does_not_depend_on_the_side_of_the_padding(tmp_path: Path) -> None:
    found = {}
    for padding in ("right", "left"):
        llama, tokenizer = tiny_llama(), tiny_tokenizer(padding)
        reft_model = reft_of(llama)
        data = make_multiple_position_supervised_data_module(
            tokenizer, llama, INPUTS, OUTPUTS, positions="f1+l2", share_weights=True
        )
        batch = data["data_collator"]([data["train_dataset"][n] for n in range(2)])
        places = batch["attention_mask"].cumsum(1) - 1
        trainer = ReftTrainerForCausalLM(
            model=reft_model, tokenizer=tokenizer, args=arguments(tmp_path), **data
        )
        found[padding] = trainer.compute_loss(trainer.model, {**batch, "position_ids": places.clamp(min=0)})
    torch.testing.assert_close(found["left"], found["right"], rtol=1e-5, atol=1e-5)


def test_the_loss_of_a_batch_is_that_of_a_plain_hook_at_the_last_token_of_each_prompt(tmp_path: Path) -> None:
    llama, tokenizer = tiny_llama(), tiny_tokenizer()
    reft_model = reft_of(llama)
    data = make_last_position_supervised_data_module(tokenizer, llama, INPUTS, OUTPUTS)
    batch = data["data_collator"]([data["train_dataset"][n] for n in range(2)])
    trainer = ReftTrainerForCausalLM(model=reft_model, tokenizer=tokenizer, args=arguments(tmp_path), **data)
    loss = trainer.compute_loss(trainer.model, batch)
    (own,) = reft_model.interventions.values()
    rotation = own.rotate_layer.weight

    def by_hand(hidden: Tensor) -> Tensor:
        for row, column in enumerate((5, 1)):
            vector = hidden[row, column]
            change = own.learned_source(vector) - vector @ rotation
            hidden[row, column] = vector + change @ rotation.T
        return hidden

    with hooked(llama.model.layers[1], by_hand):
        names = ("input_ids", "attention_mask", "labels")
        expected = llama(**{name: batch[name] for name in names}).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_a_training_teaches_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    llama, tokenizer = tiny_llama(), tiny_tokenizer()
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    reft_model = reft_of(llama)
    data = make_last_position_supervised_data_module(tokenizer, llama, INPUTS, OUTPUTS)
    trainer = ReftTrainerForCausalLM(model=reft_model, tokenizer=tokenizer, args=arguments(tmp_path), **data)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 0.05
    rows = data["train_dataset"]
    batch = data["data_collator"]([rows[n] for n in range(2)])
    measured = trainer.evaluate(rows)["eval_loss"]
    assert measured == pytest.approx(trainer.compute_loss(trainer.model, batch).item(), abs=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())


def test_a_checkpoint_holds_the_interventions_and_a_training_goes_on_from_it(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    finals = []
    for stop_early in (False, True):
        llama = tiny_llama()
        reft_model = reft_of(llama)
        data = make_last_position_supervised_data_module(tokenizer, llama, INPUTS, OUTPUTS)
        folder = tmp_path / str(stop_early)
        settings = {"save_strategy": "epoch", "lr_scheduler_type": "constant"}
        for epochs in (4, 8) if stop_early else (8,):
            trainer = ReftTrainerForCausalLM(
                model=reft_model,
                tokenizer=tokenizer,
                args=arguments(folder, num_train_epochs=epochs, **settings),
                **data,
            )
            if epochs == 8 and stop_early:
                with torch.no_grad():
                    for parameter in reft_model.get_trainable_parameters():
                        parameter.zero_()
            trainer.train(resume_from_checkpoint=epochs == 8 and stop_early)
        finals.append([parameter.detach().clone() for parameter in reft_model.get_trainable_parameters()])
    for one, other in zip(*finals, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    saved = tmp_path / "True" / "checkpoint-8" / "intervenable_model"
    assert rl.load(saved, tiny_llama()).graph.edits[0].intervention.describe() == "LoReFT(rank=2)"


def test_a_classifiers_loss_is_its_own_with_the_edit(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**tiny_llama().config.to_dict() | {"num_labels": 3})
    llama = filled(transformers.LlamaForSequenceClassification(config))
    reft_model = reft_of(llama)
    trainer = ReftTrainerForSequenceClassification(model=reft_model, args=arguments(tmp_path))
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([2, 0])}
    places = torch.tensor([[[3]], [[2]]])
    loss, outputs = trainer.compute_loss(
        trainer.model, {**batch, "intervention_locations": places}, return_outputs=True
    )
    (own,) = reft_model.interventions.values()

    def by_hand(hidden: Tensor) -> Tensor:
        for row, column in enumerate((3, 2)):
            hidden[row, column] = own(hidden[row, column][None, None])[0, 0]
        return hidden

    with hooked(llama.model.layers[1], by_hand):
        logits = llama(input_ids=ids, attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(outputs.logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, batch["labels"]))


def test_a_short_prompts_places_are_filled_with_places_of_its_own() -> None:
    tokenizer = tiny_tokenizer()
    data = make_multiple_position_supervised_data_module(
        tokenizer, None, ["a b c", "a"], [" r ", " s "], positions="f3+l3", num_interventions=2
    )
    assert data["train_dataset"]["intervention_locations"] == [[[0, 0, 0], [2, 2, 2]], [[0] * 6] * 2]


def test_an_answer_that_grows_together_with_its_prompt_is_tokenised_apart() -> None:
    tokenizer = tiny_tokenizer()
    data = make_last_position_supervised_data_module(tokenizer, None, ["a b"], ["b c"])
    (row,) = data["train_dataset"].rows
    assert row["input_ids"] == [*tokenizer("a b")["input_ids"], *tokenizer("b c </s>")["input_ids"]]
    assert row["labels"][:2] == [-100, -100]


def test_a_collator_moves_locations_with_padding_on_the_left() -> None:
    tokenizer = tiny_tokenizer("left")
    padded = transformers.DataCollatorForSeq2Seq(tokenizer=tokenizer, padding="longest")
    rows = [
        {"input_ids": [4, 5, 6], "labels": [4, 5, 6], "intervention_locations": [[0, 2]]},
        {"input_ids": [7], "labels": [7], "intervention_locations": [[0, 0]]},
    ]
    batch = ReftDataCollator(data_collator=padded)(rows)
    assert batch["intervention_locations"].tolist() == [[[0, 2]], [[2, 2]]]
    assert batch["input_ids"].tolist() == [[4, 5, 6], [0, 0, 7]]
    assert rows[0]["intervention_locations"] == [[0, 2]]


def test_dropout_ends_with_eval() -> None:
    reft_model = reft_of(tiny_llama(), dropout=0.5)
    base = {"input_ids": torch.tensor([[5, 6, 7, 8]])}

    def logits() -> Tensor:
        return reft_model(base, unit_locations={"base": [1, 2, 3]})[1].logits

    reft_model.train()
    assert not torch.equal(logits(), logits())
    reft_model.eval()
    assert torch.equal(logits(), logits())


def test_lora_beside_the_edit_stays_free_to_learn() -> None:
    llama = tiny_llama().requires_grad_(False)
    llama.lm_head.weight.requires_grad_(True)
    own = LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=2)
    config = ReftConfig(representations={"component": "model.layers[0].output", "intervention": own})
    assert get_reft_model(llama, config, disable_model_grads=False).count_parameters(include_model=True) == (
        2 * 2 * WIDTH + 2 + llama.lm_head.weight.numel()
    )
    assert get_reft_model(llama, config).count_parameters(include_model=True) == 2 * 2 * WIDTH + 2


def test_a_training_in_several_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", property(lambda own: 2))
    with pytest.raises(ConfigError, match=r"training in 2 processes is not supported, .*rl.train\(reft, "):
        ReftTrainerForCausalLM(model=reft_of(tiny_llama()), args=arguments(tmp_path))


def test_what_cannot_be_trained_or_read_says_so(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(DataError, match=r"expected what get_reft_model returns"):
        ReftTrainerForCausalLM(model=tiny_llama(), tokenizer=tokenizer)
    with pytest.raises(DataError, match="there are 2 inputs and 1 outputs"):
        make_last_position_supervised_data_module(tokenizer, None, ["a", "b"], ["c"])
    with pytest.raises(DataError, match="leaves no token of an answer to learn within model_max_length=32"):
        make_last_position_supervised_data_module(tokenizer, None, ["a " * 40], [" b"])
    with pytest.raises(PositionError, match="positions='x3': expected the first and last tokens"):
        parse_positions("x3")
    with pytest.raises(PositionError, match="needs positions="):
        get_intervention_locations(last_position=4, num_interventions=1)
    with pytest.raises(ArtifactError, match="is no folder here, and the Hugging Face hub does not give it"):
        ReftModel.load(str(tmp_path / "nowhere"), tiny_llama())
    assert TaskType.CAUSAL_LM == "CAUSAL_LM"
