"""What an edit reads, what it writes, and what it causes."""

from reftlab.explaining.causes.removal import Removal, Removed
from reftlab.explaining.composition.interference import EditPair, Interference, SharedPlace, interference
from reftlab.explaining.evidence.replies import Reply, ReplyTable
from reftlab.explaining.explain import explain
from reftlab.explaining.explanation import EditExplanation, Explanation
from reftlab.explaining.geometry.directions import Directions, find_directions
from reftlab.explaining.geometry.tokens import TokenEffect, TokenEffects, readable_token
from reftlab.explaining.geometry.vectors import CommonAxes, EditVectors, Sizes

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
