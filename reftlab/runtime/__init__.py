"""A graph bound to a model: places, windows, hooks, runs."""

from reftlab.runtime.inspect import Inspection, inspect
from reftlab.runtime.model import BoundModel
from reftlab.runtime.plan import Plan
from reftlab.runtime.reading import Reading, ReadValues
from reftlab.runtime.saving import load

__all__ = ["BoundModel", "Inspection", "Plan", "ReadValues", "Reading", "inspect", "load"]
