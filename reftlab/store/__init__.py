"""Saved artifacts: what is in the folder, how it is written and read."""

from reftlab.store.artifact import Artifact, read_artifact, write_artifact
from reftlab.store.card import model_card

__all__ = ["Artifact", "model_card", "read_artifact", "write_artifact"]
