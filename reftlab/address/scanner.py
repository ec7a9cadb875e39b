"""A cursor over one string, shared by the path and the position parsers."""

from __future__ import annotations

import re
from typing import NoReturn

from reftlab.errors import ReftlabError, pointed


class Scanner:
    """Reads `text` from left to right and raises `error` at the character that is wrong.

    Args:
        text: what the user wrote.
        what: what it should be, for the error message ("site path", "position").
        error: the exception class to raise.
    """

    def __init__(self, text: str, what: str, error: type[ReftlabError]) -> None:
        self.text, self.what, self.error = text, what, error
        self.at = 0

    @property
    def done(self) -> bool:
        return self.at >= len(self.text)

    def peek(self, token: str) -> bool:
        return self.text.startswith(token, self.at)

    def take(self, token: str) -> bool:
        """Step over `token` if it comes next, and say whether it did."""
        if self.peek(token):
            self.at += len(token)
            return True
        return False

    def expect(self, token: str, meaning: str | None = None) -> None:
        if not self.take(token):
            self.fail(meaning or repr(token))

    def match(self, pattern: str) -> str | None:
        """Step over what the regular expression matches here; None if it does not match."""
        found = re.compile(pattern).match(self.text, self.at)
        if found is None:
            return None
        self.at = found.end()
        return found.group()

    def integer(self, meaning: str = "a whole number") -> int:
        digits = self.match(r"-?[0-9]{1,12}")
        if digits is None:
            self.fail(meaning)
        return int(digits)

    def skip_spaces(self) -> None:
        self.match(r"[ \t]*")

    def fail(self, expected: str, at: int | None = None, hint: str = "") -> NoReturn:
        """Raise at character `at` (default: here), saying what was expected there."""
        at = self.at if at is None else at
        found = repr(self.text[at]) if at < len(self.text) else "the end"
        raise self.error(
            f"cannot read {self.what} {self.text!r}: at character {at} found {found}, expected {expected}"
            + hint
            + pointed(self.text.replace("\n", " "), at)
        )
