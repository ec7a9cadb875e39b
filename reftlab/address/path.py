"""Site paths: strings such as `model.layers[15].output` as small frozen objects.

A site path is a module path, a side (`input` or `output`) and, where a module takes or returns
more than one tensor, which one. The last step named `input` or `output` is the side, so that a
module that is itself called `output` (BERT has several) is written `encoder.layer[0].output.output`.
Attention modules have two sides more, `scores` and `pattern`: what goes into their softmax and what
comes out of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reftlab.address.scanner import Scanner
from reftlab.errors import AddressError

__all__ = ["ATTENTION_SIDES", "Child", "Entries", "Every", "SitePath", "parse_path"]

Side = Literal["input", "output", "scores", "pattern"]

ATTENTION_SIDES = ("scores", "pattern")
_OWN_SIDE = ("heads", "q", "k", "v")

_NAME = r"[A-Za-z_*?][A-Za-z0-9_*?\-]*"


@dataclass(frozen=True)
class Child:
    """A child module by name; `*` and `?` match as in file names."""

    name: str

    def __str__(self) -> str:
        return f".{self.name}"


@dataclass(frozen=True)
class Entries:
    """Entries of a module list by number; negative numbers count from the end."""

    numbers: tuple[int, ...]

    def __str__(self) -> str:
        return f"[{','.join(map(str, self.numbers))}]"


@dataclass(frozen=True)
class Every:
    """A slice of a module list; `[*]` is the slice of everything."""

    start: int | None = None
    stop: int | None = None
    step: int | None = None

    def __str__(self) -> str:
        if self == Every():
            return "[*]"
        start, stop = ("" if n is None else str(n) for n in (self.start, self.stop))
        return f"[{start}:{stop}" + (f":{self.step}]" if self.step is not None else "]")


Step = Child | Entries | Every


@dataclass(frozen=True)
class SitePath:
    """A parsed site path.

    Attributes:
        steps: the way from the root module to the module.
        side: `input`, `output`, `scores`, `pattern`, or None where an alias such as `unembed` or
            `blocks[3].attn.heads` brings its own side.
        leaf: which value of the side, as keys into tuples, dicts and `ModelOutput`s; empty for the
            tensor itself, the first entry of a tuple, or the main field of a `ModelOutput`.
        part: `q`, `k` or `v` where the module's last axis holds all three and one of them is meant.
    """

    steps: tuple[Step, ...]
    side: Side | None
    leaf: tuple[str | int, ...] = ()
    part: str = ""

    def __str__(self) -> str:
        text = "".join(map(str, self.steps)) + (f".{self.side}" if self.side else "")
        leaf = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in self.leaf)
        return text.removeprefix(".") + leaf

    @property
    def module(self) -> str:
        """The module path alone, as text."""
        return "".join(map(str, self.steps)).removeprefix(".")


def parse_path(text: str | SitePath) -> SitePath:
    """Read a site path.

    Args:
        text: for instance `model.layers[15].output`, `model.layers.15.output`, `h[-1].mlp.input`,
            `model.layers[4:12:2].output`, `model.layers[3,9,18].output`,
            `model.layers[*].self_attn.*_proj.input`, `output.logits`,
            `model.layers[0].self_attn.output[0]`, `blocks[3].attn.heads`, `blocks[3].attn.q`,
            `blocks[3].attn.pattern`.

    Raises:
        AddressError: the text is not a site path; the message points at the character.

    >>> str(parse_path("model.layers.15.output"))
    'model.layers[15].output'
    >>> parse_path("h[-1].mlp.output").side
    'output'
    """
    if isinstance(text, SitePath):
        return text
    if not isinstance(text, str):
        raise AddressError(f"a site path must be a string such as 'model.layers[15].output', not {text!r}")
    scanner = Scanner(text, "site path", AddressError)
    steps: list[Step] = []
    while True:
        if steps or not scanner.peek("["):
            steps.append(_step_after_dot(scanner, first=not steps))
        while scanner.take("["):
            steps.append(_bracket(scanner))
        if scanner.done:
            break
        scanner.expect(".", "'.' or '['")
    return _split_at_side(scanner, tuple(steps))


def _step_after_dot(scanner: Scanner, first: bool) -> Step:
    number = scanner.match(r"[0-9]{1,9}(?![A-Za-z0-9_*?\-])")
    if number is not None:
        return Entries((int(number),))
    name = scanner.match(_NAME)
    if name is None:
        scanner.fail("a module name" if first else "a module name, 'input' or 'output'")
    return Child(name)


def _bracket(scanner: Scanner) -> Step:
    if scanner.take("*"):
        scanner.expect("]")
        return Every()
    scanner.skip_spaces()
    first = None if scanner.peek(":") else scanner.integer("a number, a slice or '*'")
    scanner.skip_spaces()
    if scanner.take(":"):
        return _slice(scanner, first)
    numbers = [first if first is not None else 0]
    while scanner.take(","):
        scanner.skip_spaces()
        numbers.append(scanner.integer())
        scanner.skip_spaces()
    scanner.expect("]", "',', ':' or ']'")
    return Entries(tuple(numbers))


def _slice(scanner: Scanner, start: int | None) -> Every:
    bounds: list[int | None] = [start, None, None]
    for place in (1, 2):
        scanner.skip_spaces()
        if not (scanner.peek("]") or scanner.peek(":")):
            here = scanner.at
            bounds[place] = scanner.integer("a number or ']'")
            if place == 2 and bounds[2] == 0:
                scanner.fail("a step other than 0", here)
        scanner.skip_spaces()
        if place == 2 or not scanner.take(":"):
            break
    scanner.expect("]")
    return Every(*bounds)


def _split_at_side(scanner: Scanner, steps: tuple[Step, ...]) -> SitePath:
    sides = [i for i, step in enumerate(steps) if step in (Child("input"), Child("output"))]
    if sides:
        module, rest = steps[: sides[-1]], steps[sides[-1] + 1 :]
        side: Side = "input" if steps[sides[-1]] == Child("input") else "output"
        return SitePath(module, side, tuple(_leaf_key(scanner, step, side) for step in rest))
    last = steps[-1].name if isinstance(steps[-1], Child) else ""
    if last in ATTENTION_SIDES and len(steps) > 1:
        return SitePath(steps[:-1], "scores" if last == "scores" else "pattern")
    if last in _OWN_SIDE or steps == (Child("unembed"),):
        return SitePath(steps, None)
    raise AddressError(
        f"site path {scanner.text!r} ends at a module; add the side, "
        f"'{scanner.text}.output' or '{scanner.text}.input'"
    )


def _leaf_key(scanner: Scanner, step: Step, side: str) -> str | int:
    if isinstance(step, Child) and not set("*?") & set(step.name):
        return step.name
    if isinstance(step, Entries) and len(step.numbers) == 1:
        return step.numbers[0]
    raise AddressError(
        f"cannot read site path {scanner.text!r}: after '.{side}' one value is chosen, "
        f"as in '.{side}[0]' or '.{side}.last_hidden_state'; {str(step)!r} chooses several"
    )
