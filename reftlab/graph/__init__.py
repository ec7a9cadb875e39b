"""What is wired to what: nodes, the graph, its written forms and its picture."""

from reftlab.graph.graph import InterventionGraph
from reftlab.graph.nodes import BASE, Edit, Node, Phase, Read, Source

__all__ = ["BASE", "Edit", "InterventionGraph", "Node", "Phase", "Read", "Source"]
