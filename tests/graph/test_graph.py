"""Graphs: what they refuse, how they combine, and their data flow."""

from __future__ import annotations

from typing import Any

import networkx as nx
import pytest
import torch

import reftlab as rl
from reftlab import Edit, GraphError, InterventionGraph, Read, Source


def scale(name: str, at: str = "h[0].output", **more: Any) -> Edit:
    return Edit(name, at=at, intervention=rl.Scale(2.0), **more)


def swap(name: str, source: str, run: str = "base") -> Edit:
    return Edit(name, at="h[0].output", intervention=rl.Swap(), run=run, source=Read(run=source))


NESTED = InterventionGraph(
    swap("outer", "middle"), Source("inner"), Source("middle"), swap("in-middle", "inner", run="middle"),
    Read("h[1].output", name="after"),
)  # fmt: skip


def test_a_name_used_twice_names_both_nodes() -> None:
    with pytest.raises(
        GraphError, match=r"'a' is used twice, by Edit\('a'.*h\[0\].* and by Edit\('a'.*h\[1\]"
    ):
        InterventionGraph(scale("a"), scale("a", at="h[1].output"))
    with pytest.raises(GraphError, match=r"by Edit\('a'.* and by Source\('a'\)"):
        InterventionGraph(scale("a"), Source("a"))
    with pytest.raises(GraphError, match="used twice"):
        InterventionGraph(Read("h[0].output @ last"), Read("h[0].output", "last"))


def test_a_run_that_no_source_declares_is_refused_with_the_nearest() -> None:
    with pytest.raises(GraphError, match=r"edit a refers to run 'corupt'.*Did you mean 'corrupt'"):
        InterventionGraph(Source("corrupt"), swap("a", "corupt"))
    with pytest.raises(GraphError, match=r"add Source\('other'\)"):
        InterventionGraph(scale("a", run="other"))
    with pytest.raises(GraphError, match="refers to run 'other'"):
        InterventionGraph(Read("h[0].output", run="other"))


def test_runs_that_wait_for_each_other_name_their_edits() -> None:
    with pytest.raises(GraphError, match="runs wait for each other") as caught:
        InterventionGraph(Source("a"), Source("b"), swap("one", "a", run="b"), swap("two", "b", run="a"))
    for part in ("edit 'one' in run 'b' needs run 'a'", "edit 'two' in run 'a' needs run 'b'"):
        assert part in str(caught.value)


def test_a_source_cannot_wait_for_the_base_run_that_waits_for_it() -> None:
    with pytest.raises(GraphError, match="wait for each other"):
        InterventionGraph(Source("a"), swap("one", "a"), swap("two", "base", run="a"))


@pytest.mark.usefixtures("users_call")
@pytest.mark.parametrize("node", ["edit", [scale("a")], rl.Scale(2.0), None])
def test_a_graph_is_made_of_nodes(node: Any) -> None:
    with pytest.raises(GraphError, match="made of Edit, Read and Source"):
        InterventionGraph(node)


def test_a_read_on_its_own_needs_a_site() -> None:
    with pytest.raises(GraphError, match="needs a site"):
        InterventionGraph(Source("other"), Read(run="other"))


def test_runs_are_ordered_by_what_they_need_and_base_comes_last() -> None:
    assert NESTED.run_order == ("inner", "middle", "base")
    assert InterventionGraph(Source("b"), Source("a")).run_order == ("a", "b", "base")
    assert InterventionGraph().run_order == ("base",)


def test_nodes_are_found_by_name_and_listed_by_kind() -> None:
    assert NESTED["outer"].name == "outer"
    assert NESTED["after"].label == "after"
    assert InterventionGraph(Read("h[1].output"))["h[1].output @ all"].name is None
    assert [e.name for e in NESTED.edits] == ["outer", "in-middle"]
    assert NESTED.sources == ("inner", "middle")
    assert [r.label for r in NESTED.reads] == ["after"]
    assert len(NESTED) == 5
    assert list(NESTED) == list(NESTED.nodes)
    with pytest.raises(GraphError, match=r"no node 'oter'; it has .*Did you mean 'outer'"):
        NESTED["oter"]
    with pytest.raises(GraphError, match="it has no nodes"):
        InterventionGraph()["a"]


def test_addition_keeps_order_and_shares_sources() -> None:
    left = InterventionGraph(Source("other"), swap("a", "other"))
    right = InterventionGraph(Source("other"), swap("b", "other"), scale("c"))
    both = left + right
    assert [node.name for node in both] == ["other", "a", "b", "c"]
    assert [node.name for node in right + left] == ["other", "b", "c", "a"]
    assert both + InterventionGraph() == both
    assert (left.nodes, right.nodes) == (both.nodes[:2], (Source("other"), *both.nodes[2:]))


def test_addition_refuses_two_edits_of_one_name_and_other_things() -> None:
    with pytest.raises(GraphError, match=r"used twice.*graph\.rename"):
        InterventionGraph(scale("a")) + InterventionGraph(scale("a"))
    with pytest.raises(TypeError):
        InterventionGraph() + 3


def test_selection_keeps_the_named_nodes_and_the_sources_they_need() -> None:
    graph = InterventionGraph(
        Source("x"), Source("y"), swap("a", "x"), swap("b", "y"), scale("c"), Read("h[1].output", name="r")
    )
    assert [n.name for n in graph.select("a")] == ["x", "a"]
    assert [n.name for n in graph.select("c", "r")] == ["c", "r"]
    assert [n.name for n in graph.select("b", "a")] == ["x", "y", "a", "b"]
    assert [n.name for n in NESTED.select("in-middle")] == ["inner", "middle", "in-middle"]
    with pytest.raises(GraphError, match="no node 'z'"):
        graph.select("a", "z")


