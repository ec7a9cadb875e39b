"""Where: strings become places in a model and tokens in a row."""

from reftlab.address.alias import head_name, portable_names
from reftlab.address.path import ATTENTION_SIDES, SitePath, parse_path
from reftlab.address.position import (
    All,
    Every,
    First,
    Generated,
    Given,
    Indices,
    Joined,
    Last,
    PerRow,
    Position,
    Prompt,
    Union,
)
from reftlab.address.position_parser import parse_position
from reftlab.address.resolve import Site, resolve
from reftlab.address.text_position import After, Span, Token
from reftlab.address.view import View, head_size, splits_by_heads

__all__ = [
    "ATTENTION_SIDES",
    "After",
    "All",
    "Every",
    "First",
    "Generated",
    "Given",
    "Indices",
    "Joined",
    "Last",
    "PerRow",
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
