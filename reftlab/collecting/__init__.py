"""Vectors at sites and positions, collected over a data set, in memory or in memory-mapped files."""

from reftlab.collecting.activations import Activations, SiteVectors
from reftlab.collecting.collect import collect

__all__ = ["Activations", "SiteVectors", "collect"]
