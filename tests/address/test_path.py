"""The site-path parser: what it reads, what it refuses, and how it says so."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reftlab import AddressError, parse_path
from reftlab.address.path import Child, Entries, Every

READABLE = {
    "model.layers[15].output": "model.layers[15].output",
    "model.layers.15.output": "model.layers[15].output",
    "model.layers[-1].input": "model.layers[-1].input",
    "model.layers[4:12:2].output": "model.layers[4:12:2].output",
    "model.layers[:-2].output": "model.layers[:-2].output",
    "model.layers[::-1].output": "model.layers[::-1].output",
    "model.layers[ 1 : 3 ].output": "model.layers[1:3].output",
    "model.layers[3, 9,18,24].output": "model.layers[3,9,18,24].output",
    "model.layers[*].output": "model.layers[*].output",
    "model.layers[:].output": "model.layers[*].output",
    "model.layers[*].self_attn.*_proj.input": "model.layers[*].self_attn.*_proj.input",
    "model.layers[0].self_attn.output[0]": "model.layers[0].self_attn.output[0]",
    "model.output.last_hidden_state": "model.output.last_hidden_state",
    "output.past[1][-1]": "output.past[1][-1]",
    "encoder.layer[0].output.output": "encoder.layer[0].output.output",
    "input": "input",
    "0.output": "[0].output",
    "[2].1.output": "[2][1].output",
    "unembed": "unembed",
    "blocks[3].attn.heads": "blocks[3].attn.heads",
}


@pytest.mark.parametrize("text", READABLE)
def test_a_path_is_read_and_prints_in_one_normal_form(text: str) -> None:
    assert str(parse_path(text)) == READABLE[text]
    assert parse_path(READABLE[text]) == parse_path(text)


def test_a_path_is_steps_a_side_and_a_leaf() -> None:
    path = parse_path("model.layers[1:5].*_proj.input[0].hidden")
    assert path.steps == (Child("model"), Child("layers"), Every(1, 5), Child("*_proj"))
    assert (path.side, path.leaf) == ("input", (0, "hidden"))
    assert path.module == "model.layers[1:5].*_proj"
    assert parse_path("h[3,-1].output").steps == (Child("h"), Entries((3, -1)))


def test_a_module_called_output_is_told_from_the_side_that_comes_last() -> None:
    path = parse_path("encoder.layer[0].output.dense.input")
    assert (path.module, path.side) == ("encoder.layer[0].output.dense", "input")


def test_a_parsed_path_parses_to_itself() -> None:
    path = parse_path("h[0].output")
    assert parse_path(path) is path


@pytest.mark.parametrize(
    ("text", "at", "expected"),
    [
        ("", 0, "a module name"),
        ("model..layers.output", 6, "a module name"),
        ("model.layers[.output", 13, "a number, a slice or"),
        ("model.layers[1.output", 14, "',', ':' or ']'"),
        ("model.layers[1,].output", 15, "a whole number"),
        ("model.layers[1:2:0].output", 17, "a step other than 0"),
        ("model layers.output", 5, "'.' or '['"),
        ("model.layers[1]output", 15, "'.' or '['"),
        ("model.layers[*", 14, "']'"),
        ("model.output.", 13, "a module name"),
        (" model.output", 0, "a module name"),
    ],
)
def test_an_error_quotes_the_text_and_points_at_the_character(text: str, at: int, expected: str) -> None:
    with pytest.raises(AddressError) as caught:
        parse_path(text)
    message = str(caught.value)
    assert repr(text) in message
    assert f"at character {at} " in message
    assert expected in message
    shown, caret = message.splitlines()[-2:]
    assert shown == f"  {text}"
    assert caret.index("^") == at + 2


def test_a_path_that_ends_at_a_module_is_told_both_sides() -> None:
    with pytest.raises(AddressError, match=r"'model\.layers\[3\]\.output' or 'model\.layers\[3\]\.input'"):
        parse_path("model.layers[3]")


@pytest.mark.parametrize("text", ["h[0].output[1,2]", "h[0].output[:]", "h[0].output.*_state"])
def test_a_leaf_must_choose_one_value(text: str) -> None:
    with pytest.raises(AddressError, match="one value is chosen"):
        parse_path(text)


@pytest.mark.usefixtures("users_call")
@pytest.mark.parametrize("value", [None, 3, ["h[0].output"], b"h.output"])
def test_what_is_not_a_string_is_refused_with_an_example(value: Any) -> None:
    with pytest.raises(AddressError, match=r"must be a string such as 'model\.layers\[15\]\.output'"):
        parse_path(value)


pieces = st.lists(
    st.sampled_from(
        [".", "[", "]", "*", "?", ":", ",", "-", "0", "12", "999999999999999", "h", "layers", "_x", "input",
         "output", "heads", "unembed", " ", "\t", "é", "½", "\n", "\x00", "'", "@"]
    ), max_size=12,
).map("".join)  # fmt: skip


@given(st.text(max_size=30) | pieces)
def test_any_text_parses_or_raises_address_error(text: str) -> None:
    try:
        path = parse_path(text)
    except AddressError:
        return
    assert parse_path(str(path)) == path
    assert str(parse_path(str(path))) == str(path)


names = st.from_regex(r"[A-Za-z_*?][A-Za-z0-9_*?\-]{0,6}", fullmatch=True)
numbers = st.integers(-999, 999)
bounds = st.none() | numbers
steps = st.one_of(
    names.map(lambda name: f".{name}"),
    st.lists(numbers, min_size=1, max_size=3).map(lambda entries: str(entries)),
    st.tuples(bounds, bounds).map(lambda b: "[" + ":".join("" if n is None else str(n) for n in b) + "]"),
)


@given(names, st.lists(steps, max_size=5), st.sampled_from(["input", "output"]))
def test_every_path_made_by_the_grammar_parses(first: str, rest: list[str], side: str) -> None:
    path = parse_path(first + "".join(rest) + f".{side}")
    assert path.side == side
    assert len(path.steps) == 1 + len(rest)
    assert parse_path(str(path)) == path
