"""Batches hold every cell once, begin where their first cell does, and cost no more than the obvious ones."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from reftlab.sweeping.schedule import Job, schedule

JOBS = st.lists(
    st.tuples(st.integers(0, 11), st.integers(0, 6), st.integers(1, 3)), min_size=1, max_size=40
).map(lambda given: [Job(number, *one) for number, one in enumerate(given)])


def cost(batches, tokens, blocks, call):
    """Tokens computed by all blocks, and `call` for each block that is called."""
    total = 0
    for batch in batches:
        for block in range(blocks):
            rows = sum(job.rows for job in batch.jobs if job.entry <= block)
            total += rows * (tokens - batch.start) + (call if rows else 0)
    return total


@given(JOBS, st.one_of(st.none(), st.integers(1, 9)))
def test_every_cell_is_in_one_batch_that_begins_no_later_than_it(jobs, size):
    batches = schedule(jobs, 12, 6, batch_size=size)
    assert sorted(job.cell for batch in batches for job in batch.jobs) == [job.cell for job in jobs]
    for batch in batches:
        assert batch.start <= min(job.start for job in batch.jobs)
        entries = [job.entry for job in batch.jobs]
        assert entries == sorted(entries)
        rows = [job.rows for job in batch.jobs]
        assert size is None or sum(rows) <= max(size, *rows)


@given(JOBS)
def test_no_other_way_to_join_neighbouring_tokens_is_cheaper(jobs):
    jobs = [job for job in jobs if job.start in (2, 5, 6, 9, 11)]
    starts = sorted({job.start for job in jobs})
    found = cost(schedule(jobs, 12, 6, batch_size=10**6), 12, 6, 40)
    for joined in product([False, True], repeat=max(0, len(starts) - 1)):
        groups = [starts[:1]]
        for start, together in zip(starts[1:], joined, strict=True):
            if together:
                groups[-1].append(start)
            else:
                groups.append([start])
        batches = [b for g in groups for b in schedule_as_one(jobs, g)]
        assert found <= cost(batches, 12, 6, 40)


def schedule_as_one(jobs, starts):
    from reftlab.sweeping.schedule import Batch

    own = tuple(job for job in jobs if job.start in starts)
    return [Batch(starts[0], own)] if own else []


def test_late_tokens_share_a_batch_and_early_ones_do_not():
    jobs = [Job(30 * token + entry, token, entry) for token in range(100) for entry in range(30)]
    batches = schedule(jobs, 100, 30, batch_size=10**6)
    sizes = {batch.start: len({job.start for job in batch.jobs}) for batch in batches}
    assert sizes[0] <= 4
    assert max(sizes.values()) >= 2
    assert schedule([], 5, 3) == []
