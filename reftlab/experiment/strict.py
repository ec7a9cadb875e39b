"""What the parts of a configuration have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError

__all__ = ["Strict", "first_reason"]


class Strict(BaseModel):
    """Fields that are checked once and never changed; an unknown one is an error."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, frozen=True)


def first_reason(error: ValidationError) -> str:
    """The first thing that is wrong, as `field='value': reason`."""
    first = error.errors()[0]
    where = ".".join(str(step) for step in first["loc"] if isinstance(step, str) and step[:1].islower())
    if first["type"] == "missing":
        return f"{where} is missing"
    reason = first["msg"].removeprefix("Value error, ")
    return f"{where}={first['input']!r}: {reason}" if where else reason
