"""Saved artifacts: what is in the folder, how it is written and read."""

from reftlab.store.artifact import Artifact, check_destination, read_artifact, write_artifact
from reftlab.store.card import model_card
from reftlab.store.saelens import load_sae

__all__ = ["Artifact", "check_destination", "load_sae", "model_card", "read_artifact", "write_artifact"]
