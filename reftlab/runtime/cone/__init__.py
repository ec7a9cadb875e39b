"""The causal cone of a graph's edits: what they can change, and running nothing else."""

from reftlab.runtime.cone.prefix import PrefixAttention, Segment, check_attended
from reftlab.runtime.cone.runner import ConeRunner, Predictions
from reftlab.runtime.cone.stack import CANNOT_ENTER, BlockStack, extras_of, reasons_against, skipping
from reftlab.runtime.cone.store import ConeStore
from reftlab.runtime.cone.value import Cone, Reach, cone_of

__all__ = [
    "CANNOT_ENTER",
    "BlockStack",
    "Cone",
    "ConeRunner",
    "ConeStore",
    "Predictions",
    "PrefixAttention",
    "Reach",
    "Segment",
    "check_attended",
    "cone_of",
    "extras_of",
    "reasons_against",
    "skipping",
]
