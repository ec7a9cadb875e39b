"""Examples become token ids whose labels are the answer's tokens alone, padded on either side."""

import datasets
import pytest
import torch

import reftlab as rl
from reftlab.training import Collator, Encoded, as_examples, encode, format_prompt

from .conftest import make_tokenizer


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def test_pairs_mappings_prompts_and_datasets_are_all_read_as_examples():
    wanted = [rl.Example("who", "red"), rl.Example("what", "blue")]
    pairs = [("who", "red"), ["what", "blue"]]
    rows = [{"prompt": "who", "answer": "red"}, {"prompt": "what", "answer": "blue"}]
    assert as_examples(pairs) == wanted
    assert as_examples(rows) == wanted
    assert as_examples(datasets.Dataset.from_list(rows)) == wanted
    assert as_examples(wanted) == wanted
    assert as_examples(["who"]) == [rl.Example("who", None)]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("who", "must be a list"),
        ([], "no examples"),
        ([("a", "b"), ("a", 3)], "example 1"),
        ([("a", "b", "c")], "example 0"),
        ([{"question": "a"}], "expected 'prompt' and 'answer'"),
        (7, "not int"),
    ],
)
def test_what_is_not_an_example_is_refused_by_number(data, said):
    with pytest.raises(rl.DataError, match=said):
        as_examples(data)


def test_labels_hold_the_answer_and_its_end_and_nothing_of_the_prompt(tokenizer):
    (row,) = encode(tokenizer, [rl.Example("where is the cat", "red green")])
    words = tokenizer.convert_ids_to_tokens(row.input_ids)
    assert words == ["where", "is", "the", "cat", "red", "green", "<end>"]
    assert row.labels[:4] == (-100,) * 4
    assert row.labels[4:] == row.input_ids[4:]


def test_a_chat_prompt_is_exactly_what_the_template_makes_of_it(tokenizer_with_template):
    tokenizer = tokenizer_with_template
    (row,) = encode(tokenizer, [rl.Example("who", "red")], chat=True)
    assert tokenizer.convert_ids_to_tokens(row.input_ids) == ["<user>", "who", "<assistant>", "red", "<end>"]
    text = format_prompt(tokenizer, "who", chat=True, system="tell me")
    assert text.split() == ["<system>", "tell", "me", "<user>", "who", "<assistant>"]


def test_a_chat_without_template_and_a_system_message_without_chat_are_errors(tokenizer):
    with pytest.raises(rl.DataError, match="no chat template"):
        format_prompt(tokenizer, "who", chat=True)
    with pytest.raises(rl.DataError, match="needs chat=True"):
        format_prompt(tokenizer, "who", chat=False, system="be kind")


def test_an_example_without_tokens_or_with_too_many_is_named(tokenizer):
    with pytest.raises(rl.DataError, match="example 1: the answer ''"):
        encode(tokenizer, [rl.Example("who", "red"), rl.Example("who", "")])
    with pytest.raises(rl.DataError, match="example 0: the prompt ''"):
        encode(tokenizer, [rl.Example("", "red")])
    with pytest.raises(rl.DataError, match="6 tokens long, more than max_length=5"):
        encode(tokenizer, [rl.Example("where is the cat", "red")], max_length=5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_padded_on_the_side_asked_for(side):
    rows = [Encoded((5, 6, 7), (-100, 6, 7)), Encoded((8,), (8,))]
    batch = Collator(pad_id=9, side=side)(rows)
    short = [9, 9, 8] if side == "left" else [8, 9, 9]
    kept = [0, 0, 1] if side == "left" else [1, 0, 0]
    assert batch["input_ids"].tolist() == [[5, 6, 7], short]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], kept]
    assert batch["labels"].tolist()[1] == [8 if k else -100 for k in kept]
    real = batch["attention_mask"].bool()
    assert torch.equal(batch["position_ids"][real], torch.tensor([0, 1, 2, 0]))


def test_an_unknown_padding_side_is_refused(users_call):
    with pytest.raises(rl.DataError, match="side='middle'"):
        Collator(0, "middle")
