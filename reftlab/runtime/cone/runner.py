"""Running a bound model on the cone of its edits, with what lies outside it kept from earlier passes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reftlab.address.alias import innermost
from reftlab.errors import PositionError
from reftlab.graph import BASE
from reftlab.runtime.build import forget_pass
from reftlab.runtime.cone.outside import Outside, Part
from reftlab.runtime.cone.prefix import PrefixAttention, check_attended, placeholder
from reftlab.runtime.cone.room import Taken
from reftlab.runtime.cone.stack import CANNOT_ENTER, BlockStack, reasons_against, skipping
from reftlab.runtime.cone.store import ConeStore
from reftlab.runtime.cone.value import Cone, cone_of
from reftlab.runtime.hooks import turn_of
from reftlab.runtime.modes import evaluating
from reftlab.runtime.options import PER_CALL, Options
from reftlab.runtime.window import Layout

if TYPE_CHECKING:
    from reftlab.runtime.model import BoundModel

__all__ = ["ConeRunner", "Predictions"]

_WORTH_IT = 0.9
"""A cone of a larger share than this of all cells is run plainly."""
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_COARSE = 0.05
"""Largest difference of logits from the plain run's, as a share of their range."""


class Predictions(NamedTuple):
    """The logits that labels are compared with.

    Attributes:
        logits: `(n, vocab)`, row after row.
        labels: `(n,)`, the token wanted in place of each.
        rows: `(n,)`, the row of the batch that each belongs to.
    """

    logits: Float[Tensor, "n vocab"]
    labels: Int[Tensor, " n"]
    rows: Int[Tensor, " n"]


