"""Figures from plain numbers: matplotlib only, no global state."""

from reftlab.plotting.cone import cone_figure
from reftlab.plotting.figures import (
    axes_figure,
    directions_figure,
    edit_figure,
    overview_figure,
    removal_figure,
    replies_figure,
    sizes_figure,
    tokens_figure,
)
from reftlab.plotting.interference import interference_figure
from reftlab.plotting.loss import loss_figure
from reftlab.plotting.style import drawable, message_figure

__all__ = [
    "axes_figure",
    "cone_figure",
    "directions_figure",
    "drawable",
    "edit_figure",
    "interference_figure",
    "loss_figure",
    "message_figure",
    "overview_figure",
    "removal_figure",
    "replies_figure",
    "sizes_figure",
    "tokens_figure",
]
