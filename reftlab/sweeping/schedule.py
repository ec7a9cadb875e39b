"""Which cells share a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Batch", "Job", "packed", "rows_at_once", "schedule"]

_BLOCK_CALL = {"cpu": 40}
"""What calling a block costs besides its tokens, in tokens: reading its weights, and Python."""
_BLOCK_CALL_ELSEWHERE = 4000
_TOKENS = {"cpu": 4096}
"""How many tokens a batch has unless its rows are given: more makes no pass cheaper per token."""
_TOKENS_ELSEWHERE = 65536


@dataclass(frozen=True)
class Job:
    """What is to be computed for one cell.

    Attributes:
        cell: its number.
        start: the first token that it changes.
        entry: the first block that it changes.
        rows: how many runs it takes.
    """

    cell: int
    start: int
    entry: int
    rows: int = 1


@dataclass(frozen=True)
class Batch:
    """Cells that are computed together, from token `start` on."""

    start: int
    jobs: tuple[Job, ...]


def schedule(
    jobs: Sequence[Job], tokens: int, blocks: int, device: str = "cpu", batch_size: int | None = None
) -> list[Batch]:
    """Group cells into batches so that the whole takes the least time.

    A batch runs all its rows from its first token on. Cells of neighbouring tokens go together where
    the tokens that are then computed for nothing cost less than calling every block once more.

    Args:
        jobs: the cells.
        tokens: how many tokens the prompt has.
        blocks: how many blocks the model has.
        device: the model's, `cpu` or another.
        batch_size: the most rows of a batch; chosen from the number of tokens unless given.
    """
    if not jobs:
        return []
    call = _BLOCK_CALL.get(device, _BLOCK_CALL_ELSEWHERE)
    starts = sorted({job.start for job in jobs})
    groups = [[job for job in jobs if job.start == start] for start in starts]
    batches = []
    for begin, end in _partition(groups, tokens, blocks, call):
        together = sorted((job for group in groups[begin:end] for job in group), key=lambda job: job.entry)
        room = batch_size or rows_at_once(device, tokens - starts[begin])
        batches += _chunks(together, starts[begin], room)
    return batches


def packed(
    jobs: Sequence[Job], tokens: int, device: str = "cpu", batch_size: int | None = None
) -> list[Batch]:
    """Group cells whose rows have only their own tokens, those of later tokens first.

    Args:
        jobs, tokens, device, batch_size: as for `schedule`.
    """
    sizes = [job.rows * (tokens - job.start) for job in jobs]
    limit = _TOKENS.get(device, _TOKENS_ELSEWHERE)
    share = sum(sizes) / max(1, -(-sum(sizes) // limit))
    batches: list[Batch] = []
    own: list[Job] = []
    done = 0
    for job in sorted(jobs, key=lambda job: (-job.start, job.entry)):
        full = batch_size is not None and sum(other.rows for other in own) + job.rows > batch_size
        if own and (full or done >= share * (len(batches) + 1)):
            batches.append(Batch(own[-1].start, tuple(own)))
            own = []
        own.append(job)
        done += job.rows * (tokens - job.start)
    return [*batches, Batch(own[-1].start, tuple(own))] if own else []


def rows_at_once(device: str, tokens: int) -> int:
    """How many rows of so many tokens a batch has unless its rows are given."""
    return max(1, _TOKENS.get(device, _TOKENS_ELSEWHERE) // max(1, tokens))


def _partition(groups: list[list[Job]], tokens: int, blocks: int, call: int) -> list[tuple[int, int]]:
    """The cheapest way to cut the groups, which are in the order of their tokens, into runs of neighbours."""
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(groups) + 1):
        options, work, first = [], 0, blocks
        for begin in range(end - 1, -1, -1):
            work += sum(job.rows * (blocks - job.entry) for job in groups[begin])
            first = min(first, *(job.entry for job in groups[begin]))
            cost = work * (tokens - groups[begin][0].start) + (blocks - first) * call
            options.append((best[begin][0] + cost, begin))
        best.append(min(options))
    cuts, end = [], len(groups)
    while end:
        begin = best[end][1]
        cuts.append((begin, end))
        end = begin
    return cuts[::-1]


def _chunks(jobs: list[Job], start: int, room: int) -> list[Batch]:
    """Jobs in the order in which they enter, at most `room` rows together, though never less than one job."""
    count = sum(job.rows for job in jobs)
    # Of equal size, so that the last is not a small one that calls every block for little.
    size = -(-count // -(-count // room))
    batches: list[Batch] = []
    own: list[Job] = []
    for job in jobs:
        if own and sum(other.rows for other in own) + job.rows > size:
            batches.append(Batch(start, tuple(own)))
            own = []
        own.append(job)
    return [*batches, Batch(start, tuple(own))]
