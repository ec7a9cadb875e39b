"""What each batch of a collection is given, and which rows of which arrays its vectors fill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reftlab.address import All, Joined, PerRow, Position, Prompt, Union
from reftlab.collecting.rows import ReadyBatches, TokenRows
from reftlab.errors import DataError, PositionError, RunError
from reftlab.graph import BASE, Read
from reftlab.graph.nodes import replace_read
from reftlab.runtime.bind import bind_reads
from reftlab.runtime.places import BoundRead
from reftlab.runtime.reading import Reading, placed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reftlab.runtime import BoundModel

__all__ = ["ReadyJob", "Taken", "TokenJob", "Wanted", "wanted_reads"]

Taken = tuple[str, Tensor, Tensor]
"""The name of an array, rows of it, and what goes there."""


@dataclass(frozen=True, eq=False)
class Wanted:
    """What is collected.

    Attributes:
        nodes: the reads as the caller wrote them.
        bound: each place that they name; several for a path such as `blocks[*].output`.
        index: for each of those the name of the array that says which tokens its vectors are; places
            of the same positions share one.
        asked: the reads that the model is given. Positions that differ between rows of one length are
            read at all tokens, and chosen by the example's own number.
    """

    nodes: tuple[Read, ...]
    bound: tuple[BoundRead, ...]
    index: tuple[str, ...]
    asked: tuple[Read, ...]

    @property
    def vectors(self) -> tuple[str, ...]:
        """For each place the name of the array of its vectors."""
        return tuple(f"vectors-{number:03}" for number in range(len(self.bound)))


def wanted_reads(
    reft: BoundModel, sites: Sequence[str | Read], positions: Any, example: Any, *, ready: bool
) -> Wanted:
    """Resolve what is to be collected.

    Args:
        reft: the model.
        sites: as for `collect`; the graph's own reads in the base run where there are none.
        positions: for those that name none.
        example: inputs for the shape-only pass, or None.
        ready: whether the batches are the caller's own.

    Raises:
        AddressError: a site that the model does not have.
        RunError: nothing is wanted, a name twice, or a read in another run.
        DataError: vectors that have no fixed width, or positions of examples in ready batches.
    """
    chosen = sites or [node for node in reft.graph if isinstance(node, Read)]
    nodes = tuple(dict.fromkeys(placed(site, positions) for site in chosen))
    if not nodes:
        raise RunError(
            "nothing to collect: name sites, as in rl.collect(model, texts, 'blocks[5].output @ last')"
        )
    for node in nodes:
        if node.run != BASE:
            raise RunError(f"{node!r}: only the base run is collected; put the source's own inputs into data")
    bound = bind_reads(list(nodes), reft.model, example)
    labels = [read.label for read in bound]
    for read in bound:
        if labels.count(read.label) > 1:
            raise RunError(f"several reads are called {read.label!r}; give them names, Read(..., name='a')")
        _check(read, ready)
    names: dict[Any, str] = {}
    for read in bound:
        names.setdefault(_tokens_of(read), f"index-{len(names):03}")
    asked = tuple(
        replace_read(node, name=f"read{number}", positions=_asked(node, ready))
        for number, node in enumerate(nodes)
    )
    return Wanted(nodes, bound, tuple(names[_tokens_of(read)] for read in bound), asked)


class TokenJob:
    """Rows of token ids in batches by length; every vector's place is known beforehand.

    Args:
        wanted: what is collected.
        rows: the examples.
        tokenizer: for positions that look at text.
        batches: the numbers of each batch's examples, ascending.
        pad_id: the token id to pad with.

    Raises:
        PositionError: an example does not have a position; the message names it by number.
        DataError: a read chooses no token at all.
    """

    def __init__(
        self,
        wanted: Wanted,
        rows: TokenRows,
        tokenizer: PreTrainedTokenizerBase | None,
        batches: list[list[int]],
        pad_id: int,
    ) -> None:
        self.wanted, self.rows, self.batches, self._pad_id = wanted, rows, batches, pad_id
        self._chosen: dict[str, _Chosen] = {}
        for read, name in zip(wanted.bound, wanted.index, strict=True):
            if name not in self._chosen:
                self._chosen[name] = _chosen(read, rows, tokenizer)
            if not len(self._chosen[name].index):
                raise DataError(
                    f"{read.label!r} chooses no token of any example"
                    + ("; no example has an answer that the model takes" if read.phase == "decode" else "")
                )
        self.counts = {name: len(chosen.index) for name, chosen in self._chosen.items()}
        self.counts |= {
            name: self.counts[index] for name, index in zip(wanted.vectors, wanted.index, strict=True)
        }

    def __len__(self) -> int:
        return len(self.rows)

    def numbers(self, batch: int) -> list[int]:
        """The numbers of a batch's examples."""
        return self.batches[batch]

    def inputs(self, batch: int) -> dict[str, Any]:
        """What the model is given."""
        return self.rows.inputs(self.batches[batch], self._pad_id)

    def indices(self) -> Iterator[Taken]:
        """What is known before anything runs: which tokens the vectors are."""
        for name, chosen in self._chosen.items():
            yield name, torch.arange(len(chosen.index)), chosen.index

    def take(self, batch: int, reading: Reading) -> Iterator[Taken]:
        """The vectors of a batch and their rows."""
        lengths = torch.tensor([self.rows.prompts[number] for number in self.batches[batch]])
        numbers = torch.tensor(self.batches[batch])
        starts = lengths.cumsum(0) - lengths
        for name, index, bound, label in zip(
            self.wanted.vectors, self.wanted.index, self.wanted.bound, reading, strict=True
        ):
            chosen, vectors = self._chosen[index], reading.flat(label).vectors
            rows = _ranges(chosen.starts[numbers], chosen.counts[numbers])
            if not bound.positions.by_length and bound.place.stream == "tokens":
                joins = bound.positions.joins
                tokens = chosen.tokens[
                    _ranges(chosen.starts[numbers] * joins, chosen.counts[numbers] * joins)
                ]
                picked = tokens + starts.repeat_interleave(chosen.counts[numbers] * joins)
                vectors = vectors[picked.to(vectors.device)].reshape(len(rows), joins * vectors.shape[1])
            if len(vectors) != len(rows):
                raise RunError(
                    f"{bound.label!r}: {len(vectors)} vectors came for {len(rows)} tokens of the examples "
                    f"{numbers.tolist()[:8]}; give batches that are ready, as for reft.read"
                )
            yield name, rows, vectors


