"""Nodes are checked when they are made."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import reftlab as rl
from reftlab import AddressError, Edit, GraphError, InterventionError, PositionError, Read, Source
from reftlab.address import View


def edit(name: str = "edit", **changes: Any) -> Edit:
    arguments: dict[str, Any] = {"at": "h[0].output", "intervention": rl.Scale(2.0), **changes}
    return Edit(name, **arguments)


@pytest.mark.usefixtures("users_call")
@pytest.mark.parametrize("name", ["", "1st", "a b", "a.b", "a[0]", "é", None, 3, "a\n"])
def test_names_are_identifiers(name: Any) -> None:
    for make in (edit, Source, lambda n: Read("h[0].output", name=n or "", run="base")):
        with pytest.raises(GraphError, match="expected letters, digits"):
            make(name)


@pytest.mark.usefixtures("users_call")
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"intervention": rl.Scale}, GraphError, "not a class; call it"),
        ({"intervention": torch.nn.Linear(2, 2)}, GraphError, "must be one such as LoReFT"),
        ({"source": "corrupt"}, GraphError, "source must be a Read"),
        ({"phase": "always"}, GraphError, "expected 'prompt', 'decode' or 'both'"),
        ({"strength": "much"}, GraphError, "strength='much': expected a finite number"),
        ({"strength": True}, GraphError, "strength=True"),
        ({"strength": float("nan")}, GraphError, "strength=nan"),
        ({"run": "not a run"}, GraphError, "run"),
        ({"at": "h[0"}, AddressError, "cannot read site path"),
        ({"at": "h[0]"}, AddressError, "add the side"),
        ({"positions": "lst"}, PositionError, "cannot read positions"),
        ({"heads": [0, 0]}, AddressError, "heads must be different"),
        ({"heads": [0], "features": [1]}, AddressError, "not both"),
        ({"features": slice(0, 4, 0)}, AddressError, "step other than 0"),
        ({"intervention": rl.Swap()}, InterventionError, "Swap needs source="),
        ({"source": Read(run="other")}, InterventionError, "Scale takes no source"),
        ({"intervention": rl.Add()}, InterventionError, "neither a value nor a source"),
        (
            {"intervention": rl.Add(1.0), "source": Read(run="o")},
            InterventionError,
            "both a value and a source",
        ),
        (
            {"intervention": rl.Swap(), "source": Read(run="o"), "phase": "both"},
            GraphError,
            "use phase='prompt'",
        ),
        ({"phase": "decode", "positions": "last(2)"}, PositionError, "no meaning among generated tokens"),
    ],
)
def test_an_edit_that_contradicts_itself_is_refused_by_name(changes: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        edit("mine", **changes)
    assert str(caught.value).startswith(("Edit 'mine'", "Edit run"))


def test_the_base_run_needs_no_source() -> None:
    with pytest.raises(GraphError, match="the base run always exists"):
        Source("base")


def test_nodes_cannot_be_changed() -> None:
    for node in (edit(), Read("h[0].output"), Source("other")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            node.name = "another"


def test_strings_are_parsed_once_at_the_door() -> None:
    node = edit(positions="f2+l1", features=slice(0, 4))
    assert node.at == rl.parse_path("h[0].output")
    assert node.positions == rl.First(2) + rl.Last(1)
    assert node.view == View.of(features=slice(0, 4))
    assert node == edit(
        positions=rl.First(2) + rl.Last(1), features=slice(0, 4), at=rl.parse_path("h[0].output")
    )


def test_a_read_takes_its_positions_behind_an_at_sign() -> None:
    assert Read("h[0].output @ last") == Read("h[0].output", "last")
    assert Read("h[0].output@f2 + l2") == Read("h[0].output", "first(2)+last(2)")
    assert Read("h[0].output @ span('@')").positions == rl.Span("@")
    with pytest.raises(GraphError, match="positions are given twice"):
        Read("h[0].output @ last", "first")


def test_a_read_is_called_what_it_reads_unless_named() -> None:
    assert Read("h[0].output").label == "h[0].output @ all"
    assert Read("h[0].output @ l2").label == "h[0].output @ last(2)"
    assert Read("h[0].output", name="stream").label == "stream"


def test_reads_of_different_parts_of_a_site_are_called_by_them() -> None:
    reads = [
        Read("h[0].output @ last"),
        Read("h[0].output @ last", heads=1),
        Read("h[0].output @ last", heads=2),
        Read("h[0].output @ last", heads=[1, 2]),
        Read("h[0].output @ last", features=[1, 2]),
        Read("h[0].output @ last", features=slice(0, 4)),
    ]
    assert [read.label for read in reads] == [
        "h[0].output @ last",
        "h[0].output (heads 1) @ last",
        "h[0].output (heads 2) @ last",
        "h[0].output (heads 1, 2) @ last",
        "h[0].output (features 1, 2) @ last",
        "h[0].output (features 0:4) @ last",
    ]
    assert Read("h[0].output", heads=1, name="one").label == "one"


def test_a_source_read_fills_in_the_edits_own_place() -> None:
    own = edit(
        at="h[1].output", positions="last", heads=[1], intervention=rl.Swap(), source=Read(run="other")
    ).source_read
    assert (str(own.at), str(own.positions), own.run, own.heads) == ("h[1].output", "last", "other", (1,))
    partly = edit(
        at="h[1].output",
        heads=[1],
        positions="last",
        intervention=rl.Swap(),
        source=Read("h[0].output", run="other"),
    ).source_read
    assert (str(partly.at), str(partly.positions), partly.heads) == ("h[0].output", "last", None)
    assert edit().source_read is None


def test_edits_are_equal_when_every_argument_is() -> None:
    vector = torch.tensor([1.0, 2.0])
    assert edit(intervention=rl.Add(vector)) == edit(intervention=rl.Add(vector.clone()))
    assert edit(intervention=rl.Add(vector)) != edit(intervention=rl.Add(vector + 1))
    assert hash(edit()) == hash(edit())
    different: list[dict[str, Any]] = [
        {"at": "h[1].output"}, {"positions": "last"}, {"intervention": rl.Scale(3.0)}, {"run": "other"},
        {"phase": "both"}, {"heads": [0]}, {"features": [0]}, {"strength": 0.5},
        {"intervention": rl.Zero()}, {"intervention": rl.LoReFT(2)},
    ]  # fmt: skip
    for changes in different:
        assert edit() != edit(**changes)
    assert edit() != edit("another")
    assert edit() != "edit"


def test_nodes_print_as_they_are_written() -> None:
    node = edit(
        positions="last", intervention=rl.Swap(), source=Read(run="other"), features=slice(0, 4), strength=0.5
    )
    assert repr(node) == (
        "Edit('edit', at='h[0].output', positions='last', intervention=Swap(), source=Read(run='other'), "
        "features 0:4, strength=0.5)"
    )
    assert (
        repr(Read("h[0].output @ last", run="other", name="r"))
        == "Read('h[0].output @ last', run='other', name='r')"
    )
    assert str(Source("other")) == "source other"


def test_pyvenes_component_names_go_with_a_layer() -> None:
    intervention = rl.LoReFT(rank=2)
    by_name = Edit("e", at="block_output", layer=3, intervention=intervention)
    assert by_name == Edit("e", at="blocks[3].output", intervention=intervention)
    assert Read("head_attention_value_output", "last", layer=1, heads=[2]) == Read(
        "blocks[1].attn.heads @ last", heads=[2]
    )
    with pytest.raises(AddressError, match=r"at='blok_output' with layer=3.*Did you mean 'block_output'"):
        Edit("e", at="blok_output", layer=3, intervention=intervention)
    with pytest.raises(AddressError, match="says its layer itself"):
        Edit("e", at="blocks[3].output", layer=3, intervention=intervention)
