"""Where: strings become places in a model and tokens in a row."""

from reftlab.address.alias import head_name, portable_names
from reftlab.address.path import SitePath, parse_path
from reftlab.address.position import (
    After,
    All,
    First,
    Indices,
    Last,
    Position,
    Prompt,
    Span,
    Token,
    Union,
    parse_position,
)
from reftlab.address.resolve import Site, resolve
from reftlab.address.view import View, head_size, splits_by_heads

__all__ = [
    "After",
    "All",
    "First",
    "Indices",
    "Last",
    "Position",
    "Prompt",
    "Site",
    "SitePath",
    "Span",
    "Token",
    "Union",
    "View",
    "head_name",
    "head_size",
    "parse_path",
    "parse_position",
    "portable_names",
    "resolve",
    "splits_by_heads",
]
