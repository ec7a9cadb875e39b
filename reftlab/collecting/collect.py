"""`collect`: the vectors of a whole data set, in passes that stop at the deepest site."""

from __future__ import annotations

import contextlib
import inspect
import re
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from reftlab.collecting.activations import Activations, SiteVectors
from reftlab.collecting.arrays import Files, Memory, Shape
from reftlab.collecting.jobs import ReadyJob, TokenJob, Wanted, wanted_reads
from reftlab.collecting.rows import ReadyBatches, TokenRows, by_length, read_data
from reftlab.collecting.settings import dtype_of, settings_of, tasks_of
from reftlab.errors import BindError, DataError, PositionError, RunError
from reftlab.graph import InterventionGraph, Read
from reftlab.runtime import BoundModel
from reftlab.runtime.calls import continues_texts
from reftlab.runtime.modes import evaluating
from reftlab.runtime.scan import example_inputs, moved
from reftlab.runtime.sizes import parse_bytes
from reftlab.runtime.wrapped import entrances
from reftlab.training.collate import OF_EDITS, Collator
from reftlab.training.replies import PromptForm, prompt_form
from reftlab.training.settings import whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["collect"]


def collect(
    model: BoundModel | nn.Module,
    data: Any,
    *sites: str | Read | Sequence[str | Read],
    positions: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 64,
    batch_tokens: int = 4096,
    folder: str | Path | None = None,
    budget: int | str = "1GB",
    resume: bool = True,
    chat: bool | None = None,
    system: str | None = None,
    dtype: torch.dtype | str | None = None,
    tasks: str | Sequence[str | None] | None = None,
    select: str | Sequence[str] | None = None,
    progress: bool = True,
) -> Activations:
    """Collect the vectors at sites and positions over a data set.

    Examples of like length share a batch, every forward pass stops at the deepest site, and the vectors
    come back in the order of the examples. With `folder`, or where they take more than `budget`, they
    are written to memory-mapped files batch by batch, and only one batch's are in memory.

    Args:
        model: a bound model, whose edits are in force, or any model.
        data: texts; (prompt, answer) pairs, `Example`s or a table, as `rl.read_examples` takes them;
            rows of token ids; a tokenizer's output; or a list of batches that are ready, mappings of
            the model's inputs as tensors, which are taken as they are. Answers are left out unless
            positions are among them, such as `generated(0:)`: what stands in a prompt does not depend
            on them.
        *sites: as for `BoundModel.read`, `"blocks[5].output"`, `"blocks[*].output @ last"` or `Read`
            objects, or lists of these; without any, the graph's own reads. They may differ in depth and
            positions, and the results have the names that `BoundModel.read` gives them.
        positions: positions for those that name none, `all` unless given. Positions of each row,
            `rows([3], [4, 5], …)`, are those of each example.
        tokenizer: for texts, and for positions that look at text; a bound model's own unless given.
        batch_size: rows in one batch at most.
        batch_tokens: tokens in one batch at most, padding included; a longer example is alone.
        folder: where the vectors go. A collection that was interrupted there goes on.
        budget: from how many bytes on the vectors go to a temporary folder where none is given:
            a whole number, or a text such as `"500 MB"` or `"2 GiB"`.
        resume: whether to go on with, or return, what is in the folder; otherwise that is an error.
        chat, system: as for `rl.reply`: whether texts go through the tokenizer's chat template.
        dtype: in which dtype the vectors are kept; that of the site unless given.
        tasks: which tasks' edits act, one text for all, or one entry for each example.
        select: the edits that act, by name; all unless given.
        progress: whether to show a progress bar.

    Returns:
        `Activations`: by read a tensor `(n, width)`, with the example, token and token id of each vector.

    Raises:
        AddressError: a site that the model does not have.
        DataError: the data are empty or cannot be used, an argument has the wrong form, or the folder
            holds something else or a collection with other data, model, edits or settings.
        PositionError: an example does not have a position; the message names it by number.
        ArtifactError: the folder's files are damaged.

    >>> found = rl.collect(model, texts, "blocks[5].output @ last", tokenizer=tokenizer)  # doctest: +SKIP
    >>> X = found["blocks[5].output @ last"].numpy()        # (text, width)        # doctest: +SKIP
    >>> LogisticRegression().fit(X, labels)                                        # doctest: +SKIP
    """
    limit, kept_as = parse_bytes("budget", budget), dtype_of(dtype)
    batch_size, batch_tokens = whole("batch_size", batch_size, 1), whole("batch_tokens", batch_tokens, 1)
    if folder is not None and (not isinstance(folder, str | Path) or not str(folder).strip()):
        raise DataError(f"folder={folder!r}: expected the path of a folder")
    if not isinstance(model, nn.Module):
        raise DataError(f"collect takes a bound model or a torch module, not {type(model).__name__}")
    tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    form: PromptForm = {"chat": bool(chat), "system": system}
    if tokenizer is not None:
        form = prompt_form(model, tokenizer, chat, system)
    source = _of_bare(read_data(data, tokenizer, form), model)
    if (chat or system is not None) and not (isinstance(source, TokenRows) and source.texts):
        raise DataError("chat= and system= are for texts, and data are token ids or batches; leave them out")
    reft, example = _bound(model, tokenizer, source)
    listed = [one for site in sites for one in (site if isinstance(site, list | tuple) else (site,))]
    if sites and not listed:
        raise DataError("sites=[]: expected sites such as 'blocks[5].output @ last', one or more")
    wanted = wanted_reads(reft, listed, positions, example, ready=isinstance(source, ReadyBatches))
    if isinstance(source, TokenRows) and not _reads_answers(reft, wanted):
        source = source.without_answers()
    work = _Work(reft, wanted, source, tokenizer, tasks_of(tasks, source), select, kept_as, progress)
    batching = {"batch_size": batch_size, "batch_tokens": batch_tokens}
    settings = settings_of(
        reft, wanted.nodes, source, form, select=select, tasks=work.tasks, dtype=kept_as,
        **(batching if isinstance(source, TokenRows) else {}),
    )  # fmt: skip
    home, files, finished = None if folder is None else Path(folder).expanduser(), None, False
    if home is not None:
        files, finished = Files.at(home, settings, resume)
        if finished:
            return Activations.open(home)
    job = work.job(batch_size, batch_tokens, {} if files is None else files.rows)
    return _run(work, job, files, limit, settings)


