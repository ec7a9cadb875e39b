"""Time that a computation may take."""

from __future__ import annotations

import math
import time
from typing import Any

from reftlab.errors import DataError

__all__ = ["Budget"]


class Budget:
    """Seconds that something may take, counted from when this was made.

    Args:
        seconds: 0 or more, with 0 for as little as can be measured; None for no limit.

    Raises:
        DataError: `budget=` is no such number.

    >>> Budget(None).used_up, Budget(0).used_up, Budget(60).allows(3600)
    (False, True, False)
    """

    def __init__(self, seconds: Any = None) -> None:
        number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if seconds is not None and not (number and seconds >= 0):
            raise DataError(f"budget={seconds!r}: expected seconds, 0 or more, or None for no limit")
        self.seconds: float | None = seconds
        self._began = time.perf_counter()

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._began

    @property
    def left(self) -> float | None:
        """Seconds left, not below 0; None without limit."""
        return None if self.seconds is None else max(0.0, self.seconds - self.spent)

    @property
    def used_up(self) -> bool:
        return not self.allows()

    def allows(self, seconds: float = 0.0) -> bool:
        """Whether so many more seconds fit into it."""
        return self.spent + seconds < (math.inf if self.seconds is None else self.seconds)

    def __repr__(self) -> str:
        limit = "without limit" if self.seconds is None else f"of {self.seconds:g} s"
        return f"Budget({self.spent:.3g} s {limit})"
