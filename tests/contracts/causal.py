"""Causal models as graphs, the data that interchange makes from them, and alignment of a network with one.

A causal model is a `networkx.DiGraph` whose nodes are variables; a variable that is computed keeps its
function as `mechanism`. Interchange gives a variable the value that it has on other inputs and computes
what follows anew. A network realises the model where the same interchange inside it, at the place that
stands for the variable, gives the same answers: Geiger et al., "Causal Abstractions of Neural Networks"
(2021, arXiv:2106.02997), and "Finding Alignments Between Interpretable Causal Variables and Distributed
Neural Representations" (2023, arXiv:2303.02536).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import Tensor

import reftlab as rl

Values = dict[str, Tensor]
"""Variables' values by name, each `(n, …)`: n settings side by side."""


def causal_model(**mechanisms: Callable[..., Tensor]) -> nx.DiGraph:
    """A causal model from functions: a name is a variable, and its function's arguments are its parents.

    >>> model = causal_model(same=lambda a, b: a == b, answer=lambda same: ~same)
    >>> sorted(model.edges)
    [('a', 'same'), ('b', 'same'), ('same', 'answer')]
    """
    model = nx.DiGraph()
    for name, mechanism in mechanisms.items():
        model.add_node(name, mechanism=mechanism)
        model.add_edges_from((parent, name) for parent in inspect.signature(mechanism).parameters)
    assert nx.is_directed_acyclic_graph(model)
    return model


def solve(
    model: nx.DiGraph, inputs: Mapping[str, Tensor], fixed: Mapping[str, Tensor] | None = None
) -> Values:
    """All variables' values, given those without parents.

    Args:
        model: from `causal_model`.
        inputs: values of the variables that have no mechanism.
        fixed: values that stand whatever the variables' mechanisms would say.
    """
    values: Values = {}
    for name in nx.topological_sort(model):
        mechanism = model.nodes[name].get("mechanism")
        if fixed is not None and name in fixed:
            values[name] = fixed[name]
        elif mechanism is None:
            values[name] = inputs[name]
        else:
            values[name] = mechanism(**{parent: values[parent] for parent in model.predecessors(name)})
    return values


def interchange(
    model: nx.DiGraph, base: Mapping[str, Tensor], sources: Mapping[str, Mapping[str, Tensor]]
) -> Values:
    """All values on the inputs `base` where variables have those of other inputs, by variable in `sources`.

    >>> model = causal_model(same=lambda a, b: a == b, answer=lambda same, b: same.long() + b)
    >>> base, source = ({"a": torch.tensor([a]), "b": torch.tensor([3])} for a in (1, 3))
    >>> interchange(model, base, {"same": source})["answer"]
    tensor([4])
    """
    fixed = {variable: solve(model, inputs)[variable] for variable, inputs in sources.items()}
    return solve(model, base, fixed)


@dataclass(frozen=True)
class Examples:
    """Inputs of a network, and the labels that a causal model gives them.

    Attributes:
        base: the network's input, `(n, …)`.
        sources: the input of each source run, by its name.
        labels: what the network is to answer, as the loss function takes it.
        options: further arguments of the call, such as `tasks=`.
    """

    base: Tensor
    sources: dict[str, Tensor]
    labels: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def answers(self, reft: rl.BoundModel) -> Tensor:
        """What the network says with its edits, `(n, …)`."""
        sources = {name: {"input": tensor} for name, tensor in self.sources.items()}
        return reft(input=self.base, sources=sources, **self.options)


def align(
    reft: rl.BoundModel,
    draw: Callable[[], Examples],
    loss: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    learning_rate: float = 1e-2,
) -> None:
    """Train the edits, with the network as it is, until interchange in it gives the causal model's labels.

    Args:
        reft: the bound network.
        draw: makes the next step's examples.
        loss: `(answers, labels) -> ()`.
        steps: number of steps; the learning rate falls to 0 in a straight line over them.
        learning_rate: of Adam, at first.
    """
    parts = list(reft.interventions.values())
    optimiser = torch.optim.Adam(reft.interventions.parameters(), learning_rate)
    for step in range(steps):
        for part in parts:
            part.schedule(step / steps)
        examples = draw()
        total = loss(examples.answers(reft), examples.labels)
        for part in parts:
            penalty = part.penalty()
            total = total if penalty is None else total + penalty
        optimiser.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
    for part in parts:
        part.schedule(1.0)


@torch.no_grad()
def interchange_accuracy(
    reft: rl.BoundModel, examples: Examples, decide: Callable[[Tensor], Tensor]
) -> float:
    """Share of the examples in which the network, edited, decides as the causal model does."""
    right = decide(examples.answers(reft)) == examples.labels
    return float(right.reshape(len(right), -1).all(1).float().mean())