@dataclass(frozen=True, eq=False)
class _Work:
    """What is collected from what, in which form."""

    reft: BoundModel
    wanted: Wanted
    source: TokenRows | ReadyBatches
    tokenizer: PreTrainedTokenizerBase | None
    tasks: str | tuple[str | None, ...] | None
    select: str | Sequence[str] | None
    dtype: torch.dtype | None
    progress: bool

    def job(self, rows: int, tokens: int, counts: dict[str, int]) -> TokenJob | ReadyJob:
        """The batches."""
        if isinstance(self.source, ReadyBatches):
            return ReadyJob(self.wanted, self.source, counts)
        lengths = [len(one) for one in self.source.encoded]
        # A model that is told of no padding must be given none.
        groups = by_length(lengths, rows, tokens, equal="attention_mask" not in self.takes)
        if self.tokenizer is not None:
            pad = Collator.of(self.tokenizer).pad_id
        else:
            known = getattr(getattr(self.reft.model, "config", None), "pad_token_id", None)
            pad = known if isinstance(known, int) else 0
        return TokenJob(self.wanted, self.source, self.tokenizer, groups, pad)

    @cached_property
    def takes(self) -> frozenset[str]:
        """Names of the inputs that the model takes."""
        found: set[str] = set()
        for module in entrances(self.reft.model):
            found |= set(inspect.signature(module.forward).parameters)
        return frozenset(found)

    def read(self, job: TokenJob | ReadyJob, batch: int) -> Any:
        """Run one batch as far as the deepest site."""
        numbers, inputs, takes = job.numbers(batch), job.inputs(batch), self.takes
        if isinstance(job, TokenJob):
            taken = {*takes, *OF_EDITS} if self.reads_labels else {*takes, *OF_EDITS} - {"labels"}
            inputs = {name: value for name, value in inputs.items() if name in taken}
            if "use_cache" in takes:
                inputs["use_cache"] = False
        if self.tasks is not None:
            one = isinstance(self.tasks, str)
            inputs["tasks"] = self.tasks if one else [self.tasks[number] for number in numbers]
        try:
            return self.reft.read(*self.wanted.asked, select=self.select, **moved(inputs, self.reft.device))
        except (PositionError, RunError) as error:
            raise type(error)(_by_example(str(error), numbers)) from error

    def kept(self, values: torch.Tensor) -> torch.Tensor:
        """Vectors as they are kept."""
        found = values.to("cpu", self.dtype)
        if found.dtype == torch.float16 and bool((found.isinf() & values.cpu().isfinite()).any()):
            raise RunError(
                f"dtype='float16' is too narrow: a number of {float(values.abs().max()):.3g} is there, and "
                "float16 ends at 65504; take 'bfloat16' or 'float32'"
            )
        return found

    @property
    def reads_labels(self) -> bool:
        return _reads_answers(self.reft, self.wanted)