def test_scaling_multiplies_the_strength_of_one_edit() -> None:
    graph = InterventionGraph(scale("a", strength=0.5), scale("b"))
    scaled = graph.scale("a", 0.5).scale("a", -1)
    assert (scaled["a"].strength, scaled["b"].strength) == (-0.25, 1.0)
    assert graph["a"].strength == 0.5
    with pytest.raises(GraphError, match="only edits have a strength"):
        NESTED.scale("inner", 2.0)
    with pytest.raises(GraphError, match="no node 'z'"):
        graph.scale("z", 2.0)


@pytest.mark.usefixtures("users_call")
@pytest.mark.parametrize("factor", ["2", None, float("inf")])
def test_a_scale_must_be_a_finite_number(factor: Any) -> None:
    with pytest.raises(GraphError, match="expected a finite number"):
        InterventionGraph(scale("a")).scale("a", factor)


def test_renaming_follows_every_reference() -> None:
    renamed = NESTED.rename({"inner": "x", "middle": "y", "outer": "z", "after": "end"})
    assert [node.name for node in renamed] == ["z", "x", "y", "in-middle", "end"]
    assert renamed["z"].source.run == "y"
    assert (renamed["in-middle"].run, renamed["in-middle"].source.run) == ("y", "x")
    assert renamed.rename({"x": "inner", "y": "middle", "z": "outer", "end": "after"}) == NESTED


def test_names_can_be_exchanged_and_unnamed_reads_named() -> None:
    graph = InterventionGraph(scale("a"), scale("b", at="h[1].output"), Read("h[1].output @ last"))
    exchanged = graph.rename({"a": "b", "b": "a"})
    assert [(e.name, str(e.at)) for e in exchanged.edits] == [("b", "h[0].output"), ("a", "h[1].output")]
    assert graph.rename({"h[1].output @ last": "end"}).reads[0].name == "end"
    for names in ({"a": "b"}, {"a": "a b"}, {"z": "y"}):
        with pytest.raises(GraphError):
            graph.rename(names)


def test_graphs_cannot_be_changed_and_are_equal_by_their_nodes() -> None:
    graph = InterventionGraph(scale("a"))
    with pytest.raises(AttributeError):
        graph.nodes = ()
    assert graph == InterventionGraph(scale("a"))
    assert graph != InterventionGraph(scale("b"))
    assert hash(graph) == hash(InterventionGraph(scale("a")))


def test_the_order_of_edits_at_one_site_is_the_order_of_the_list() -> None:
    assert InterventionGraph(scale("a"), scale("b")) != InterventionGraph(scale("b"), scale("a"))


def test_the_data_flow_is_a_networkx_graph() -> None:
    flow = NESTED.to_networkx()
    assert isinstance(flow, nx.DiGraph)
    kinds = {(*edge, kind) for *edge, kind in flow.edges(data="kind")}
    assert kinds == {
        (("edit", "outer"), ("run", "base"), "edits"),
        (("edit", "in-middle"), ("run", "middle"), "edits"),
        (("run", "middle"), ("read", "outer.source"), "reads"),
        (("run", "inner"), ("read", "in-middle.source"), "reads"),
        (("read", "outer.source"), ("edit", "outer"), "supplies"),
        (("read", "in-middle.source"), ("edit", "in-middle"), "supplies"),
        (("run", "base"), ("read", "after"), "reads"),
    }
    assert nx.has_path(flow, ("run", "inner"), ("read", "after"))
    assert flow.nodes["edit", "outer"]["node"] == NESTED["outer"]
    assert flow.nodes["run", "inner"]["node"] == Source("inner")
    assert nx.is_directed_acyclic_graph(flow)


def test_a_graph_prints_its_nodes_line_by_line() -> None:
    lines = repr(NESTED).splitlines()
    assert (lines[0], lines[-1], len(lines)) == ("InterventionGraph(", ")", 7)
    assert "Edit('outer'" in lines[1]
    assert repr(InterventionGraph()) == "InterventionGraph()"


def test_the_data_flow_holds_the_sources_as_they_were_declared() -> None:
    source = Source("c", inputs="base", grad=True)
    edit = Edit("swap", at="blocks[0].output", intervention=rl.Swap(), source=Read(run="c"))
    flow = InterventionGraph(source, edit).to_networkx()
    assert flow.nodes["run", "c"]["node"] is source
    assert flow.nodes["run", "base"]["node"] is None


def test_addition_says_whether_one_graph_or_both_edit_a_shared_run() -> None:
    def graph(name: str, value: float | None) -> InterventionGraph:
        swap = Edit(name, at="blocks[0].output", intervention=rl.Swap(), source=Read(run="c"))
        inner = Edit(f"{name}_in_c", at="embed.output", run="c", intervention=rl.Add(value or 0.0))
        return InterventionGraph(Source("c"), swap, *([] if value is None else [inner]))

    with pytest.raises(GraphError, match="only one of them edits it"):
        graph("a", None) + graph("b", 1.0)
    with pytest.raises(GraphError, match="they edit it differently"):
        graph("a", 1.0) + graph("b", 2.0)


def test_edits_are_equal_by_every_number_of_their_interventions() -> None:
    def edit(vector: torch.Tensor) -> Edit:
        return Edit("e", at="blocks[0].output", intervention=rl.Add(vector))

    vector = torch.randn(4)
    assert edit(vector) == edit(vector.clone())
    assert edit(vector) != edit(vector + 1e-6)
    assert edit(vector) != edit(torch.cat([vector, vector]))
    assert edit(vector) != edit(1.0)
    assert edit(torch.tensor([0.0])) != edit(torch.tensor([-0.0]))
