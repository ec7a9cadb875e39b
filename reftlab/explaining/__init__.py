"""What an edit reads, what it writes, and what it causes."""

from reftlab.explaining.directions import Directions, find_directions
from reftlab.explaining.explain import explain
from reftlab.explaining.explanation import EditExplanation, Explanation
from reftlab.explaining.interference import EditPair, Interference, SharedPlace, interference
from reftlab.explaining.removal import Removal, Removed
from reftlab.explaining.replies import Reply, ReplyTable
from reftlab.explaining.tokens import TokenEffect, TokenEffects, readable_token
from reftlab.explaining.vectors import CommonAxes, EditVectors, Sizes

__all__ = [
    "CommonAxes",
    "Directions",
    "EditExplanation",
    "EditPair",
    "EditVectors",
    "Explanation",
    "Interference",
    "Removal",
    "Removed",
    "Reply",
    "ReplyTable",
    "SharedPlace",
    "Sizes",
    "TokenEffect",
    "TokenEffects",
    "explain",
    "find_directions",
    "interference",
    "readable_token",
]
