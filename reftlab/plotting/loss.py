"""The picture of a training: loss against step."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

__all__ = ["loss_curve"]


def loss_curve(
    steps: Sequence[int],
    losses: Sequence[float],
    evaluation_steps: Sequence[int] = (),
    evaluation_losses: Sequence[float] = (),
) -> Figure:
    """Draw training and evaluation loss, nats a token, on a logarithmic axis."""
    figure = Figure(figsize=(6.0, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="#0072B2", label="training batch")
    if evaluation_steps:
        axes.plot(evaluation_steps, evaluation_losses, "o--", color="#D55E00", label="evaluation examples")
        axes.legend(frameon=False)
    if any(loss > 0 for loss in (*losses, *evaluation_losses)):
        axes.set_yscale("log")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("answer loss (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    return figure
