"""An experiment written down: model, graph, data and settings in one object or one file."""

from reftlab.experiment.experiment import Experiment
from reftlab.experiment.source import DataSource

__all__ = ["DataSource", "Experiment"]
