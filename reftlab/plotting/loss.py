"""The picture of a training: loss against step."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from reftlab.plotting.style import BLUE, VERMILLION, empty_figure, frame

__all__ = ["loss_figure"]


def loss_figure(
    steps: Sequence[int],
    losses: Sequence[float],
    evaluation_steps: Sequence[int] = (),
    evaluation_losses: Sequence[float] = (),
) -> Figure:
    """Draw training and evaluation loss, nats a token, on a logarithmic axis."""
    figure = empty_figure(6.0, 3.4)
    axes = figure.subplots()
    axes.plot(steps, losses, color=BLUE, label="training batch")
    if evaluation_steps:
        axes.plot(evaluation_steps, evaluation_losses, "o--", color=VERMILLION, label="evaluation examples")
        axes.legend(frameon=False)
    if any(loss > 0 for loss in (*losses, *evaluation_losses)):
        axes.set_yscale("log")
        shown = [loss for loss in (*losses, *evaluation_losses) if loss > 0]
        # Over a decade or less, powers of ten alone would leave the axis all but bare.
        narrow = max(shown) < 20 * min(shown)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6) if narrow else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    frame(axes, x="optimiser step", y="answer loss (nats per token, log scale)")
    return figure
