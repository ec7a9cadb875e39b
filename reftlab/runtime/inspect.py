"""What a model is made of, in the words that a path uses."""

from __future__ import annotations

import contextlib
import html
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reftlab.address import head_size, parse_path, portable_names, resolve
from reftlab.errors import BindError, RunError
from reftlab.runtime.axes import axes_of
from reftlab.runtime.leaf import get_input, get_output
from reftlab.runtime.scan import example_inputs, moved, sizes_of, skeleton
from reftlab.runtime.wrapped import eagerly

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Inspection", "ModuleLine", "inspect"]

Shape = tuple[int, ...]

_NOTE = (
    "Type .output or .input behind a path. [*] stands for all of several equal modules; "
    "[15], [4:12:2] and [3,9,-1] for some."
)


@dataclass(frozen=True)
class ModuleLine:
    """One module, or several equal ones under one path.

    Attributes:
        path: what one types before `.output` or `.input`.
        kind: class name.
        modules: how many modules the path names.
        input_width, output_width: number of features of what goes in and comes out; None where that is
            no tensor with rows of tokens, or where the module is never called.
        heads: number of attention heads among the module's output features, or None.
        parameters: numbers in one module, its children's included.
        aliases: portable names of its sites.
    """

    path: str
    kind: str
    modules: int
    input_width: int | None
    output_width: int | None
    heads: int | None
    parameters: int
    aliases: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """The modules of a model in the order of `named_modules`.

    Attributes:
        model: class name of the model.
        parameters: numbers in the whole model.
        lines: one for each path.
        found: where reftlab knows no portable names for the model, what it seems to be built of; and
            what to give where the widths are not known. Empty where there is nothing to say.
    """

    model: str
    parameters: int
    lines: tuple[ModuleLine, ...]
    found: str = ""

    def to_frame(self) -> pd.DataFrame:
        """One line a path, with the fields of `ModuleLine`."""
        import pandas as pd

        return pd.DataFrame([asdict(line) for line in self.lines])

    def __str__(self) -> str:
        rows = [("path", "width in → out", "parameters", "module", "portable names")]
        rows += [(line.path, *_cells(line)) for line in self.lines]
        wide = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = [
            f"{path:<{wide[0]}}  {width:<{wide[1]}}  {size:>{wide[2]}}  {kind:<{wide[3]}}  {names}".rstrip()
            for path, width, size, kind, names in rows
        ]
        notes = [_NOTE, *([self.found] if self.found else [])]
        return "\n".join([f"{self.model}, {self.parameters:,} parameters", "", *lines, "", *notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = f"{html.escape(self.model)}, {self.parameters:,} parameters"
        frame = self.to_frame().drop(columns=["heads"])
        frame["aliases"] = frame["aliases"].map(", ".join)
        table = frame.to_html(index=False, na_rep="", float_format=lambda number: f"{number:.0f}")
        return f"<p>{head}</p>{table}" + (f"<p>{html.escape(self.found)}</p>" if self.found else "")


def inspect(model: nn.Module, *, example: Any = None, every: bool = False) -> Inspection:
    """List a model's modules with the paths that one can type, their widths and their aliases.

    Widths come from one pass on shapes alone, which costs no arithmetic; where the model cannot run
    so, or reftlab cannot make up inputs and no example is given, they are None.

    Args:
        model: any module.
        example: inputs for the pass, as for `InterventionGraph.bind`.
        every: whether to list equal blocks one by one rather than as `[*]`.

    >>> from torch import nn
    >>> inspect(nn.Sequential(nn.Linear(3, 5), nn.ReLU()), example=torch.zeros(2, 3)).lines[0].output_width
    5
    """
    widths = _widths(model, example)
    aliases = {alias: _modules_of(alias, model) for alias in portable_names(model)}
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, module in model.named_modules():
        if name:
            template = re.sub(r"\.\d+(?=\.|$)", "[*]", f".{name}").removeprefix(".")
            facts = (type(module).__name__, *widths.get(name, (None, None)), _size(module))
            groups.setdefault((template, *facts, name if every else ""), []).append(name)
    lines = []
    for (template, kind, before, after, size, _), names in groups.items():
        lines.append(
            ModuleLine(
                _path(names, alone=_alone(template, groups)),
                kind,
                len(names),
                before,
                after,
                _heads(model, names[0], after),
                size,
                tuple(alias + _which(names, there) for alias, there in aliases.items() if there & set(names)),
            )
        )
    return Inspection(type(model).__name__, _size(model), tuple(lines), _found(model, aliases, widths))


def _widths(model: nn.Module, example: Any) -> dict[str, tuple[int | None, int | None]]:
    seen: dict[str, list[tuple[Shape | None, Shape | None]]] = {}

    def noter(name: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before = _shape(lambda: get_input(module, args, kwargs, (), name))
            seen.setdefault(name, []).append((before, _shape(lambda: get_output(output, (), name))))

        return note

    try:
        args, kwargs = example_inputs(model, example)
    except BindError:
        return {}
    copy = skeleton(model)
    for name, module in copy.named_modules():
        module.register_forward_hook(noter(name), with_kwargs=True)
    # Some models need values to run; what was seen until then is still right.
    failures = RuntimeError, NotImplementedError, TypeError, ValueError
    with contextlib.suppress(*failures), torch.no_grad(), eagerly(copy):
        copy(*moved(args, torch.device("meta")), **moved(kwargs, torch.device("meta")))
    rows, tokens = sizes_of(args, kwargs)
    widths = {}
    for name, shapes in seen.items():
        module = model.get_submodule(name)
        places = [(s, axes_of(s, module, rows, tokens, len(shapes)) if s else None) for s in shapes[0]]
        before, after = (None if s is None or axes is None else axes[0].width(s) for s, axes in places)
        widths[name] = before, after
    return widths


def _shape(get: Any) -> Shape | None:
    try:
        tensor: Tensor = get()
    except RunError:
        return None
    return tuple(tensor.shape) if tensor.dim() > 1 and tensor.is_floating_point() else None


def _modules_of(alias: str, model: nn.Module) -> frozenset[str]:
    return frozenset(site.module for site in resolve(parse_path(alias), model))


def _which(names: list[str], there: frozenset[str]) -> str:
    """Which of a line's modules an alias stands for, where it does not stand for all of them."""
    some = [name for name in names if name in there]
    if len(some) == len(names):
        return ""
    numbers = (re.findall(r"\.(\d+)(?=\.|$)", f".{name}") for name in some)
    return " at " + ", ".join("".join(f"[{number}]" for number in found) for found in numbers)


def _found(model: nn.Module, aliases: Mapping[str, Any], widths: Mapping[str, Any]) -> str:
    """What stands out in a model that reftlab has no entry for, and what would say more."""
    more = "" if widths else "Give example=, inputs that the model takes, to see widths."
    if aliases:
        return more
    start = f"reftlab has no portable names for {type(model).__name__}; every path above works as it is."
    lists = [
        (_size(module), name, list(module.children()))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module.children()}) == 1
    ]
    several = [entry for entry in lists if len(entry[2]) > 1]
    if not several:
        return f"{start} {more}".rstrip()
    _, name, blocks = max(several, key=lambda entry: entry[0])
    path = _path([f"{name}.{number}" for number in range(len(blocks))], alone=True)
    blocks_are = f"Its blocks seem to be {path}.output, {len(blocks)} of {type(blocks[0]).__name__}."
    return f"{start} {blocks_are} {more}".rstrip()


def _alone(template: str, groups: Iterable[tuple[Any, ...]]) -> bool:
    return sum(key[0] == template for key in groups) == 1


def _path(names: list[str], alone: bool) -> str:
    """One path for modules that differ in their numbers only."""
    first = names[0]
    if len(names) == 1:
        return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", f".{first}").removeprefix(".")
    if alone:
        return re.sub(r"\.\d+(?=\.|$)", "[*]", f".{first}").removeprefix(".")
    columns = list(zip(*(re.findall(r"\.(\d+)(?=\.|$)", f".{name}") for name in names), strict=True))
    numbers: Iterator[str] = (",".join(dict.fromkeys(column)) for column in columns)
    return re.sub(r"\.\d+(?=\.|$)", lambda _: f"[{next(numbers)}]", f".{first}").removeprefix(".")


def _heads(model: nn.Module, name: str, width: int | None) -> int | None:
    size = head_size(model, name) if re.search(r"(^|[._])[qkv](_proj)?$", name) else None
    return width // size if size and width and width % size == 0 else None


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _cells(line: ModuleLine) -> tuple[str, str, str, str]:
    kind = line.kind + (f" ×{line.modules}" if line.modules > 1 else "")
    widths = f"{line.input_width or '·'} → {line.output_width or '·'}"
    widths += f" ({line.heads} heads)" if line.heads else ""
    return widths, f"{line.parameters:,}", kind, ", ".join(line.aliases)
