"""Folding: an edit of all tokens at the output of a linear module, put into that module's weights.

An affine edit of `y = W x + b` is one more linear map,

    y + s (A (C y) + c)  =  (W + s A C W) x  +  b + s (A (C b) + c)

with `A` (width × rank), `C` (rank × width) and `c` (width) of `Intervention.affine`, and `s` the edit's
strength. The products are taken in float64 and cast to the module's dtype once. The module's own
parameters are put aside, not overwritten, so that they come back bit for bit.

A folded edit acts in every call of the model, also in calls without reftlab, on padding too, and in
`state_dict()` of the model; what would need it elsewhere, or not at all, is refused until `unfold`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reftlab.address import All, Every
from reftlab.errors import BindError, RunError, did_you_mean
from reftlab.graph import BASE
from reftlab.interventions import Intervention
from reftlab.interventions.base import Affine
from reftlab.runtime.calls import continues_texts
from reftlab.runtime.linears import linears_of
from reftlab.runtime.wrapped import device_of, is_dispatched

if TYPE_CHECKING:
    from reftlab.runtime.model import BoundModel
    from reftlab.runtime.options import Options
    from reftlab.runtime.places import BoundEdit, BoundRead

__all__ = ["Folds", "check_unfolded"]

_MARK = "_reftlab_folded"
"""Where a linear module notes the interventions in its weights."""

_CLOSE = 1e-4
"""How far, relative to the vectors, what `affine` says may be from what the intervention does."""

_Value = tuple[Tensor, int, Tensor]


@dataclass(eq=False)
class _Fold:
    """One linear module and the edits in its weights.

    Attributes:
        name: the module's path in the model.
        module: the module.
        edits: the edits, in the order in which they act.
        built: their interventions.
        inside: the modules whose outputs hold what the edits have made only while they are folded.
        weight, bias: the module's own parameters.
        now: weight and bias with the edits.
        seen: the interventions' tensors, their versions and their values when they were folded.
        written: the folded weight and its version when it was put in.
    """

    name: str
    module: nn.Module
    edits: tuple[BoundEdit, ...]
    built: tuple[Intervention, ...]
    inside: frozenset[str]
    weight: Tensor
    bias: Tensor | None
    now: tuple[nn.Parameter, nn.Parameter | None]
    seen: tuple[tuple[_Value, ...], ...]
    written: tuple[int, int] = (0, 0)

    def put_in(self) -> None:
        self.module._parameters.update(weight=self.now[0], bias=self.now[1])
        vars(self.module)[_MARK] = self.built
        self.written = id(self.now[0]), self.now[0]._version

    def take_out(self) -> None:
        own: dict[str, Any] = self.module._parameters
        weight = own["weight"]
        # A copy of the model has tensors, and versions, of its own.
        copied = id(self.now[0]) != self.written[0]
        if weight is not self.now[0] or not (copied or weight._version == self.written[1]):
            warnings.warn(
                f"the weights of {self.name} were written to while edits were folded into them; that is "
                "undone with the edits",
                UserWarning,
                stacklevel=5,
            )
        for original in (self.weight, self.bias):
            if original is not None:
                # The model may have been moved, cast or frozen in the meantime.
                if (original.device, original.dtype) != (weight.device, weight.dtype):
                    original.data = original.data.to(weight.device, weight.dtype)
                original.requires_grad_(weight.requires_grad)
        own.update(weight=self.weight, bias=self.bias)
        vars(self.module).pop(_MARK, None)


class Folds:
    """The edits of one bound model that are folded into its model's weights; see `BoundModel.fold`."""

    def __init__(self) -> None:
        self._folds: list[_Fold] = []

    @property
    def names(self) -> tuple[str, ...]:
        """The folded edits."""
        return tuple(dict.fromkeys(edit.edit.name for fold in self._folds for edit in fold.edits))

    def fold(self, bound: BoundModel, names: Sequence[str]) -> None:
        """Fold these edits, or all, on top of those that are folded; all of them, or none and an error."""
        known = [edit.name for edit in bound.graph.edits]
        for name in names:
            if name not in known:
                raise RunError(f"there is no edit {name!r}; there is {known}.{did_you_mean(name, known)}")
            if name in self.names:
                raise RunError(f"edit {name!r} is folded already")
        if not known:
            raise RunError("this graph has no edits to fold")
        before = self.names
        self._refold(bound, {*before, *(names or known)}, before)

    def unfold(self) -> None:
        """Give every module its own parameters back."""
        while self._folds:
            self._folds.pop().take_out()

    @contextlib.contextmanager
    def within(self, bound: BoundModel, names: Sequence[str]) -> Iterator[None]:
        """Fold these edits, or all, inside a `with` block."""
        before = self.names
        self.fold(bound, names)
        try:
            yield
        finally:
            self._refold(bound, before, ())

    @contextlib.contextmanager
    def taken_out(self) -> Iterator[None]:
        """The model as it is without folded edits, inside a `with` block."""
        for fold in self._folds:
            fold.take_out()
        try:
            yield
        finally:
            for fold in self._folds:
                fold.put_in()

    def _refold(self, bound: BoundModel, names: Iterable[str], otherwise: Iterable[str]) -> None:
        self.unfold()
        try:
            self._folds = _folds_of(bound, frozenset(names))
        except Exception:
            self._folds = _folds_of(bound, frozenset(otherwise))
            raise
        finally:
            for fold in self._folds:
                fold.put_in()

    def check_none(self) -> None:
        """Refuse to make another bound model of one whose edits act in the weights of both.

        Raises:
            BindError: as said.
        """
        for fold in self._folds:
            raise BindError(
                f"edit {fold.edits[0].key!r} is folded into the weights of {fold.name}, where it would act "
                "in the new bound model too; unfold() first"
            )

    def check(self, bound: BoundModel, options: Options, reads: Iterable[BoundRead] = ()) -> None:
        """Refuse a call in which a folded edit would have to do anything else than it does.

        Raises:
            RunError: as said; the message names the edit.
        """
        for fold in self._folds:
            for edit, built, seen in zip(fold.edits, fold.built, fold.seen, strict=True):
                why = self._contradiction(bound, options, edit, built, seen)
                if why:
                    raise RunError(f"edit {edit.key!r} is folded into {fold.name}, {why}; unfold() first")
            for read in reads:
                if read.site.module in fold.inside:
                    raise RunError(
                        f"{read.site} comes before edit {fold.edits[0].key!r} acts, which is folded into "
                        f"{fold.name}; unfold() first"
                    )

    def _contradiction(
        self, bound: BoundModel, options: Options, edit: BoundEdit, built: Intervention, seen: Any
    ) -> str:
        name = edit.edit.name
        if bound.training:
            return "where it cannot be trained, and this bound model is in training mode"
        if bound._observers:
            return "where nobody can watch it"
        if name in bound._disabled or (options.select is not None and name not in options.select):
            return "where it acts in every call, and this call leaves it out"
        if options.tasks is not None and not all(row & set(edit.edit.task_names) for row in options.tasks):
            return "where it acts in every row, and not all rows have its task"
        if (
            any(f != 1.0 for f in options.scale.get(name, ()))
            or name in options.positions
            or name in options.subspace
        ):
            return "and this call gives it another strength, positions or directions"
        if bound.interventions[edit.module] is not built:
            return "and another intervention stands in its place"
        if _changed(built, seen):
            return "and its numbers have changed since then"
        return ""


