"""Amounts of bytes in words."""

from __future__ import annotations

from typing import Any

import pytest

import reftlab as rl
from reftlab.runtime.sizes import in_words, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1GB", 10**9),
        ("2 GiB", 2**31),
        ("1.5 MB", 1_500_000),
        ("12b", 12),
        ("3 kib", 3072),
        (5, 5),
        (" 1 TB ", 10**12),
    ],
)
def test_budgets_are_read(text: str | int, size: int) -> None:
    assert parse_bytes("budget", text) == size


@pytest.mark.parametrize("text", ["", "GB", "1,5 GB", "2 gigs", "-1 MB", "1e9", 1.5, True, None, "1 GBB"])
def test_other_budgets_are_refused(text: Any) -> None:
    with pytest.raises(rl.DataError, match="budget="):
        parse_bytes("budget", text)


def test_amounts_are_said_in_powers_of_ten() -> None:
    assert [in_words(size) for size in (0, 999, 1000, 1_550_000, 2 * 10**9)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "1.6 MB",
        "2.0 GB",
    ]
