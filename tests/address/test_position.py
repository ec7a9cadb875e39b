"""The position parser, and which tokens each position chooses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reftlab as rl
from reftlab import PositionError, parse_position
from reftlab.address import Prompt


def chosen(position: Any, length: int) -> list[int]:
    return parse_position(position).select(Prompt(length)).tolist()


def generated(position: Any, count: int) -> list[int]:
    return parse_position(position).select_generated(count).tolist()


SAME = {
    "all": rl.All(),
    "last": rl.Last(),
    "first": rl.First(),
    "first(7)": rl.First(7),
    "last( 2 )": rl.Last(2),
    "f7": rl.First(7),
    "l3": rl.Last(3),
    "first(7)+last(7)": rl.Union((rl.First(7), rl.Last(7))),
    "f7 + l7": rl.First(7) + rl.Last(7),
    "[0, 2, -1]": rl.Indices((0, 2, -1)),
    "[4]": rl.Indices((4,)),
    "f1+[3]+l1": rl.First() + rl.Indices((3,)) + rl.Last(),
    "span('Eiffel Tower')": rl.Span("Eiffel Tower"),
    'span("it\'s", -1)': rl.Span("it's", -1),
    "token(' Paris')": rl.Token(" Paris"),
    "after('a\\nb', 2)": rl.After("a\nb", 2),
}


@pytest.mark.parametrize("text", SAME)
def test_a_string_is_the_object_it_stands_for(text: str) -> None:
    assert parse_position(text) == SAME[text]
    assert parse_position(str(SAME[text])) == SAME[text]


def test_numbers_and_objects_are_positions_too() -> None:
    assert parse_position(3) == rl.Indices((3,))
    assert parse_position([0, -1]) == rl.Indices((0, -1))
    assert parse_position((1,)) == rl.Indices((1,))
    assert parse_position(rl.Last(2)) == rl.Last(2)
    assert str(rl.First(2) + "last" + [0]) == "first(2)+last+[0]"


@pytest.mark.parametrize(
    ("position", "length", "expected"),
    [
        ("all", 4, [0, 1, 2, 3]),
        ("last", 4, [3]),
        ("first", 4, [0]),
        ("first(2)", 4, [0, 1]),
        ("last(2)", 4, [2, 3]),
        ("f2+l1", 4, [0, 1, 3]),
        ("[0, 2, -1]", 4, [0, 2, 3]),
        ("[-1, 0]", 4, [0, 3]),
        ([1, -3], 4, [1]),
    ],
)
def test_a_position_chooses_tokens(position: Any, length: int, expected: list[int]) -> None:
    assert chosen(position, length) == expected


@pytest.mark.parametrize(
    ("position", "expected"),
    [("f7+l7", [0, 1, 2]), ("first(7)", [0, 1, 2]), ("last(7)", [0, 1, 2]), ("f2+l2", [0, 1, 2])],
)
def test_on_a_short_prompt_sums_are_unions(position: str, expected: list[int]) -> None:
    assert chosen(position, 3) == expected


@pytest.mark.parametrize("position", ["[3]", "[-4]", "[0, 5]"])
def test_a_number_outside_the_prompt_names_the_row_and_the_range(position: str) -> None:
    with pytest.raises(PositionError, match=r"row 6: position .* outside its 3 prompt tokens; .* -3 to 2"):
        parse_position(position).select(Prompt(3, row=6))


@pytest.mark.parametrize(
    ("position", "count", "expected"),
    [("all", 3, [0, 1, 2]), ("last", 3, [0, 1, 2]), ("first(2)", 3, [0, 1]), ("first(5)", 3, [0, 1, 2]),
     ("[0, 2, 9]", 3, [0, 2]), ("f1+[2]", 4, [0, 2]), ("[7]", 3, [])],
)  # fmt: skip
def test_among_generated_tokens_a_position_counts_from_the_first_of_them(
    position: str, count: int, expected: list[int]
) -> None:
    assert generated(position, count) == expected


@pytest.mark.parametrize("position", ["last(2)", "[-1]", "span('a')", "token('a')", "after('a')", "f1+l2"])
def test_positions_that_need_an_end_are_refused_among_generated_tokens(position: str) -> None:
    with pytest.raises(PositionError, match="have no meaning among generated tokens"):
        generated(position, 3)


@pytest.mark.parametrize(
    ("text", "at", "expected"),
    [
        ("", 0, "all, first, last"),
        ("lst", 0, "all, first, last"),
        ("first(", 6, "how many tokens"),
        ("first(0)", 0, "a count of 1 or more"),
        ("first(-2)", 0, "a count of 1 or more"),
        ("f0", 0, "a count of 1 or more"),
        ("first(2", 7, "')'"),
        ("first last", 6, "'+' or the end"),
        ("f7+", 3, "all, first, last"),
        ("[0,]", 3, "a whole number"),
        ("[0 1]", 3, "',' or ']'"),
        ("[]", 1, "a whole number"),
        ("span(Eiffel)", 5, "a quoted text"),
        ("span('')", 5, "a text that is not empty"),
        ("span('a', 0)", 10, "an occurrence other than 0"),
        ("span('a'", 8, "')'"),
        ("token('\\x')", 6, "a quoted text with valid escapes"),
    ],
)
def test_an_error_quotes_the_text_and_points_at_the_character(text: str, at: int, expected: str) -> None:
    with pytest.raises(PositionError) as caught:
        parse_position(text)
    message = str(caught.value)
    assert repr(text) in message
    assert f"at character {at} " in message
    assert expected in message
    assert message.splitlines()[-1].index("^") == at + 2


@pytest.mark.usefixtures("users_call")
@pytest.mark.parametrize("value", [None, True, 1.0, {"first": 2}, [0.5], [], [True], ["last"]])
def test_what_is_not_a_position_is_refused(value: Any) -> None:
    with pytest.raises(PositionError):
        parse_position(value)


@pytest.mark.usefixtures("users_call")
@pytest.mark.parametrize(
    "make",
    [lambda: rl.First(0), lambda: rl.Last(True), lambda: rl.First(1.5), lambda: rl.Indices(()),
     lambda: rl.Span(""), lambda: rl.Token("a", 0), lambda: rl.After("a", 1.0)],
)  # fmt: skip
def test_objects_are_checked_like_strings(make: Any) -> None:
    with pytest.raises(PositionError):
        make()


pieces = st.lists(
    st.sampled_from(
        ["all", "first", "last", "f7", "l", "span", "token", "after", "(", ")", "[", "]", ",", "+", "-", "0",
         "3", "99999999999999", "'", '"', "\\", "\\x4", "\\N{", "a", " ", "\n", "\x00", "é", "\ud800"]
    ), max_size=12,
).map("".join)  # fmt: skip


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@given(st.text(max_size=30) | pieces)
def test_any_text_parses_or_raises_position_error(text: str) -> None:
    try:
        position = parse_position(text)
    except PositionError:
        return
    assert parse_position(str(position)) == position


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
occurrences = st.integers(-9, 9).filter(bool)
terms = st.one_of(
    st.just(rl.All()),
    st.builds(rl.First, st.integers(1, 99)),
    st.builds(rl.Last, st.integers(1, 99)),
    st.lists(st.integers(-99, 99), min_size=1, max_size=4).map(lambda n: rl.Indices(tuple(n))),
    st.builds(rl.Span, texts, occurrences),
    st.builds(rl.Token, texts, occurrences),
    st.builds(rl.After, texts, occurrences),
)
objects = terms | st.lists(terms, min_size=2, max_size=4).map(lambda t: rl.Union(tuple(t)))


@given(objects)
def test_every_position_prints_as_a_string_that_is_that_position(position: rl.Position) -> None:
    assert parse_position(str(position)) == position


lengthwise = st.one_of(
    st.just(rl.All()), st.builds(rl.First, st.integers(1, 12)), st.builds(rl.Last, st.integers(1, 12))
)


@given(st.lists(lengthwise, min_size=1, max_size=4), st.integers(1, 9))
def test_choices_ascend_without_repeats_and_stay_inside_the_prompt(terms: list[Any], length: int) -> None:
    tokens = rl.Union(tuple(terms)).select(Prompt(length))
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == sorted(set(tokens.tolist()))
    assert set(tokens.tolist()) <= set(range(length))
    assert set(tokens.tolist()) == {n for term in terms for n in term.select(Prompt(length)).tolist()}