def check_unfolded(model: nn.Module, interventions: Iterable[nn.Module]) -> None:
    """Refuse to bind interventions that are folded into the model's weights.

    Raises:
        BindError: as said.
    """
    mine = set(map(id, interventions))
    for name, module in model.named_modules():
        if mine.intersection(map(id, vars(module).get(_MARK, ()))):
            raise BindError(
                f"these edits are folded into the weights of {name}, where they would act a second time; "
                "unfold() first"
            )


def _tensors(built: nn.Module) -> tuple[Tensor, ...]:
    return (*built.parameters(), *built.buffers())


def _values(built: nn.Module) -> tuple[_Value, ...]:
    return tuple((t, _version(t), t.detach().clone()) for t in _tensors(built))


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _changed(built: nn.Module, seen: Sequence[_Value]) -> bool:
    """Whether an intervention has other numbers than when it was folded."""
    now = _tensors(built)
    if len(now) != len(seen):
        return True
    return any(
        not (own is tensor and _version(own) == version >= 0)
        and not torch.equal(own.detach().cpu(), value.cpu())
        for own, (tensor, version, value) in zip(now, seen, strict=True)
    )


def _folds_of(bound: BoundModel, names: frozenset[str]) -> list[_Fold]:
    """What folding these edits comes to; nothing is changed yet."""
    wanted = [edit for edit in bound.edits if edit.edit.name in names]
    for edit in wanted:
        _check_edit(bound, edit)
    if not wanted:
        return []
    linears = linears_of(bound.model, bound._example, wanted)
    groups: dict[str, list[BoundEdit]] = {}
    for edit in wanted:
        if edit.key not in linears:
            kind = type(bound.model.get_submodule(edit.site.module)).__name__
            raise _refused(
                edit, f"what {edit.site.module}, a {kind}, returns is not what one linear module makes"
            )
        groups.setdefault(linears[edit.key], []).append(edit)
    for name, edits in groups.items():
        _check_module(bound, name, edits)
    with torch.inference_mode(False), torch.no_grad():
        return [_fold_of(bound, name, edits) for name, edits in groups.items()]


