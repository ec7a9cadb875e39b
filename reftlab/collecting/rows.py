"""Data as rows of token ids, batched by length; or batches that are ready, taken as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from reftlab.errors import DataError
from reftlab.runtime.window import IGNORED_LABEL
from reftlab.training.collate import Collator
from reftlab.training.columns import PROMPT_NAMES
from reftlab.training.data import Encoded, encode, table_rows
from reftlab.training.files import is_data_file, read_examples
from reftlab.training.hub import dataset_rows, is_dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reftlab.training.replies import PromptForm

__all__ = ["ReadyBatches", "TokenRows", "by_length", "read_data"]

_OF_TOKENS = {"input_ids", "attention_mask", "token_type_ids"}
_MESSAGES = {"messages", "conversations", "conversation"}


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Examples as token ids.

    Attributes:
        encoded: one for each example.
        prompts: how many of its tokens are the prompt, before an answer.
        texts: whether texts were tokenised, so that the form of prompts matters.
    """

    encoded: list[Encoded]
    prompts: list[int]
    texts: bool

    def __len__(self) -> int:
        return len(self.encoded)

    @classmethod
    def of(cls, encoded: Sequence[Encoded], texts: bool) -> TokenRows:
        prompts = [_prompt_length(one) for one in encoded]
        empty = [number for number, length in enumerate(prompts) if length == 0]
        if empty:
            raise DataError(f"example {empty[0]} has no prompt tokens")
        return cls(list(encoded), prompts, texts)

    def without_answers(self) -> TokenRows:
        """The prompts alone."""
        cut = [
            replace(one, input_ids=one.input_ids[:length], labels=one.labels[:length])
            for one, length in zip(self.encoded, self.prompts, strict=True)
        ]
        return replace(self, encoded=cut)

    def inputs(self, numbers: Sequence[int], pad_id: int) -> dict[str, Any]:
        """A batch of some examples, padded on the right, where padding changes no token's place."""
        batch = Collator(pad_id, "right")([self.encoded[number] for number in numbers])
        return {name: value for name, value in batch.items() if name != "position_ids"}

    def digest(self) -> str:
        """A short hash of all tokens, tasks and sources."""
        found = hashlib.sha256()
        for one in self.encoded:
            for ids in (one.input_ids, one.labels, *(one.sources or {}).values()):
                found.update(np.array([len(ids), *ids], dtype=np.int64).tobytes())
            found.update(repr((one.task, list(one.sources or {}))).encode())
        return found.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class ReadyBatches:
    """Inputs of forward passes, taken as they are and one after the other.

    Attributes:
        batches: arguments of the model by name.
        starts: the number of the first example of each, and of all at the end.
    """

    batches: list[dict[str, Any]]
    starts: list[int]

    def __len__(self) -> int:
        return self.starts[-1]

    @classmethod
    def of(cls, batches: Sequence[Any]) -> ReadyBatches:
        starts = [0]
        for number, batch in enumerate(batches):
            if not isinstance(batch, Mapping):
                raise DataError(f"batch {number}: expected inputs by name as before it, not {batch!r:.80}")
            sizes = [value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.dim()]
            # Some inputs are the same for all rows, such as position ids.
            if not any(sizes):
                raise DataError(f"batch {number} holds no tensor with rows; it has {sorted(batch)}")
            starts.append(starts[-1] + max(sizes))
        return cls([dict(batch) for batch in batches], starts)

    def digest(self) -> str:
        """A short hash of all inputs."""
        found = hashlib.sha256()
        for batch in self.batches:
            _hash(batch, found)
        return found.hexdigest()[:16]


