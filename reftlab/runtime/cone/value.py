"""The causal cone of a bound model's edits in one batch, as a value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reftlab.address import ATTENTION_SIDES, Site
from reftlab.errors import RunError
from reftlab.graph import BASE
from reftlab.runtime.choose import Chooser
from reftlab.runtime.cone.stack import BlockStack, reasons_against
from reftlab.runtime.options import PER_CALL, Options
from reftlab.runtime.places import BoundEdit, BoundRead
from reftlab.runtime.window import IGNORED_LABEL, Layout

if TYPE_CHECKING:
    from reftlab.runtime.model import BoundModel

__all__ = ["Cone", "Reach", "cone_of"]

_KNOWN = frozenset({
    *PER_CALL, "input_ids", "attention_mask", "labels", "position_ids", "inputs_embeds", "past_key_values",
    "sources", "use_cache", "return_dict", "output_attentions", "output_hidden_states",
})  # fmt: skip
_OF_THE_CALL = ("reads", "prompt", "num_items_in_batch")


@dataclass(frozen=True)
class Reach:
    """What one edit, or a read that it needs, can influence or must see.

    Attributes:
        name: the edit's key, or the read's label.
        block: the first block whose result can differ; the number of blocks where only the final norm
            or the logits can.
        starts: for each row the number of the first token that can differ, among its real tokens; None
            where the edit does not act.
        stops: for each row the number after the last token at which the edit acts.
    """

    name: str
    block: int
    starts: tuple[int | None, ...]
    stops: tuple[int | None, ...]


@dataclass(frozen=True)
class Cone:
    """What a batch's edits can change, and so all that a pass must compute.

    Blocks before `first_block`, and tokens before each row's start, hold the same values in every
    pass of the frozen model: they are computed once.

    Attributes:
        blocks: number of blocks of the model.
        first_block: the first block that must run.
        starts: for each row the number of the first token that must run, among its real tokens.
        stops: for each row the number after the last token that must run: no later one has a say in
            any label's logits.
        lengths: for each row the number of its real tokens.
        targets: for each row the tokens whose logits are wanted.
        reaches: what each edit can influence, in the order in which they act.
        why: why everything must run; empty where the cone is less than everything.
    """

    blocks: int
    first_block: int
    starts: tuple[int, ...]
    stops: tuple[int, ...]
    lengths: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]
    reaches: tuple[Reach, ...]
    why: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def share(self) -> float:
        """The share of (block, token) cells that must run; 1 where the cone is everything."""
        if self.why:
            return 1.0
        ran = (self.blocks - self.first_block) * sum(
            b - a for a, b in zip(self.starts, self.stops, strict=True)
        )
        return ran / max(1, self.blocks * sum(self.lengths))

    def __repr__(self) -> str:
        if self.why:
            return f"Cone(everything: {'; '.join(self.why)})"
        tokens = sum(b - a for a, b in zip(self.starts, self.stops, strict=True))
        return (
            f"Cone(blocks {self.first_block} to {self.blocks - 1}, {tokens} of {sum(self.lengths)} tokens, "
            f"{self.share:.1%} of all cells)"
        )


def cone_of(
    bound: BoundModel,
    batch: Mapping[str, Any],
    *,
    training: bool | None = None,
    train_model: bool = False,
    reasons: Sequence[str] | None = None,
    stack: BlockStack | None = None,
) -> Cone:
    """Work out the causal cone of the edits that act in a batch.

    Args:
        bound: the bound model.
        batch: inputs as its `forward` takes them: `input_ids` and where given `attention_mask`, `labels`
            and `position_ids`, each `(row, token)`; `tasks`, `positions`, … as there. Without labels the
            last token's logits are wanted.
        training: whether dropout of the model counts as active; its modules' own modes tell unless given.
        train_model: whether the model's own parameters learn, so that no value stays as it is.
        reasons: what `reasons_against` says of the model, where that is known already.
        stack: the model's blocks, where they are known already.

    Raises:
        RunError: the batch holds no tokens.
        PositionError: a row lacks an edit's position.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(batch, Mapping) or (isinstance(ids, Tensor) and (ids.dim() != 2 or not ids.numel())):
        shape = f"input_ids of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else repr(batch)
        raise RunError(
            f"batch={shape}: expected inputs with input_ids (row, token), such as rl.training_batch(reft, "
            "examples) or the tokenizer's output with return_tensors='pt'"
        )
    given = {name: batch[name] for name in PER_CALL if name in batch}
    options = Options.of(bound.graph, **given)
    layout = Layout.of(batch, causal=True)
    if layout is None:
        raise RunError("batch= holds no input_ids (row, token), so it has no tokens to plan for")
    options.check_rows(layout.rows)
    lengths = tuple(len(p) + len(a) for p, a in zip(layout.prompts, layout.answers, strict=True))
    stack = BlockStack.of(bound.model) if stack is None else stack
    why = list(reasons_against(bound.model, training=training) if reasons is None else reasons)
    if train_model:
        why.append("parameters of the model itself learn (train_model=True)")
    if bound._observers:
        why.append("what the edits do is being watched (reft.watching)")
    why += _of_inputs(batch, layout, bound._calls._takes)
    reaches: list[Reach] = []
    if stack is not None and not why:
        chooser = Chooser(bound.model, {"tokens": layout}, bound.tokenizer, options)
        for node, edit in _nodes(bound, options):
            block = _block(stack, node, why)
            if block is not None:
                reaches.append(_reach(node, edit, block, chooser, layout, options))
    targets = _targets(batch, layout)
    blocks = 0 if stack is None else len(stack)
    # By all edits, those of other rows' tasks too, so that one example is kept for one first block.
    first = min((reach.block for reach in reaches), default=blocks)
    starts, stops = [], []
    for row, wanted in enumerate(targets):
        begin = [start for reach in reaches if (start := reach.starts[row]) is not None]
        end = [stop for reach in reaches if (stop := reach.stops[row]) is not None]
        starts.append(min([*begin, *wanted[:1]], default=0))
        # All of the prompt, from whose end positions may count, also in a row without labels.
        stops.append(max([len(layout.prompts[row]), *end, *(token + 1 for token in wanted[-1:])]))
    if reaches and first == 0 and not any(starts):
        at = next(reach.name for reach in reaches if reach.block == 0)
        why.append(f"{at!r} acts before block 0, and the first tokens of all rows count")
    if why:
        return Cone(blocks, 0, (0,) * len(lengths), lengths, lengths, targets, tuple(reaches), tuple(why))
    return Cone(blocks, first, tuple(starts), tuple(stops), lengths, targets, tuple(reaches))