def _refused(edit: BoundEdit, why: str) -> RunError:
    return RunError(f"edit {edit.key!r} at {edit.site} cannot be folded: {why}")


def _check_edit(bound: BoundModel, bound_edit: BoundEdit) -> None:
    """Refuse an edit that is not one affine map of every token in every call."""
    edit, place, calls = bound_edit.edit, bound_edit.place, bound._calls
    writes = calls.has_decoder or continues_texts(calls._model)
    missing = "the prompt" if edit.phase == "decode" else "generated tokens and answers"
    reasons = [
        (bound.training, "this bound model is in training mode; call eval() first"),
        (edit.name in bound._disabled, "disabled() leaves it out at present"),
        (edit.run != BASE, f"it acts in run {edit.run!r}, and weights act in every run"),
        (len(bound.graph.run_order) > 1, "the graph has source runs, and weights act in every run"),
        (edit.source is not None, "it has a source"),
        (edit.when is not None, "it has a condition"),
        (bool(edit.tasks), f"it is for tasks ({', '.join(edit.task_names)}), and weights act in every row"),
        (edit.subspace is not None, "it acts in some directions of its basis alone"),
        (edit.positions not in (All(), Every()), f"positions are {str(edit.positions)!r}, not 'all'"),
        (writes and edit.phase != "both", f"phase={edit.phase!r} leaves out {missing}; only 'both' is all"),
        (not edit.view.whole or place.index is not None, "it acts on a view of its site"),
        (bound_edit.site.side != "output", "its site is not the output of a module"),
        (place.stream == "calls", "its module runs several times in one pass"),
        (is_dispatched(bound.model), "the model's weights are dispatched by accelerate"),
    ]
    for holds, why in reasons:
        if holds:
            raise _refused(bound_edit, why)
    _check_map(bound_edit, bound.interventions[bound_edit.module])


def _check_map(edit: BoundEdit, built: nn.Module) -> None:
    """Refuse an intervention whose `affine` is missing, or is not what it does."""
    found = built.affine() if isinstance(built, Intervention) else None
    if not isinstance(built, Intervention) or found is None:
        raise _refused(edit, f"{edit.edit.intervention.describe()} is not an affine map of the vector")
    device = device_of(built)
    vectors = torch.randn(5, edit.width, generator=torch.Generator().manual_seed(0)).to(device)
    numbers = torch.arange(5)
    with torch.no_grad(), torch.random.fork_rng():
        does = built.edited(vectors, positions=numbers, rows=numbers)
    says = (
        vectors
        + (vectors @ found.read.T.to(vectors)) @ found.write.T.to(vectors)
        + found.constant.to(vectors)
    )
    if not torch.allclose(does, says, rtol=_CLOSE, atol=_CLOSE * float(1.0 + says.abs().max())):
        raise _refused(edit, f"what affine() of {type(built).__name__} says is not what it does")