class ConeRunner:
    """Runs batches of a bound model whose own parameters stand still, on the cone of its edits.

    The first time that an example comes by, the bare model runs on it once and what lies outside
    the cone is put into a store: keys and values of the tokens before the cone, and what enters the
    first block that must run. From then on only the cone runs. The numbers are those of a plain run up
    to the order of additions; the first batch is run both ways, and if they differ, everything is run
    plainly and `why` says so. What else speaks against the cone (dropout, foreign hooks, …) is looked up
    once for each mode of the model.

    Args:
        reft: the bound model.
        store: where values are kept; a new one of the usual budgets unless given. Entries are found
            by the tokens and by the weights' fingerprint, so a store may serve several models.

    Attributes:
        why: why everything runs plainly; empty while nothing speaks against the cone.
    """

    def __init__(self, reft: BoundModel, store: ConeStore | None = None) -> None:
        self.reft = reft
        self.store = ConeStore() if store is None else store
        self._plain: dict[str, None] = {}
        self._look()

    def _look(self) -> None:
        """Take note of the model's blocks, and nothing yet of how they behave."""
        self._stack = BlockStack.of(self.reft.model)
        self._outside = None if self._stack is None else Outside(self.reft, self._stack, self.store)
        self._attention = PrefixAttention(self.reft.model, () if self._stack is None else self._stack.blocks)
        self._reasons: dict[tuple[bool, bool], tuple[str, ...]] = {}
        self._different: tuple[str, ...] = ()
        self._checked: set[tuple[int, bool]] = set()

    @property
    def why_plain(self) -> tuple[str, ...]:
        """Why batches so far were left to be run plainly; empty where none was."""
        return tuple(self._plain)

    @property
    def why(self) -> tuple[str, ...]:
        blocks = () if self._stack is None else self._stack.blocks
        state = self.reft.model.training, any(getattr(b, "gradient_checkpointing", False) for b in blocks)
        if state not in self._reasons:
            self._reasons[state] = (*reasons_against(self.reft.model), *_of_the_loss(self.reft.model))
        return self._different or self._reasons[state]

    def cone(self, batch: Mapping[str, Any]) -> Cone:
        """The cone of a batch, whose `why` says where everything must run."""
        return cone_of(self.reft, batch, reasons=self.why, stack=self._stack)

    def predictions(self, batch: Mapping[str, Any], cone: Cone | None = None) -> Predictions | None:
        """The logits at the labels of a batch, with gradients where these are on.

        Args:
            batch: as `Collator` makes it: `input_ids`, `attention_mask`, `position_ids` and `labels`,
                each `(row, token)`, and what it says of the edits.
            cone: the batch's cone where it is known, or a larger one.

        Returns:
            None where everything must run, so that the caller runs it plainly.
        """
        cone = self._usable(batch, cone)
        return None if cone is None else self._run(batch, cone)

    def fill(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Make and keep the values outside the cones of some batches, as long as there is room.

        A training does so before its first step: what is kept then depends on nothing but the examples, so
        that a training that was interrupted goes on with the very same numbers.
        """
        for batch in batches:
            cone = self._usable(batch)
            if cone is None or self._outside is None:
                continue
            if not self._outside.fill(_parts(batch, cone), cone.first_block):
                return

    def _usable(self, batch: Mapping[str, Any], cone: Cone | None = None) -> Cone | None:
        """The cone of a batch, or None, and a note in `why_plain`, where everything must run."""
        if self._stack is not None and not self._stack.stands_in(self.reft.model):
            self._look()
        cone = self.cone(batch) if cone is None else cone
        if cone.share > _WORTH_IT and not cone.why:
            cone = replace(cone, why=(f"the cone is {cone.share:.0%} of everything",))
        check = cone.first_block, any(cone.starts)
        if not cone.why and any(cone.targets) and check not in self._checked:
            self._checked.add(check)
            self._compare(batch, cone)
        why = cone.why or self.why
        self._plain |= dict.fromkeys(why)
        return None if why or not any(cone.targets) else cone

    def loss(self, batch: Mapping[str, Any], items: Any = None) -> Float[Tensor, ""] | None:
        """The model's own loss of a batch, or None where everything must run.

        Args:
            batch: as for `predictions`.
            items: by how many labels to divide the sum, where that is not the batch's own number.
        """
        found = self.predictions(batch)
        if found is None:
            return None
        loss: Any = innermost(self.reft.model).loss_function
        further = {} if items is None else {"num_items_in_batch": items}
        value: Tensor = loss(
            logits=found.logits[None],
            labels=None,
            vocab_size=found.logits.shape[-1],
            shift_labels=found.labels[None],
            **further,
        )
        return value

    def _run(self, batch: Mapping[str, Any], cone: Cone) -> Predictions:
        assert self._stack is not None
        assert self._outside is not None
        model, reft, count = self.reft.model, self.reft, cone.first_block
        parts, device = _parts(batch, cone), batch["input_ids"].device
        rows, columns = _places(cone, parts)
        options = Options.of(reft.graph, **{name: batch[name] for name in PER_CALL if name in batch})
        for intervention in reft.interventions.values():
            forget_pass(intervention)
        with turn_of(model), contextlib.ExitStack() as stack:
            past, hidden = self._outside.gather(parts, count, device)
            arranged = _arranged(parts, device)
            real, answered = arranged.mask.bool().cpu(), arranged.answered.bool().cpu()
            layout = Layout._of_masks(real, answered, arranged.ids, False)
            run = reft._run(BASE, {"tokens": layout}, {}, options)
            gathers = all(bound.site.module != self._stack.head for bound in run.edits)
            if count:
                stack.enter_context(skipping(self._stack, count, hidden, self._outside.extras[:count]))
            if gathers:
                stack.enter_context(_only(model.get_submodule(self._stack.head), rows, columns))
            inputs = self._inputs(arranged, past, hidden, count)
            if past is not None:
                stack.enter_context(self._attention.attending(past.values))
            output = reft._call(run, model, (), inputs)
        run.check_touched(True, False)
        check_attended(inputs.get("past_key_values"))
        logits = output.logits[0] if gathers else output.logits[rows.to(device), columns.to(device)]
        pairs = zip(parts, cone.targets, strict=True)
        labels = torch.tensor([part.labels[token + 1] for part, targets in pairs for token in targets])
        return Predictions(logits, labels.to(logits.device), rows)

    def _inputs(self, arranged: _Arranged, past: Taken | None, hidden: Tensor, count: int) -> dict[str, Any]:
        """The arguments of a pass over the tokens in the cone, which continues those before it."""
        before = arranged.before
        inputs: dict[str, Any] = {
            "input_ids": arranged.ids[:, before:],
            "attention_mask": arranged.mask,
            "position_ids": arranged.numbers[:, before:],
        }
        inputs = {name: value for name, value in inputs.items() if name in self.reft._calls._takes}
        if not before:
            return inputs | {"use_cache": False}
        like = hidden[:, None] if past is None else past.values[0, 0]
        empty = placeholder(like.shape[0], like.shape[1], before, like.shape[3], like)
        layers = [(empty, empty)] * count
        layers += [] if past is None else [(kv[0], kv[1]) for kv in past.values]
        mark = None if past is None else past.mark
        return inputs | {"past_key_values": self._attention.cache_of(layers, mark=mark), "use_cache": True}

    def _compare(self, batch: Mapping[str, Any], cone: Cone) -> None:
        """Run a part of a batch both ways, and note in `why` if the two differ."""
        reft, labelled = self.reft, [row for row in range(cone.rows) if cone.targets[row]]
        order = sorted(labelled, key=lambda row: cone.lengths[row])
        rows = sorted({order[0], order[-1], max(labelled, key=lambda row: cone.starts[row])})
        if not _goes_with(reft, len(rows)):
            rows = list(range(cone.rows))
        part = {name: _rows_of(value, rows, cone.rows) for name, value in batch.items()}
        devices = [reft.device] if reft.device.type == "cuda" else []
        with torch.no_grad(), evaluating(reft), torch.random.fork_rng(devices):
            torch.manual_seed(0)
            plain = reft(**part).logits
            small = cone_of(reft, part, reasons=())
            why = self._difference(part, small, plain)
            if why and self._attention.usable:
                # The model's attention may be none that can be run on the prefix as it stands.
                self._attention.usable = False
                why = self._difference(part, small, plain)
        self._different = why

    def _difference(
        self, batch: Mapping[str, Any], cone: Cone, plain: Float[Tensor, "row token vocab"]
    ) -> tuple[str, ...]:
        """What tells a batch on its cone from a plain run; nothing where it is rounding."""
        name = type(self.reft.model).__name__
        torch.manual_seed(0)
        try:
            quick = self._run(batch, cone)
        except CANNOT_ENTER as error:
            return (f"{name} cannot be entered in the middle: {error}",)
        columns = enumerate(_columns(batch, cone))
        wanted = torch.cat([plain[row, there] for row, there in columns]).float()
        difference = float((wanted - quick.logits.float()).abs().max())
        allowed = _TOLERANCE.get(plain.dtype, _COARSE) * float(wanted.max() - wanted.min())
        if difference <= allowed:
            return ()
        return (
            f"{name} gives other logits when it is entered in the middle: they differ by {difference:.2g}, "
            f"and {allowed:.2g} is rounding",
        )


def _goes_with(reft: BoundModel, rows: int) -> bool:
    """Whether the graph's own positions are meant for batches of so many rows."""
    try:
        for edit in reft.edits:
            edit.positions.check_rows(rows)
            for read in edit.reads:
                read.positions.check_rows(rows)
    except PositionError:
        return False
    return True


def _of_the_loss(model: Any) -> Iterator[str]:
    inner = innermost(model)
    kind = getattr(inner, "loss_type", None)
    if kind not in (None, "ForCausalLM"):
        yield f"{type(inner).__name__} has a loss of its own, {kind}"
    if getattr(getattr(inner, "config", None), "output_router_logits", False):
        yield "the loss counts the routers' logits of all tokens (output_router_logits)"


def _parts(batch: Mapping[str, Any], cone: Cone) -> list[Part]:
    ids, mask = batch["input_ids"].cpu(), batch.get("attention_mask")
    labels = batch["labels"].cpu()
    real = torch.ones_like(ids).bool() if mask is None else mask.cpu() != 0
    parts = []
    for row in range(cone.rows):
        own, wanted = ids[row][real[row]].tolist(), labels[row][real[row]].tolist()
        parts.append(Part(tuple(own), tuple(wanted), cone.starts[row], cone.stops[row]))
    return parts


class _Arranged(NamedTuple):
    """Each row's tokens before the cone, up to column `before`, and those in it, from there on.

    Attributes:
        before: how many columns stand before the cone.
        ids, mask, numbers, answered: `(row, column)`; `numbers` count each row's real tokens.
    """

    before: int
    ids: Tensor
    mask: Tensor
    numbers: Tensor
    answered: Tensor


def _arranged(parts: Sequence[Part], device: torch.device) -> _Arranged:
    before = max(part.start for part in parts)
    shape = len(parts), before + max(len(part.suffix) for part in parts)
    ids, mask, numbers, answered = (torch.zeros(shape, dtype=torch.long) for _ in range(4))
    for row, part in enumerate(parts):
        here = slice(before - part.start, before + len(part.suffix))
        ids[row, here] = torch.tensor(part.ids[: part.stop])
        answered[row, here] = torch.tensor(part.answered[: part.stop]).long()
        mask[row, here] = 1
        numbers[row, here] = torch.arange(part.stop)
    return _Arranged(before, *(value.to(device) for value in (ids, mask, numbers, answered)))


def _places(cone: Cone, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """Row and column, in what runs, of each wanted logit."""
    rows = [torch.full((len(targets),), row) for row, targets in enumerate(cone.targets)]
    columns = [
        torch.tensor(targets, dtype=torch.long) - part.start
        for part, targets in zip(parts, cone.targets, strict=True)
    ]
    return torch.cat(rows), torch.cat(columns)


def _columns(batch: Mapping[str, Any], cone: Cone) -> list[Tensor]:
    """Columns of the whole batch, row by row, of the wanted logits."""
    mask = batch.get("attention_mask")
    real = torch.ones_like(batch["input_ids"]).bool() if mask is None else mask != 0
    return [row.nonzero()[:, 0].cpu()[list(targets)] for row, targets in zip(real, cone.targets, strict=True)]


def _rows_of(value: Any, rows: Sequence[int], count: int) -> Any:
    """Some rows of what a batch gives, row by row or for all rows."""
    if isinstance(value, Tensor):
        return value[list(rows)] if value.shape[0] == count else value
    if isinstance(value, Mapping):
        return {name: _rows_of(item, rows, count) for name, item in value.items()}
    return [value[row] for row in rows] if isinstance(value, list | tuple) and len(value) == count else value


@contextlib.contextmanager
def _only(head: Any, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Hand a module only some tokens of what it is given, `(1, n, width)`, inside a `with` block."""

    def gather(module: Any, args: Any) -> Any:
        hidden = args[0]
        return (hidden[rows.to(hidden.device), columns.to(hidden.device)][None], *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()
