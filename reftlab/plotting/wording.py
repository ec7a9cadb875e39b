"""Numbers and places as a reader sees them, in figures and in sentences."""

from __future__ import annotations

import re
import textwrap
from typing import Any

__all__ = ["block_named", "number", "true_minus", "wrapped"]

_NUMBER = re.compile(r"(?<![\w.])(?P<sign>[+-]?)(?P<size>\d+\.?\d*(?:e[+-]?\d+)?|inf)(?![\w.]*\w)")
_BLOCK = re.compile(r"(?P<before>(?:\w+\.)*?)(?:layers|layer|blocks|block|h)[.\[](?P<number>\d+)\]?\.output")
_STACKS = ("text", "vision", "encoder", "decoder")
_QUOTED = r"(?:(?<!\w)'[^'\n]*'(?!\w)|\"[^\"\n]*\"|“[^”\n]*”)"
_KEPT = re.compile(rf"(?P<kept>{_QUOTED}|(?<=\w)\[[^\]\n]*\])|{_NUMBER.pattern}")
_TOGETHER = re.compile(rf"{_QUOTED} [−+] {_QUOTED}"), re.compile(rf"{_QUOTED}|\[[^\]\n]*\]|\([^)\n]*\)")
_SPACE = "\x1f"
"""A space at which no line is broken."""


def number(value: Any, form: str = ".3g") -> str:
    """A number, or anything that formats as numbers, with a true minus sign, and 0 without any sign.

    >>> number(-0.25), number(-0.001, "+.2f"), number(3, "+g")
    ('−0.25', '0.00', '+3')
    """
    return true_minus(format(value, form))


def true_minus(text: str) -> str:
    """A text in which negative numbers have a true minus sign, and 0 no sign.

    Words, what is quoted, and indices in paths stay as they are.

    >>> true_minus("-13 [-13.8, -0.0] of gpt-2")
    '−13 [−13.8, 0.0] of gpt-2'
    >>> true_minus("blocks[-1].output @ 'last(-2)'")
    "blocks[-1].output @ 'last(-2)'"
    """
    return _KEPT.sub(lambda found: found[0] if found["kept"] else _readable(found), text)


def _readable(found: re.Match[str]) -> str:
    sign, size = found["sign"], found["size"]
    sign = "" if size != "inf" and float(size) == 0 else sign
    return (sign + size).replace("-", "−")


def block_named(site: str) -> str:
    """A site in few words where it is the output of a block, and its path where it is not.

    >>> block_named("model.layers.19.output"), block_named("decoder.blocks[3].output")
    ('block 19', 'decoder block 3')
    >>> block_named("model.layers.19.mlp.output")
    'model.layers.19.mlp.output'
    """
    found = _BLOCK.fullmatch(site)
    words = [] if found is None else found["before"].split(".")
    if found is None or any(word.isdigit() for word in words):
        return site
    stack = [name for name in _STACKS if any(word.split("_")[0] == name for word in words)]
    return " ".join([*stack[:1], "block", found["number"]])


def wrapped(text: str, width: int) -> str:
    r"""A text in lines of at most `width`, broken neither inside quotes and brackets nor across its lines.

    >>> wrapped("difference, ' good' − ' bad'\n(logits)", 16).split("\n")
    ['difference,', "' good' − ' bad'", '(logits)']
    """
    for pattern in _TOGETHER:
        text = pattern.sub(lambda found: _held(found[0]) if len(found[0]) <= width else found[0], text)
    lines = (textwrap.wrap(line, max(width, 1)) for line in text.split("\n"))
    return "\n".join(line for some in lines for line in some).replace(_SPACE, " ")


def _held(words: str) -> str:
    return words.replace(" ", _SPACE)
