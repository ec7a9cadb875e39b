"""Numbers, places and lines of text as readers see them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reftlab.plotting.parts import site_label
from reftlab.plotting.wording import block_named, number, true_minus, wrapped


@given(st.floats(allow_nan=False), st.sampled_from(["+.2f", ".3g", "g", "+.0%", ".1e"]))
def test_a_number_is_never_written_with_a_hyphen_or_as_minus_0(value, form):
    shown = number(value, form)
    assert "-" not in shown
    back = float(shown.replace("−", "-").removesuffix("%"))
    assert back == float(format(value, form).removesuffix("%"))
    assert (shown[0] in "−+") == (back < 0 or (form[0] == "+" and back > 0))


def test_names_keep_their_hyphens():
    text = "smollm2-135m, edit a-3, blocks[3::6].output, 2026-11-22, log-probability"
    assert true_minus(text) == text
    assert true_minus(f"{text}: -3.5 [-4, -0.0]") == f"{text}: −3.5 [−4, 0.0]"


@pytest.mark.parametrize(
    ("site", "name"),
    [
        ("model.layers.19.output", "block 19"),
        ("model.layers[19].output", "block 19"),
        ("transformer.h.0.output", "block 0"),
        ("blocks[3].output", "block 3"),
        ("encoder.block.2.output", "encoder block 2"),
        ("vision_model.encoder.layers.4.output", "vision block 4"),
    ],
)
def test_the_output_of_a_block_is_named_by_its_number(site, name):
    assert block_named(site) == name


@pytest.mark.parametrize(
    "site",
    ["model.layers.19.mlp.output", "model.layers.19.input", "model.layers.3.mlp.layers.1.output",
     "hidden.2.output", "players.2.output", "blocks[*].output", "3"],
)  # fmt: skip
def test_other_places_keep_their_paths(site):
    assert block_named(site) == site


def test_of_a_long_path_the_end_is_shown():
    label = site_label("model.language_model.layers.19.self_attn.o_proj.input")
    assert len(label) == 32
    assert label.endswith("19.self_attn.o_proj.input")


def test_lines_are_broken_neither_in_quotes_nor_in_brackets():
    text = "logit difference, ' good' − ' bad'\n(nats per answer token) [-1, 2]"
    lines = wrapped(text, 24).split("\n")
    assert lines == ["logit difference,", "' good' − ' bad'", "(nats per answer token)", "[-1, 2]"]
    assert wrapped("' good' − ' bad'", 10).split("\n") == ["' good' −", "' bad'"]
    assert wrapped("the edits' effect on what they're given", 14).split("\n")[0] == "the edits'"


@given(st.text(alphabet="ab '\"()[]−\n", max_size=60), st.integers(1, 20))
def test_lines_are_no_longer_than_asked_and_no_letter_is_lost(text, width):
    lines = wrapped(text, width).split("\n")
    assert max(map(len, lines)) <= width
    assert "".join("".join(lines).split()) == "".join(text.split())