def _run(
    work: _Work, job: TokenJob | ReadyJob, files: Files | None, limit: int, settings: dict[str, Any]
) -> Activations:
    """Run the batches that are left, and hand over what they gave."""
    store: Memory | Files = Memory() if files is None else files
    start, opened = 0 if files is None else files.done, False
    done = sum(len(job.numbers(batch)) for batch in range(start))
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(work.reft))
        stack.enter_context(torch.no_grad())
        bar = stack.enter_context(
            tqdm(total=len(job), initial=done, desc="collect", unit="example", disable=not work.progress)
        )
        undo = stack.enter_context(contextlib.ExitStack())
        if isinstance(store, Files):
            undo.callback(store.keep)
        for batch in range(start, len(job.batches)):
            taken = [
                (name, rows, values if name in work.wanted.index else work.kept(values))
                for name, rows, values in job.take(batch, work.read(job, batch))
            ]
            if not opened:
                shapes = _shapes(job, taken)
                if isinstance(store, Memory) and _bytes(shapes) > limit:
                    store = _temporary(settings, undo)
                store.open(shapes)
                for name, rows, values in job.indices():
                    store.write(name, rows, values)
                opened = True
            for name, rows, values in taken:
                store.write(name, rows, values)
            if isinstance(store, Memory) and store.size(job.counts) > limit:
                store = _spilled(store, _temporary(settings, undo), job.counts)
            if isinstance(store, Files):
                store.note(batch + 1, job.counts)
            bar.update(len(job.numbers(batch)))
        if isinstance(store, Files) and not opened:
            store.open(store.shapes)
        result = _result(work.wanted, job, store)
        undo.pop_all()
    return result


def _result(wanted: Wanted, job: TokenJob | ReadyJob, store: Memory | Files) -> Activations:
    names = [
        (read.label, vectors, index)
        for read, vectors, index in zip(wanted.bound, wanted.vectors, wanted.index, strict=True)
    ]
    if isinstance(store, Memory):
        arrays = store.cut(job.counts)
        return Activations(
            {label: SiteVectors(arrays[vectors], arrays[index]) for label, vectors, index in names}, len(job)
        )
    reads = {label: [vectors, index] for label, vectors, index in names}
    store.finish(job.counts, {"examples": len(job), "reads": reads})
    result = Activations.open(store.folder)
    if not store.lasting:
        result = replace(result, temporary=True)
        weakref.finalize(result, shutil.rmtree, store.folder, ignore_errors=True)
    return result


def _shapes(
    job: TokenJob | ReadyJob, taken: list[tuple[str, torch.Tensor, torch.Tensor]]
) -> dict[str, Shape]:
    """What the arrays hold, by what the first batch gave."""
    known = job.counts if isinstance(job, TokenJob) else {}
    written = [*taken, *job.indices()]
    return {name: Shape(known.get(name, 0), values.shape[1], values.dtype) for name, _, values in written}


def _bytes(shapes: Mapping[str, Shape]) -> int:
    return sum(shape.rows * shape.row_bytes for shape in shapes.values())


def _temporary(settings: dict[str, Any], undo: contextlib.ExitStack) -> Files:
    """Files in a folder that goes with an error."""
    folder = Path(tempfile.mkdtemp(prefix="reftlab-activations-"))
    undo.callback(shutil.rmtree, folder, ignore_errors=True)
    files = Files(folder, settings, lasting=False)
    undo.callback(files.close)
    return files


def _spilled(memory: Memory, files: Files, rows: Mapping[str, int]) -> Files:
    """The same arrays in files."""
    files.open({name: Shape(0, array.shape[1], array.dtype) for name, array in memory.arrays.items()})
    for name, array in memory.arrays.items():
        files.write(name, torch.arange(rows[name]), array[: rows[name]])
    return files


def _bound(
    model: BoundModel | nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    source: TokenRows | ReadyBatches,
) -> tuple[BoundModel, Any]:
    """The model with its edits or none, and inputs for a shape-only pass where they are needed."""
    example: Any = model._example if isinstance(model, BoundModel) else None
    try:
        example_inputs(model.model if isinstance(model, BoundModel) else model, example)
    except BindError:
        if isinstance(source, ReadyBatches):
            example = {name: value for name, value in source.batches[0].items() if name not in OF_EDITS}
        else:
            example = {"input_ids": torch.zeros(2, 11, dtype=torch.long)}
    if isinstance(model, BoundModel):
        return model, example
    return InterventionGraph().bind(model, tokenizer, example=example), example


def _reads_answers(reft: BoundModel, wanted: Wanted) -> bool:
    return continues_texts(reft.model) and any(read.phase == "decode" for read in wanted.bound)


def _of_bare(source: TokenRows | ReadyBatches, model: nn.Module) -> TokenRows | ReadyBatches:
    """The data without what they say of edits, where there are none."""
    if isinstance(source, ReadyBatches):
        return source
    if not isinstance(model, BoundModel):
        plain = [replace(one, task=None, sources=None, positions=None) for one in source.encoded]
        return replace(source, encoded=plain)
    if source.encoded[0].positions is not None:
        raise DataError(
            "the examples have positions for edits, which a reading pass does not take; leave them out, or "
            "take reft.model to collect without edits"
        )
    return source


def _by_example(message: str, numbers: list[int]) -> str:
    """A message about a row of a batch, with the example's number."""

    def named(found: re.Match[str]) -> str:
        row = int(found[1])
        return f"example {numbers[row]}" if row < len(numbers) else found[0]

    return re.sub(r"\brow (\d+)\b", named, message)
