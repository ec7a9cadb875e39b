"""Edits that stand at one place and are carried out together, each on the tokens of its own rows.

Eight tasks' edits of one site are eight gathers, products and scatters when each is visited on its own,
and one of each here. Where several edits choose one vector, as in a row of the task `formal+emoji`, they
act on it in the order of the graph: what is done at once is every vector's first edit, then every
vector's second one, and so on.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from reftlab.address import Site
from reftlab.interventions import Intervention
from reftlab.runtime.axes import Stream
from reftlab.runtime.choose import Chooser, Frame
from reftlab.runtime.options import Options
from reftlab.runtime.places import BoundEdit, BoundRead, Place
from reftlab.runtime.window import Selection

__all__ = ["Acting", "Division", "EditGroup", "Grouping", "Share"]


@dataclass(eq=False)
class EditGroup:
    """Edits that follow one another at one place and need nothing but the vectors there.

    Attributes:
        edits: the edits, in the order in which they act.
        built: their interventions.
        kinds: for each edit a number; those of one number can be one product.
        signature: equal for groups that divide every pass in the same way.
    """

    edits: tuple[BoundEdit, ...]
    built: tuple[Any, ...]
    kinds: tuple[int, ...]
    signature: int
    _stacks: dict[tuple[int, ...], tuple[list[_Seen], Any]] = field(default_factory=dict)
    _used: bool = False

    def __post_init__(self) -> None:
        self.place: Place = self.edits[0].place
        self.site: Site = self.place.site
        # Asked in every pass: the stream whose generated tokens are none of these edits' business.
        self._left_out = self.place.stream if all(edit.phase == "prompt" for edit in self.edits) else None

    def skips(self, streams: frozenset[Stream]) -> bool:
        """Whether no edit chooses a token of a pass that covers only generated ones in these streams."""
        return self._left_out in streams

    @property
    def name(self) -> str:
        """The edits, for an error message."""
        keys = [repr(edit.key) for edit in self.edits]
        return f"edit {keys[0]}" if len(keys) == 1 else f"one of the edits {', '.join(keys)}"

    def stack(self, members: tuple[int, ...]) -> Any:
        """The stacked parameters of some of the edits.

        A generation asks for them once a token; where no gradient flows they are kept for this run, from
        the second time on.
        """
        built = [self.built[member] for member in members]
        if torch.is_grad_enabled() or not self._used:
            self._used = True
            return type(built[0]).stacked(built)
        kept = self._stacks.get(members)
        if kept is None or not all(seen.holds() for seen in kept[0]):
            kept = list(_seen(built)), type(built[0]).stacked(built)
            self._stacks[members] = kept
        return kept[1]


@dataclass(frozen=True, eq=False)
class Share:
    """Vectors of a pass that are changed at once, by one edit or by several of one kind.

    Attributes:
        members: numbers of the edits in their group.
        tokens: the vectors' tokens, those of each member together.
        where: the vectors' index into the site's tensor.
        spread: `(member, m)`, which vector stands where when each member has as many; None for one
            member, or where each has as many by itself. What is left over repeats a vector of the same
            member.
        kept: where in the flattened `spread` each vector stands.
        factor: strength, one number or `(n, 1)`.
        subspace: which directions act for each vector, `(n, directions)`, or None for all.
    """

    members: tuple[int, ...]
    tokens: Selection
    where: tuple[Tensor, ...]
    spread: Tensor | None
    kept: Tensor | None
    factor: float | Tensor
    subspace: Tensor | None


@dataclass(frozen=True, eq=False)
class Division:
    """What a group does in one pass.

    Attributes:
        counts: how many tokens each edit's positions choose, whichever rows it then acts in.
        shares: what is changed, one after the other.
    """

    counts: tuple[int, ...]
    shares: tuple[Share, ...]


@dataclass(frozen=True, eq=False)
class _Seen:
    """A parameter as it was when it was stacked."""

    owner: dict[str, Any]
    name: str
    value: Tensor
    version: int
    address: int

    def holds(self) -> bool:
        value = self.value
        # Tensors of inference mode do not say when they are written to.
        return (
            self.owner.get(self.name) is value
            and value.data_ptr() == self.address
            and not value.is_inference()
            and value._version == self.version
        )


def _seen(built: Sequence[nn.Module]) -> Iterator[_Seen]:
    for intervention in built:
        for module in intervention.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    version = 0 if value.is_inference() else value._version
                    yield _Seen(module._parameters, name, value, version, value.data_ptr())


Acting = BoundEdit | BoundRead | EditGroup
"""What acts at a site: a node by itself, or several edits together."""


class Grouping:
    """Finds the groups of one run, and divides its passes among their edits.

    Args:
        interventions: built interventions by `BoundEdit.module`.
        chooser: which tokens, see `Chooser`.
        options: what this call says of its edits.
        apart: whether each edit is carried out by itself, for those who are shown what each does.
    """

    def __init__(
        self, interventions: nn.ModuleDict, chooser: Chooser, options: Options, apart: bool = False
    ) -> None:
        self._interventions, self._chooser, self._options = interventions, chooser, options
        self._apart = apart
        self._contents: dict[Hashable, int] = {}
        self._content_of: dict[tuple[int, int | None], int] = {}
        self._signatures: dict[Hashable, int] = {}
        self._divisions: dict[tuple[Any, ...], tuple[Division, Frame]] = {}

    def grouped(self, nodes: Sequence[BoundEdit | BoundRead]) -> list[Acting]:
        """The nodes of one site, in their order, with those that belong together in groups."""
        found: list[Acting] = []
        for alone, following in groupby(nodes, self._goes_alone):
            edits: list[Any] = list(following)
            if alone:
                found += edits
            elif self._apart or len(edits) == 1:
                found += [self._group([edit], [None]) for edit in edits]
            else:
                found += self._groups(edits)
        return found

    def _groups(self, edits: Sequence[BoundEdit]) -> Iterator[EditGroup]:
        keys = [self._key(edit) for edit in edits]
        start = 0
        for stop in range(1, len(edits) + 1):
            whole = stop == len(edits) or None in keys[stop - 1 : stop + 1]
            if whole or not _at_one_place(edits[stop - 1].place, edits[stop].place):
                yield self._group(edits[start:stop], keys[start:stop])
                start = stop

    def clear(self) -> None:
        """Forget what was divided; the next pass covers other tokens."""
        self._divisions.clear()

    def division(self, group: EditGroup, frame: Frame, tensor: Tensor) -> Division:
        """What a group does in this pass; shared by all groups of its signature."""
        layout = frame.layout
        key = (group.signature, id(layout), frame.rows, frame.start, frame.stop, tensor.device, tensor.dim())
        if key not in self._divisions:
            # The frame is kept so that no other layout gets the number of this one.
            self._divisions[key] = self._divided(group, frame, tensor), frame
        return self._divisions[key][0]

    def _goes_alone(self, node: BoundEdit | BoundRead) -> bool:
        """Whether a node needs more than its own vectors, so that nothing is known ahead."""
        return (
            isinstance(node, BoundRead)
            or bool(node.reads)
            or node.place.stream == "calls"
            or self._chooser.position(node).joins > 1
        )

    def _key(self, edit: BoundEdit) -> Hashable | None:
        """What an edit's intervention shares with those of its kind; None where it is called by itself."""
        built = self._interventions[edit.module]
        # Hooks that someone has put on an intervention run when it is called, and only then.
        if not isinstance(built, Intervention) or any(
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
            for m in built.modules()
        ):
            return None
        return built.stack_key()

    def _group(self, edits: Sequence[BoundEdit], keys: Sequence[Hashable | None]) -> EditGroup:
        built = tuple(self._interventions[edit.module] for edit in edits)
        kinds = tuple(keys.index(key) for key in keys)
        each = tuple(map(self._number, edits, built))
        signature = self._signatures.setdefault((edits[0].place.stream, kinds, each), len(self._signatures))
        return EditGroup(tuple(edits), built, kinds, signature)

    def _number(self, node: BoundEdit, built: Any) -> int:
        """Equal for edits that choose the same vectors, strengths and directions."""
        edit, options, directions = node.edit, self._options, getattr(built, "directions", None)
        own = id(edit), directions
        if own not in self._content_of:
            content = (
                self._chooser.position(node), node.phase, edit.strength, options.scale.get(edit.name),
                None if options.tasks is None else (edit.run, edit.tasks, edit.task_names),
                edit.subspace, options.subspace.get(edit.name), directions,
            )  # fmt: skip
            self._content_of[own] = self._contents.setdefault(content, len(self._contents))
        return self._content_of[own]

    def _divided(self, group: EditGroup, frame: Frame, tensor: Tensor) -> Division:
        counts, acting = [], []
        for number, node in enumerate(group.edits):
            chosen = self._chooser.in_window(node, frame)
            counts.append(len(chosen))
            if len(chosen) == 0:
                continue
            self._options.check_rows(frame.layout.rows, node.edit)
            acts = self._options.rows_of(node.edit, chosen.tokens.rows // frame.group)
            if acts is None or bool(acts.any()):
                acting.append((number, chosen.tokens if acts is None else chosen.tokens.where(acts)))
        if not acting:
            return Division(tuple(counts), ())
        owner = torch.cat([torch.full_like(tokens.rows, number) for number, tokens in acting])
        tokens = Selection.joined([tokens for _, tokens in acting])
        shares = []
        for members, mask in self._rounds(group, [number for number, _ in acting], owner, tokens):
            shares.append(self._share(group, members, owner[mask], tokens.where(mask), frame, tensor))
        return Division(tuple(counts), tuple(shares))

    def _rounds(
        self, group: EditGroup, acting: list[int], owner: Tensor, tokens: Selection
    ) -> Iterator[tuple[tuple[int, ...], Tensor | slice]]:
        """Which edits act at once, and on which of all their vectors."""
        everything = slice(None)
        if len(acting) == 1:
            yield (acting[0],), everything
            return
        turn, kind = _turns(tokens), torch.tensor(group.kinds)[owner]
        for now in range(int(turn.max()) + 1):
            for wanted in dict.fromkeys(group.kinds[number] for number in acting):
                mask = (turn == now) & (kind == wanted)
                members = tuple(owner[mask].unique().tolist())
                if members:
                    yield members, mask

    def _share(
        self,
        group: EditGroup,
        members: tuple[int, ...],
        owner: Tensor,
        tokens: Selection,
        frame: Frame,
        tensor: Tensor,
    ) -> Share:
        device, rows = tensor.device, tokens.rows // frame.group
        where: tuple[Tensor, ...] = (tokens.rows.to(device),)
        if tensor.dim() == 3:
            where = (*where, (tokens.columns - frame.start).to(device))
        # Each member's vectors stand together, since those of the edits were joined one after the other.
        each = torch.bincount(owner, minlength=len(group.edits))[list(members)].tolist()
        spread, kept = _spread(each)
        factor, subspace = self._strengths(group, members, rows.split(each))
        return Share(
            members, tokens, where,
            None if spread is None else spread.to(device),
            None if kept is None else kept.to(device),
            factor.to(device) if isinstance(factor, Tensor) else factor,
            None if subspace is None else subspace.to(device),
        )  # fmt: skip

    def _strengths(
        self, group: EditGroup, members: tuple[int, ...], rows: Sequence[Tensor]
    ) -> tuple[float | Tensor, Tensor | None]:
        """The factor and the directions of each member's vectors."""
        edits = [group.edits[member].edit for member in members]
        factors = [self._options.factor(edit, own) for edit, own in zip(edits, rows, strict=True)]
        chosen = [
            self._options.directions(edit, own, getattr(group.built[member], "directions", None))
            for edit, own, member in zip(edits, rows, members, strict=True)
        ]
        factor: float | Tensor = factors[0]
        if any(isinstance(each, Tensor) or each != factors[0] for each in factors):
            parts = zip(factors, rows, strict=True)
            factor = torch.cat([torch.as_tensor(f, dtype=torch.float32).expand(len(r), 1) for f, r in parts])
        given = [directions for directions in chosen if directions is not None]
        if not given:
            return factor, None
        count = given[0].shape[1]
        whole = (torch.ones(len(own), count, dtype=torch.bool) for own in rows)
        return factor, torch.cat([w if c is None else c for w, c in zip(whole, chosen, strict=True)])


def _at_one_place(a: Place, b: Place) -> bool:
    """Whether two places of one side of a module are the same vectors."""
    if a is b:
        return True
    if (a.site.leaf, a.axes, a.stream, a.heads) != (b.site.leaf, b.axes, b.stream, b.heads):
        return False
    if a.index is None or b.index is None:
        return a.index is b.index
    return torch.equal(a.index, b.index)


def _turns(tokens: Selection) -> Tensor:
    """For each vector how many edits before it, in the order given, act on the same one, `(n,)`."""
    place = tokens.rows * (int(tokens.columns.max()) + 1) + tokens.columns
    ordered, order = place.sort(stable=True)
    numbers = torch.arange(len(place))
    begins = torch.cat([torch.ones(1, dtype=torch.bool), ordered[1:] != ordered[:-1]])
    first = torch.where(begins, numbers, 0).cummax(0).values
    return torch.empty_like(place).scatter_(0, order, numbers - first)


def _spread(each: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
    """See `Share.spread` and `Share.kept`, for members of which each has so many vectors."""
    most = max(each)
    if len(each) == 1 or min(each) == most:
        return None, None
    counts = torch.tensor(each)
    starts = counts.cumsum(0) - counts
    places = torch.arange(most)
    spread = starts[:, None] + places.clamp(max=counts[:, None] - 1)
    return spread, (places < counts[:, None]).flatten().nonzero()[:, 0]