def _nodes(bound: BoundModel, options: Options) -> Iterator[tuple[BoundEdit | BoundRead, BoundEdit]]:
    """The edits that act in any batch, and what they read, each with the edit that it belongs to."""
    whatever = replace(options, tasks=None)
    for edit in sorted(bound._active_edits(whatever), key=lambda bound: bound.order):
        yield edit, edit
        for read in edit.reads:
            yield read, edit


def _block(stack: BlockStack, node: BoundEdit | BoundRead, why: list[str]) -> int | None:
    """The first block that must run for a node; None, and a reason, where that is all of them."""
    site: Site = node.site
    named = f"edit {node.key!r}" if isinstance(node, BoundEdit) else f"read {node.label!r}"
    run = node.edit.run if isinstance(node, BoundEdit) else node.run
    if run != BASE:
        why.append(f"{named} belongs to run {run!r}, which has inputs of its own")
    elif site.side in ATTENTION_SIDES:
        why.append(f"{named} is at {site}, whose tokens look at keys of all tokens")
    elif node.place.stream != "tokens":
        why.append(f"{named} is at {site}, which holds no vector for each token")
    else:
        inside = stack.block_of(site.module)
        if inside is not None:
            whole = site.module == stack.paths[inside] and site.side == "output"
            return inside + 1 if whole else inside
        if site.module in stack.before and site.side == "output":
            return 0
        if site.module in stack.after:
            return len(stack)
        why.append(f"{named} is at {site}, outside the chain of blocks")
    return None


