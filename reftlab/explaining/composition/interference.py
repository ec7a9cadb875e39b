"""How much two edits get in each other's way: their bases, their order, and their effect together."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from reftlab.address import head_name
from reftlab.errors import DataError
from reftlab.explaining.geometry.angles import principal_angles
from reftlab.explaining.subject import asked
from reftlab.graph import BASE, Read
from reftlab.graph.nodes import replace_read
from reftlab.interventions import Intervention
from reftlab.runtime.modes import evaluating
from reftlab.runtime.places import BoundEdit
from reftlab.runtime.reading import ReadValues
from reftlab.training.data import Example, as_examples
from reftlab.training.replies import prompt_form

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from reftlab.runtime import BoundModel

__all__ = ["EditPair", "Interference", "SharedPlace", "interference", "principal_angles", "write_basis"]


@dataclass(frozen=True)
class SharedPlace:
    """Two edits at one place of the model.

    Attributes:
        a, b: keys of the edits.
        site: the place.
        angles: principal angles between the subspaces that they write in, ascending, in degrees:
            0 is a shared direction, 90 none; empty where one of them has no fixed subspace.
        overlap: mean squared cosine of the angles, 0 to 1: the share of the smaller subspace that
            lies in the larger.
        chance: what `overlap` is on average for random subspaces of these sizes.
        commutator: mean of `‖a(b(h)) − b(a(h))‖` over mean of `‖a(h) − h‖ + ‖b(h) − h‖`, for the
            vectors h of the inputs: 0 where their order does not matter; None where they do not act
            on the same tokens of the prompt, take values from elsewhere, or act under a condition.
        vectors: number of vectors that the commutator was measured on.
    """

    a: str
    b: str
    site: str
    angles: tuple[float, ...]
    overlap: float | None
    chance: float | None
    commutator: float | None
    vectors: int


@dataclass(frozen=True)
class EditPair:
    """Two edits, or what two tasks have of one.

    Attributes:
        a, b: names of the edits, `edit (task)` where a task has directions of its own.
        places: where both act.
        interaction: what the logits after the prompt, with both edits, differ from the sum of the
            edits' single effects, over the sum of the lengths of those effects: 0 where the effects add
            up; None where the model has no logits, where a call gives the positions of one of the two,
            and where an edit of the graph takes values from other runs.
    """

    a: str
    b: str
    places: tuple[SharedPlace, ...]
    interaction: float | None


@dataclass(frozen=True)
class Interference:
    """How much each two edits of a bound model interfere.

    Attributes:
        pairs: every two edits.
        rows: number of prompts that it was measured on.
    """

    pairs: tuple[EditPair, ...]
    rows: int

    def to_frame(self) -> pd.DataFrame:
        """One line a pair and shared place; a pair without one has a line of its own."""
        import pandas as pd

        lines = []
        for pair in self.pairs:
            alone = SharedPlace(pair.a, pair.b, "", (), None, None, None, 0)
            for place in pair.places or (alone,):
                lines.append(
                    {
                        "a": place.a,
                        "b": place.b,
                        "site": place.site,
                        "smallest angle (degrees)": place.angles[0] if place.angles else None,
                        "overlap": place.overlap,
                        "chance": place.chance,
                        "commutator": place.commutator,
                        "interaction": pair.interaction,
                    }
                )
        return pd.DataFrame(lines)

    def plot(self) -> Figure:
        """Angles on the left, commutators and interactions on the right, one line a pair and place."""
        from reftlab.plotting import interference_figure

        lines: list[tuple[str, Sequence[float], float | None, float | None]] = []
        for pair in self.pairs:
            name = f"{pair.a}, {pair.b}"
            lines += [(_place_name(name, p), p.angles, p.commutator, pair.interaction) for p in pair.places]
            lines += [] if pair.places else [(name, (), None, pair.interaction)]
        return interference_figure(lines)

    def __repr__(self) -> str:
        parts = []
        for pair in self.pairs:
            commutators = [p.commutator for p in pair.places if p.commutator is not None]
            order = f", commutator up to {max(commutators):.3g}" if commutators else ""
            effect = "" if pair.interaction is None else f", interaction {pair.interaction:.3g}"
            parts.append(f"{pair.a} and {pair.b}: {len(pair.places)} shared places{order}{effect}")
        return f"Interference({'; '.join(parts) or 'one edit alone'})"

    def _repr_html_(self) -> str:
        table = self.to_frame().to_html(index=False, float_format="{:.3g}".format, na_rep="–")
        return f"<p>{html.escape(repr(self))}</p>{table}"


def interference(reft: BoundModel, prompts: Any) -> Interference:
    """Measure how much each two edits of a bound model interfere.

    Args:
        reft: a bound model with two edits or more, for instance `emoji + formal`.
        prompts: texts, (prompt, answer) pairs of which the prompt is taken, or a batch of the model's
            inputs by name.

    Returns:
        Angles, commutators and interactions; see `SharedPlace` and `EditPair` for the formulas. The
        principal angles are those of Björck and Golub, "Numerical methods for computing angles
        between linear subspaces" (1973).

    Raises:
        DataError: texts and no tokenizer, or nothing to measure on.

    >>> rl.interference(emoji + formal, ["What is the sea like?"])  # doctest: +SKIP
    Interference(emoji and formal: 1 shared places, commutator up to 0.02, interaction 0.4)
    """
    inputs = _inputs(reft, prompts)
    rows = next((len(value) for value in inputs.values() if isinstance(value, Tensor)), 0)
    units = _units(reft)
    with evaluating(reft), torch.no_grad():
        effects = _Effects(reft, inputs)
        shared = {
            (a, b): [(x, y) for x in a.bound for y in b.bound if x.shares_place(y)]
            for a, b in combinations(units, 2)
        }
        bare = _bare(reft, dict.fromkeys(e for both in shared.values() for two in both for e in two), inputs)
        pairs = [
            EditPair(
                a.name,
                b.name,
                tuple(_measured(reft, (x, a), (y, b), bare) for x, y in both),
                effects.interaction(a, b),
            )
            for (a, b), both in shared.items()
        ]
    return Interference(tuple(pairs), rows)


@dataclass(frozen=True)
class _Unit:
    """An edit, or what one task has of it: the directions of its basis that the task acts in."""

    name: str
    edit: str
    directions: tuple[int, ...] | None
    bound: tuple[BoundEdit, ...]

    def key(self, bound: BoundEdit) -> str:
        return bound.key + self.name.removeprefix(self.edit)


def _units(reft: BoundModel) -> list[_Unit]:
    units = []
    for edit in reft.graph.edits:
        bound = tuple(b for b in reft.edits if b.edit.name == edit.name)
        by_task = [(task, chosen) for task, chosen in edit.tasks if chosen is not None]
        units += [_Unit(f"{edit.name} ({task})", edit.name, chosen, bound) for task, chosen in by_task]
        if not by_task:
            units.append(_Unit(edit.name, edit.name, edit.subspace, bound))
    return units


def write_basis(built: Any) -> Float[Tensor, "width r"] | None:
    """An orthonormal basis of the subspace that a built intervention writes in; None where it has none."""
    own = _own_basis(built)
    if own is not None:
        return own
    affine = built.affine() if isinstance(built, Intervention) else None
    if affine is None:
        return None
    written = torch.cat([affine.write, affine.constant[:, None]], dim=1).detach().float()
    left, sizes, _ = torch.linalg.svd(written, full_matrices=False)
    return left[:, sizes > sizes.max() * 1e-6]


def _own_basis(built: Any) -> Float[Tensor, "width r"] | None:
    """The orthonormal basis that an intervention keeps, or None."""
    basis = getattr(built, "basis", None)
    return basis().detach() if isinstance(basis, torch.nn.Module) else None


class _Effects:
    """What each set of edits does to the logits after the prompt."""

    def __init__(self, reft: BoundModel, inputs: Mapping[str, Any]) -> None:
        self.reft, self.inputs = reft, inputs
        head = head_name(reft.model)
        needs = {read.run for edit in reft.graph.edits for read in edit.reads} - {BASE}
        self._read = None if head is None or needs else Read(f"{head}.output", "last", name="logits")
        self._known: dict[frozenset[str], Tensor] = {}

    def interaction(self, a: _Unit, b: _Unit) -> float | None:
        given = any(str(unit.bound[0].edit.positions) == "given" for unit in (a, b))
        if self._read is None or given:
            return None
        none, one, other, both = (self._logits(*units) for units in ((), (a,), (b,), (a, b)))
        first, second = one - none, other - none
        size = first.norm(dim=-1) + second.norm(dim=-1)
        return float((both - none - first - second).norm(dim=-1).mean() / size.mean().clamp(min=1e-12))

    def _logits(self, *units: _Unit) -> Tensor:
        key = frozenset(unit.name for unit in units)
        if key not in self._known:
            assert self._read is not None
            chosen: dict[str, Any] = {}
            for unit in units:
                if unit.directions is not None:
                    chosen[unit.edit] = sorted({*chosen.get(unit.edit, ()), *unit.directions})
            select = [unit.edit for unit in units]
            found = self.reft.read(self._read, **self.inputs, select=select, subspace=chosen)
            self._known[key] = found["logits"][:, 0].float()
        return self._known[key]


def _inputs(reft: BoundModel, prompts: Any) -> dict[str, Any]:
    if isinstance(prompts, Mapping):
        taken = reft._calls.forward_inputs(prompts)
        if not any(isinstance(value, Tensor) and value.dim() for value in taken.values()):
            raise DataError(
                f"interference: none of {sorted(prompts)} is an input of the model; give a batch of what its "
                "forward takes, by name"
            )
        for name in prompts:
            if name not in (*taken, "sources", "past_key_values", "use_cache"):
                raise DataError(f"interference: {name!r} is no input of the model; leave it out")
        further = {"sources": prompts["sources"]} if prompts.get("sources") is not None else {}
        return {name: value for name, value in taken.items() if name != "labels"} | further
    if reft.tokenizer is None:
        raise DataError("interference needs a tokenizer for texts: bind with one, or give the model's inputs")
    rows = as_examples([prompts] if isinstance(prompts, str) else prompts)
    if rows[0].positions is not None:
        raise DataError("interference takes the edits' own positions; leave those of the examples out")
    plain = [Example(row.prompt, sources=row.sources) for row in rows]
    return asked(reft, plain, prompt_form(reft, reft.tokenizer, None))


Acting = tuple[BoundEdit, _Unit]


def _measured(reft: BoundModel, x: Acting, y: Acting, bare: Mapping[BoundEdit, ReadValues]) -> SharedPlace:
    bases = [_written(reft.interventions[bound.module], unit) for bound, unit in (x, y)]
    angles: tuple[float, ...] = ()
    overlap = chance = None
    if all(basis is not None and basis.shape[1] for basis in bases):
        a, b = bases
        assert a is not None
        assert b is not None
        found = principal_angles(a, b.to(a))
        angles = tuple(found.tolist())
        overlap = float(torch.cos(torch.deg2rad(found)).square().mean())
        chance = max(a.shape[1], b.shape[1]) / a.shape[0]
    commutator, count = _commutator(reft, x, y, bare)
    return SharedPlace(
        x[1].key(x[0]), y[1].key(y[0]), str(x[0].site), angles, overlap, chance, commutator, count
    )


def _written(built: Any, unit: _Unit) -> Tensor | None:
    """A basis of what a unit writes in: of the directions that it acts in, where it has only some."""
    if unit.directions is None:
        return write_basis(built)
    if built.takes_subspace == "features":
        return torch.eye(built.width)[:, list(unit.directions)]
    basis = _own_basis(built)
    return None if basis is None else basis[:, list(unit.directions)]


def _bare(
    reft: BoundModel, bounds: Iterable[BoundEdit], inputs: Mapping[str, Any]
) -> dict[BoundEdit, ReadValues]:
    """What edits would be given without any edit, for those of which one pass can tell."""
    wanted = {bound: read for bound in bounds if (read := _own_read(bound)) is not None}
    if not wanted:
        return {}
    names = {read: f"read{number}" for number, read in enumerate(dict.fromkeys(wanted.values()))}
    with reft.disabled():
        found = reft.read(*[replace_read(read, name=name) for read, name in names.items()], **inputs)
    return {bound: found.flat(names[read]) for bound, read in wanted.items()}


def _own_read(bound: BoundEdit) -> Read | None:
    """A read of what an edit is given; None where it depends on more than the prompt."""
    edit, site = bound.edit, bound.site
    if edit.run != BASE or edit.phase == "decode" or edit.reads or str(edit.positions) == "given":
        return None
    if site.part and site.label:  # a part of several places has no path of its own
        return None
    return Read(
        str(site) if site.label else edit.at, edit.positions, heads=edit.heads, features=edit.features
    )


def _commutator(
    reft: BoundModel, x: Acting, y: Acting, bare: Mapping[BoundEdit, ReadValues]
) -> tuple[float | None, int]:
    if x[0] not in bare or y[0] not in bare:
        return None, 0
    found, other = bare[x[0]], bare[y[0]]
    if not (torch.equal(found.rows, other.rows) and torch.equal(found.positions, other.positions)):
        return None, 0
    base = found.vectors.float()

    def act(acting: Acting, vectors: Tensor) -> Tensor:
        bound, unit = acting
        built: Any = reft.interventions[bound.module]
        mask = None
        if unit.directions is not None:
            mask = torch.zeros(len(vectors), built.directions, dtype=torch.bool)
            mask[:, list(unit.directions)] = True
        new = built.edited(vectors, subspace=mask, positions=found.positions, rows=found.rows)
        return vectors + bound.edit.strength * (new - vectors)

    first, second = act(x, base), act(y, base)
    size = (first - base).norm(dim=-1) + (second - base).norm(dim=-1)
    apart = (act(x, second) - act(y, first)).norm(dim=-1)
    return float(apart.mean() / size.mean().clamp(min=1e-12)), len(base)


def _place_name(name: str, place: SharedPlace) -> str:
    labels = [key.partition("[")[2].rstrip("]") for key in (place.a, place.b)]
    return f"{name} at {place.site}" if not any(labels) else f"{name} [{labels[0] or labels[1]}]"
