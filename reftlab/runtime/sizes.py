"""Amounts of bytes, from words and in words."""

from __future__ import annotations

import re
from typing import Any

from reftlab.errors import DataError

__all__ = ["in_words", "parse_bytes"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def parse_bytes(argument: str, value: Any) -> int:
    """A number of bytes from a whole number, or from words such as `"2 GB"` and `"512MiB"`.

    Args:
        argument: what the value is called in messages.
        value: the value.

    Raises:
        DataError: the value is neither.

    >>> parse_bytes("budget", "1.5 kB"), parse_bytes("budget", 7)
    (1500, 7)
    """
    if type(value) is int and value >= 0:
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value) if isinstance(value, str) else None
    if found is None or found[2].upper() not in _UNITS:
        raise DataError(f"{argument}={value!r}: expected a number of bytes, such as 500_000_000 or '2GB'")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def in_words(size: int) -> str:
    """A number of bytes for people, in powers of ten.

    >>> in_words(1_500_000)
    '1.5 MB'
    """
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} B"
