"""The questions of analyses/commonsense: LLM-Adapters' layout, prompts, the draw, and how LoRA is sized."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import reftlab as rl

FOLDER = Path(__file__).parents[2] / "analyses" / "commonsense"


def part_of(name):
    """A module of the study, which is a script's folder and no package."""
    spec = importlib.util.spec_from_file_location(f"commonsense_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by its name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


questions, methods = part_of("questions"), part_of("methods")


def science(number, answer=2, text=None, options=4):
    """A made-up question in the layout of ARC-Easy and OpenBookQA."""
    text = text or f"What is number {number}?"
    choices = [f"answer{n}" for n in range(1, options + 1)]
    shown = " ".join(f"Answer{n}: thing {number}.{n}" for n in range(1, options + 1))
    asked = f"Please choose the correct answer to the question: {text}\n\n{shown}\n\n"
    return {
        "instruction": f"{asked}Answer format: {'/'.join(choices)}",
        "input": "",
        "output": f"the correct answer is answer{answer}",
        "answer": f"answer{answer}",
    }


YES_NO = {
    "instruction": "Please answer the following question with true or false, question: is the sea salty?\n\n"
    "Answer format: true/false",
    "input": "",
    "output": "the correct answer is true",
    "answer": "true",
}


def written(folder, task="ARC-Easy", **parts):
    for part, entries in parts.items():
        file = folder / task / f"{part}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(entries), encoding="utf-8")
    return folder


def choose(folder, **settings):
    settings = {"train": 100, "test": 100, "tokens": len, "max_tokens": 10_000} | settings
    return questions.choose(folder, "ARC-Easy", **settings)


def test_a_question_with_options_is_taken_apart(tmp_path):
    folder = written(tmp_path, train=[science(7, answer=3, text="Why is it: cold?")])
    (found,) = questions.read_questions(folder / "ARC-Easy" / "train.json")
    assert found.choices == ("answer1", "answer2", "answer3", "answer4")
    assert found.text == "Why is it: cold?"
    assert found.options == tuple(f"thing 7.{n}" for n in (1, 2, 3, 4))
    assert (found.answer, found.right) == ("answer3", 2)


def test_a_yes_no_question_has_no_options(tmp_path):
    folder = written(tmp_path, "boolq", train=[YES_NO])
    (found,) = questions.read_questions(folder / "boolq" / "train.json")
    assert (found.text, found.options, found.right) == ("is the sea salty?", (), 0)


@pytest.mark.parametrize("entry", [science(1), science(1, answer=4), YES_NO])
def test_prompt_and_ending_are_the_instruction_and_the_output(tmp_path, entry):
    folder = written(tmp_path, train=[entry])
    (found,) = questions.read_questions(folder / "ARC-Easy" / "train.json")
    assert found.prompt + found.ending == f"{entry['instruction']}\n{entry['output']}"
    # All that the choices have in common stands in the prompt.
    assert len({ending.strip()[0] for ending in questions.endings(found.choices)[1]}) == len(found.choices)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": "answer9", "output": "the correct answer is answer9"}, "answer9"),
        ({"output": "it is answer2"}, "it is answer2"),
        ({"input": "more"}, "input='more'"),
        ({"instruction": "What?"}, "Answer format"),
    ],
)
def test_what_is_not_in_the_layout_is_refused_with_its_number(tmp_path, change, said):
    folder = written(tmp_path, train=[science(0), science(1) | change])
    with pytest.raises(ValueError, match="entry 1") as caught:
        questions.read_questions(folder / "ARC-Easy" / "train.json")
    assert said in str(caught.value)


def test_a_missing_field_is_named(tmp_path):
    entry = science(0)
    del entry["answer"]
    with pytest.raises(ValueError, match="it has no answer"):
        questions.read_questions(written(tmp_path, train=[entry]) / "ARC-Easy" / "train.json")


def test_no_training_question_is_in_the_test_file_and_every_reason_is_counted(tmp_path):
    folder = written(
        tmp_path,
        train=[science(0), science(1, text="Why NOW?"), science(2), science(3, options=3)],
        test=[science(10, text="why  now"), science(11), science(12, text="What is number 11?")],
    )
    found = choose(folder, max_tokens=10_000)
    assert sorted(q.id for q in found.train) == [0, 2]
    assert sorted(q.id for q in found.test) == [0, 1]
    assert sorted(found.left_out.values()) == [1, 1, 1]


