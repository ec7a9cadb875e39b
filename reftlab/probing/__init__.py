"""Probes: what can be told from the vectors at a site, and what such a finding is worth."""

from reftlab.graph.linear_probe import LinearParts, linear_parts
from reftlab.probing.amnesic import amnesic
from reftlab.probing.amnesic_result import Amnesic
from reftlab.probing.change import probe_change
from reftlab.probing.change_result import ProbeChange
from reftlab.probing.control import control_labels
from reftlab.probing.description import CodeBlock, DescriptionLength, description_length
from reftlab.probing.directions import MeanDifference, class_directions
from reftlab.probing.fitted import FittedProbe
from reftlab.probing.held_out import HeldOut
from reftlab.probing.inlp import Inlp, inlp
from reftlab.probing.probe import probe
from reftlab.probing.result import ProbeMap

__all__ = [
    "Amnesic",
    "CodeBlock",
    "DescriptionLength",
    "FittedProbe",
    "HeldOut",
    "Inlp",
    "LinearParts",
    "MeanDifference",
    "ProbeChange",
    "ProbeMap",
    "amnesic",
    "class_directions",
    "control_labels",
    "description_length",
    "inlp",
    "linear_parts",
    "probe",
    "probe_change",
]
