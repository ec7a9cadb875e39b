"""What every intervention is: mathematics on vectors, without knowing any model."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reftlab.errors import InterventionError
from reftlab.interventions.basis import OrthonormalBasis
from reftlab.interventions.passing import PassMean

__all__ = ["Affine", "Intervention", "intervention_types"]

_TYPES: dict[str, type[Intervention]] = {}
_Own = TypeVar("_Own", bound="Intervention")


@dataclass(frozen=True)
class Affine:
    """An edit written as `new − base = write (read · base) + constant`.

    Attributes:
        write: `(width, rank)`.
        read: `(rank, width)`.
        constant: `(width,)`.
    """

    write: Float[Tensor, "width rank"]
    read: Float[Tensor, "rank width"]
    constant: Float[Tensor, " width"]

    @classmethod
    def adding(cls, constant: Float[Tensor, " width"]) -> Affine:
        """The edit that reads nothing and adds `constant`."""
        nothing = constant.new_zeros(len(constant), 0)
        return cls(nothing, nothing.T, constant)

    @classmethod
    def removing(
        cls,
        left: Float[Tensor, "width rank"],
        right: Float[Tensor, "rank width"],
        mean: Float[Tensor, " width"] | None,
    ) -> Affine:
        """The edit `h − left · right (h − mean)`."""
        constant = left.new_zeros(len(left)) if mean is None else left @ (right @ mean)
        return cls(-left, right, constant)


class Intervention(nn.Module):
    """Base of all interventions.

    An intervention is written without a width, `LoReFT(rank=4)`, and stays a description until
    `build(width)` returns a copy that has its parameters. `graph.bind(model)` does that for every
    edit.

    To write your own, take every setting as an argument of `__init__` and keep it under the same
    name, make parameters in `setup`, and do the mathematics in `forward`:

        class Shift(rl.Intervention):
            def __init__(self, start: float = 0.0):
                super().__init__()
                self.start = start

            def setup(self, width):
                self.vector = torch.nn.Parameter(torch.full((width,), self.start))

            def forward(self, base, source=None):
                return base + self.vector

    Attributes:
        takes_source: whether values from another forward pass are `"required"`, `"optional"` or
            not taken (`"no"`).
        counts_positions: whether `forward` is also handed `positions`, `(n,)` int64, the number of
            each vector's token among the real tokens of its row.
        counts_rows: whether `forward` is also handed `rows`, `(n,)` int64, the row of the batch that
            each vector is from.
        averages_source: whether each vector's source is the mean of its row's source vectors, which
            need not be as many as the edited tokens then.
        takes_subspace: what `subspace=` chooses from: `"basis"` where `forward` takes it and confines
            the edit to the chosen directions, `"features"` where the edit treats each feature by
            itself, so that the others simply stay as they are, `"no"` where there is no choice.
        width: length of the vectors, None before `build`.
    """

    takes_source: ClassVar[Literal["no", "optional", "required"]] = "no"
    counts_positions: ClassVar[bool] = False
    counts_rows: ClassVar[bool] = False
    averages_source: ClassVar[bool] = False
    takes_subspace: ClassVar[Literal["no", "features", "basis"]] = "no"
    width: int | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.__name__.startswith("_"):
            _TYPES[cls.__name__] = cls

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that this intervention was made with, by name.

        Raises:
            InterventionError: a subclass does not keep an argument under its own name.
        """
        names = list(_arguments(type(self)))
        missing = [name for name in names if not hasattr(self, name)]
        if missing:
            raise InterventionError(
                f"{type(self).__name__}.__init__ takes {missing[0]!r} but does not keep it as "
                f"self.{missing[0]}; interventions keep every argument under its own name"
            )
        return {name: getattr(self, name) for name in names}

    def build(self: _Own, width: int) -> _Own:
        """Return a copy with fresh parameters for vectors of `width`; this one stays as it is."""
        built = type(self)(**self.config)
        built.width = width
        built.setup(width)
        return built

    def setup(self, width: int) -> None:
        """Make the parameters for vectors of `width`; nothing to make by default."""

    def forward(
        self, base: Float[Tensor, "n width"], source: Float[Tensor, "n width"] | None = None
    ) -> Float[Tensor, "n width"]:
        """Return the new vectors for `base`, given `source` where the intervention takes one."""
        raise NotImplementedError(f"{type(self).__name__} does not say what forward does")

    @property
    def directions(self) -> int | None:
        """How many directions a subspace chooses from; None where it takes none or is not yet built."""
        if self.takes_subspace == "basis":
            return getattr(self, "rank", None) or self.width
        return self.width if self.takes_subspace == "features" else None

    def edited(
        self,
        base: Float[Tensor, "n width"],
        source: Float[Tensor, "n width"] | None = None,
        *,
        subspace: Bool[Tensor, "n directions"] | None = None,
        positions: Int[Tensor, " n"] | None = None,
        rows: Int[Tensor, " n"] | None = None,
    ) -> Tensor:
        """Call `forward` with what it takes, and confine the edit to a subspace; the runtime calls this.

        Args:
            base: the vectors to edit. Half precision is worked out in float32 and cast back.
            source: the vectors from elsewhere that belong to them.
            subspace: which directions act for each vector; None for all. Another vector's choice
                changes nothing.
            positions: number of each vector's token, for edits with `counts_positions`.
            rows: row of the batch of each vector, for edits with `counts_rows`.

        Returns:
            The new vectors, `(n, width)` in the dtype of `base`.

        Raises:
            InterventionError: a subspace where none is taken, or not of the shape `(n, directions)`.
        """
        extra: dict[str, Any] = {}
        if self.counts_positions:
            extra["positions"] = positions
        if self.counts_rows:
            extra["rows"] = rows
        if subspace is not None:
            subspace = self._checked_subspace(subspace, base)
            if self.takes_subspace == "basis":
                extra["subspace"] = subspace
        if base.dtype in (torch.bfloat16, torch.float16):
            new = self(base.float(), None if source is None else source.float(), **extra).to(base.dtype)
        else:
            new = self(base, source, **extra)
        return torch.where(subspace, new, base) if subspace is not None and "subspace" not in extra else new

    def stack_key(self) -> Hashable | None:
        """What interventions must have in common so that one product carries out several of them.

        Returns:
            Equal values for interventions that `stacked` takes together; None for one that goes alone.
        """
        return None

    @classmethod
    def stacked(cls: type[_Own], members: Sequence[_Own]) -> Any:
        """The parameters of members of one `stack_key`, each on an axis of members that comes first."""
        raise NotImplementedError(f"{cls.__name__} has a stack_key and does not say what is stacked")

    def grouped(
        self,
        stack: Any,
        base: Float[Tensor, "member n width"],
        subspace: Bool[Tensor, "member n directions"] | None = None,
    ) -> Float[Tensor, "member n width"]:
        """What `forward` does, for several members at once, each on vectors of its own.

        Args:
            stack: what `stacked` made of the members, of which this is one.
            base: float32 vectors, as many for each member.
            subspace: which directions act for each vector; None for all.
        """
        raise NotImplementedError(f"{type(self).__name__} has a stack_key and does not say what grouped does")

    def _checked_subspace(self, subspace: Tensor, base: Tensor) -> Tensor:
        count = self.directions
        expected = (base.shape[0], count)
        if count is None:
            raise InterventionError(
                f"subspace={_short(subspace)}: {type(self).__name__} has no directions to choose from; "
                "leave subspace= out"
            )
        if not isinstance(subspace, Tensor) or subspace.dtype != torch.bool or subspace.shape != expected:
            kind = f"{subspace.dtype} " if isinstance(subspace, Tensor) else ""
            raise InterventionError(
                f"subspace={kind}{_short(subspace)}: {self.describe()} takes a bool tensor "
                f"(vectors, directions), here {expected}; directions are numbered 0 to {count - 1}"
            )
        return subspace.to(base.device)

    def penalty(self) -> Float[Tensor, ""] | None:
        """A term that training adds to the loss, from the last forward pass; none by default."""
        return None

    def schedule(self, progress: float) -> None:
        """Take note that the share `progress` of training, 0 to 1, is done; nothing to do by default."""

    def prepare(self) -> None:
        """Compute ahead what the coming forward pass shares, and begin the means that penalties are made of.

        The runtime calls it before each forward pass, and once for a whole generation.
        """
        for module in self.modules():
            if isinstance(module, OrthonormalBasis | PassMean):
                module.start_pass()

    def finish(self) -> None:
        """Drop what `prepare` computed, unless a backward pass may need it, and end the means."""
        for module in self.modules():
            if isinstance(module, OrthonormalBasis | PassMean):
                module.end_pass()

    def check_source(self, given: bool) -> None:
        """Refuse an edit that lacks the source it needs, or has one that it would ignore.

        Raises:
            InterventionError: as said.
        """
        name = type(self).__name__
        if self.takes_source == "required" and not given:
            raise InterventionError(f"{name} needs source=, as in source=rl.Read(run='corrupt')")
        if self.takes_source == "no" and given:
            raise InterventionError(f"{name} takes no source; leave source= out, or use Swap")

    def affine(self) -> Affine | None:
        """The edit as an affine map of the base vector, or None where it is not one."""
        return None

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={_short(value)}" for name, value in self.config.items())

    def describe(self) -> str:
        """One short line, `LoReFT(rank=4)`: the arguments that differ from their defaults."""
        defaults = _arguments(type(self))
        shown = [
            f"{name}={_short(value)}"
            for name, value in self.config.items()
            if isinstance(value, Tensor) or value != defaults[name].default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def formula(self) -> str:
        """The formula as the docstring states it: its first indented line, or second of two paragraphs."""
        text = inspect.cleandoc(type(self).__doc__ or "")
        indented = [line.strip() for line in text.splitlines() if line.startswith("    ")]
        paragraphs = text.split("\n\n")
        # Where nothing follows the formula, it sets the docstring's margin and is no longer indented.
        alone = len(paragraphs) == 2 and "\n" not in paragraphs[1]
        return indented[0] if indented else paragraphs[1] if alone else ""


def intervention_types() -> dict[str, type[Intervention]]:
    """Every intervention class that has been defined so far, by name."""
    return dict(_TYPES)


def as_vector(value: Any, argument: str) -> Tensor | None:
    """Turn numbers into a float32 tensor `()` or `(width,)`; None stays None.

    Raises:
        InterventionError: not a number or a vector of finite numbers.
    """
    if value is None:
        return None
    if isinstance(value, bool) or (isinstance(value, Tensor) and (value.is_complex() or value.is_meta)):
        raise InterventionError(f"{argument}={_short(value)}: expected a number or a vector of real numbers")
    try:
        tensor = torch.as_tensor(value).detach().to(torch.float32).clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InterventionError(f"{argument}={value!r}: expected a number or a vector of numbers") from error
    if tensor.dim() > 1 or not torch.isfinite(tensor).all():
        raise InterventionError(
            f"{argument} must be a number or a vector (width,) of finite numbers, "
            f"not {_short(value)} of shape {tuple(tensor.shape)}"
        )
    return tensor


def as_feature_vector(value: Any, argument: str, width: int) -> Tensor | None:
    """Turn a number or `width` numbers into a float32 tensor `(width,)`; None stays None.

    Raises:
        InterventionError: neither, or numbers that are not finite.
    """
    vector = as_vector(value, argument)
    check_width(vector, argument, width)
    return None if vector is None else vector.expand(width).clone()


def as_matrix(value: Any, argument: str) -> Tensor:
    """Turn rows of numbers into a float32 tensor `(rows, width)`; one vector is one row.

    Raises:
        InterventionError: not a vector or a matrix of finite numbers, or one without rows.
    """
    if isinstance(value, Tensor) and (value.is_complex() or value.is_meta):
        raise InterventionError(f"{argument}={_short(value)}: expected a vector or rows of real numbers")
    try:
        tensor = torch.as_tensor(value).detach().to(torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InterventionError(f"{argument}={value!r}: expected a vector or rows of numbers") from error
    tensor = tensor[None] if tensor.dim() == 1 else tensor
    if tensor.dim() != 2 or 0 in tensor.shape or not torch.isfinite(tensor).all():
        raise InterventionError(
            f"{argument} must be a vector (width,) or rows (k, width) of finite numbers, "
            f"not {_short(value)} of shape {tuple(tensor.shape)}"
        )
    return tensor


def check_width(value: Tensor | None, argument: str, width: int) -> None:
    """Refuse a vector that is not as long as the site is wide."""
    if value is not None and value.dim() > 0 and value.shape[-1] != width:
        raise InterventionError(f"{argument} has {value.shape[-1]} numbers, the vectors here have {width}")


def number(value: Any, argument: str, low: float = -float("inf"), high: float = float("inf")) -> float:
    """Check that an argument is a number from `low` to `high` and return it as a float."""
    ok = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not ok or abs(value) > sys.float_info.max:
        upper = "" if high == float("inf") else f" to {high:g}"
        between = "" if low == -float("inf") else f" from {low:g}{upper}"
        raise InterventionError(f"{argument}={value!r}: expected a finite number{between}")
    return float(value)


def whole(value: Any, argument: str, low: int) -> int:
    """Check that an argument is a whole number of `low` or more and return it; numpy's are taken too."""
    value = value.item() if isinstance(value, np.integer) else value
    if type(value) is not int or value < low:
        raise InterventionError(f"{argument}={value!r}: expected a whole number of {low} or more")
    return value


def check_rank(rank: int, width: int) -> None:
    """Refuse more directions than a site has features."""
    if rank > width:
        raise InterventionError(f"rank={rank} is more than the {width} features of the site")


def flag(value: Any, argument: str) -> bool:
    """Check that an argument is True or False and return it."""
    if type(value) is not bool:
        raise InterventionError(f"{argument}={value!r}: expected True or False")
    return value


def _arguments(kind: type[Intervention]) -> dict[str, inspect.Parameter]:
    """The named arguments of a class's `__init__`; torch's own, where it has none, takes none by name."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(kind.__init__).parameters.items()
    return {name: p for name, p in parameters if name != "self" and p.kind not in variable}


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape)}" if value.dim() else f"{value.item():g}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Intervention):
        return value.describe()
    return getattr(value, "__name__", None) or repr(value)