def _check_module(bound: BoundModel, name: str, edits: Sequence[BoundEdit]) -> None:
    """Refuse a linear module whose weights are more than its own, or into which an edit would come early."""
    from transformers.pytorch_utils import Conv1D

    module, edit = bound.model.get_submodule(name), edits[-1]
    weight = module._parameters.get("weight")
    if type(module) not in (nn.Linear, Conv1D) or weight is None or not weight.is_floating_point():
        raise _refused(edit, f"{name} is a {type(module).__name__}, not a plain nn.Linear or Conv1D")
    if vars(module).get(_MARK):
        raise _refused(
            edit,
            f"edits of another bound model are folded into {name}; unfold() them there, or load the model "
            "anew",
        )
    if (
        "forward" in vars(module)
        or module._forward_pre_hooks
        or any(
            not str(getattr(hook, "__module__", "")).startswith("transformers.")
            for hook in module._forward_hooks.values()
        )
    ):
        raise _refused(edit, f"somebody else's hooks are on {name}, and the edit acts after them")
    names = [other for other, found in bound.model.named_modules(remove_duplicate=False) if found is module]
    if len(names) > 1:
        raise _refused(edit, f"its module has several places, {' and '.join(names)}")
    if edit.width != weight.shape[0 if isinstance(module, nn.Linear) else 1]:
        raise _refused(edit, f"its vectors have {edit.width} numbers, not those that {name} makes")
    for kind in ("weight", "bias"):
        own = module._parameters.get(kind)
        tied = [
            n for n, p in bound.model.named_parameters(remove_duplicate=False) if own is not None and p is own
        ]
        if len(tied) > 1:
            raise _refused(edit, f"the {kind} of {name} is tied, {' and '.join(tied)} are one tensor")
    for folded in edits:
        before = _inside(name, folded.site.module) | {folded.site.module}
        sooner = bound.edits[: bound.edits.index(folded)]
        for other in sooner:
            if other not in edits and other.site.module in before and other.site.side == "output":
                raise _refused(folded, f"edit {other.key!r} acts there before it and is not folded")
        reads = (*bound._bound_reads, *(read for e in bound._bound_edits for read in e.reads))
        for read in reads:
            if read.site.module in _inside(name, folded.site.module) and read.site.side == "output":
                raise _refused(folded, f"{read.site} is read before it acts")


def _inside(linear: str, module: str) -> frozenset[str]:
    """The linear module and those around it that are inside another; none where they are one."""
    parts = linear.split(".")
    chain = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return frozenset(chain[: chain.index(module)])


def _fold_of(bound: BoundModel, name: str, edits: Sequence[BoundEdit]) -> _Fold:
    module = bound.model.get_submodule(name)
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    exact = torch.float32 if weight.device.type == "mps" else torch.float64
    flat = isinstance(module, nn.Linear)
    matrix = (weight if flat else weight.T).to(exact)
    vector = matrix.new_zeros(len(matrix)) if bias is None else bias.to(exact)
    built: list[Any] = [bound.interventions[edit.module] for edit in edits]
    for edit, intervention in zip(edits, built, strict=True):
        found: Affine = intervention.affine()
        write, read, constant = (p.to(matrix) for p in (found.write, found.read, found.constant))
        matrix = matrix + edit.edit.strength * (write @ (read @ matrix))
        vector = vector + edit.edit.strength * (write @ (read @ vector) + constant)
    moves = bias is not None or bool(vector.any())
    made = (matrix if flat else matrix.T).to(weight.dtype).contiguous()
    now = (
        nn.Parameter(made, weight.requires_grad),
        nn.Parameter(vector.to(weight.dtype), weight.requires_grad) if moves else None,
    )
    inside = frozenset().union(*(_inside(name, edit.site.module) for edit in edits))
    seen = tuple(_values(intervention) for intervention in built)
    return _Fold(name, module, tuple(edits), tuple(built), inside, weight, bias, now, seen)  # type: ignore[arg-type]