def test_long_prompts_are_left_out_and_short_ones_kept_whole(tmp_path):
    long = science(1, text="word " * 50 + "?")
    folder = written(tmp_path, train=[science(0), long], test=[science(5)])
    found = choose(folder, tokens=lambda text: len(text.split()), max_tokens=60)
    assert [q.id for q in found.train] == [0]
    assert found.train[0].prompt.startswith(science(0)["instruction"])
    assert list(found.left_out.values()) == [1]


def test_the_same_questions_are_drawn_each_time_and_a_larger_draw_is_no_repeat(tmp_path):
    folder = written(
        tmp_path, train=[science(n) for n in range(30)], test=[science(n) for n in range(50, 70)]
    )
    first, again = (choose(folder, train=10, test=5) for _ in range(2))
    assert first == again
    assert (len({q.id for q in first.train}), len({q.id for q in first.test})) == (10, 5)
    assert len(choose(folder, train=1000).train) == 30


def test_the_commonest_answer_is_that_of_the_training_questions(tmp_path):
    folder = written(
        tmp_path,
        train=[science(n, answer=4 if n < 3 else 1) for n in range(5)],
        test=[science(n, answer=2) for n in range(50, 60)],
    )
    assert choose(folder).commonest == 3


@pytest.mark.parametrize("wanted", [1, 500, 69_180, 46_120, 6_000_000])
def test_lora_is_as_near_as_any_rank_and_number_of_blocks_can_be(wanted):
    sizes = [[576 + 576, 576 + 192]] * 30
    rank, blocks = methods.nearest_lora(wanted, sizes)
    counts = {(r, b): r * b * (576 + 576 + 576 + 192) for r in range(1, 65) for b in range(1, 31)}
    best = min(abs(count - wanted) for count in counts.values())
    assert abs(counts[rank, blocks] - wanted) == best
    assert blocks == max(b for (_, b), count in counts.items() if abs(count - wanted) == best)


def test_both_forms_of_a_task_ask_the_same_questions(tmp_path):
    folder = written(
        tmp_path, train=[science(n) for n in range(30)], test=[science(n) for n in range(50, 70)]
    )
    settings = {"train": 10, "test": 5, "tokens": len, "max_tokens": 10_000}
    by_number, by_text = (
        questions.choose(folder, task, **settings) for task in ("ARC-Easy", "ARC-Easy-text")
    )
    assert (by_number.train, by_number.test) == (by_text.train, by_text.test)
    one = by_text.train[0]
    assert by_text.pair(one) == (f"Question: {one.text}\nAnswer:", f" thing {one.id}.2")
    assert by_number.pair(one) == (one.prompt, one.ending)


def test_an_option_s_score_is_the_likelihood_of_its_text_with_the_edit_at_the_prompt_s_last_token(
    llama, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(FOLDER)
    option_scores = importlib.import_module("answering").option_scores
    entries = [science(1, text="Why?"), science(22, text="What is it that is so long?", answer=3)]
    asked = questions.read_questions(written(tmp_path, train=entries) / "ARC-Easy" / "train.json")
    edit = rl.Edit(
        "e",
        at="blocks[1].output",
        positions="last",
        intervention=rl.Add(torch.ones(llama.config.hidden_size)),
    )
    scores = option_scores(rl.InterventionGraph(edit).bind(llama, tokenizer), asked, batch_size=2)
    bare = option_scores(rl.InterventionGraph().bind(llama, tokenizer), asked, batch_size=2)

    def by_hand(question, option, added):
        prompt, answer = (tokenizer(text, add_special_tokens=False).input_ids
                          for text in (f"Question: {question.text}\nAnswer:", f" {option}"))  # fmt: skip

        def add(module, inputs, output):
            output = output.clone()
            output[0, len(prompt) - 1] += added
            return output

        handle = llama.model.layers[1].register_forward_hook(add)
        said = llama(torch.tensor([prompt + answer])).logits[0].detach().log_softmax(-1)
        handle.remove()
        own = [said[len(prompt) - 1 + n, token] for n, token in enumerate(answer)]
        return float(sum(own)) / len(option)

    for found, added in ((scores, 1), (bare, 0)):
        wanted = [[by_hand(question, option, added) for option in question.options] for question in asked]
        assert found == pytest.approx(torch.tensor(wanted).numpy(), abs=1e-4)
    assert abs(scores - bare).max() > 0.01
