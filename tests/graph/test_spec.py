"""YAML and JSON: what is written comes back, and anything else is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reftlab as rl
from reftlab import Edit, GraphError, InterventionGraph, Read, Source
from reftlab.graph import spec

EVERYTHING = InterventionGraph(
    Source("other"),
    Source("third"),
    Edit("loreft", at="blocks[4,10].output", positions="f7+l7", strength=0.25,
         intervention=rl.LoReFT(4, activation="gelu", dropout=0.05, bias=False, scale=2.0)),
    Edit("noreft", at="h[*].output", positions=[0, -1], intervention=rl.NoReFT(2)),
    Edit("direft", at="h[0:8:2].output", intervention=rl.DiReFT(2)),
    Edit("nodireft", at="h[-1].output", positions="last", phase="both", intervention=rl.NodiReFT(1)),
    Edit("consreft", at="h[0].output[0]", intervention=rl.ConsReFT(3, scale=0.1)),
    Edit("lobireft", at="h[0].*_proj.input", intervention=rl.LobiReFT(3, dropout=0.5)),
    Edit("swap", at="h[0].output", positions="span('Eiffel \\'Tower\\'\\n', -1)", intervention=rl.Swap(),
         source=Read("h[1].output @ first", run="other", name="was", heads=[0, 2])),
    Edit("add", at="h[0].output", run="other", intervention=rl.Add([0.1, -2.0, 3e-8])),
    Edit("subtract", at="h[0].output", heads=[2, 5], intervention=rl.Subtract(), source=Read(run="third")),
    Edit("scale", at="h[0].output", features=slice(None, 64, 2), intervention=rl.Scale(1 / 3)),
    Edit("zero", at="h[0].output", features=[3, 1], intervention=rl.Zero()),
    Edit("mean", at="h[0].output", intervention=rl.Mean(0.5)),
    Edit("noise", at="h[0].output", intervention=rl.Noise(std=3.0, seed=7)),
    Edit("clamp", at="h[0].output", phase="decode", intervention=rl.Clamp(high=2.0)),
    Read("logits.output @ last", name="end"),
    Read("h[0].output", "token(' é🎉')", run="third", features=slice(1, 5)),
)  # fmt: skip


@pytest.mark.parametrize("form", ["yaml", "json", "dict"])
def test_a_graph_of_every_kind_of_node_comes_back_equal(form: str) -> None:
    written = getattr(EVERYTHING, f"to_{form}")()
    again = getattr(InterventionGraph, f"from_{form}")(written)
    assert again == EVERYTHING
    assert getattr(again, f"to_{form}")() == written
    assert again["add"].intervention.value.equal(EVERYTHING["add"].intervention.value)


def test_the_written_form_is_plain_and_short() -> None:
    graph = InterventionGraph(
        Edit("emoji", at="model.layers[15].output", positions="last", intervention=rl.LoReFT(rank=4))
    )
    assert yaml.safe_load(graph.to_yaml()) == json.loads(graph.to_json()) == graph.to_dict() == {
        "format": 1,
        "nodes": [
            {"edit": "emoji", "at": "model.layers[15].output", "positions": "last",
             "intervention": {"type": "LoReFT", "rank": 4}}
        ],
    }  # fmt: skip


def test_graphs_are_written_to_files_and_read_from_them(tmp_path: Path) -> None:
    assert EVERYTHING.to_yaml(tmp_path / "graph.yaml") == (tmp_path / "graph.yaml").read_text("utf-8")
    EVERYTHING.to_json(tmp_path / "graph.json")
    assert InterventionGraph.from_yaml(tmp_path / "graph.yaml") == EVERYTHING
    assert InterventionGraph.from_json(tmp_path / "graph.json") == EVERYTHING


def test_tensors_can_be_kept_beside_the_text() -> None:
    tensors: dict[str, torch.Tensor] = {}
    data = spec.graph_to_dict(EVERYTHING.nodes, tensors)
    assert set(tensors) == {"add.value", "mean.value"}
    assert InterventionGraph(*spec.nodes_from_dict(data, tensors)) == EVERYTHING
    with pytest.raises(GraphError, match=r"'add\.value' is not among those stored"):
        spec.nodes_from_dict(data, {})


def test_code_is_never_written() -> None:
    graph = InterventionGraph(Edit("f", at="h[0].output", intervention=rl.Function(torch.sin)))
    for write in (graph.to_dict, graph.to_yaml, graph.to_json):
        with pytest.raises(GraphError, match=r"edit 'f': Function\(function=sin\) holds code"):
            write()


def one(**changes: Any) -> dict[str, Any]:
    node = {"edit": "a", "at": "h[0].output", "intervention": {"type": "Scale", "factor": 2.0}, **changes}
    return {"format": 1, "nodes": [node]}


MALFORMED = [
    (None, "'format' and 'nodes' are missing"),
    ([], "'format' and 'nodes' are missing"),
    ({"format": 1}, "'format' and 'nodes' are missing"),
    ({"format": 2, "nodes": []}, "a newer one needs a newer reftlab"),
    ({"format": 0, "nodes": []}, "reads formats 1 to 1"),
    ({"format": True, "nodes": []}, "graph format True"),
    ({"format": "1", "nodes": []}, "graph format '1'"),
    ({"format": 1, "nodes": "abc"}, "'nodes' must be a list"),
    ({"format": 1, "nodes": {}}, "'nodes' must be a list"),
    ({"format": 1, "nodes": [{}]}, "node 0: expected 'edit', 'read' or 'source'"),
    ({"format": 1, "nodes": ["edit"]}, "node 0: expected"),
    ({"format": 1, "nodes": [{"source": 3}]}, "node 0 .*Source name 3"),
    ({"format": 1, "nodes": [{"source": "a", "also": 1}]}, "unknown key 'also'"),
    ({"format": 1, "nodes": [{"read": "h[0].output"}]}, "a read is written as a mapping"),
    ({"format": 1, "nodes": [{"read": {"att": "h[0].output"}}]}, "unknown key 'att'.*Did you mean 'at'"),
    ({"format": 1, "nodes": [{"read": {}}]}, "needs a site"),
    (one(at="h[0"), "node 0 .*cannot read site path"),
    (one(at=None), "node 0"),
    (one(positions={"first": 1}), "node 0"),
    (one(positions="lst"), "node 0 .*cannot read positions"),
    (one(intervention=None), "an intervention is written as"),
    (one(intervention={"type": 3}), "an intervention is written as"),
    (one(intervention={"type": "Scal", "factor": 1}), "'Scal' is not known.*Did you mean 'Scale'"),
    (one(intervention={"type": "Intervention"}), "is not known"),
    (one(intervention={"type": "Scale"}), "node 0 .*factor"),
    (one(intervention={"type": "Scale", "factor": "x"}), "node 0"),
    (one(intervention={"type": "Scale", "factor": 10**400}), "node 0"),
    (one(intervention={"type": "Scale", "factor": 1, "more": 2}), "node 0"),
    (one(intervention={"type": "Scale", 3: 2}), "node 0"),
    (one(intervention={"type": "Add", "value": {"tensor": "x"}}), "'x' is not among those stored"),
    (one(intervention={"type": "Add", "value": {"tensor": [1]}}), "node 0"),
    (one(intervention={"type": "Add", "value": [1, "b"]}), "node 0"),
    (one(intervention={"type": "Add", "value": [10**400]}), "node 0"),
    (one(intervention={"type": "LoReFT", "rank": 2, "activation": ["relu"]}), "node 0"),
    (one(intervention={"type": "Function", "function": "os.system"}), "cannot be called|node 0"),
    (one(strength="1"), "node 0"),
    (one(strength=10**400), "node 0"),
    (one(phase=["prompt"]), "node 0"),
    (one(heads="ab"), "node 0"),
    (one(heads=1.5), "node 0"),
    (one(features={"slice": [0, 4]}), "expected {slice: "),
    (one(features={"slice": "abc"}), "node 0"),
    (one(features={"slice": [0, 4, 0]}), "node 0"),
    (one(features={"cut": [0, 4, 1]}), "expected {slice: "),
    (one(source="other"), "a read is written as a mapping"),
    (one(name="b"), "unknown key 'name'"),
    (one(run="other"), r"add Source\('other'\)"),
]  # fmt: skip


@pytest.mark.parametrize("checked", [True, False], ids=["beartype", "as-users-call"])
@pytest.mark.parametrize(("data", "message"), MALFORMED)
def test_malformed_data_is_a_graph_error_that_says_where(
    data: Any, message: str, checked: bool, request: pytest.FixtureRequest
) -> None:
    if not checked or not isinstance(data, dict):
        request.getfixturevalue("users_call")
    with pytest.raises(GraphError) as caught:
        InterventionGraph.from_dict(data)
    if not checked:
        caught.match(message)


@pytest.mark.parametrize(
    "text",
    ["[", "a: b: c", "2001-99-99", "!!int x", "!!bool x", "!!timestamp x", "!!int ''", "!!python/object:os.system {}", "? [a]\n: b", "\x00",
     "*a", "&a [*a]", "", "just text", "- 1", "[" * 3000],
)  # fmt: skip
def test_text_that_is_no_graph_is_a_graph_error(text: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("users_call")
    with pytest.raises(GraphError):
        InterventionGraph.from_yaml(text)
    with pytest.raises(GraphError):
        InterventionGraph.from_json(text)


@pytest.mark.usefixtures("users_call")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=60))
def test_any_text_is_a_graph_or_a_graph_error(text: str) -> None:
    for read in (InterventionGraph.from_yaml, InterventionGraph.from_json):
        try:
            read(text)
        except GraphError:
            continue


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
    | st.sampled_from(["h[0].output", "last", "Scale", "Add", "LoReFT", "Swap", "prompt", "a", "base"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["type", "rank", "factor", "value", "slice", "tensor", "at", "run", "name"])
        | st.text(max_size=3) | st.integers(),
        inner, max_size=4,
    ),
    max_leaves=6,
)  # fmt: skip
keys = st.sampled_from(["edit", "read", "source", "at", "positions", "intervention", "run", "phase", "heads",
                        "features", "strength", "x"])  # fmt: skip


@pytest.mark.usefixtures("users_call")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(keys, anything, max_size=6), max_size=3))
def test_any_data_is_a_graph_or_a_graph_error(nodes: list[Any]) -> None:
    try:
        graph = InterventionGraph.from_dict({"format": 1, "nodes": nodes})
    except GraphError:
        return
    assert InterventionGraph.from_dict(graph.to_dict()) == graph


names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_\-]{0,5}", fullmatch=True).filter(lambda name: name != "base")
finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
views = st.one_of(
    st.just({}),
    st.lists(st.integers(-9, 9), min_size=1, max_size=3, unique=True).map(lambda n: {"heads": n}),
    st.lists(st.integers(-9, 9), min_size=1, max_size=3, unique=True).map(lambda n: {"features": n}),
    st.builds(slice, st.none() | st.integers(-9, 9), st.none() | st.integers(-9, 9)).map(
        lambda s: {"features": s}
    ),
)
interventions = st.one_of(
    st.builds(rl.LoReFT, st.integers(1, 9), scale=finite, dropout=st.floats(0, 1), bias=st.booleans()),
    st.builds(rl.ConsReFT, st.integers(1, 9), scale=finite),
    st.builds(rl.Scale, finite),
    st.builds(rl.Add, st.lists(finite, min_size=1, max_size=4) | finite),
    st.builds(rl.Noise, st.floats(0, 9), st.integers()),
)
positions = st.sampled_from(["all", "last", "f2+l3", "[0, -1]"]) | st.text(min_size=1, max_size=9).map(
    rl.Span
)


@st.composite
def graphs(draw: Any) -> InterventionGraph:
    taken = draw(st.lists(names, min_size=1, max_size=5, unique=True))
    source, rest = Source(taken[0]), taken[1:]
    edits = [
        Edit(name, at=draw(st.sampled_from(["h[0].output", "h[*].mlp.input[1]"])), positions=draw(positions),
             intervention=draw(interventions), run=draw(st.sampled_from(["base", source.name])),
             strength=draw(finite), **draw(views))
        for name in rest
    ]  # fmt: skip
    return InterventionGraph(source, *edits)


@given(graphs())
def test_every_graph_comes_back_equal_from_yaml_and_json(graph: InterventionGraph) -> None:
    assert InterventionGraph.from_yaml(graph.to_yaml()) == graph
    assert InterventionGraph.from_json(graph.to_json()) == graph
