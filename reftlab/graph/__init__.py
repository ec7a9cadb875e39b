"""What is wired to what: nodes, conditions, the graph, its written forms and its picture."""

from reftlab.graph.condition import Condition, Gate, gate
from reftlab.graph.edit import Edit, Node, Phase
from reftlab.graph.graph import InterventionGraph
from reftlab.graph.measure import Measure, cosine, norm, probability, projection
from reftlab.graph.nodes import BASE, Read, Source

__all__ = [
    "BASE",
    "Condition",
    "Edit",
    "Gate",
    "InterventionGraph",
    "Measure",
    "Node",
    "Phase",
    "Read",
    "Source",
    "cosine",
    "gate",
    "norm",
    "probability",
    "projection",
]