def read_data(
    data: Any, tokenizer: PreTrainedTokenizerBase | None, form: PromptForm
) -> TokenRows | ReadyBatches:
    """Read what `collect` was given.

    Args:
        data: see `collect`.
        tokenizer: for texts.
        form: how prompts become texts.

    Raises:
        DataError: it is empty, or an entry is nothing that can be read; named by number.
    """
    if isinstance(data, Mapping) and not is_dataset(data):
        return _of_mapping(data)
    if isinstance(data, str) and not is_data_file(data):
        raise DataError(f"data={data!r:.80}: expected a list of texts, [text], or a file that holds one")
    if not isinstance(data, Iterable) and not hasattr(data, "to_dict") and not hasattr(data, "__fspath__"):
        raise DataError(f"data must be texts, pairs, examples or batches, not {type(data).__name__}")
    is_file = isinstance(data, str) or hasattr(data, "__fspath__")
    entries: Any = data if is_file else list(dataset_rows(data) if is_dataset(data) else table_rows(data))
    if not is_file and not entries:
        raise DataError("data holds no examples")
    first = None if is_file else entries[0]
    if isinstance(first, Mapping) and any(isinstance(value, Tensor) and value.dim() > 1
                                          for value in first.values()):  # fmt: skip
        return ReadyBatches.of(entries)
    if isinstance(first, Encoded | Tensor) or _is_numbers(first) or _has_ids(first):
        return TokenRows.of([_row(entry, number) for number, entry in enumerate(entries)], texts=False)
    if tokenizer is None:
        raise DataError(
            "data are texts, and there is no tokenizer: give tokenizer=, or bind with one, "
            "graph.bind(model, tokenizer)"
        )
    column = "text" if isinstance(first, Mapping) and _has_only_text(first) else None
    return TokenRows.of(encode(tokenizer, read_examples(entries, prompt=column), **form), texts=True)


def by_length(lengths: Sequence[int], rows: int, tokens: int, equal: bool = False) -> list[list[int]]:
    """Group examples of like length, the longest first, so that padding is small.

    Args:
        lengths: of each example, in tokens.
        rows: most examples in one batch.
        tokens: most tokens in one batch, padding included; a longer example is alone.
        equal: whether only examples of one length stand together, so that nothing is padded.

    Returns:
        The numbers of each batch's examples, ascending.

    >>> by_length([3, 9, 4, 8], rows=2, tokens=100)
    [[1, 3], [0, 2]]
    """
    groups: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        group = groups[-1] if groups else []
        longest = lengths[group[0]] if group else 0
        full = len(group) >= rows or longest * (len(group) + 1) > tokens
        if not group or full or (equal and lengths[number] != longest):
            groups.append([])
        groups[-1].append(number)
    return [sorted(group) for group in groups]


def _of_mapping(data: Mapping[str, Any]) -> TokenRows | ReadyBatches:
    """A tokenizer's output for all examples, which is taken apart, or one batch of any other kind."""
    ids, mask, kinds = (data.get(name) for name in ("input_ids", "attention_mask", "token_type_ids"))
    plain = data.keys() <= _OF_TOKENS and (kinds is None or not any(_flat(row) for row in kinds))
    if ids is None or not plain:
        return ReadyBatches.of([data])
    if len(ids) == 0:
        raise DataError("data holds no examples")
    masks = [None] * len(ids) if mask is None else mask
    rows = [{"input_ids": row, "attention_mask": real} for row, real in zip(ids, masks, strict=True)]
    return TokenRows.of([_row(row, number) for number, row in enumerate(rows)], texts=False)


def _prompt_length(one: Encoded) -> int:
    if one.labels.count(IGNORED_LABEL) == len(one):
        return len(one)
    return next(number for number, label in enumerate(one.labels) if label != IGNORED_LABEL)


def _row(entry: Any, number: int) -> Encoded:
    """Token ids as an example."""
    if isinstance(entry, Encoded):
        return entry
    found, mask = entry, None
    if isinstance(entry, Mapping):
        found, mask = entry.get("input_ids"), entry.get("attention_mask")
    if (isinstance(found, Tensor) and found.dim() == 1 and not found.is_floating_point()) or _is_numbers(
        found
    ):
        ids = [int(one) for one in found]
        if mask is not None:
            ids = [one for one, real in zip(ids, mask, strict=True) if int(real)]
        return Encoded(tuple(ids), (IGNORED_LABEL,) * len(ids))
    raise DataError(
        f"example {number}: expected token ids as before it, a list of whole numbers, not {entry!r:.80}"
    )


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(type(one) is int for one in value)


def _has_ids(entry: Any) -> bool:
    return isinstance(entry, Mapping) and "input_ids" in entry


def _has_only_text(entry: Mapping[str, Any]) -> bool:
    return "text" in entry and not (set(PROMPT_NAMES) | _MESSAGES) & set(entry)


def _flat(row: Any) -> list[int]:
    """The numbers of a row that are not 0."""
    return [int(one) for one in row if int(one)]


def _hash(value: Any, found: Any) -> None:
    if isinstance(value, Tensor):
        found.update(repr((tuple(value.shape), value.dtype)).encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for name in sorted(value):
            found.update(repr(name).encode())
            _hash(value[name], found)
    else:
        found.update(repr(value).encode())