class ReadyJob:
    """Batches as the caller gave them, whose vectors follow one another.

    Args:
        wanted: what is collected.
        data: the batches.
        counts: how many rows each array has already.
    """

    def __init__(self, wanted: Wanted, data: ReadyBatches, counts: dict[str, int]) -> None:
        self.wanted, self.data = wanted, data
        self.counts = {name: counts.get(name, 0) for name in (*wanted.vectors, *wanted.index)}

    @property
    def batches(self) -> list[dict[str, Any]]:
        return self.data.batches

    def __len__(self) -> int:
        return len(self.data)

    def numbers(self, batch: int) -> list[int]:
        """The numbers of a batch's examples."""
        return list(range(*self.data.starts[batch : batch + 2]))

    def inputs(self, batch: int) -> dict[str, Any]:
        """What the model is given."""
        return dict(self.data.batches[batch])

    def indices(self) -> Iterator[Taken]:
        """Nothing is known before the batches run."""
        return iter(())

    def take(self, batch: int, reading: Reading) -> Iterator[Taken]:
        """The vectors of a batch and their rows, and which tokens they are."""
        inputs, before = self.data.batches[batch], dict(self.counts)
        if reading.rows != len(self.numbers(batch)):
            raise RunError(
                f"batch {batch} seems to have {len(self.numbers(batch))} rows by its tensors, and its sites "
                f"have {reading.rows}; leave out inputs whose first axis is no row"
            )
        for name, index, bound, label in zip(
            self.wanted.vectors, self.wanted.index, self.wanted.bound, reading, strict=True
        ):
            read = reading.flat(label)
            rows = before[name] + torch.arange(len(read.vectors))
            self.counts[name] = before[name] + len(rows)
            yield name, rows, read.vectors
            if self.counts[index] == before[index]:
                examples = read.rows + self.data.starts[batch]
                ids = _ids(inputs, bound.place.stream, read.rows, read.positions)
                self.counts[index] = before[index] + len(rows)
                yield index, rows, torch.stack([examples, read.positions, ids], 1)


@dataclass(frozen=True, eq=False)
class _Chosen:
    """The tokens of all examples that one position chooses.

    Attributes:
        counts, starts: how many vectors each example has, and the row of the first, `(example,)`.
        tokens: number of each token in its prompt, `(n · joins,)`.
        index: `(n, 3)`, example, token and token id; of joined tokens the first.
    """

    counts: Tensor
    starts: Tensor
    tokens: Tensor
    index: Tensor


