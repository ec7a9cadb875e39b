"""The errors that reftlab raises on purpose, and the help they carry.

Every message says what was wrong, where, and what would be right.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AddressError",
    "ArtifactError",
    "BindError",
    "ConfigError",
    "DataError",
    "GraphError",
    "InterventionError",
    "ModelError",
    "PositionError",
    "ReftlabError",
    "RunError",
    "UntouchedEditWarning",
]


class ReftlabError(Exception):
    """Base of every error that reftlab raises on purpose."""


class AddressError(ReftlabError, ValueError):
    """A path, an alias or a view that cannot be read or does not exist in the model."""


class PositionError(ReftlabError, ValueError):
    """A token position that cannot be read, or that a row of the batch does not have."""


class InterventionError(ReftlabError, ValueError):
    """An argument of an intervention, or vectors handed to it, that cannot be used."""


class GraphError(ReftlabError, ValueError):
    """Nodes that contradict each other, or a graph description that cannot be read."""


class BindError(ReftlabError, ValueError):
    """A graph that does not fit the model it is bound to."""


class RunError(ReftlabError, RuntimeError):
    """A forward call that cannot be carried out as the graph says."""


class DataError(ReftlabError, ValueError):
    """Training or evaluation examples that cannot be used."""


class ArtifactError(ReftlabError, ValueError):
    """A saved artifact that is missing, damaged, foreign, newer, or made for another model."""


class ConfigError(ReftlabError, ValueError):
    """An experiment's configuration that cannot be used."""


class ModelError(ReftlabError, ValueError):
    """A model that cannot be found or loaded."""


class UntouchedEditWarning(UserWarning):
    """An edit that touched no token in a call where running on is still sensible."""


def did_you_mean(word: str, options: Iterable[str], limit: int = 3) -> str:
    """Return `" Did you mean 'a' or 'b'?"` for the options nearest to `word`, or the empty string.

    >>> did_you_mean("self_atn", ["self_attn", "mlp"])
    " Did you mean 'self_attn'?"
    """
    near = difflib.get_close_matches(word, list(options), n=limit, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""


def pointed(text: str, at: int) -> str:
    """Return two indented lines: `text`, and a caret under character `at` (counted from 0)."""
    return f"\n  {text}\n  {' ' * at}^"
