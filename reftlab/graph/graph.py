"""The intervention graph: nodes, the data flow between them, and how graphs combine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx

from reftlab.errors import GraphError, InterventionError, did_you_mean
from reftlab.graph import spec
from reftlab.graph.edit import Edit, Node, renamed
from reftlab.graph.nodes import BASE, Read, Source
from reftlab.interventions.base import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from reftlab.runtime.model import BoundModel

__all__ = ["InterventionGraph"]


@dataclass(frozen=True, init=False, repr=False)
class InterventionGraph:
    """What to read and what to edit in a model, as data.

    Nodes may be given in any order, except that the edits of one site act in the order of the
    list. Graphs are immutable; every operation returns a new one.

    Args:
        nodes: `Edit`, `Read` and `Source` objects.

    Raises:
        GraphError: a name used twice, a run that no `Source` declares, or runs that wait for each
            other; the message names the nodes.

    >>> from reftlab import Edit, InterventionGraph, LoReFT
    >>> graph = InterventionGraph(
    ...     Edit("emoji", at="model.layers[15].output", positions="last", intervention=LoReFT(rank=4))
    ... )
    >>> InterventionGraph.from_yaml(graph.to_yaml()) == graph
    True
    """

    nodes: tuple[Node, ...]

    def __init__(self, *nodes: Node) -> None:
        for node in nodes:
            if not isinstance(node, Source | Read | Edit):
                hint = "; unpack it with *nodes" if isinstance(node, list | tuple) else ""
                raise GraphError(f"a graph is made of Edit, Read and Source, not {node!r}{hint}")
        object.__setattr__(self, "nodes", tuple(nodes))
        self._check_names()
        self._check_runs()
        self.run_order  # noqa: B018  (raises where runs wait for each other)

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits, in the order in which they were given."""
        return tuple(node for node in self.nodes if isinstance(node, Edit))

    @property
    def reads(self) -> tuple[Read, ...]:
        """The reads that stand alone; those of edits are `edit.reads`."""
        return tuple(node for node in self.nodes if isinstance(node, Read))

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the source runs."""
        return tuple(node.name for node in self.nodes if isinstance(node, Source))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Every task that an edit belongs to, in the order of the edits."""
        return tuple(dict.fromkeys(name for edit in self.edits for name in edit.task_names))

    @property
    def run_order(self) -> tuple[str, ...]:
        """Runs in the order in which they must be computed; `base` is last among those it needs."""
        needs: nx.DiGraph = nx.DiGraph()
        needs.add_nodes_from((*self.sources, BASE))
        for edit in self.edits:
            for read in edit.reads:
                if read.run != edit.run:
                    needs.add_edge(read.run, edit.run, edit=edit.name)
        try:
            order = list(nx.lexicographical_topological_sort(needs))
        except nx.NetworkXUnfeasible:
            cycle = nx.find_cycle(needs)
            steps = "; ".join(
                f"edit {needs.edges[a, b]['edit']!r} in run {b!r} needs run {a!r}"
                for a, b in (edge[:2] for edge in cycle)
            )
            raise GraphError(f"runs wait for each other: {steps}") from None
        return (*[run for run in order if run != BASE], BASE)

    def to_networkx(self) -> nx.DiGraph:
        """The data flow as a directed graph.

        Nodes are `("run", name)`, `("edit", name)` and `("read", label)`, each with the node object
        under `node`; an edge's `kind` is `edits`, `reads`, `supplies` or `decides`.
        """
        flow: nx.DiGraph = nx.DiGraph()
        for source in self.nodes:
            if isinstance(source, Source):
                flow.add_node(("run", source.name), node=source)
        flow.add_node(("run", BASE), node=None)
        for read in self.reads:
            flow.add_node(("read", read.label), node=read)
            flow.add_edge(("run", read.run), ("read", read.label), kind="reads")
        for edit in self.edits:
            flow.add_node(("edit", edit.name), node=edit)
            flow.add_edge(("edit", edit.name), ("run", edit.run), kind="edits")
            source_read = edit.source_read
            wanted = [] if source_read is None else [(source_read, "source", "supplies")]
            wanted += [(read, f"when{n}", "decides") for n, read in enumerate(edit.condition_reads)]
            for read, what, kind in wanted:
                key = ("read", f"{edit.name}.{what}")
                flow.add_node(key, node=read)
                flow.add_edge(("run", read.run), key, kind="reads")
                flow.add_edge(key, ("edit", edit.name), kind=kind)
        return flow

    def __add__(self, other: InterventionGraph) -> InterventionGraph:
        """Both graphs in one; the edits of the left one act first where they share a site.

        Sources of the same name become one run. An edit or a named read of the same name is an
        error; `rename` one of them.
        """
        if not isinstance(other, InterventionGraph):
            return NotImplemented
        for run in set(self.sources) & set(other.sources):
            mine, theirs = ([e for e in graph.edits if e.run == run] for graph in (self, other))
            if mine != theirs:
                named = ", ".join(repr(edit.name) for edit in (*mine, *theirs))
                how = "they edit it differently" if mine and theirs else "only one of them edits it"
                raise GraphError(
                    f"both graphs have a run {run!r}, and {how} ({named}), so that the "
                    "other would read what it did not ask for; rename one, as in "
                    f"graph.rename({{{run!r}: 'other'}})"
                )

        def once(node: Node) -> bool:
            """Whether a node of a source run, or the run itself, is one that both graphs have."""
            of_source = isinstance(node, Source) or (isinstance(node, Edit) and node.run != BASE)
            return of_source and node in self.nodes

        return InterventionGraph(*self.nodes, *[node for node in other.nodes if not once(node)])

    def __getitem__(self, name: str) -> Edit | Read | Source:
        for node in self.nodes:
            if isinstance(name, str) and name in (node.name, getattr(node, "label", None)):
                return node
        raise GraphError(
            f"the graph has no node {name!r}; it has {self._names_text()}."
            + did_you_mean(str(name), self._names())
        )

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def select(self, *names: str) -> InterventionGraph:
        """Only the named edits and reads, and the sources that they need, with those sources' edits."""
        kept = {self._named(name) for name in names}
        chosen = {edit.run for edit in kept if isinstance(edit, Edit)}
        while True:
            runs = {node.run for node in kept if not isinstance(node, Source)}
            runs |= {read.run for edit in kept if isinstance(edit, Edit) for read in edit.reads}
            runs |= {node.inputs for node in kept if isinstance(node, Source) and node.inputs}
            # What is read in a run is what its own edits make of it, or those of them that are named.
            needed: set[Node] = {n for n in self.nodes if isinstance(n, Source) and n.name in runs}
            needed |= {n for n in self.edits if n.run in runs - {BASE} - chosen}
            if needed <= kept:
                return InterventionGraph(*[node for node in self.nodes if node in kept])
            kept |= needed

    def scale(self, name: str, factor: float) -> InterventionGraph:
        """The graph with one edit's strength multiplied by `factor`."""
        edit = self._named(name)
        if not isinstance(edit, Edit):
            raise GraphError(f"scale({name!r}, …): only edits have a strength, and {name!r} is a {edit}")
        try:
            strength = edit.strength * number(factor, "factor")
        except InterventionError as error:
            raise GraphError(f"scale({name!r}, …): {error}") from error
        return self._mapped(lambda node: edit.with_strength(strength) if node is edit else node)

    def rename(self, names: Mapping[str, str]) -> InterventionGraph:
        """The graph with nodes renamed, `{"old": "new"}`; references to them follow."""
        if not isinstance(names, Mapping):
            raise GraphError(f"rename({names!r}): expected new names by old ones, as in {{'old': 'new'}}")
        for old in names:
            self._named(old)
        return self._mapped(lambda node: renamed(node, dict(names)))

    def bind(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        example: Any = None,
    ) -> BoundModel:
        """Fit the graph to a model: resolve every site, learn widths, build the interventions.

        Args:
            model: any torch module; it is shared and not changed.
            tokenizer: for positions that look at text, and for training and explaining.
            example: inputs for the shape-only pass that learns the widths, needed where the model
                is not a Hugging Face text model.

        Returns:
            A module whose `forward` and `generate` are the model's own, with the edits.

        Raises:
            AddressError: a site that the model does not have.
            BindError: a site or a source that does not fit.
        """
        from reftlab.runtime.model import BoundModel

        return BoundModel(self, model, tokenizer, example=example)

    def to_dict(self) -> dict[str, Any]:
        """The graph as plain lists, dicts, numbers and strings; see `reftlab.graph.spec`."""
        return spec.graph_to_dict(self.nodes)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> InterventionGraph:
        """Read what `to_dict` wrote; a malformed one raises `GraphError`."""
        return cls(*spec.nodes_from_dict(data))

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The graph as YAML, also written to `path` where one is given."""
        return spec.write(spec.to_yaml(self.to_dict()), path)

    @classmethod
    def from_yaml(cls, text: str | Path) -> InterventionGraph:
        """Read a graph from YAML text, or from a file given as a `Path`."""
        return cls.from_dict(spec.parse_yaml(text))

    def to_json(self, path: str | Path | None = None) -> str:
        """The graph as JSON, also written to `path` where one is given."""
        return spec.write(spec.to_json(self.to_dict()), path)

    @classmethod
    def from_json(cls, text: str | Path) -> InterventionGraph:
        """Read a graph from JSON text, or from a file given as a `Path`."""
        return cls.from_dict(spec.parse_json(text))

    def draw(self, path: str | Path | None = None) -> Figure:
        """Draw the graph: model depth from left to right, one lane a run; see `reftlab.graph.draw`."""
        from reftlab.graph.draw import draw_graph

        figure = draw_graph(self)
        if path is not None:
            figure.savefig(path)
        return figure

    def __repr__(self) -> str:
        if not self.nodes:
            return "InterventionGraph()"
        return "InterventionGraph(\n" + "".join(f"    {node!r},\n" for node in self.nodes) + ")"

    def _repr_html_(self) -> str:
        from reftlab.graph.draw import graph_html

        return graph_html(self)

    def _mapped(self, change: Callable[[Node], Node]) -> InterventionGraph:
        return InterventionGraph(*map(change, self.nodes))

    def _names(self) -> list[str]:
        return [getattr(node, "label", None) or node.name or "" for node in self.nodes]

    def _names_text(self) -> str:
        return ", ".join(map(repr, self._names())) or "no nodes"

    def _named(self, name: str) -> Node:
        return self[name]

    def _check_names(self) -> None:
        seen: dict[str, Node] = {}
        for node in self.nodes:
            name = node.label if isinstance(node, Read) else node.name
            if name in seen:
                raise GraphError(
                    f"the name {name!r} is used twice, by {seen[name]!r} and by {node!r}; "
                    "rename one, as in graph.rename({'old': 'new'})"
                )
            seen[name] = node
            if isinstance(node, Read) and node.at is None:
                raise GraphError(f"{node!r} stands alone, so it needs a site, Read('blocks[5].output')")

    def _check_runs(self) -> None:
        runs = (*self.sources, BASE)
        for node in self.nodes:
            if isinstance(node, Source):
                wanted = [node.inputs or BASE]
            else:
                wanted = [node.run, *(read.run for read in getattr(node, "reads", ()))]
            for run in wanted:
                if run not in runs:
                    raise GraphError(
                        f"{node} refers to run {run!r}, and the graph has {', '.join(map(repr, runs))}; "
                        f"add Source({run!r})." + did_you_mean(run, runs)
                    )