def _chosen(read: BoundRead, rows: TokenRows, tokenizer: PreTrainedTokenizerBase | None) -> _Chosen:
    position, joins = read.positions, read.positions.joins
    by_shape: dict[tuple[int, int], Tensor] = {}
    found: list[Tensor] = []
    try:
        _check_rows(position, len(rows))
        for number, (one, length) in enumerate(zip(rows.encoded, rows.prompts, strict=True)):
            shape = length, len(one) - length
            if read.place.stream == "row":
                found.append(torch.zeros(1, dtype=torch.long))
            elif not position.by_length or shape not in by_shape:
                found.append(_select(position, read.phase, shape, Prompt(
                    length, one.input_ids[:length], tokenizer, number)))  # fmt: skip
                by_shape[shape] = found[-1]
            else:
                found.append(by_shape[shape])
    except PositionError as error:
        message = str(error).replace("row ", "example ", 1)
        raise PositionError(f"read {read.label!r}: {message}") from error
    sizes = torch.tensor([len(tokens) for tokens in found])
    counts, tokens = sizes // joins, torch.cat(found)
    examples = torch.arange(len(rows)).repeat_interleave(sizes)
    ids = torch.full_like(tokens, -1)
    if read.place.stream != "row":
        lengths = torch.tensor([len(one) for one in rows.encoded])
        flat = torch.tensor([token for one in rows.encoded for token in one.input_ids])
        ids = flat[(lengths.cumsum(0) - lengths)[examples] + tokens]
    index = torch.stack([examples, tokens, ids], 1)[::joins].contiguous()
    return _Chosen(counts, counts.cumsum(0) - counts, tokens, index)


def _check_rows(position: Position, examples: int) -> None:
    try:
        position.check_rows(examples)
    except PositionError as error:
        raise PositionError(
            f"{str(position)!r:.60} is not written for {examples} examples; give a list for each of them"
        ) from error


def _select(position: Position, phase: str, shape: tuple[int, int], prompt: Prompt) -> Tensor:
    if phase == "decode":
        return position.select_generated(shape[1]) + shape[0]
    return position.select(prompt)


def _tokens_of(read: BoundRead) -> Any:
    shared = read.place.stream in ("tokens", "decoder", "row")
    return read.positions, read.phase, read.place.stream, None if shared else read.label


def _asked(node: Read, ready: bool) -> Position:
    positions = node.positions or All()
    return positions if ready or positions.by_length else All()


def _check(read: BoundRead, ready: bool) -> None:
    if read.place.site_width is None:
        raise DataError(
            f"{read.label!r}: a row of attention is as long as its prompt, so that the vectors of different "
            "examples make no tensor; read it batch by batch, reft.read(...)"
        )
    if not ready and read.place.stream not in ("tokens", "row"):
        raise DataError(
            f"{read.label!r} has other tokens than those of the texts (of {read.place.stream!r}); give "
            "batches that are ready, mappings of the model's inputs"
        )
    if ready and _per_row(read.positions):
        raise DataError(
            f"{read.label!r}: positions of each example go with texts or rows of token ids, not with batches "
            "that are ready; read them batch by batch, reft.read(...)"
        )


def _per_row(position: Position) -> bool:
    if isinstance(position, Union):
        return any(_per_row(term) for term in position.terms)
    return isinstance(position, PerRow) or (isinstance(position, Joined) and _per_row(position.inner))


def _ranges(starts: Tensor, counts: Tensor) -> Tensor:
    """The numbers of several ranges, one after the other."""
    total = int(counts.sum())
    before = counts.cumsum(0) - counts
    return torch.arange(total) + (starts - before).repeat_interleave(counts)


def _ids(inputs: dict[str, Any], stream: str, rows: Tensor, numbers: Tensor) -> Tensor:
    """Token ids of tokens that are counted among the real ones of their rows."""
    prefix = {"tokens": "", "decoder": "decoder_"}.get(stream)
    ids = None if prefix is None else inputs.get(f"{prefix}input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return torch.full_like(numbers, -1)
    ids, mask = ids.cpu(), inputs.get(f"{prefix}attention_mask")
    real = torch.ones_like(ids) if not isinstance(mask, Tensor) else (mask.cpu() != 0).long()
    # A stable sort brings each row's real columns to its front, in their order.
    columns = (1 - real).argsort(dim=1, stable=True)
    found: Tensor = ids[rows, columns[rows, numbers]]
    return found
