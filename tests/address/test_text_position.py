"""Positions that look at text: span, token, after."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import reftlab as rl
from reftlab import PositionError, parse_position
from reftlab.address import Prompt

SENTENCE = "the Eiffel Tower is in Paris and the Eiffel Tower is in London"


def prompt(text: str, tokenizer: Any, row: int = 0) -> Prompt:
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return Prompt(len(ids), ids, tokenizer, row)


def words(position: str, text: str, tokenizer: Any) -> list[str]:
    asked = prompt(text, tokenizer)
    tokens = parse_position(position).select(asked).tolist()
    return [tokenizer.convert_ids_to_tokens(asked.ids[number]).strip("▁") for number in tokens]


def test_a_span_is_the_tokens_that_cover_the_text(tokenizer: Any) -> None:
    assert parse_position("span('Eiffel Tower')").select(prompt(SENTENCE, tokenizer)).tolist() == [1, 2]
    assert words("span('iffel Tow')", SENTENCE, tokenizer) == ["Eiffel", "Tower"]
    assert words("span('s in P')", SENTENCE, tokenizer) == ["is", "in", "Paris"]


def test_a_word_of_several_tokens_is_covered_by_all_of_them(tokenizer: Any) -> None:
    assert words("span('zebra')", "the zebra is in Paris", tokenizer) == list("zebra")


@pytest.mark.parametrize(("occurrence", "expected"), [(1, [1, 2]), (2, [8, 9]), (-1, [8, 9]), (-2, [1, 2])])
def test_an_occurrence_is_counted_from_either_end(
    tokenizer: Any, occurrence: int, expected: list[int]
) -> None:
    position = rl.Span("Eiffel Tower", occurrence)
    assert position.select(prompt(SENTENCE, tokenizer)).tolist() == expected


def test_after_is_every_token_behind_the_text(tokenizer: Any) -> None:
    assert words("after('Paris')", SENTENCE, tokenizer) == [
        "and",
        "the",
        "Eiffel",
        "Tower",
        "is",
        "in",
        "London",
    ]
    assert words("after('Tower', 2)", SENTENCE, tokenizer) == ["is", "in", "London"]


def test_a_token_is_found_by_its_exact_text(tokenizer: Any) -> None:
    assert parse_position("token('Paris')").select(prompt(SENTENCE, tokenizer)).tolist() == [5]
    assert parse_position("token('in', -1)").select(prompt(SENTENCE, tokenizer)).tolist() == [11]


def test_a_text_of_several_tokens_is_no_token(tokenizer: Any) -> None:
    with pytest.raises(PositionError, match=r"2 tokens, not one; use span\('Eiffel Tower'\)"):
        parse_position("token('Eiffel Tower')").select(prompt(SENTENCE, tokenizer))


@pytest.mark.parametrize(
    ("position", "message"),
    [
        ("span('Berlin')", r"row 4: .*'Berlin' does not occur in the prompt 'the Eiffel"),
        ("span('Paris', 2)", r"row 4: .*'Paris' occurs 1 time in"),
        ("span('Tower', -3)", r"row 4: .*'Tower' occurs 2 times in"),
        ("token('cat')", r"row 4: .*the token does not occur"),
        ("after('London')", r"row 4: .*no token follows that text"),
    ],
)
def test_text_that_is_not_there_is_an_error_that_names_the_row(
    tokenizer: Any, position: str, message: str
) -> None:
    with pytest.raises(PositionError, match=message):
        parse_position(position).select(prompt(SENTENCE, tokenizer, row=4))


@pytest.mark.parametrize("position", ["span('a')", "token('a')", "after('a')"])
def test_text_positions_ask_for_what_they_lack(tokenizer: Any, position: str) -> None:
    with pytest.raises(PositionError, match="needs tokenizer"):
        parse_position(position).select(Prompt(3, (1, 2, 3), None))
    with pytest.raises(PositionError, match="needs input_ids"):
        parse_position(position).select(Prompt(3, None, tokenizer))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, so that an emoji is four of which none can be shown alone."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_characters_of_several_tokens_are_covered_whole() -> None:
    tokenizer = byte_tokenizer()
    asked = prompt("a 🎉 é!", tokenizer)
    assert asked.length == 10
    assert parse_position("span('🎉')").select(asked).tolist() == [2, 3, 4, 5]
    assert parse_position("span('é')").select(asked).tolist() == [7, 8]
    assert parse_position("after('🎉')").select(asked).tolist() == [6, 7, 8, 9]
    assert parse_position("span('🎉 é')").select(asked).tolist() == list(range(2, 9))


def test_an_uncased_tokenizers_text_is_found_by_what_the_user_writes() -> None:
    from tokenizers import normalizers

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert parse_position("span('Paris')").select(prompt("in Paris.", tokenizer)).tolist() == [3, 4, 5, 6, 7]