def _reach(
    node: BoundEdit | BoundRead,
    edit: BoundEdit,
    block: int,
    chooser: Chooser,
    layout: Layout,
    options: Options,
) -> Reach:
    name = node.key if isinstance(node, BoundEdit) else node.label
    if not options.acts(edit.edit):
        return Reach(name, block, (None,) * layout.rows, (None,) * layout.rows)
    tokens = chooser.selection(node, layout)
    # Reads are taken, and joined tokens must be whole, in rows of other tasks too.
    by_task = isinstance(node, BoundEdit) and not node.reads and chooser.position(node).joins == 1
    acts = options.rows_of(edit.edit, torch.arange(layout.rows)) if by_task else None
    starts: list[int | None] = []
    stops: list[int | None] = []
    for row in range(layout.rows):
        numbers = tokens.numbers[tokens.rows == row]
        there = len(numbers) > 0 and (acts is None or bool(acts[row]))
        starts.append(int(numbers.min()) if there else None)
        # Positions among generated tokens may count from the end, so that none may be left out there.
        last = int(numbers.max()) + 1 if there else None
        length = len(layout.prompts[row]) + len(layout.answers[row])
        stops.append(length if there and node.phase != "prompt" else last)
    return Reach(name, block, tuple(starts), tuple(stops))


def _targets(batch: Mapping[str, Any], layout: Layout) -> tuple[tuple[int, ...], ...]:
    """For each row the numbers of the tokens whose logits predict a label, or the last one's."""
    labels = batch.get("labels")
    found = []
    for prompt, answer, row in zip(layout.prompts, layout.answers, range(layout.rows), strict=True):
        columns = torch.cat([prompt, answer])
        wanted = torch.tensor([len(columns)])
        if isinstance(labels, Tensor):
            wanted = (labels[row].cpu()[columns] != IGNORED_LABEL).nonzero()[:, 0]
        # The token before a label predicts it; nothing predicts the first token.
        found.append(tuple((wanted[wanted > 0] - 1).tolist()))
    return tuple(found)


def _of_inputs(batch: Mapping[str, Any], layout: Layout, takes: frozenset[str]) -> Iterator[str]:
    """Why a batch's own arguments do not go with skipping."""
    for name, value in batch.items():
        if value is not None and name not in _KNOWN and (name in takes or name in _OF_THE_CALL):
            yield f"the batch gives {name}, by which kept values are not told apart"
    if batch.get("input_ids") is None:
        yield "the batch gives vectors in place of token ids"
    if batch.get("past_key_values") is not None:
        yield "the batch continues a cache"
    if batch.get("sources"):
        yield "the batch brings inputs of source runs"
    if any(
        len(prompt) + len(answer) == 0 for prompt, answer in zip(layout.prompts, layout.answers, strict=True)
    ):
        yield "a row has no tokens"
    mask, positions, labels = batch.get("attention_mask"), batch.get("position_ids"), batch.get("labels")
    columns = [torch.cat([p, a]) for p, a in zip(layout.prompts, layout.answers, strict=True)]
    if isinstance(labels, Tensor) and isinstance(mask, Tensor):
        real = mask != 0
        # The loss compares what stands in one column with the logits of the column before it.
        counted = (labels[:, 1:] != IGNORED_LABEL) & ~(real[:, 1:] & real[:, :-1]).to(labels.device)
        if bool(counted.any()):
            yield "labels stand on padding, or on a first token after it, and the loss counts them"
    if any(bool((c.diff() != 1).any()) for c in columns):
        yield "the attention mask has gaps inside a row"
    if isinstance(positions, Tensor):
        ids = positions.cpu()
        if any(
            ids.shape[0] not in (1, layout.rows) or ids[row % len(ids), c].tolist() != list(range(len(c)))
            for row, c in enumerate(columns)
        ):
            yield "position_ids do not count each row's real tokens from 0"
    elif isinstance(mask, Tensor) and any(len(c) and int(c[0]) for c in columns):
        yield "rows padded on the left come without position_ids, so that padding is counted"
